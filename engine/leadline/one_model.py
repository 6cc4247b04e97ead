"""Depths of one PyTorch model in one process, in memory: no Ray, no files."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from leadline.depth import depth_from_votes, is_unsettled
from leadline.embedding import embed_batch, fit_directions
from leadline.embedding.reductions import (
    Choice,
    Reducer,
    check_patterns,
    checked_choice,
    choose_reductions,
    make_reducers,
    stored_width,
)
from leadline.errors import LeadlineError
from leadline.knn import knn_votes, usable_method
from leadline.members.probes import Probe, place_probes
from leadline.store.schemas import OUTPUT_FIELDS, vote_columns

Array = np.ndarray[Any, np.dtype[Any]]
FIT_BYTES = 4 << 30  # that a fit of principal directions may take


def prediction_depth(
    model: torch.nn.Module, bank: Any, queries: Any = None, *, probes: str | Sequence[str] = "auto", k: int = 30,
    method: str = "exact", batch_size: int = 256, device: str | torch.device | None = None, reduction: Choice = "none",
) -> pa.Table:  # fmt: skip
    """Prediction depth of each query under one model (definition: `leadline.depth_from_votes`).

    bank, queries: map-style data sets of (input tensor or array, integer label); bank is what the model was trained on.
    queries=None: the bank itself, each point left out of its own neighbours. probes: "auto", "paper" (for the
    architectures that Leadline brings) or module names, with wildcards; the input and the softmax are always probes.
    device: where the model and the products run, by default where the model's parameters lie; embeddings are kept in
    main memory, (bank + queries) x the sum of the stored widths x 4 bytes.
    reduction: what is stored of the embeddings: "none", "pca:M" (fitted to the bank), "jl:M" or "pool:HxW" for all but
    the input and the softmax, or these by probe name, with wildcards; wider layers are measured in full by default.
    method: as in `leadline.knn_votes`, at every probe.

    Returns one row a query: point_id int64 (its place in the data set), label int32, in_training bool, prediction
    int32, confidence, margin, entropy float32, depth int16, unsettled bool, and the votes winner, winner_votes,
    runner_up, runner_up_votes, fixed-size lists of int32 over the probes, whose names and reductions are in the
    schema's metadata under "probes" and "reductions", one a line.

    Raises LeadlineError for empty or unreadable data sets, labels out of range, values that are not finite, fewer than
    k bank points to choose from, reductions that are unknown or do not fit the probes, and a method that is not known
    or whose package or GPU is missing.
    """
    if batch_size < 1:
        raise LeadlineError(f"batch_size: {batch_size}; give at least 1")
    usable_method(method)  # before the work of embedding, not after it
    if device is None:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    model = model.to(device)
    example = _read(bank, np.zeros(1, np.int64), "bank", device)[0]
    placed = place_probes(model, probes, example)
    check_patterns(checked_choice(reduction), [probe.name for probe in placed])
    placed = choose_reductions(reduction, placed)
    directions = fit_directions(
        model, placed, lambda ids: _read(bank, ids, "bank", device)[0], np.arange(len(bank)), seed=0,
        batch_size=batch_size, memory=FIT_BYTES, member="bank",
    )  # fmt: skip
    reducers = make_reducers(placed, directions)
    bank_embeddings, bank_labels, bank_outputs = _embed(model, placed, reducers, bank, "bank", batch_size, device)
    if queries is None:
        embeddings, labels, outputs, exclude = bank_embeddings, bank_labels, bank_outputs, np.arange(len(bank_labels))
    else:
        embeddings, labels, outputs = _embed(model, placed, reducers, queries, "queries", batch_size, device)
        exclude = None
    votes = [
        knn_votes(rows, bank_labels, asked, k=k, exclude=exclude, method=method, device=device)
        for rows, asked in zip(bank_embeddings, embeddings, strict=True)
    ]
    depths = depth_from_votes(np.stack([vote.winner for vote in votes], axis=1), outputs["prediction"])
    columns = {
        "point_id": pa.array(np.arange(len(labels))),
        "label": pa.array(labels, pa.int32()),
        "in_training": pa.array(np.full(len(labels), queries is None)),
        **{name: pa.array(values) for name, values in outputs.items()},
        "depth": pa.array(depths),
        "unsettled": pa.array(is_unsettled(depths, len(placed))),
        **vote_columns(votes),
    }
    names, reductions = ("\n".join(lines) for lines in zip(*((p.name, p.reduction) for p in placed), strict=True))
    return pa.table(columns).replace_schema_metadata({"probes": names, "reductions": reductions})


def _embed(
    model: torch.nn.Module, probes: Sequence[Probe], reducers: Sequence[Reducer], points: Any, name: str,
    batch_size: int, device: Any,
) -> tuple[list[Array], Array, dict[str, Array]]:  # fmt: skip
    """Embeddings of a data set, [N, stored width] a probe; its labels int64 [N]; its outputs [N] by column."""
    labels = np.empty(len(points), np.int64)
    embeddings = [np.empty((len(points), stored_width(probe)), np.float32) for probe in probes]
    parts = []
    for first in range(0, len(points), batch_size):
        ids = np.arange(first, min(first + batch_size, len(points)))
        inputs, labels[ids] = _read(points, ids, name, device)
        batch = embed_batch(model, probes, inputs, first, name, reducers)
        for kept, values in zip(embeddings, batch.embeddings, strict=True):
            kept[ids] = values
        parts.append(batch.outputs)
    outputs = {field: np.concatenate([getattr(part, field) for part in parts]) for field in OUTPUT_FIELDS}
    return embeddings, labels, outputs


def _read(points: Any, ids: Array, name: str, device: Any) -> tuple[torch.Tensor, list[int]]:
    """Inputs of some points of a data set, [B, ...] on the device, and their labels."""
    items = [_item(points, int(i), name) for i in ids]
    return _inputs([value for value, _ in items], name, ids).to(device), [label for _, label in items]


def _item(points: Any, place: int, name: str) -> tuple[torch.Tensor, int]:
    """One (input, label) of a data set."""
    if place >= len(points):
        raise LeadlineError(f"{name}: the data set is empty; give at least one point")
    item = points[place]
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise LeadlineError(f"{name}: item {place} is {type(item).__name__}; give data sets of (input, label)")
    value, label = item
    try:
        return torch.as_tensor(np.asarray(value) if not isinstance(value, torch.Tensor) else value), int(label)
    except (TypeError, ValueError):
        raise LeadlineError(
            f"{name}: item {place} is ({type(value).__name__}, {label!r}); give (tensor or array, integer label)"
        ) from None


def _inputs(values: Sequence[torch.Tensor], name: str, ids: Array) -> torch.Tensor:
    for i, value in enumerate(values):
        if value.shape != values[0].shape:
            raise LeadlineError(
                f"{name}: input {ids[i]} has shape {tuple(value.shape)}, input {ids[0]} {tuple(values[0].shape)}; "
                "transform them to one shape"
            )
    stacked = torch.stack(list(values))
    return stacked if stacked.is_floating_point() else stacked.float()
