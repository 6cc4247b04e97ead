"""Whole runs with all votes, and with a point's votes only until its depth is decided.

python benchmarks/exact_votes.py modes CONFIG --out DIRECTORY     runs lie in DIRECTORY/<mode>-<round>

Each run trains and embeds anew, so the seconds of the voting stage are what to compare.
"""

import statistics
from collections import defaultdict
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import typer
from record import stamp, write_result
from rich.console import Console
from rich.table import Table

import leadline
from leadline.config import load_config
from leadline.knn import Cost
from leadline.store.files import read_json

PACKAGES = ("leadline", "torch", "numba", "numpy", "pyarrow", "ray")
MODES = ("all", "until-decided")


def modes(
    config: Annotated[str, typer.Argument(metavar="PRESET|FILE.yaml")],
    out: Annotated[Path, typer.Option(help="folder for the runs; finished ones are not run again")],
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Whole runs on Ray, votes: all and votes: until-decided in turns: seconds by stage and probe, pairs, depths."""
    given = tuple(overrides or ())
    runs: dict[str, list[leadline.Run]] = {mode: [] for mode in MODES}
    for number in range(rounds):
        # The first of a round may find caches cold: the modes take turns at it.
        for mode in MODES[:: -1 if number % 2 else 1]:
            runs[mode].append(leadline.run(config, out / f"{mode}-{number}", overrides=(*given, f"votes={mode}")))
    figures = {mode: [measured(run) for run in several] for mode, several in runs.items()}
    rows = {
        key: {mode: statistics.median(one[key] for one in several) for mode, several in figures.items()}
        for key in figures["all"][0]
    }
    reference = depths(runs["all"][0])
    equal = all(depths(run).equals(reference) for several in runs.values() for run in several)
    settings = load_config(config, given)
    print_rows(f"{settings.name}: median of {rounds} run(s) of each", rows)
    print("depth tables:", "equal in all runs" if equal else "DIFFERENT")
    write_result(
        f"exact_votes-modes-{settings.name}",
        {
            **stamp(PACKAGES, settings.engine.threads),
            "workers": settings.engine.workers,
            "rounds": rounds,
            "fingerprints": {mode: several[0].manifest["fingerprint"] for mode, several in runs.items()},
            "measured": rows,
            "depth_tables_equal": equal,
        },
    )


def measured(run: leadline.Run) -> dict[str, float]:
    """Seconds by stage; seconds and costs of voting by architecture and probe, over members; costs over all probes."""
    found: defaultdict[str, float] = defaultdict(float)
    for stage, report in run.manifest["stages"].items():
        found[f"{stage} stage, s"] = report["seconds"]
    table = run.probes.to_table().to_pylist()
    seconds = {
        member: read_json(run.directory.record("reduce", member))["vote_seconds"]
        for member in {row["member"] for row in table}
    }
    counts = [field.name for field in fields(Cost) if field.name in table[0]]
    for row in table:
        place = f"{row['architecture']} {row['probe']} {row['name']}"
        found[f"{place}, s"] += seconds[row["member"]][row["probe"]]
        found[f"{place}, pairs"] += row["pairs"]
    for name in counts:
        found[f"all probes, {name}"] = sum(row[name] for row in table)
    return dict(found)


def depths(run: leadline.Run) -> pa.Table:
    """Whole, without the stamps of the run, which name its configuration."""
    return run.sql("SELECT * FROM depths ORDER BY member, point_id").replace_schema_metadata()


def print_rows(title: str, rows: dict[str, dict[str, Any]]) -> None:
    table = Table("", title=title, title_justify="left")
    for head in (*MODES, "ratio"):
        table.add_column(head, justify="right")
    for key, by_mode in rows.items():
        values = [by_mode[mode] for mode in MODES]
        form = ",.2f" if key.endswith(", s") else ",.0f"
        ratio = f"{values[0] / values[1]:.2f}" if values[1] else "-"
        table.add_row(key, *(f"{value:{form}}" for value in values), ratio)
    Console(width=120).print(table)
