"""Training a member with the paper's recipe."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import count, takewhile
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from leadline.errors import LeadlineError, one_line
from leadline.full_precision import full_precision
from leadline.members.probes import eval_mode

if TYPE_CHECKING:
    from leadline.config import Learning, Training
    from leadline.points import Points

RESIDENT_BYTES = 2**30  # a decoded training split below this is read once and kept on the device
STEPS_BETWEEN_CHECKS = 50  # looking at a loss waits for the GPU
STEPS_BEFORE_CAPTURE = 3  # libraries set themselves up, and momentum gets its memory, in steps that no graph holds


def train(
    model: nn.Module,
    points: "Points",
    ids: NDArray[np.int64],
    training: "Training",
    seed: int,
    device: torch.device | str,
    at: Collection[int] = (),
    watch: Callable[[int], None] = lambda step: None,
    *,
    replay: bool = False,
) -> None:
    """Train a model in place, by SGD with momentum on the cross-entropy of the given labels; no augmentation.

    ids: int64 [n], the points of the split. Each epoch is a fresh order of them, drawn by `seed`, cut into batches; an
    incomplete last batch is dropped unless it is the epoch's only one. The rate is multiplied by `decay` after each
    milestone's number of steps. The model is moved to `device` and left there in eval mode. The same seed, number of
    threads and machine give the same bits; the caller's random state stays as it was.
    watch is called with the number of steps done, 0 before the first, where that is one of `at`. The model is in eval
    mode then, and watch may run it, but must not change it: what is trained is the same bits with and without.
    replay: the step is captured in a CUDA graph and replayed, on a CUDA device that keeps the split's inputs; elsewhere
    it makes no difference. The model must not wait for the device in its forward pass (`.item()`).
    Raises LeadlineError where the loss is not finite, naming the step; where the split is empty, the model has nothing
    to train, its output is not logits for all the labels, or a step cannot be captured.
    """
    device = torch.device(device)
    with deterministic(seed, device), side_stream(device) if replay else nullcontext():
        for step in steps(model, points, ids, training, seed, device, at, replay=replay):
            if step in at:
                with aside([model], device):
                    watch(step)
    model.eval()
    if training.steps in at:
        watch(training.steps)


def steps(
    model: nn.Module,
    points: "Points",
    ids: NDArray[np.int64],
    training: "Training",
    seed: int,
    device: torch.device,
    at: Collection[int] = (),
    *,
    replay: bool = False,
) -> Iterator[int]:
    """The steps of `train`, for who does something between them: the number of steps done, before each step.

    The losses of the steps before those in `at` have been looked at. The model is left in training mode. Where the
    step is replayed, it runs on the current stream, which may not be the default one.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    check_trainable(len(ids), len(parameters))
    model.to(device).train()
    labels = torch.as_tensor(points.labels[ids], dtype=torch.int64, device=device)
    n_labels = int(labels.max()) + 1
    resident = is_resident(len(ids), points.input_shape)
    read = _reader(points, ids, device, resident)
    use_bfloat16 = resolve_precision(training.precision, device) == "bfloat16"

    def loss_of(places: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=use_bfloat16):
            logits = checked_logits(model(read(places)), len(places), n_labels)
        return F.cross_entropy(logits.float(), labels[places.to(device)])

    places = torch.arange(len(ids), device=device if resident else "cpu")
    replay = replay and resident and device.type == "cuda"
    return descend(parameters, loss_of, batches(places, training.batch, seed), training, at, replay=replay)


