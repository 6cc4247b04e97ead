"""Training several members of one architecture at once, each the same training that it would have alone."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.overrides import TorchFunctionMode

from leadline.errors import LeadlineError, one_line
from leadline.members.train import (
    aside,
    batches,
    check_trainable,
    checked_logits,
    descend,
    deterministic,
    resolve_precision,
    side_stream,
)

if TYPE_CHECKING:
    from leadline.config import Training
    from leadline.points import Points

_PRODUCTS = (F.linear, F.conv1d, F.conv2d, F.conv3d, torch.matmul)
_NORMS = (F.batch_norm, F.group_norm, F.layer_norm, F.instance_norm)


def train_together(
    models: Sequence[nn.Module],
    points: "Points",
    ids: Sequence[NDArray[np.int64]],
    training: "Training",
    seeds: Sequence[int],
    device: torch.device | str,
    at: Collection[int] = (),
    watch: Callable[[int], None] = lambda step: None,
    *,
    replay: bool = False,
) -> None:
    """Train M models of one architecture in place, each as `train` does with its own split and seed, by one vmap.

    ids: of each, int64 [n]. The inputs of all splits together are kept on the device, once for all models: ask
    `is_resident` before. watch, at and replay as in `train`; watch finds all models at the step.
    It is the same training: start, batches, rate and precision are those of `train`. The weights are not the same
    bits, since sums are made in another order; and dropout draws its masks, other ones for each model, from the first
    seed. The same models, seeds and machine give the same bits again.
    In bfloat16 the products of linear layers and convolutions are made, what else there is in float32.
    Raises LeadlineError as `train` does, naming the seed of the model; where the splits give batches of different
    sizes; and for a model that vmap cannot map (`.item()` in its forward pass).
    """
    device = torch.device(device)
    with deterministic(seeds[0], device), side_stream(device) if replay else nullcontext():
        training_at_once = steps_together(models, points, ids, training, seeds, device, at, replay=replay)
        for step in _explained(training_at_once):
            if step in at:
                with aside(models, device):
                    watch(step)
    for model in models:
        model.eval()
    if training.steps in at:
        watch(training.steps)


def steps_together(
    models: Sequence[nn.Module],
    points: "Points",
    ids: Sequence[NDArray[np.int64]],
    training: "Training",
    seeds: Sequence[int],
    device: torch.device,
    at: Collection[int] = (),
    *,
    replay: bool = False,
) -> Iterator[int]:
    """The steps of `train_together`, as `train.steps` gives them; the models hold the weights at those in `at`."""
    for model in models:
        model.to(device).train()
    parameters, buffers = stack_module_state(list(models))
    trained = [values for values in parameters.values() if values.requires_grad]
    check_trainable(min(map(len, ids)), len(trained))
    _check_batches(ids, training.batch)
    union = np.unique(np.concatenate(ids))
    inputs = points.read_on(union, device)
    labels = torch.as_tensor(points.labels[union], dtype=torch.int64, device=device)
    n_labels = int(labels.max()) + 1
    rows = [torch.as_tensor(np.searchsorted(union, of_one), device=device) for of_one in ids]
    each = [batches(of_one, training.batch, seed) for of_one, seed in zip(rows, seeds, strict=True)]
    precision = resolve_precision(training.precision, device)

    def forward(parameters: dict[str, Tensor], buffers: dict[str, Tensor], inputs: Tensor) -> Tensor:
        with _ProductsInBfloat16() if precision == "bfloat16" else nullcontext():
            logits = functional_call(models[0], (parameters, buffers), (inputs,))
        return checked_logits(logits, len(inputs), n_labels)

    def losses_of(places: Tensor) -> Tensor:
        logits = vmap(forward, randomness="different")(parameters, buffers, inputs[places])
        losses = F.cross_entropy(logits.float().flatten(0, 1), labels[places].flatten(), reduction="none")
        return losses.reshape(places.shape).mean(dim=1)

    stacked = {**parameters, **buffers}
    batch_of_each = (torch.stack(of_all) for of_all in zip(*each, strict=True))
    whose = [f" of the model with seed {seed}" for seed in seeds]
    replay = replay and device.type == "cuda"
    for step in descend(trained, losses_of, batch_of_each, training, at, whose, replay=replay):
        if step in at:
            _unstack(stacked, models)
        yield step
    _unstack(stacked, models)


def _explained(training: Iterator[int]) -> Iterator[int]:
    try:
        yield from training
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        raise LeadlineError(
            f"training.at_once: the network cannot be trained with others ({one_line(error)}); leave at_once out"
        ) from error


class _ProductsInBfloat16(TorchFunctionMode):
    """What autocast does to layers, which vmap would hide from it: products in bfloat16, norms in float32."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            args, kwargs = _cast(args, kwargs, torch.bfloat16)
        elif func in _NORMS:
            args, kwargs = _cast(args, kwargs, torch.float32)
        return func(*args, **kwargs)


def _cast(args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(map(cast, args)), {key: cast(value) for key, value in kwargs.items()}


def _check_batches(ids: Sequence[NDArray[np.int64]], batch: int) -> None:
    sizes = sorted({min(batch, len(of_one)) for of_one in ids})
    if len(sizes) > 1:
        raise LeadlineError(
            f"training: splits of {min(map(len, ids))} to {max(map(len, ids))} points give batches of "
            f"{sizes[0]} to {sizes[-1]}, and one size is needed to train at once; leave at_once out"
        )


def _unstack(stacked: Mapping[str, Tensor], models: Sequence[nn.Module]) -> None:
    """Copy the weights and buffers [M, ...] into the models."""
    with torch.no_grad():
        for number, model in enumerate(models):
            for name, value in (*model.named_parameters(), *model.named_buffers()):
                value.copy_(stacked[name][number])
