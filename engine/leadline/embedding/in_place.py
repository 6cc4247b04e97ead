"""Embeddings that stay where the network runs: of all points, at as many probes at a time as there is room for."""

from collections.abc import Iterable, Sequence
from dataclasses import fields

import numpy as np
import torch

from leadline.embedding.extract import embed_resident
from leadline.embedding.outputs import Array, Outputs
from leadline.embedding.reductions import Reducer, stored_width
from leadline.members.probes import Probe

EMBEDDED = 0.3  # of the memory that there is, for embeddings that are kept together: their search takes of the rest
DECODED = 0.1  # of a GPU's, for inputs that every pass would read again


def probe_groups(probes: Sequence[Probe], n_points: int, room: float) -> list[list[int]]:
    """Indexes of probes whose embeddings of so many points are kept together, in order; room: bytes for them.

    One at least, whatever the room.
    """
    groups: list[list[int]] = []
    left = 0.0
    for probe in probes:
        needed = 4 * n_points * stored_width(probe)
        if not groups or needed > left:
            groups.append([])
            left = room
        groups[-1].append(probe.index)
        left -= needed
    return groups


def embed_in_place(
    model: torch.nn.Module, probes: Sequence[Probe], reducers: Sequence[Reducer], group: Sequence[int],
    batches: Iterable[tuple[Array, torch.Tensor]], n_points: int, name: str, precision: str = "float32",
) -> tuple[list[torch.Tensor], dict[str, Array]]:  # fmt: skip
    """Embeddings at the probes of a group, float32 [N, stored width] each, on the device; and the outputs, [N] each.

    batches: the ids of its points, which follow one another, and their inputs on the model's device. Raises
    LeadlineError as `embed_batch` does.
    """
    # The input and the softmax belong to every forward pass.
    passed = [probe for probe in probes if probe.index in group or probe.place is None]
    wanted = [i for i, probe in enumerate(passed) if probe.index in group]
    kept: list[torch.Tensor] = []
    parts: list[Outputs] = []
    for ids, inputs in batches:
        first = int(ids[0])
        some, outputs = embed_resident(
            model, passed, inputs, first, name, [reducers[probe.index] for probe in passed], precision
        )
        kept = kept or [torch.empty((n_points, some[i].shape[1]), device=inputs.device) for i in wanted]
        for rows, i in zip(kept, wanted, strict=True):
            rows[first : first + len(inputs)] = some[i]
        parts.append(outputs)
    names = [field.name for field in fields(Outputs)]
    return kept, {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
