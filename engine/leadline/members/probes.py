"""Where a member is read, and reading it there."""

import difflib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from leadline.errors import LeadlineError, one_line

ENDS = ("input", "softmax")
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Probe:
    """A named place in a member.

    index: 0 is the input, the last is the softmax. width: values of a point's embedding, and shape: theirs before it is
    flattened. place: the module whose output is read, None for the input and the softmax.
    reduction: what is stored of the embedding, as `embedding.reductions` names it.
    """

    index: int
    name: str
    width: int
    place: str | None
    shape: tuple[int, ...]
    reduction: str = "none"


def place_probes(model: nn.Module, probes: str | Sequence[str] | None, example: Tensor) -> tuple[Probe, ...]:
    """The probes of a model in the order of its forward pass, with widths from a real forward pass of `example`.

    probes: "paper", the places of the source paper (mlp, resnet18 and vgg16 only); "auto", the top-level blocks; None,
    "paper" where the model has it, else "auto"; or names of modules, in which the wildcards * ? [] stand for characters
    other than a dot: `layer*.*` is every block of torchvision's ResNets, and nothing inside a block. A wildcard passes
    over modules that a forward pass calls never or several times. "input" and "softmax" are always there.
    The top-level blocks are the model's direct children that hold parameters, are called exactly once and do not return
    the logits themselves; an nn.Sequential, ModuleList or ModuleDict among them gives its children instead, and so does
    a module that holds all of the model's parameters in one child. (A vision transformer of torchvision's keeps its
    blocks deeper than that: name them, `encoder.layers.*`.)
    example: [1 or 2, *input_shape], on the model's device.

    Raises LeadlineError for names that match nothing or cannot be read, for a model without paper's probes, and where
    the model fails on the example or does not return logits [B, C], C >= 2. The model's mode is restored.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    try:
        records, output = _forward(model, modules, example)
    except Exception as error:  # a user's model may raise anything
        raise LeadlineError(
            f"probes: the model fails on inputs of shape {tuple(example.shape[1:])} ({one_line(error)}); "
            "give a model and points that fit each other"
        ) from error
    logits = _checked_logits(output, len(example))
    calls = Counter(name for name, _ in records)
    outputs = dict(records)
    if probes is None:
        probes = "paper" if hasattr(model, "paper_probes") else "auto"
    if probes == "paper":
        chosen = _paper_places(model)
    elif probes == "auto":
        chosen = {name for name in _block_names(model) if calls[name] == 1 and not _same(outputs[name], logits)}
    elif isinstance(probes, str):
        raise LeadlineError(f"probes: {probes!r} is neither paper nor auto; give a list for names of modules")
    else:
        chosen = _named_places(probes, list(modules), calls)
    places = [name for name in outputs if name in chosen]  # in the order of the calls
    shapes = [_shape(name, outputs[name], len(example)) for name in places]
    ends = [("input", None, tuple(example.shape[1:])), ("softmax", None, tuple(logits.shape[1:]))]
    named = [ends[0], *zip(places, places, shapes, strict=True), ends[1]]
    return tuple(Probe(index, name, math.prod(shape), place, shape) for index, (name, place, shape) in enumerate(named))


def read_probes(model: nn.Module, probes: Sequence[Probe], inputs: Tensor) -> tuple[list[Tensor], Tensor]:
    """One forward pass in eval mode: the embeddings of a batch at each probe, and its logits.

    inputs: [B, *input_shape] on the model's device. Returns the embeddings, float32 [B, width] each, the input first
    and the softmax last, and the logits, float32 [B, C], all on the model's device and without gradients; the input's
    embedding may share the memory of `inputs`. Hooks are removed and the model's mode restored, also after an error.
    Raises LeadlineError where the model's output or a module's is not what `place_probes` found.
    """
    places = [probe.place for probe in probes if probe.place is not None]
    records, output = _forward(model, places, inputs)
    logits = _checked_logits(output, len(inputs))
    calls = Counter(name for name, _ in records)
    for place in places:
        if calls[place] != 1:
            raise LeadlineError(f"probes: a forward pass called module {place} {calls[place]} times; read another")
    outputs = {name: _rows(name, tensor, len(inputs)) for name, tensor in records}
    first, last = inputs.flatten(1).to(torch.float32), torch.softmax(logits, dim=1)
    embeddings = [first, *(outputs[place] for place in places), last]
    for probe, embedding in zip(probes, embeddings, strict=True):
        if embedding.shape[1] != probe.width:
            raise LeadlineError(
                f"probes: {probe.name} is {embedding.shape[1]} wide, not {probe.width} as when it was placed; "
                "inputs of one shape are needed"
            )
    return embeddings, logits


def read_logits(model: nn.Module, inputs: Tensor) -> Tensor:
    """The logits of one forward pass in eval mode, float32 [B, C], the same as `read_probes` gives."""
    _, output = _forward(model, [], inputs)
    return _checked_logits(output, len(inputs))


def read_probe(model: nn.Module, probe: Probe, inputs: Tensor) -> Tensor:
    """The embeddings of a batch at one probe, float32 [B, width], the same as `read_probes` gives.

    The forward pass ends at the probe: what comes after it is not computed, and the model's output not checked.
    """
    if probe.index == 0:
        return inputs.flatten(1).to(torch.float32)
    if probe.place is None:
        return torch.softmax(read_logits(model, inputs), dim=1)
    reached: list[Tensor | None] = []

    def end(module: nn.Module, args: Any, output: Any) -> None:
        reached.append(_copy(output))
        raise _Reached

    with model.get_submodule(probe.place).register_forward_hook(end), suppress(_Reached):
        _forward(model, [], inputs)
    return _rows(probe.place, reached[0] if reached else None, len(inputs))


class _Reached(Exception):  # noqa: N818 - not an error
    """A forward pass has come to the module that is read."""


def _forward(model: nn.Module, names: Iterable[str], inputs: Tensor) -> tuple[list[tuple[str, Tensor | None]], Any]:
    """The named modules' outputs, (name, float32 copy or None) in the order of the calls; and the model's output."""
    records: list[tuple[str, Tensor | None]] = []

    def hook(name: str) -> Any:
        # Copied at once: an in-place ReLU that follows would change what is recorded.
        return lambda module, args, output: records.append((name, _copy(output)))

    with ExitStack() as stack:
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_hook(hook(name)).remove)
        stack.enter_context(eval_mode(model))
        stack.enter_context(torch.inference_mode())
        return records, model(inputs.clone())  # a model may begin with a ReLU in place


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every module gets its own mode back, since they may differ."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _copy(output: Any) -> Tensor | None:
    """A tensor, or the first tensor of a tuple, as a contiguous float32 copy."""
    if isinstance(output, tuple):
        output = next((item for item in output if isinstance(item, Tensor)), None)
    if not isinstance(output, Tensor):
        return None
    return output.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _rows(name: str, output: Tensor | None, n_rows: int) -> Tensor:
    """A module's output as [n_rows, width]."""
    return _checked_output(name, output, n_rows).reshape(n_rows, -1)


