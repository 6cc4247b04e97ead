"""Adversarial input margins of Fashion-MNIST under a small network, beside the same by torch.func.

python benchmarks/margins.py [--network mlp] [--points 10000]
    writes benchmarks/results/margins-NETWORK-POINTS-PROCESSOR.json

Ours takes a backward pass of a batch for each other class. `jacrev` makes each point's whole Jacobian, under `vmap`;
`vjp` takes all of a batch's other classes in one backward pass, under `vmap` too. All in one process, on one thread,
one after the other, ROUNDS times; `forward` is one pass of all points, which bounds all of them from below.
"""

import statistics
import time
from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch
import typer
from record import stamp, write_result
from torch import Tensor, nn

from leadline.config import load_config
from leadline.knn.arrays import Array
from leadline.members.architectures import build
from leadline.points import open_points
from leadline.study.margins import adversarial_input_margin

BATCH, ROUNDS = 256, 3
NETWORKS = {"mlp": {"width": 256, "depth": 5}, "resnet18": {"width": 8}}
PACKAGES = ("leadline", "torch", "numpy")


def main(
    network: Annotated[str, typer.Option(help=f"one of {', '.join(NETWORKS)}")] = "mlp",
    points: Annotated[int, typer.Option(min=1)] = 10_000,
) -> None:
    """Time all ways, and hold torch.func's answers against ours."""
    torch.set_num_threads(1)
    data = open_points(load_config("fashion-mnist-cpu").points)
    inputs = torch.from_numpy(data.read(np.arange(points)))
    model = build(network, NETWORKS[network], data.input_shape, 10, seed=0).eval()
    ways: dict[str, Callable[[], Array]] = {
        "leadline": lambda: adversarial_input_margin(model, inputs, batch_size=BATCH),
        "jacrev": lambda: in_batches(by_jacobians, model, inputs),
        "vjp": lambda: in_batches(by_pullbacks, model, inputs),
        "forward": lambda: in_batches(forward, model, inputs),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    answers = {}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            started = time.perf_counter()
            answers[name] = way()
            times[name].append(time.perf_counter() - started)
    seconds = {name: statistics.median(some) for name, some in times.items()}
    by_leadline = {name: value / seconds["leadline"] for name, value in seconds.items()}
    apart = {name: np.abs(answers[name] / answers["leadline"] - 1).max().item() for name in ("jacrev", "vjp")}
    for name, value in seconds.items():
        print(f"{name:9} {value:7.2f} s, {by_leadline[name]:.2f} of leadline's")
    print("  ".join(f"{name}: greatest relative difference {value:.1e}" for name, value in apart.items()))
    write_result(
        f"margins-{network}-{points}",
        {
            **stamp(PACKAGES, torch.get_num_threads()), "network": {network: NETWORKS[network]}, "points": points,
            "batch": BATCH, "seconds": times, "medians": seconds, "medians_by_leadline": by_leadline,
            "greatest_relative_difference": apart,
        },
    )  # fmt: skip


def in_batches(way: Callable[[nn.Module, Tensor], Tensor], model: nn.Module, inputs: Tensor) -> Array:
    with torch.no_grad():  # of the parameters; torch.func differentiates by the inputs all the same
        return np.concatenate([way(model, rows).numpy() for rows in inputs.split(BATCH)])


def by_jacobians(model: nn.Module, rows: Tensor) -> Tensor:
    """Real [B]; ties of the predicted class to the lower."""
    logits = model(rows)
    gradients = torch.func.vmap(torch.func.jacrev(lambda x: model(x[None])[0]))(rows).flatten(2)
    every, predicted = torch.arange(len(rows)), logits.argmax(dim=1)
    gaps = logits[every, predicted, None] - logits
    norms = _norms(gradients[every, predicted, None] - gradients)
    margins = gaps / norms
    margins[every, predicted] = torch.inf
    return margins.amin(dim=1)


def by_pullbacks(model: nn.Module, rows: Tensor) -> Tensor:
    """Real [B]; ties of the predicted class to the lower."""
    logits, pull, *_ = torch.func.vjp(model, rows)
    n_classes = logits.shape[1]
    predicted = logits.argmax(dim=1)
    others = (predicted + torch.arange(1, n_classes)[:, None]) % n_classes  # [C - 1, B]
    directions = torch.eye(n_classes)[predicted] - torch.eye(n_classes)[others]  # [C - 1, B, C]
    norms = torch.func.vmap(lambda one: _norms(pull(one)[0].flatten(1)))(directions)
    gaps = logits.gather(1, predicted[:, None]) - logits.gather(1, others.T)
    return (gaps / norms.T).amin(dim=1)


def _norms(gradients: Tensor) -> Tensor:
    return torch.linalg.vector_norm(gradients, dim=-1, dtype=torch.float64)


def forward(model: nn.Module, rows: Tensor) -> Tensor:
    return model(rows)


if __name__ == "__main__":
    typer.run(main)
