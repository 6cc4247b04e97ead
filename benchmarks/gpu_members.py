"""Training of several small networks on one device: one after another, at once by vmap, on streams, in CUDA graphs.

python benchmarks/gpu_members.py         prints JSON; of a CUDA device where there is one, else quick figures of the CPU
python benchmarks/gpu_members.py cpu     writes benchmarks/results/members_at_once-*.json, of the CPU

The inputs are random and lie on the device, so that steps are what is measured. A rate is steps a second of members: n
steps of M networks are n x M. Setting up (reading, first steps, the capture of a graph) is `ready_seconds`, and not in
the rate. `agreement` says how far the weights that a way trains, and the losses, lie from those of `train`, one after
another: relative to how far training moved them, or to the loss.
"""

import platform
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from turns import in_turns, need_cuda, print_figures, wait_for

from leadline.errors import one_line
from leadline.full_precision import full_precision
from leadline.members.architectures import build
from leadline.members.together import steps_together, train_together
from leadline.members.train import deterministic, resolve_precision, steps, train

SECONDS = 55.0  # nothing is begun later than this
CLASSES = 10
FIRST_STEPS = 6  # of a way that is set up: a graph is captured in them


@dataclass(frozen=True)
class Network:
    architecture: str
    parameters: dict[str, Any]
    input_shape: tuple[int, ...]

    def models(self, members: int) -> list[torch.nn.Module]:
        return [build(self.architecture, self.parameters, self.input_shape, CLASSES, seed) for seed in range(members)]


@dataclass(frozen=True)
class Recipe:
    """The fields of `config.Training`, which needs pydantic."""

    steps: int
    batch: int = 128
    learning_rate: float = 0.01
    milestones: tuple[int, ...] = ()
    decay: float = 0.2
    momentum: float = 0.9
    precision: str = "auto"


