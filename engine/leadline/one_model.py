"""Depths of one PyTorch model in one process, in memory: no Ray, no files."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from leadline.depth import depth_from_votes, is_unsettled
from leadline.embedding import fit_directions, forward_pass
from leadline.embedding.in_place import DECODED, EMBEDDED, embed_in_place, probe_groups
from leadline.embedding.reductions import (
    Choice,
    check_patterns,
    checked_choice,
    choose_reductions,
    make_reducers,
)
from leadline.errors import LeadlineError
from leadline.knn import Devices, Votes, devices_of, knn_votes, usable_method
from leadline.knn.on_device import free_memory
from leadline.members.probes import place_probes
from leadline.points.kept import Batch, KeptBatches
from leadline.store.schemas import vote_columns

Array = np.ndarray[Any, np.dtype[Any]]
FIT_BYTES = 4 << 30  # that a fit of principal directions may take
PRECISIONS = ("float32", "bfloat16")
EMPTY = "the data set is empty; give at least one point"


def prediction_depth(
    model: torch.nn.Module, bank: Any, queries: Any = None, *, probes: str | Sequence[str] = "auto", k: int = 30,
    method: str = "exact", batch_size: int = 256, device: Devices | None = None, reduction: Choice = "none",
    precision: str = "float32",
) -> pa.Table:  # fmt: skip
    """Prediction depth of each query under one model (definition: `leadline.depth_from_votes`).

    bank, queries: map-style data sets of (input tensor or array, integer label); bank is what the model was trained on.
    queries=None: the bank itself, each point left out of its own neighbours. probes: "auto", "paper" (for the
    architectures that Leadline brings) or module names, with wildcards; the input and the softmax are always probes.
    device: where the model and the searches run, by default where the model's parameters lie, and where embeddings are
    kept, (bank + queries) x the sum of the stored widths x 4 bytes. A GPU takes as many probes at a time as its memory
    allows, and runs the points through the model once for each such group. Of a list of GPUs the first has the model
    and the embeddings, and all of them share the searches, as in `leadline.knn_votes`.
    precision: of the forward pass, "float32" or "bfloat16" (autocast), which changes the embeddings. In bfloat16 on a
    GPU convolutions give tensors that lie channels-last, which a model may `reshape` or `flatten`, but not `view`.
    reduction: what is stored of the embeddings: "none", "pca:M" (fitted to the bank), "jl:M" or "pool:HxW" for all but
    the input and the softmax, or these by probe name, with wildcards; wider layers are measured in full by default.
    method: as in `leadline.knn_votes`, at every probe.

    Returns one row a query: point_id int64 (its place in the data set), label int32, in_training bool, prediction
    int32, confidence, margin, entropy float32, depth int16, unsettled bool, and the votes winner, winner_votes,
    runner_up, runner_up_votes, fixed-size lists of int32 over the probes, whose names and reductions are in the
    schema's metadata under "probes" and "reductions", one a line, and the precision under "precision".

    Raises LeadlineError for empty or unreadable data sets, labels out of range, values that are not finite, fewer than
    k bank points to choose from, reductions that are unknown or do not fit the probes, devices that are not here, and a
    method that is not known or whose package or GPU is missing.
    """
    if batch_size < 1:
        raise LeadlineError(f"batch_size: {batch_size}; give at least 1")
    if precision not in PRECISIONS:
        raise LeadlineError(f"precision: {precision!r}; allowed: {', '.join(PRECISIONS)}")
    usable_method(method)  # before the work of embedding, not after it
    if device is None:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    devices = devices_of(device)
    first = devices[0]
    model = model.to(first)
    example = _read(bank, np.zeros(1, np.int64), "bank", first)[0]
    with forward_pass(model, example.device, precision):  # what fails in it is told here
        placed = place_probes(model, probes, example)
    check_patterns(checked_choice(reduction), [probe.name for probe in placed])
    placed = choose_reductions(reduction, placed)
    directions = fit_directions(
        model, placed, lambda ids: _read(bank, ids, "bank", first)[0], np.arange(len(bank)), seed=0,
        batch_size=batch_size, memory=FIT_BYTES, member="bank", precision=precision,
    )  # fmt: skip
    reducers = make_reducers(placed, directions)
    given = {"bank": bank} | ({"queries": queries} if queries is not None else {})
    sets = [_Points(points, name, first, batch_size) for name, points in given.items()]
    exclude = np.arange(len(bank)) if queries is None else None
    votes: list[Votes] = []
    for group in probe_groups(placed, sum(len(points) for points in sets), _room(first)):
        embedded = [
            embed_in_place(model, placed, reducers, group, points.batches, len(points), points.name, precision)
            for points in sets
        ]
        bank_labels, (labels, outputs) = sets[0].labels, (sets[-1].labels, embedded[-1][1])
        for _ in group:
            # Each probe's embeddings are gone before the next one's search.
            rows, asked = embedded[0][0].pop(0), embedded[-1][0].pop(0) if queries is not None else None
            points = rows if asked is None else asked
            votes.append(knn_votes(rows, bank_labels, points, k=k, exclude=exclude, method=method, device=devices))
            del rows, asked, points
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
    about = {"probes": names, "reductions": reductions, "precision": precision}
    return pa.table(columns).replace_schema_metadata(about)


class _Points:
    """A data set of (input, label) in batches, whose inputs stay on a GPU as far as a tenth of its free memory goes.

    `labels` are read by the way.
    """

    def __init__(self, points: Any, name: str, device: torch.device, batch_size: int) -> None:
        if not len(points):
            raise LeadlineError(f"{name}: {EMPTY}")
        self._points, self.name, self._device = points, name, device
        self.labels = np.empty(len(points), np.int64)
        ids = [np.arange(i, min(i + batch_size, len(self))) for i in range(0, len(self), batch_size)]
        self.batches = KeptBatches(ids, self._batches, DECODED * free_memory(device) if device.type == "cuda" else 0)

    def __len__(self) -> int:
        return len(self.labels)

    def _batches(self, batches: Iterable[Array]) -> Iterator[Batch]:
        for ids in batches:
            inputs, self.labels[ids] = _read(self._points, ids, self.name, self._device)
            yield ids, inputs


def _room(device: torch.device) -> float:
    """Bytes for the embeddings that are kept together; in main memory all of them are."""
    return EMBEDDED * free_memory(device) if device.type == "cuda" else math.inf


def _read(points: Any, ids: Array, name: str, device: Any) -> tuple[torch.Tensor, list[int]]:
    """Inputs of some points of a data set, [B, ...] on the device, and their labels."""
    items = [_item(points, int(i), name) for i in ids]
    return _inputs([value for value, _ in items], name, ids).to(device), [label for _, label in items]


def _item(points: Any, place: int, name: str) -> tuple[torch.Tensor, int]:
    """One (input, label) of a data set."""
    if place >= len(points):
        raise LeadlineError(f"{name}: {EMPTY}")
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
