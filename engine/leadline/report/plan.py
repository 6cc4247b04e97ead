"""A plan in one screen of text."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

UNITS = ("", "k", "M", "G", "T", "P", "E")


def print_plan(plan: dict[str, Any], console: Console) -> None:
    """plan: the record of a `cluster.plan.Plan`: stages, totals, what is assumed, and what cannot be."""
    cluster, priced = plan["cluster"], plan["cost"] is not None
    drawn = Table(title=_title(plan), title_justify="left", box=SIMPLE_HEAD)
    names = ["stage", "units", "work", "FLOP", "read", "written", "memory of a worker", "worker time", "time"]
    if cluster["device"] is not None:
        names.insert(7, "of its GPU")
    for name in [*names, *(["cost"] if priced else [])]:
        drawn.add_column(name, justify="left" if name == "stage" else "right")
    for stage in plan["stages"]:
        cells = [
            stage["name"], f"{stage['units']:,}", f"{_short(stage['work'])} {stage['measure']}", _short(stage["flops"]),
            f"{_short(stage['read'])}B", f"{_short(stage['written'])}B", f"{_short(plan['base'] + stage['memory'])}B",
            _time(stage["seconds"]), _time(stage["time"]),
        ]  # fmt: skip
        if cluster["device"] is not None:
            cells.insert(7, f"{_short(stage['device'])}B")
        drawn.add_row(*cells, *([f"{stage['cost']:,.2f}"] if priced else []))
    console.print(drawn)
    lines = [
        f"from beginning to end {_time(plan['seconds'])}, of which workers are busy {plan['busy']:.0%}; "
        f"{_time(plan['start'])} until they are there",
        f"scratch: {_short(plan['scratch'])}B for a group of members, placement {plan['placement']}",
    ]
    if priced:
        lines.append(f"cost: {plan['cost']:,.2f}, at {cluster['price']:g} an hour and node")
    said = [(what, text) for what in ("assumptions", "advice") for text in plan[what]]
    for line in [*lines, *(f"{what}: {text}" for what, text in said)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _title(plan: dict[str, Any]) -> str:
    return (
        f"{plan['name']}: {plan['points']:,} points, {plan['members']} members, {plan['probes']} probes of members, on "
        f"{plan['cluster']['said']}"
    )


def _short(number: float) -> str:
    """Three figures and a unit: 1.28M."""
    power = 0
    while number >= 999.5 and power < len(UNITS) - 1:
        number /= 1000
        power += 1
    return f"{number:.3g}{' ' if power else ''}{UNITS[power]}" if number < 1000 else f"{number:,.0f} {UNITS[power]}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h" if seconds < 72 * 3600 else f"{seconds / 86400:,.1f} days"