class RandomPoints:
    """Random inputs and labels, as `Points` gives them."""

    def __init__(self, n: int, input_shape: tuple[int, ...]) -> None:
        random = np.random.default_rng(0)
        self.input_shape = input_shape
        self.labels = random.integers(0, CLASSES, n).astype(np.int32)
        self._inputs = random.standard_normal((n, *input_shape), np.float32)

    def read_on(self, ids: np.ndarray, device: torch.device | str) -> torch.Tensor:
        return torch.from_numpy(self._inputs[ids]).to(device)

    def splits(self, members: int) -> list[np.ndarray]:
        """A random half for each member."""
        n = len(self.labels)
        return [np.sort(np.random.default_rng(seed).permutation(n)[: n // 2]) for seed in range(members)]


LARGE = {
    "mlp 256x5 on 1x28x28": Network("mlp", {"width": 256, "depth": 5}, (1, 28, 28)),
    "resnet18 width 16 on 3x32x32": Network("resnet18", {"width": 16}, (3, 32, 32)),
}
SMALL = {
    "mlp 32x3 on 1x8x8": Network("mlp", {"width": 32, "depth": 3}, (1, 8, 8)),
    "resnet18 width 4 on 3x16x16": Network("resnet18", {"width": 4, "depth": [1, 1, 1, 1]}, (3, 16, 16)),
}


def measure(device: torch.device | str, quick: bool = False) -> dict[str, Any]:
    """Agreement of the ways, and their rates: on an H100 in under a minute, quick in seconds on a CPU."""
    device = torch.device(device)
    until = time.perf_counter() + SECONDS
    networks, members, batch, n_points = (SMALL, 2, 32, 400) if quick else (LARGE, 8, 128, 10_000)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "members": members,
        "batch": batch,
        "precision": resolve_precision("auto", device),
        "agreement": {},
    }
    for name, network in networks.items():
        kinds = {name: network}
        if network.architecture == "resnet18":
            kinds[f"{name}, batch norm"] = replace(network, parameters={**network.parameters, "norm": "batch"})
        for kind, of_kind in kinds.items():
            for precision in ("float32", "bfloat16"):
                title = f"{kind}, {precision}"
                try:
                    result["agreement"][title] = agreement(title, of_kind, device, batch, precision)
                except Exception as error:
                    result["agreement"][title] = {"failed": one_line(error)}
    seconds, rounds = (0.1, 1) if quick else (0.6, 3)
    result["member_steps_per_second"] = rates(networks, members, batch, n_points, device, seconds, rounds, until)
    return result


def rates(
    networks: dict[str, Network], members: int, batch: int, n_points: int, device: torch.device, seconds: float,
    rounds: int, until: float,
) -> dict[str, Any]:  # fmt: skip
    """Steps a second of members, by network and way. seconds: of a turn, about."""
    found = {}
    for name, network in networks.items():
        points = RandomPoints(n_points, network.input_shape)
        turns = ways(network, points, Recipe(10**9, batch), members, device, seconds)
        with deterministic(0, device):
            found[name] = in_turns(name, turns, rounds, until)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def agreement(title: str, network: Network, device: torch.device, batch: int, precision: str) -> dict[str, Any]:
    """How far each way's networks are from `train`'s after 16 steps, one of them looked at, the rate cut in the middle.

    In float32 sums of another order part them, by 1e-5 or so. In bfloat16 roundings do, by 1e-2 and more.
    """
    members = 2
    points = RandomPoints(40 * batch // 16, network.input_shape)
    splits, seeds = points.splits(members), range(members)
    recipe = Recipe(16, min(batch, len(splits[0]) // 2), milestones=(8,), precision=precision)
    start = [weights(model) for model in network.models(members)]

    def alone(models: list[torch.nn.Module], replay: bool) -> None:
        for model, ids, seed in zip(models, splits, seeds, strict=True):
            train(model, points, ids, recipe, seed, device, (5,), replay=replay)

    def together(models: list[torch.nn.Module], replay: bool) -> None:
        train_together(models, points, splits, recipe, seeds, device, (5,), replay=replay)

    def trained(way: Callable[..., None], replay: bool) -> tuple[list[torch.Tensor], list[float]]:
        models = network.models(members)
        with full_precision():
            way(models, replay)
            return [weights(model) for model in models], [loss(model, points, device) for model in models]

    found: dict[str, Any] = {}
    expected, losses = trained(alone, False)
    for name, way, replay in (
        ("one after another, again", alone, False),
        ("one after another, replayed", alone, True),
        ("at once", together, False),
        ("at once, replayed", together, True),
    ):
        try:
            if replay:
                need_cuda(device)
            values, their_losses = trained(way, replay)
            apart = [
                float((one - other).norm() / (other - before).norm())
                for one, other, before in zip(values, expected, start, strict=True)
            ]
            found[name] = {
                "weights": max(apart),
                "losses": max(abs(one / other - 1) for one, other in zip(their_losses, losses, strict=True)),
                "same_bits": all(torch.equal(one, other) for one, other in zip(values, expected, strict=True)),
            }
        except Exception as error:
            found[name] = {"failed": one_line(error)}
        print(f"{title}: {name}: {found[name]}", flush=True)
    return found


def weights(model: torch.nn.Module) -> torch.Tensor:
    """Weights and running statistics, as one vector on the CPU."""
    state = model.state_dict().values()
    return torch.cat([value.detach().double().flatten().cpu() for value in state if value.is_floating_point()])


def loss(model: torch.nn.Module, points: RandomPoints, device: torch.device) -> float:
    """Of all points, in eval mode."""
    inputs = points.read_on(np.arange(len(points.labels)), device)
    with torch.no_grad():
        return F.cross_entropy(model(inputs), torch.as_tensor(points.labels, device=device).long()).item()


def ways(
    network: Network, points: RandomPoints, recipe: Recipe, members: int, device: torch.device, seconds: float
) -> dict[str, Callable[[], Callable[[], float]]]:
    """For `in_turns`: a way's networks are made when its first turn comes, and their training goes on in the next."""
    splits = points.splits(members)

    def one_after_another(replay: bool) -> Callable[[int], None]:
        on = stream_for(device, beside=replay)
        with on():
            trainings = [
                steps(model, points, ids, recipe, seed, device, replay=replay)
                for seed, (model, ids) in enumerate(zip(network.models(members), splits, strict=True))
            ]

        def advance(n: int) -> None:
            with on():
                for training in trainings:
                    for _ in range(n):
                        next(training)

        return advance

    def at_once(replay: bool) -> Callable[[int], None]:
        on = stream_for(device, beside=replay)
        models = network.models(members)
        training = steps_together(models, points, splits, recipe, range(members), device, replay=replay)

        def advance(n: int) -> None:
            with on():
                for _ in range(n):
                    next(training)

        return advance

    def on_streams(replay: bool) -> Callable[[int], None]:
        need_cuda(device)
        streams = [stream_for(device, beside=True) for _ in range(members)]
        trainings = []
        for seed, (on, model, ids) in enumerate(zip(streams, network.models(members), splits, strict=True)):
            with on():
                trainings.append(steps(model, points, ids, recipe, seed, device, replay=replay))

        def advance(n: int) -> None:
            for _ in range(n):
                for on, training in zip(streams, trainings, strict=True):
                    with on():
                        next(training)

        return advance

    def ready(way: Callable[[bool], Callable[[int], None]], replay: bool) -> Callable[[], float]:
        if replay:
            need_cuda(device)
        advance = way(replay)
        advance(FIRST_STEPS)
        n = max(1, round(4 * seconds / timed(advance, 4, device)))
        return lambda: n * members / timed(advance, n, device)

    return {
        f"{name}{', replayed' if replay else ''}": partial(ready, way, replay)
        for name, way in (("one after another", one_after_another), ("at once", at_once), ("on streams", on_streams))
        for replay in (False, True)
    }


def timed(advance: Callable[[int], None], n: int, device: torch.device) -> float:
    """Seconds of n steps of each network."""
    wait_for(device)
    started = time.perf_counter()
    advance(n)
    wait_for(device)
    return time.perf_counter() - started


def stream_for(device: torch.device, beside: bool) -> Callable[[], AbstractContextManager[Any]]:
    """A context that makes a stream of its own the current one, or leaves the default one."""
    if not beside or device.type != "cuda":
        return nullcontext
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return lambda: torch.cuda.stream(stream)


def on_the_cpu() -> None:
    """The rates of the networks that are measured on a GPU, on a CPU, which a GPU has nothing to do with."""
    from record import stamp, write_result  # of packages that a machine with a GPU need not have

    until = time.perf_counter() + 600
    of_each = rates(LARGE, 8, 128, 10_000, torch.device("cpu"), 3.0, 5, until)
    told = stamp(("leadline", "torch", "numpy"), torch.get_num_threads())
    precision = resolve_precision("auto", "cpu")
    result = {
        **told,
        "command": "python benchmarks/gpu_members.py cpu",
        "members": 8,
        "batch": 128,
        "precision": precision,
        "member_steps_per_second": of_each,
    }
    print(write_result("members_at_once", result))


if __name__ == "__main__":
    on_the_cpu() if sys.argv[1:] == ["cpu"] else print_figures(measure)
