"""Where does an index begin to pay? Build and search for all points once, for more and more, beside exact search.

python benchmarks/ann_vs_exact.py                    synthetic rows (inputs.DeepLayer), of several widths
python benchmarks/ann_vs_exact.py --run RUN          the layers of a stored member, as far as it has points

All points are bank and queries, each left out of its own neighbours; whole calls are timed. What would take longer than
--seconds, as the sizes before it say, is done for a random part of the queries and its search time scaled
("extrapolated"); where building alone, or that part, would take longer still, or the rows do not fit --memory, seconds
are computed from the growth over the last sizes that were run ("computed").
Writes benchmarks/results/ann_vs_exact-NAME-PROCESSOR.json and .png.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import altair as alt
import numpy as np
import torch
import typer
from inputs import DeepLayer
from record import stamp, write_result
from rich.console import Console
from rich.table import Table

from leadline.bench import EXACT, PACKAGES, SEED, Question, answer, usual_methods
from leadline.errors import LeadlineError
from leadline.knn import count_votes, parse_method, usable_method
from leadline.knn.arrays import Array
from leadline.knn.audit import draw, recall_at_k
from leadline.layers import open_layers
from leadline.report.plots import FONT_SIZE, family, finished, log_scale, log_ticks, look, save_chart, short_names

CHUNK = 20_000  # rows that are drawn at once
LEAST = 1000  # queries
FITTED = 3  # sizes that a growth is fitted on
MOST = 2.0  # exponent of all pairs; it is taken where only one size was run
MEASURED, EXTRAPOLATED, COMPUTED = "measured", "extrapolated", "computed"
WIDTH, HEIGHT, APART = 480, 360, 14  # pixels of a panel, and between names in it

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
Cell = dict[str, Any]


@dataclass(frozen=True)
class Series:
    """Rows of one kind: `draw(n)` gives n of them, float32 [n, width], with labels int [n]; there are `most`."""

    name: str
    width: int
    most: int
    draw: Callable[[int], tuple[Array, Array]]


@dataclass(frozen=True)
class Budget:
    """Seconds of a cell: to build, and to search; and bytes, of the rows and an index that holds them again."""

    seconds: float
    memory: int


@app.command()
def main(
    run: Annotated[Path | None, typer.Option(help="directory of a run; without it rows are synthetic")] = None,
    member: Annotated[str | None, typer.Option(help="of the run; by default the first")] = None,
    layers: Annotated[list[str] | None, typer.Option("--layer", help="of the member; by default all")] = None,
    points: Annotated[list[int], typer.Option("--points", min=LEAST)] = [  # noqa: B006
        1000, 3000, 10_000, 30_000, 100_000, 300_000, 1_000_000
    ],
    widths: Annotated[list[int], typer.Option("--width", min=1, help="of synthetic rows")] = [128, 512],  # noqa: B006
    latent: Annotated[int, typer.Option(min=1, help="intrinsic dimensions of synthetic rows")] = 8,
    methods: Annotated[list[str] | None, typer.Option(help="several with spaces between them, or again")] = None,
    seconds: Annotated[float, typer.Option(help="that a cell may take to build, and to search")] = 120.0,
    memory: Annotated[float, typer.Option(help="GiB of rows and an index")] = 12.0,
    threads: Annotated[int, typer.Option(min=1)] = os.cpu_count() or 1,
    k: Annotated[int, typer.Option("-k", min=1)] = 30,
) -> None:  # fmt: skip
    """Time for all points once, by their number, and where each index begins to pay."""
    torch.set_num_threads(threads)
    given = [text for several in methods or [] for text in several.split()]
    texts = list(dict.fromkeys([EXACT, *(str(parse_method(text)) for text in given or _by_default())]))
    for text in texts:
        usable_method(text)
    budget, name = Budget(seconds, int(memory * 2**30)), f"latent{latent}"
    series: Iterator[Series] = (_synthetic(latent, width) for width in widths)
    if run is not None:
        stored = open_layers(run, member)
        name, series = stored.about["name"], _of_member(stored, layers or stored.names)
    found = [measure(one, sorted(points), texts, budget, k) for one in series]
    result = {
        **stamp(PACKAGES, threads),
        "source": stored.about if run is not None else {"generator": " ".join((DeepLayer.__doc__ or "").split())},
        "k": k,
        "seconds_of_a_cell": seconds,
        "memory_gib": memory,
        "series": found,
    }
    for one in found:
        Console(width=150).print(table(one))
    path = write_result(f"ann_vs_exact-{name}", result)
    save_chart(chart(result), path.with_suffix(".png"))


def _by_default() -> list[str]:
    """The usual methods with the parameters that they take by themselves: those for one size say little of another."""
    usable, _ = usual_methods(LEAST)
    return [family(text) for text in usable]


def _synthetic(latent: int, width: int) -> Series:
    layer = DeepLayer(latent, width)

    def rows(n: int) -> tuple[Array, Array]:
        values, labels = np.empty((n, width), np.float32), np.empty(n, np.int64)
        for first in range(0, n, CHUNK):
            part = slice(first, min(first + CHUNK, n))
            values[part], labels[part] = layer.draw(part.stop - first, seed=first)
        return values, labels

    return Series(f"synthetic, {latent} intrinsic dimensions of {width}", width, 2**62, rows)


def _of_member(stored: Any, names: list[str]) -> Iterator[Series]:
    for name in names:
        if name not in stored.names:
            raise LeadlineError(f"--layer: {name!r} is not there; there are {', '.join(stored.names)}")
        with _copied(stored, stored.names.index(name)) as values:

            def rows(n: int, values: Array = values) -> tuple[Array, Array]:
                ids = draw(len(values), n, SEED)[0]
                return values[ids], stored.labels[ids]

            yield Series(f"{stored.title} {name}, width {values.shape[1]}", values.shape[1], len(values), rows)


@contextmanager
def _copied(stored: Any, layer: int) -> Iterator[Array]:
    with stored.rows(layer) as values:
        yield values


def measure(series: Series, points: list[int], methods: list[str], budget: Budget, k: int) -> dict[str, Any]:
    """Every method at every size of one kind of rows."""
    cells: dict[str, list[Cell]] = {method: [] for method in methods}
    for n in points:
        fits = n <= series.most and 2 * 4 * n * series.width <= budget.memory
        values, labels = series.draw(n) if fits else (None, None)
        exact: tuple[Array, Array] | None = None
        for method in methods:
            asked = queries_within(cells[method], n, budget) if values is not None else 0
            if not asked:
                cells[method].append(computed(cells[method], n))
            else:
                ids = draw(n, asked, SEED)[0]
                queries = values if asked == n else values[ids]
                given = answer(method, Question(values, queries, ids, k), "cpu")
                exact = (ids, given.neighbours) if method == EXACT else exact
                cells[method].append(ran(given, ids, n, exact, labels))
            cell = cells[method][-1]
            print(f"{series.name}: {n:,} points, {method}: {cell['seconds']:.3g} s, {cell['status']}", flush=True)
    rows = [
        {"method": method, "cells": own, "growth": growth(own, "seconds"), **pays(own, cells[EXACT])}
        for method, own in cells.items()
    ]
    return {"name": series.name, "width": series.width, "methods": rows}


def ran(given: Any, ids: Array, n: int, exact: tuple[Array, Array] | None, labels: Array) -> Cell:
    """A cell that was run, on the queries `ids`; recall and votes on those that exact search answered too."""
    search = given.figures["search_seconds"] * n / len(ids)
    cell = {
        "points": n,
        "status": MEASURED if len(ids) == n else EXTRAPOLATED,
        "queries": len(ids),
        "plan": given.figures["plan"],
        "build_seconds": given.figures["build_seconds"],
        "search_seconds": search,
        "seconds": given.figures["build_seconds"] + search,
        "index_bytes": given.figures["index_bytes"],
    }
    if exact is not None:
        _, own, theirs = np.intersect1d(ids, exact[0], assume_unique=True, return_indices=True)
        found, right = given.neighbours[own], exact[1][theirs]
        votes, exact_votes = (count_votes(labels[rows]).winner for rows in (found, right))
        cell |= {"compared": len(own), "recall": float(recall_at_k(found, right).mean())}
        cell["vote_agreement"] = float((votes == exact_votes).mean())
    return cell


def queries_within(cells: list[Cell], n: int, budget: Budget) -> int:
    """How many queries of n a method is asked within the budget, 0 where it is not to be run. The first size is run."""
    if not cells:
        return n
    build, search = grown(cells, "build_seconds", n), grown(cells, "search_seconds", n)
    asked = n if search <= budget.seconds else max(LEAST, int(n * budget.seconds / search))
    within = build <= budget.seconds and search * asked / n <= budget.seconds
    return asked if within else 0


def computed(cells: list[Cell], n: int) -> Cell:
    """A cell that was not run."""
    build, search = grown(cells, "build_seconds", n), grown(cells, "search_seconds", n)
    times = {"build_seconds": build, "search_seconds": search, "seconds": build + search}
    return {"points": n, "status": COMPUTED, **times}


def grown(cells: list[Cell], key: str, n: int) -> float:
    """Seconds at n points, from the last size that was run on."""
    last = [cell for cell in cells if cell["status"] != COMPUTED][-1]
    return float(last[key] * (n / last["points"]) ** growth(cells, key))


def growth(cells: list[Cell], key: str) -> float:
    """The exponent with which seconds grow with points, by least squares on the last sizes that were run.

    At least 1, and at most that of all pairs, which no method exceeds: where sizes are small, noise would say other.
    """
    some = [cell for cell in cells if cell["status"] != COMPUTED][-FITTED:]
    if len(some) == 1:
        return MOST
    slope = np.polyfit(*(np.log([cell[name] for cell in some]) for name in ("points", key)), 1)[0]
    return min(MOST, max(1.0, float(slope)))


def pays(cells: list[Cell], exact: list[Cell]) -> dict[str, Any]:
    """From how many points on a method takes less time than exact search, and whether a computed cell says so.

    Between two sizes the ratio of times is a power of the points. None where it does not up to the largest size.
    """
    ratios = [own["seconds"] / other["seconds"] for own, other in zip(cells, exact, strict=True)]
    above = [i for i, ratio in enumerate(ratios) if ratio >= 1]
    first = above[-1] + 1 if above else 0
    if first == len(cells):
        return {"pays_from": None, "pays_from_is_computed": None}
    sizes = [cell["points"] for cell in cells]
    at = float(sizes[0])
    if first:
        share = np.log(ratios[first - 1]) / (np.log(ratios[first - 1]) - np.log(ratios[first]))
        at = float(np.exp(np.log(sizes[first - 1]) + share * np.log(sizes[first] / sizes[first - 1])))
    by = COMPUTED in (cells[first]["status"], exact[first]["status"])
    return {"pays_from": at, "pays_from_is_computed": by}


def told(row: dict[str, Any]) -> str:
    """Where a method pays, in words."""
    if row["method"] == EXACT:
        return ""
    if row["pays_from"] is None:
        return f"not up to {row['cells'][-1]['points']:,}"
    size = float(f"{row['pays_from']:.2g}")
    return f"from {size:,.0f}{' (computed)' if row['pays_from_is_computed'] else ''}"


def table(series: dict[str, Any]) -> Table:
    signs = {MEASURED: "", EXTRAPOLATED: " e", COMPUTED: " c"}
    title = f"{series['name']}: seconds to build and search for all points (e extrapolated, c computed)"
    drawn = Table("method", title=title, title_justify="left")
    for cell in series["methods"][0]["cells"]:
        drawn.add_column(f"{cell['points']:,}", justify="right")
    drawn.add_column("recall", justify="right")
    drawn.add_column("pays")
    for row in series["methods"]:
        recalls = [cell["recall"] for cell in row["cells"] if "recall" in cell]
        times = [f"{cell['seconds']:.3g}{signs[cell['status']]}" for cell in row["cells"]]
        drawn.add_row(row["method"], *times, f"{min(recalls):.4f}" if recalls else "-", told(row))
    return drawn


def chart(result: dict[str, Any]) -> Any:
    """Time against points, a panel for each kind of rows."""
    panels = alt.concat(*(panel(series) for series in result["series"]), columns=2, spacing=40)
    lines = [
        f"k = {result['k']}, {result['hardware']}. Filled: measured. Pale: some of the queries, time scaled to all.",
        "Hollow and dashed: not run, computed from the growth over the sizes before. Beside a name: from how many "
        "points on it is faster than exact search.",
    ]
    return finished(panels, "Neighbours of all points once: build and search, by number of points", lines)


def panel(series: dict[str, Any]) -> Any:
    methods = [row["method"] for row in series["methods"]]
    cells = [
        {
            "method": row["method"],
            "family": family(row["method"]),
            "points": cell["points"],
            "seconds": cell["seconds"],
            "filled": {MEASURED: 1.0, EXTRAPOLATED: 0.35, COMPUTED: 0.0}[cell["status"]],
            "computed": cell["status"] == COMPUTED,
        }
        for row in series["methods"]
        for cell in row["cells"]
    ]
    # A line to a computed cell begins at the cell before it.
    lines = [
        {**end, "line": f"{end['method']} {i}", "dashed": b["computed"]}
        for i, (a, b) in enumerate(pairwise(cells))
        if a["method"] == b["method"]
        for end in (a, b)
    ]
    across = log_scale([cell["points"] for cell in cells], WIDTH * 0.62)
    down = log_scale([cell["seconds"] for cell in cells], HEIGHT)
    x = alt.X(
        "points:Q",
        title="points",
        scale=alt.Scale(type="log", domain=[across.low, across.value(WIDTH)], nice=False),
        axis=alt.Axis(values=[tick for tick in log_ticks(across) if tick <= across.high], format=",~r"),
    )
    y = alt.Y(
        "seconds:Q",
        title="seconds",
        scale=alt.Scale(type="log", domain=[down.low, down.high], nice=False),
        axis=alt.Axis(values=log_ticks(down), format=",~g"),
    )
    ends = [row["cells"][-1] for row in series["methods"]]
    heights = apart([down.pixel(cell["seconds"]) for cell in ends])
    names = [
        {
            "text": ": ".join(filter(None, [name, told(row)])),
            "family": family(row["method"]),
            "points": across.value(across.pixel(end["points"]) + 22),
            "seconds": down.value(height),
            "from_points": end["points"],
            "from_seconds": end["seconds"],
        }
        for row, name, end, height in zip(series["methods"], short_names(methods), ends, heights, strict=True)
    ]
    looks = look(methods)
    dash = alt.StrokeDash("dashed:N", scale=alt.Scale(domain=[False, True], range=[[1, 0], [5, 4]]), legend=None)
    return alt.layer(
        alt.Chart(alt.Data(values=lines))
        .mark_line(strokeWidth=1.6)
        .encode(x, y, color=looks["color"], detail="line:N", strokeDash=dash),
        alt.Chart(alt.Data(values=names))
        .mark_rule(strokeWidth=0.7, opacity=0.6)
        .encode(x, y, x2="from_points:Q", y2="from_seconds:Q", color=looks["color"]),
        alt.Chart(alt.Data(values=cells))
        .mark_point(size=60, strokeWidth=1.4)
        .encode(x, y, **looks, fillOpacity=alt.FillOpacity("filled:Q", scale=None)),
        alt.Chart(alt.Data(values=names))
        .mark_text(align="left", dx=3, fontSize=FONT_SIZE, color="#333333")
        .encode(x, y, text="text:N"),
    ).properties(width=WIDTH, height=HEIGHT, title=series["name"])


def apart(heights: list[float]) -> list[float]:
    """The same heights, moved where two are nearer than APART, in their order."""
    order = np.argsort(heights)
    moved = np.array(heights)[order]
    for _ in range(100):
        for i in range(1, len(moved)):
            lacking = APART - (moved[i] - moved[i - 1])
            if lacking > 0:
                moved[i - 1 : i + 1] += (-lacking / 2, lacking / 2)
        moved = np.clip(moved, APART / 2, HEIGHT - APART / 2)
    placed = np.empty(len(moved))
    placed[order] = moved
    return placed.tolist()


if __name__ == "__main__":
    app()
