"""Training a member with the paper's recipe."""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import count, takewhile
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from leadline.errors import LeadlineError
from leadline.members.probes import eval_mode

if TYPE_CHECKING:
    from leadline.config import Learning, Training
    from leadline.points import Points

RESIDENT_BYTES = 2**30  # a decoded training split below this is read once and kept on the device
STEPS_BETWEEN_CHECKS = 50  # looking at a loss waits for the GPU


def train(
    model: nn.Module,
    points: "Points",
    ids: NDArray[np.int64],
    training: "Training",
    seed: int,
    device: torch.device | str,
    at: Collection[int] = (),
    watch: Callable[[int], None] = lambda step: None,
) -> None:
    """Train a model in place, by SGD with momentum on the cross-entropy of the given labels; no augmentation.

    ids: int64 [n], the points of the split. Each epoch is a fresh order of them, drawn by `seed`, cut into batches; an
    incomplete last batch is dropped unless it is the epoch's only one. The rate is multiplied by `decay` after each
    milestone's number of steps. The model is moved to `device` and left there in eval mode. The same seed, number of
    threads and machine give the same bits; the caller's random state stays as it was.
    watch is called with the number of steps done, 0 before the first, where that is one of `at`. The model is in eval
    mode then, and watch may run it, but must not change it: what is trained is the same bits with and without.
    Raises LeadlineError where the loss is not finite, naming the step; where the split is empty, the model has nothing
    to train, or its output is not logits for all the labels.
    """
    device = torch.device(device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not len(ids) or not parameters:
        raise LeadlineError(f"training: {len(ids)} points and {len(parameters)} parameters to train; give one at least")
    model.to(device).train()
    optimizer = torch.optim.SGD(parameters, lr=training.learning_rate, momentum=training.momentum)
    labels = torch.as_tensor(points.labels[ids], dtype=torch.int64, device=device)
    n_labels = int(labels.max()) + 1
    read = _reader(points, ids, device)
    use_bfloat16 = resolve_precision(training.precision, device) == "bfloat16"
    unchecked: list[Tensor] = []
    with _deterministic(seed, device):
        for step, batch in zip(range(training.steps), _batches(len(ids), training.batch, seed), strict=False):
            if step in at:
                with _aside(model, device):
                    watch(step)
            rate = training.learning_rate * training.decay ** sum(m <= step for m in training.milestones)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast(device.type, torch.bfloat16, enabled=use_bfloat16):
                logits = _checked_logits(model(read(batch)), len(batch), n_labels)
            loss = F.cross_entropy(logits.float(), labels[batch.to(device)])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            unchecked.append(loss.detach())
            done = step + 1
            if len(unchecked) == STEPS_BETWEEN_CHECKS or done == training.steps or done in at:
                _check_losses(unchecked, step, rate)
                unchecked.clear()
    model.eval()
    if training.steps in at:
        watch(training.steps)


def steps_per_epoch(n_points: int, batch: int) -> int:
    """Batches that a split of so many points is cut into."""
    return max(1, n_points // batch)


def checkpoint_steps(steps: int, steps_per_epoch: int, learning: "Learning") -> list[int]:
    """Numbers of steps after which a training of `steps` is looked at, ascending: 0, `steps`, and between them

    10^(i / per_decade) and i x steps_per_epoch / per_epoch for i = 0, 1, ..., rounded to whole steps.
    """
    by_decade = (round(10 ** (i / learning.per_decade)) for i in count())
    by_epoch = (round(i * steps_per_epoch / learning.per_epoch) for i in count()) if learning.per_epoch else iter(())
    between = (takewhile(lambda step: step < steps, found) for found in (by_decade, by_epoch))
    return sorted({0, steps}.union(*between))


def resolve_precision(precision: str, device: torch.device | str) -> Literal["float32", "bfloat16"]:
    """What "auto" means on a device: bfloat16 where its hardware multiplies it natively; else what is asked for."""
    if precision == "auto":
        kind = torch.device(device).type
        native = (kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)) or (
            kind == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
        )
        return "bfloat16" if native else "float32"
    return "bfloat16" if precision == "bfloat16" else "float32"


@contextmanager
def _deterministic(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers (of dropout, say) from `seed` and no choice of kernels by their speed, for a while."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


@contextmanager
def _aside(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode, and random numbers that training does not miss, for a while."""
    with eval_mode(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _batches(n_points: int, size: int, seed: int) -> Iterator[Tensor]:
    """Batches of places 0 … n_points - 1, int64 [size], epoch after epoch without end."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, n_points)
    while True:
        order = torch.randperm(n_points, generator=generator)
        yield from order[: n_points // size * size].reshape(-1, size)


def is_resident(n_points: int, input_shape: tuple[int, ...]) -> bool:
    """Whether the inputs of so many points are kept on the device while a member is trained."""
    return 4 * n_points * math.prod(input_shape) < RESIDENT_BYTES


def _reader(points: "Points", ids: NDArray[np.int64], device: torch.device) -> Callable[[Tensor], Tensor]:
    """Inputs by their places in `ids`, float32 [n, *input_shape] on the device."""
    if is_resident(len(ids), points.input_shape):
        inputs = torch.as_tensor(points.read(ids), device=device)  # decoding again each epoch would take most time
        return lambda places: inputs[places.to(device)]
    return lambda places: torch.as_tensor(points.read(ids[places.numpy()]), device=device)


def _checked_logits(output: object, n_rows: int, n_labels: int) -> Tensor:
    if not isinstance(output, Tensor):
        raise LeadlineError(
            f"training: the model returns {type(output).__name__} in training mode; wrap it so that it returns logits"
        )
    if output.ndim != 2 or len(output) != n_rows or output.shape[1] < n_labels:
        raise LeadlineError(
            f"training: the model returns shape {tuple(output.shape)} for {n_rows} points of classes 0 to "
            f"{n_labels - 1}; one logit for each class is needed"
        )
    return output


def _check_losses(losses: list[Tensor], last_step: int, rate: float) -> None:
    finite = torch.isfinite(torch.stack(losses))
    if not finite.all():
        step = last_step + 1 - len(losses) + int(finite.int().argmin())
        raise LeadlineError(
            f"training: the loss is {losses[int(finite.int().argmin())].item()} at step {step}; "
            f"use a learning rate lower than {rate:g}"
        )