def _shape(name: str, output: Tensor | None, n_rows: int) -> tuple[int, ...]:
    """The shape of a module's output for one input."""
    return tuple(_checked_output(name, output, n_rows).shape[1:])


def _checked_output(name: str, output: Tensor | None, n_rows: int) -> Tensor:
    if output is None:
        raise LeadlineError(f"probes: module {name} does not return a tensor; read a module inside it")
    if output.ndim == 0 or len(output) != n_rows:
        raise LeadlineError(
            f"probes: module {name} returns shape {tuple(output.shape)} for {n_rows} inputs, not one row for each; "
            "read another module"
        )
    return output


def _checked_logits(output: Any, n_rows: int) -> Tensor:
    if not isinstance(output, Tensor):
        raise LeadlineError(
            f"probes: the model returns {type(output).__name__}; wrap it so that it returns the logits [B, C] alone"
        )
    if output.ndim != 2 or len(output) != n_rows or output.shape[1] < 2:
        raise LeadlineError(
            f"probes: the model returns shape {tuple(output.shape)} for {n_rows} inputs; "
            "logits of shape [B, C], C >= 2, are needed"
        )
    return output.to(torch.float32)


def _same(output: Tensor | None, logits: Tensor) -> bool:
    return output is not None and output.numel() == logits.numel() and torch.equal(output.view_as(logits), logits)


def _paper_places(model: nn.Module) -> set[str]:
    places: Any = getattr(model, "paper_probes", None)
    if places is None:
        raise LeadlineError(
            f"probes: the paper places none in {type(model).__name__}, only in mlp, resnet18 and vgg16; "
            "use auto or names of modules"
        )
    return set(places)


def _block_names(model: nn.Module) -> Iterator[str]:
    """Names of the top-level blocks that hold parameters."""
    module, prefix = model, ""
    while (child := _wrapped(module)) is not None:
        module, prefix = module.get_submodule(child), f"{prefix}{child}."
    yield from _opened(module, prefix)


def _wrapped(module: nn.Module) -> str | None:
    """The child that a module is only a wrapper of: it holds all of the parameters and has children itself."""
    children = [(name, child) for name, child in module.named_children() if _has_parameters(child)]
    if len(children) != 1 or any(True for _ in module.parameters(recurse=False)):
        return None
    name, child = children[0]
    return name if any(True for _ in child.children()) else None


def _opened(module: nn.Module, prefix: str) -> Iterator[str]:
    for name, child in module.named_children():
        # Not isinstance: a subclass is somebody's block.
        if type(child) in CONTAINERS:
            yield from _opened(child, f"{prefix}{name}.")
        elif _has_parameters(child):
            yield prefix + name


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _named_places(patterns: Sequence[str], names: list[str], calls: Counter[str]) -> set[str]:
    chosen: set[str] = set()
    for pattern in patterns:
        if pattern in names:
            if calls[pattern] != 1:
                raise LeadlineError(
                    f"probes: a forward pass calls module {pattern} {calls[pattern]} times, and a probe is read once; "
                    "name another module"
                )
            chosen.add(pattern)
        elif pattern not in ENDS:
            chosen.update(_matching(pattern, names, calls))
    return chosen


def _matching(pattern: str, names: list[str], calls: Counter[str]) -> list[str]:
    matched = [name for name in names if matches(name, pattern)]
    if not matched:
        close = difflib.get_close_matches(pattern, names, n=4, cutoff=0.4)
        hint = f"did you mean {', '.join(close)}" if close else f"it has {', '.join(names[:4])}, ..."
        raise LeadlineError(f"probes: {pattern} matches no module of the model; {hint}")
    once = [name for name in matched if calls[name] == 1]
    if not once:
        raise LeadlineError(
            f"probes: a forward pass calls none of the modules that match {pattern} exactly once "
            f"({', '.join(matched[:4])}); name other modules"
        )
    return once


def matches(name: str, pattern: str) -> bool:
    """Whether a dotted name is of a pattern: shell wildcards, each within one part of the name."""
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))