def descend(
    parameters: Sequence[Tensor],
    losses_of: Callable[[Tensor], Tensor],
    batches: Iterator[Tensor],
    training: "Training",
    at: Collection[int],
    whose: Sequence[str] = ("",),
    *,
    replay: bool,
) -> Iterator[int]:
    """SGD with momentum on the sum of losses; gives the number of steps done before each step.

    losses_of: the losses of a batch, [] or [M], M networks' that share no parameter; whose: a word on each, for errors.
    """
    optimizer = torch.optim.SGD(parameters, lr=training.learning_rate, momentum=training.momentum)

    def step_on(batch: Tensor) -> Tensor:
        losses = losses_of(batch)
        optimizer.zero_grad()
        losses.sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return losses.detach()

    take: Callable[[Tensor], Tensor] = step_on
    rate_in_graph = None
    unchecked: list[Tensor] = []
    for step, batch in zip(range(training.steps), batches, strict=False):
        yield step
        rate = training.learning_rate * training.decay ** sum(m <= step for m in training.milestones)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if replay and step >= STEPS_BEFORE_CAPTURE and rate != rate_in_graph:
            take = step_on  # the memory of an earlier graph is free before there is another
            optimizer.zero_grad()  # gradients are to lie in the graph's own memory
            take, rate_in_graph = _captured(step_on, batch), rate
        with _refusing_to_wait() if replay and step == STEPS_BEFORE_CAPTURE - 1 else nullcontext():
            unchecked.append(take(batch))
        done = step + 1
        if len(unchecked) == STEPS_BETWEEN_CHECKS or done == training.steps or done in at:
            _check_losses(unchecked, step, rate, whose)
            unchecked.clear()


def _captured(step_on: Callable[[Tensor], Tensor], batch: Tensor) -> Callable[[Tensor], Tensor]:
    """A step as a CUDA graph on the current stream. Capturing it takes no step."""
    given, graph = batch.clone(), torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream(batch.device)
    # Other threads (Ray's, a reader's) may go on using CUDA meanwhile.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        losses = step_on(given)

    def replayed(batch: Tensor) -> Tensor:
        given.copy_(batch)
        graph.replay()
        return losses.clone()

    return replayed


@contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """What waits for the device cannot be captured, and to try would leave torch's memory of this process unusable."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise LeadlineError(
            f"training.cuda_graph: a step of the network cannot be captured ({one_line(error)}); leave cuda_graph out"
        ) from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


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
def deterministic(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers (of dropout, say) from `seed`, full float32, no choice of kernels by their speed, for a while."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        with full_precision(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """A stream beside the current one, which waits for it in the end: a CUDA graph is not captured on the default one.

    Nothing where the device is no CUDA device.
    """
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


@contextmanager
def aside(models: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Eval mode, and random numbers that training does not miss, for a while."""
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(eval_mode(model))
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        yield


def batches(places: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Batches of the places, int64 [size] on their device, epoch after epoch without end."""
    generator = torch.Generator().manual_seed(seed)
    n_points = len(places)
    size = min(size, n_points)
    while True:
        order = torch.randperm(n_points, generator=generator)
        # A whole epoch at once: to copy each batch to a GPU would hold up its step.
        yield from places[order[: n_points // size * size].to(places.device)].reshape(-1, size)


def is_resident(n_points: int, input_shape: tuple[int, ...]) -> bool:
    """Whether the inputs of so many points are kept on the device while a member is trained."""
    return 4 * n_points * math.prod(input_shape) < RESIDENT_BYTES


def check_trainable(n_points: int, n_parameters: int) -> None:
    if not n_points or not n_parameters:
        raise LeadlineError(f"training: {n_points} points and {n_parameters} parameters to train; give one at least")


def _reader(
    points: "Points", ids: NDArray[np.int64], device: torch.device, resident: bool
) -> Callable[[Tensor], Tensor]:
    """Inputs by their places in `ids`, float32 [n, *input_shape] on the device."""
    if resident:
        inputs = points.read_on(ids, device)  # decoding again each epoch would take most time
        return lambda places: inputs[places]
    return lambda places: points.read_on(ids[places.numpy()], device)


def checked_logits(output: object, n_rows: int, n_labels: int) -> Tensor:
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


def _check_losses(losses: list[Tensor], last_step: int, rate: float, whose: Sequence[str]) -> None:
    """losses: of one step after another, each [] or [M]."""
    table = torch.stack(losses).reshape(len(losses), -1)
    wrong = (~torch.isfinite(table)).nonzero()
    if len(wrong):
        row, member = wrong[0].tolist()
        raise LeadlineError(
            f"training: the loss{whose[member]} is {table[row, member].item()} at step "
            f"{last_step + 1 - len(losses) + row}; use a learning rate lower than {rate:g}"
        )
