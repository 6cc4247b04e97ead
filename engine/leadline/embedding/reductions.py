"""Reductions: fewer values for a wide embedding, made where the network runs, so that it never leaves there in full."""

import difflib
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from leadline.embedding.principal import Directions
from leadline.embedding.signs import project
from leadline.errors import LeadlineError
from leadline.members.probes import ENDS, Probe, matches

ALLOWED = "allowed: none, pca:M, jl:M, pool:HxW, with numbers of one to nine digits, from 1"

Choice = str | Mapping[str, str]  # a reduction for the layers of a network, or one for each name or pattern
Reducer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Reduction:
    """What is stored of an embedding. kind: none, pca, jl or pool; size: (), (M,), (M,) or (height, width)."""

    kind: str
    size: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.size))}" if self.size else self.kind

    def stored_width(self, shape: Sequence[int]) -> int:
        """Values that are stored of an embedding of this shape."""
        if self.kind == "none":
            return math.prod(shape)
        return shape[0] * math.prod(self.size) if self.kind == "pool" else self.size[0]

    def narrows(self, shape: Sequence[int]) -> bool:
        """Whether fewer values are stored than there are, and an image would not be pooled to more pixels."""
        grows = self.kind == "pool" and any(new > old for new, old in zip(self.size, shape[1:], strict=True))
        return not grows and self.stored_width(shape) < math.prod(shape)


NONE = Reduction("none")


def parse_reduction(text: str) -> Reduction:
    """The Reduction that is written none, pca:256, jl:1024 or pool:2x2. Raises LeadlineError for anything else."""
    number = "([1-9][0-9]{0,8})"
    found = re.fullmatch(f"none|(pca|jl):{number}|pool:{number}x{number}", text, re.ASCII)
    if found is None:
        raise LeadlineError(f"{text!r} is no reduction; {ALLOWED}")
    size = tuple(int(group) for group in found.groups()[1:] if group)
    return Reduction(text.partition(":")[0], size)


def checked_choice(value: object) -> Choice:
    """The same value. Raises LeadlineError where it is neither a reduction nor a mapping of text to reductions."""
    if isinstance(value, str):
        parse_reduction(value)
        return value
    if not isinstance(value, Mapping):
        raise LeadlineError(f"{value!r} is neither a reduction nor a mapping of probes' names to them; {ALLOWED}")
    for pattern, text in value.items():
        if not isinstance(pattern, str) or not isinstance(text, str):
            raise LeadlineError(f"{pattern!r}: {text!r} is not a probe's name with a reduction; {ALLOWED}")
        try:
            parse_reduction(text)
        except LeadlineError as error:
            raise LeadlineError(f"{pattern}: {error}") from None
    return value


def check_patterns(choice: Choice, names: Collection[str]) -> None:
    """Raises LeadlineError where a key of a choice is the name of no probe and matches none. names: all probes'."""
    for pattern in () if isinstance(choice, str) else choice:
        if pattern not in names and not any(matches(name, pattern) for name in names if name not in ENDS):
            close = difflib.get_close_matches(pattern, names, n=4, cutoff=0.4) or list(names)[:4]
            raise LeadlineError(
                f"reduction: {pattern} matches no probe (the input and the softmax go by their own names); "
                f"there are {', '.join(close)}"
            )


def choose_reductions(choice: Choice, probes: Sequence[Probe]) -> tuple[Probe, ...]:
    """The same probes, each with the reduction that is chosen for it.

    choice: one reduction, which leaves out the input and the softmax, or reductions by the probes' names, with the
    wildcards of `place_probes`; a name counts before a wildcard, and the input and the softmax go by name alone. A
    probe that is not wider than what would be stored keeps "none", as does one that has no image's three dimensions
    where a pool is not chosen for its very name.
    Raises LeadlineError for a pool by name where there is no image, and for wildcards that contradict each other.
    """
    return tuple(replace(probe, reduction=str(_reduction(choice, probe))) for probe in probes)


def _reduction(choice: Choice, probe: Probe) -> Reduction:
    by_name = not isinstance(choice, str) and probe.name in choice
    reduction = parse_reduction(_asked(choice, probe))
    if reduction.kind == "pool" and len(probe.shape) != 3:
        if by_name:
            raise LeadlineError(
                f"reduction: {probe.name} has values of shape {probe.shape}, and {reduction} takes channels, height "
                "and width; use pca or jl"
            )
        return NONE
    return reduction if reduction.narrows(probe.shape) else NONE


def _asked(choice: Choice, probe: Probe) -> str:
    if not isinstance(choice, str) and probe.name in choice:
        return choice[probe.name]
    if probe.place is None:
        return "none"
    if isinstance(choice, str):
        return choice
    asked = {pattern: reduction for pattern, reduction in choice.items() if matches(probe.name, pattern)}
    if len(set(asked.values())) > 1:
        raise LeadlineError(f"reduction: {' and '.join(asked)} contradict each other at {probe.name}; give it by name")
    return next(iter(asked.values()), "none")


def stored_width(probe: Probe) -> int:
    """Values that are stored of a point's embedding at a probe."""
    return parse_reduction(probe.reduction).stored_width(probe.shape)


def make_reducers(probes: Sequence[Probe], directions: Mapping[int, Directions]) -> list[Reducer]:
    """For each probe a function of embeddings, float32 [B, width], to what is stored, float32 [B, stored width].

    directions: for the probes, by index, that are reduced by pca, on the device of the embeddings.
    """
    return [_reducer(probe, directions.get(probe.index)) for probe in probes]


def _reducer(probe: Probe, directions: Directions | None) -> Reducer:
    reduction = parse_reduction(probe.reduction)
    if directions is not None:
        return lambda rows: (rows - directions.mean) @ directions.matrix
    if reduction.kind == "jl":
        return lambda rows: project(rows, reduction.size[0])
    if reduction.kind == "pool":
        height, width = reduction.size
        return lambda rows: F.adaptive_avg_pool2d(rows.view(-1, *probe.shape), (height, width)).flatten(1)
    return lambda rows: rows
