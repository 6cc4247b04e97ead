"""Points to embeddings: batches through networks, in eval mode."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from leadline.embedding.outputs import Array, Outputs, summarise_logits
from leadline.embedding.principal import Directions, principal_directions, search_bytes
from leadline.embedding.reductions import Reducer, make_reducers, parse_reduction
from leadline.errors import LeadlineError
from leadline.full_precision import full_precision
from leadline.members.probes import Probe, read_logits, read_probes

SAMPLE = 4096  # points that principal directions are fitted to, or SAMPLE_OF_EACH for each direction where that is more
SAMPLE_OF_EACH = 4
SAMPLE_SEED = 1


@dataclass(frozen=True)
class Embedded:
    """A batch of B points in one member: embeddings, float32 [B, stored width] a probe, and what its logits say."""

    embeddings: list[Array]
    outputs: Outputs


def embed_batch(
    model: torch.nn.Module, probes: Sequence[Probe], inputs: torch.Tensor, first_point: int, member: str,
    reducers: Sequence[Reducer] | None = None, precision: str = "float32",
) -> Embedded:  # fmt: skip
    """Run one batch (inputs [B, ...], on the model's device) and bring its embeddings to the CPU.

    reducers: of `make_reducers`, applied on the device; None brings the embeddings in full. precision: "bfloat16" runs
    the network in it, and rounds its embeddings so; they come as float32 nevertheless.
    Raises LeadlineError that names the member, the probe and the point where an embedding or a logit is not finite;
    first_point is the id of the batch's first point.
    """
    embeddings, outputs = embed_resident(model, probes, inputs, first_point, member, reducers, precision)
    return Embedded([values.cpu().numpy() for values in embeddings], outputs)


def embed_resident(
    model: torch.nn.Module, probes: Sequence[Probe], inputs: torch.Tensor, first_point: int, member: str,
    reducers: Sequence[Reducer] | None = None, precision: str = "float32",
) -> tuple[list[torch.Tensor], Outputs]:  # fmt: skip
    """As `embed_batch`, but its embeddings stay on the device."""
    with forward_pass(model, inputs.device, precision):
        embeddings, logits = read_probes(model, probes, inputs)
    with full_precision():
        embeddings = [values.float() for values in embeddings]
        if reducers is not None:
            embeddings = [reduce(values) for reduce, values in zip(reducers, embeddings, strict=True)]
    # The logits come first in the list: a softmax that is not finite is their doing.
    named = [("logits", logits), *zip((p.name for p in probes), embeddings, strict=True)]
    # One look at all of them: each look waits for the device.
    if not torch.stack([values.isfinite().all() for _, values in named]).all():
        ids = np.arange(first_point, first_point + len(inputs))
        for name, values in named:
            _check_finite(values.isfinite().all(dim=1).cpu().numpy(), ids, name, member)
    return embeddings, summarise_logits(logits.float().cpu().numpy())


def batch_logits(
    model: torch.nn.Module, inputs: torch.Tensor, first_point: int, member: str, precision: str = "float32"
) -> Array:
    """The logits of one batch, float32 [B, C], of which `embed_batch` tells: with the same arguments the same bits.

    Raises LeadlineError as it does.
    """
    with forward_pass(model, inputs.device, precision):
        logits = read_logits(model, inputs).cpu().numpy()
    ids = np.arange(first_point, first_point + len(inputs))
    _check_finite(np.isfinite(logits).all(axis=1), ids, "logits", member)
    return np.asarray(logits)


def embed_input(probe: Probe, inputs: torch.Tensor, first_point: int) -> Array:
    """The embedding of a batch (inputs [B, ...]) at the input probe, float32 [B, stored width]: of every member alike.

    Raises LeadlineError that names the point where it is not finite.
    """
    (reduce,) = make_reducers([probe], {})
    with full_precision():
        values = reduce(inputs.flatten(1).to(torch.float32)).cpu().numpy()
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        raise LeadlineError(f"probe input: not finite at point {first_point + int(np.argmin(finite))}; mend that input")
    return np.asarray(values)


def _check_finite(finite: Array, ids: Array, name: str, member: str) -> None:
    """finite: bool [B], of the points with these ids."""
    if not finite.all():
        point = ids[np.flatnonzero(~finite)[0]]
        raise LeadlineError(
            f"member {member}, probe {name}: not finite at point {point}; its weights or that input are broken"
        )


def fit_directions(
    model: torch.nn.Module, probes: Sequence[Probe], read: Callable[[Array], torch.Tensor], ids: Array, *, seed: int,
    batch_size: int, memory: int, member: str, precision: str = "float32",
) -> dict[int, Directions]:  # fmt: skip
    """Principal directions of the embeddings at every probe that is reduced by pca, by the probe's index.

    They are fitted to a sample of the points `ids`, int64 [n], drawn by `seed`: 4096 of them, or four for each
    direction where that is more, or all. read: the inputs of points by id, [B, ...] on the model's device. The sample
    runs through the network again and again and is never held; probes are fitted together as far as `memory` bytes
    allow, one at a time at least. The result depends on batch_size in its rounding, on memory not at all. precision:
    that in which the embeddings are made that will be reduced.
    Raises LeadlineError where there are not more points than directions, and where an embedding is not finite.
    """
    sizes = {probe.index: parse_reduction(probe.reduction).size[0] for probe in probes if _is_principal(probe)}
    if not sizes:
        return {}
    largest = max(sizes.values())
    if len(ids) <= largest:
        raise LeadlineError(
            f"member {member}: pca:{largest} is fitted to more points than it has directions, there are {len(ids)}; "
            "lower it, or use jl or pool"
        )
    wanted = min(len(ids), max(SAMPLE, SAMPLE_OF_EACH * largest))
    sample = np.sort(np.random.default_rng((seed, SAMPLE_SEED)).choice(ids, wanted, replace=False))
    directions: dict[int, Directions] = {}
    for group in _groups([probe for probe in probes if probe.index in sizes], sizes, memory):
        stream = partial(_stream, model, probes, group, read, sample, batch_size, member, precision)
        with full_precision():
            found = principal_directions(stream, [sizes[index] for index in group])
        directions.update(zip(group, found, strict=True))
    return directions


def _is_principal(probe: Probe) -> bool:
    return parse_reduction(probe.reduction).kind == "pca"


def _groups(probes: Sequence[Probe], sizes: Mapping[int, int], memory: int) -> list[list[int]]:
    """Indexes of probes, in runs whose searches fit the memory together; one that does not fit it is alone."""
    groups: list[list[int]] = []
    taken = 0
    for probe in probes:
        needed = search_bytes(probe.width, sizes[probe.index])
        if not groups or taken + needed > memory:
            groups.append([])
            taken = 0
        groups[-1].append(probe.index)
        taken += needed
    return groups


def _stream(
    model: torch.nn.Module, probes: Sequence[Probe], group: Sequence[int], read: Callable[[Array], torch.Tensor],
    sample: Array, batch_size: int, member: str, precision: str,
) -> Iterator[list[torch.Tensor]]:  # fmt: skip
    """One pass: the embeddings of the sample at the probes of a group, batch by batch."""
    # The input and the softmax belong to every forward pass.
    passed = [probe for probe in probes if probe.index in group or probe.place is None]
    for first in range(0, len(sample), batch_size):
        ids = sample[first : first + batch_size]
        inputs = read(ids)
        with forward_pass(model, inputs.device, precision):
            embeddings, _ = read_probes(model, passed, inputs)
        asked = [(p.name, values) for p, values in zip(passed, embeddings, strict=True) if p.index in group]
        for name, values in asked:
            _check_finite(values.isfinite().all(dim=1).cpu().numpy(), ids, name, member)
        yield [values for _, values in asked]


@contextmanager
def forward_pass(model: torch.nn.Module, device: torch.device, precision: str) -> Iterator[None]:
    """How a model runs wherever its embeddings or logits are read: in full float32, or in bfloat16 by autocast."""
    rounds = precision == "bfloat16"
    # Convolutions in bfloat16 are faster so; in float32 it would change the bits for nothing.
    layout = channels_last(model) if rounds and device.type == "cuda" else nullcontext()
    with full_precision(), torch.autocast(device.type, torch.bfloat16, enabled=rounds), layout:
        yield


@contextmanager
def channels_last(model: torch.nn.Module) -> Iterator[None]:
    """A model's weights of four dimensions lie channels-last for a while; what its convolutions give lies so too.

    They do not ask how their inputs lie. The weights come back where they were: a training may have them in a CUDA
    graph.
    """
    weights = [parameter for parameter in model.parameters() if parameter.dim() == 4]
    before = [weight.data for weight in weights]
    try:
        for weight in weights:
            weight.data = weight.data.to(memory_format=torch.channels_last)
        yield
    finally:
        for weight, data in zip(weights, before, strict=True):
            weight.data = data
