"""What scheduling costs: units that do nothing, and the share of a run's time that is not work.

python benchmarks/scheduling.py empty              units a second, and the driver's memory, over so many empty units
python benchmarks/scheduling.py overhead CONFIG --out RUN   a run's time beside the seconds of all its units

Writes benchmarks/results/scheduling-COMMAND-PROCESSOR.json.
"""

import os
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from record import stamp, write_result
from rich.console import Console

import leadline
from leadline.cluster.pool import Ended, Pool, Scratch, connected
from leadline.cluster.progress import Stages
from leadline.cluster.schedule import Schedule, Unit
from leadline.cluster.work import list_members
from leadline.config import load_config
from leadline.store import RunDirectory
from leadline.store.log import ended_units, sessions

PACKAGES = ("leadline", "ray")
GROUP = 1000  # units that are taken in together, as those of a group of members are

app = typer.Typer(help="What scheduling costs.", add_completion=False, pretty_exceptions_enable=False)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@app.command()
def empty(
    units: Annotated[int, typer.Option(min=GROUP)] = 100_000, workers: Annotated[int, typer.Option(min=1)] = 2
) -> None:  # fmt: skip
    """Units that find nothing to remove, each needing one before it, done by real actors."""
    config = load_config("digits", (f"engine.workers={workers}",))
    (member, *_), groups = list_members(config), units // GROUP
    with tempfile.TemporaryDirectory() as folder, connected(config.engine, None) as is_local:
        directory, schedule, left = RunDirectory(Path(folder)), Schedule(), list(range(groups))
        memory: dict[int, int] = {}
        n_done = 0

        def add() -> None:
            number = left.pop(0)
            schedule.add(
                Unit("free", (member,), f"{number} {i}", ((number, i - 1),), ((number, i),), number)
                for i in range(GROUP)
            )

        def ended(_: Unit, end: Ended) -> None:
            nonlocal n_done
            n_done += end.state == "done"
            if n_done % (units // 10) == 0:
                memory[n_done] = resident()
            if left and len(schedule) < GROUP:
                add()

        stages = Stages(Console(stderr=True))
        scratch = Scratch("shared", None, "", "", 0)
        add()
        add()
        with Pool(config.engine, (config, {}, directory), scratch, is_local, stages.say) as pool:
            started = time.perf_counter()
            failures = pool.run(schedule, lambda *_: None, ended, lambda _: None)
            seconds = time.perf_counter() - started
    assert not failures and n_done == units
    print(f"{units:,} units in {seconds:.1f} s: {units / seconds:,.0f} units/s by {workers} workers")
    print("driver, MiB:", {count: round(size / 2**20, 1) for count, size in memory.items()})
    write_result(
        "scheduling-empty",
        {
            **stamp(PACKAGES, workers), "workers": workers, "units": units, "seconds": seconds,
            "units_per_s": units / seconds, "driver_bytes_by_units": memory,
        },
    )  # fmt: skip


@app.command()
def overhead(
    config: Annotated[str, typer.Argument(metavar="PRESET|FILE.yaml")],
    out: Annotated[Path, typer.Option(help="a new directory for the run")],
) -> None:
    """A run's whole time, by its workers, over the seconds that they spent in units."""
    started = time.perf_counter()
    run = leadline.run(config, out)
    seconds = time.perf_counter() - started
    workers = load_config(config).engine.workers or os.cpu_count() or 1
    stages = run.manifest["stages"]
    in_units = sum(stage["worker_seconds"] for stage in stages.values())
    (session,) = sessions(run.directory)
    units = list(ended_units(run.directory, session["session"]))
    at_work = max(unit["ended"] for unit in units) - min(unit["began"] for unit in units)
    ratios = {"whole": seconds * workers / in_units, "at_work": at_work * workers / in_units}
    print(
        f"{seconds:.1f} s by {workers} workers, {in_units:.1f} s of them in units: {ratios['whole']:.3f} times the work"
    )
    print(f"without starting and stopping Ray and its workers: {at_work:.1f} s, {ratios['at_work']:.3f} times")
    write_result(
        f"scheduling-overhead-{run.manifest['name']}",
        {
            **stamp(PACKAGES, workers), "workers": workers, "seconds": seconds, "unit_seconds": in_units,
            "seconds_at_work": at_work, "ratios": ratios, "stages": stages,
        },
    )  # fmt: skip


if __name__ == "__main__":
    app()
