"""How near `leadline plan` comes to what runs then take: time, and memory of a worker, on this machine.

python benchmarks/plan_check.py [NAME …]     digits, fashion-mnist-10000, fashion-mnist-cpu; all of them by default

Each run is planned and then made, from the beginning, in a folder of its own. A ratio is what was measured, by what was
planned. Writes benchmarks/results/plan_check-NAME-PROCESSOR.json for each.
"""

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from part import write_part
from record import stamp, write_result
from rich.console import Console
from rich.table import Table

import leadline
from leadline.cluster.at_hand import plan_at_hand
from leadline.cluster.graph import graph_of
from leadline.config import RunConfig, load_config
from leadline.points import open_points
from leadline.report.status import status_of

PACKAGES = ("leadline", "torch", "numba", "numpy", "pyarrow", "ray")
TRAINING, TESTING = 8000, 2000  # of Fashion-MNIST's images, in fashion-mnist-10000
FULL, PART = "fashion-mnist-cpu", "fashion-mnist-10000"


def main(names: Annotated[list[str] | None, typer.Argument(metavar="NAME")] = None) -> None:
    """Hold plans against runs."""
    for name in names or ["digits", PART, FULL]:
        with tempfile.TemporaryDirectory() as folder:
            config = _part_of_it(Path(folder)) if name == PART else load_config(name)
            result = _checked(config, Path(folder))
        _print(name, result)
        write_result(f"plan_check-{name}", {**stamp(PACKAGES, config.engine.threads), **result})


def _part_of_it(folder: Path) -> RunConfig:
    """The configuration of all of Fashion-MNIST, with some thousands of its points."""
    config = load_config(FULL)
    source = write_part(open_points(config.points), folder, TRAINING, TESTING)
    return load_config({**config.model_dump(mode="json"), "name": PART, "points": source})


def _checked(config: RunConfig, folder: Path) -> dict[str, Any]:
    points = open_points(config.points)
    started = time.perf_counter()
    plan = plan_at_hand(graph_of(config, points), points, None, None)
    planning = time.perf_counter() - started
    started = time.perf_counter()
    run = leadline.run(config, folder / "run")
    seconds = time.perf_counter() - started
    told = run.manifest["stages"]
    stages = {
        stage.name: _beside(stage.seconds, told[stage.name]["worker_seconds"])
        for stage in plan.stages
        if stage.name in told
    }
    peaks = [worker["peak_memory"] for worker in status_of(run.directory)["workers"]]
    needed = plan.base + max(stage.memory for stage in plan.stages)
    return {
        "points": plan.points,
        "members": plan.members,
        "workers": plan.cluster.workers,
        "seconds_of_planning": planning,
        "seconds": _beside(plan.seconds, seconds),
        "worker_seconds": stages,
        "memory_of_a_worker": _beside(needed, max(peaks)),
        "memory_of_workers": peaks,
        "units": {stage.name: [stage.units, told[stage.name]["units"]] for stage in plan.stages if stage.name in told},
        "plan": plan.record(),
    }


def _beside(planned: float, measured: float) -> dict[str, float]:
    return {"planned": planned, "measured": measured, "ratio": measured / planned}


def _print(name: str, result: dict[str, Any]) -> None:
    drawn = Table(title=f"{name}, planned in {result['seconds_of_planning']:.1f} s", title_justify="left")
    for column in ("", "planned", "measured", "ratio"):
        drawn.add_column(column, justify="right")
    rows = {f"{stage}, worker seconds": found for stage, found in result["worker_seconds"].items()}
    for what, found in {**rows, "all, seconds": result["seconds"]}.items():
        drawn.add_row(what, f"{found['planned']:.2f}", f"{found['measured']:.2f}", f"{found['ratio']:.2f}")
    memory = result["memory_of_a_worker"]
    planned, measured = (f"{memory[key] / 1e6:,.0f}" for key in ("planned", "measured"))
    drawn.add_row("memory of a worker, MB", planned, measured, f"{memory['ratio']:.2f}")
    Console(width=100).print(drawn)


if __name__ == "__main__":
    typer.run(main)
