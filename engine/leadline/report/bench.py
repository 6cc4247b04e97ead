"""What `leadline bench knn` measured, as tables and as a picture."""

from pathlib import Path
from typing import Any

import altair as alt
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from leadline.bench import QUALITIES
from leadline.report.plots import (
    FONT_SIZE,
    GREY,
    RESOLUTION,
    Scale,
    family,
    finished,
    log_scale,
    log_ticks,
    look,
    miss_scale,
    miss_ticks,
    place_labels,
    save_chart,
    short_names,
)
from leadline.store.files import replacing, write_json

WIDTH, HEIGHT = 460, 300  # of a panel, in pixels
HEADS = {"recall": "recall", "vote_agreement": "votes", "depth_agreement": "depths", "depth_error": "error, layers"}
MIB = 2**20


def write_knn(result: dict[str, Any], folder: Path) -> None:
    """Write a comparison to a folder: knn.json, knn.txt with the tables, knn.png and knn.svg."""
    write_json(folder / "knn.json", result)
    with replacing(folder / "knn.txt") as beside, beside.open("w") as opened:
        console = Console(file=opened, width=200)
        for table in knn_tables(result):
            console.print(table)
    chart = knn_chart(result)
    for suffix in ("png", "svg"):
        save_chart(chart, folder / f"knn.{suffix}")


def knn_tables(result: dict[str, Any]) -> list[Table]:
    """Each method over all layers, and layer by layer. A star: on the Pareto front of time and that measure."""
    title = f"{_title(result)}\n{_asked(result)}; * nothing is both as fast and as good"
    drawn = [_table(title, result["methods"], [""] * len(result["methods"]))]
    for layer in result["layers"]:
        names = [layer["layer"], f"{layer['width']} wide"]
        drawn.append(_table(None, layer["methods"], [*names, *[""] * len(layer["methods"])]))
    return drawn


def _table(title: str | None, rows: list[dict[str, Any]], names: list[str]) -> Table:
    drawn = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    drawn.add_column("all layers" if title else "layer")
    drawn.add_column("method", overflow="fold", min_width=max(len(row["method"]) for row in rows))
    measures = [name for name in HEADS if name in rows[0]]
    for head in ("build, s", "search, s", "total, s", "of exact", "MiB", *(HEADS[name] for name in measures)):
        drawn.add_column(head, justify="right")
    for name, row in zip(names, rows, strict=False):
        times = (row["build_seconds"], row["seconds"] - row["build_seconds"], row["seconds"])
        drawn.add_row(
            name,
            row["method"],
            *(f"{seconds:.3g}" for seconds in times),
            f"{row['seconds'] / rows[0]['seconds']:.2f}",
            f"{row['index_bytes'] / MIB:.1f}",
            *(_share(row, measure) for measure in measures),
        )
    return drawn


def _share(row: dict[str, Any], name: str) -> str:
    interval = f" [{row[f'{name}_low']:.4f}, {row[f'{name}_high']:.4f}]" if f"{name}_low" in row else ""
    return f"{row[name]:.4f}{'*' if row['pareto'].get(name) else ' '}{interval}"


def _title(result: dict[str, Any]) -> str:
    return f"{result['title']}: approximate neighbours beside exact ones"


def _asked(result: dict[str, Any]) -> str:
    asked = f"{result['queries']:,} of {result['points']:,} points asked" if result["is_sample"] else "all points asked"
    return (
        f"{result['bank']:,} bank rows, {asked}, k = {result['k']}, {len(result['layers'])} layers, "
        f"{result['threads']} thread{'s' * (result['threads'] > 1)}"
    )


def knn_chart(result: dict[str, Any]) -> Any:
    """Recall, agreement of votes and of depths against time, with the Pareto front; and the memory of each method."""
    rows = result["methods"]
    titles = {
        "recall": f"recall@{result['k']}, mean of layers",
        "vote_agreement": "votes as exact, mean of layers",
        "depth_agreement": "depths as exact",
    }
    panels = [_against_time(rows, name, titles[name]) for name in QUALITIES if name in rows[0]]
    chart = alt.concat(*panels, _memory(rows), columns=2, spacing=36).resolve_scale(color="shared", shape="shared")
    whole = "search scaled from a sample to all points" if result["is_sample"] else "for all points once"
    lines = [
        f"{_asked(result)}, {result['hardware'].partition(' (')[0]}. Time: build and search, all layers, {whole}.",
        "Vertical scales are stretched towards 1. Grey line and filled marks: nothing is both as fast and as good."
        + (" Bars: 95 % intervals." if result["is_sample"] else ""),
    ]
    return finished(chart, _title(result), lines)


def _against_time(rows: list[dict[str, Any]], name: str, title: str) -> Any:
    """One measure of every method against its time. Drawn is what a share lacks to 1, and told is the share."""
    across = log_scale([row["seconds"] for row in rows], WIDTH)
    down = miss_scale([1 - row.get(f"{name}_low", row[name]) for row in rows], HEIGHT)
    x = alt.X(
        "seconds:Q",
        title="seconds to build and search",
        scale=alt.Scale(type="log", domain=[across.low, across.high], nice=False),
        axis=alt.Axis(values=log_ticks(across), format="~g"),
    )
    y = alt.Y(
        "miss:Q",
        title=title,
        scale=alt.Scale(type="symlog", constant=RESOLUTION, domain=[down.high, down.low], nice=False),
        axis=alt.Axis(values=miss_ticks(down), labelExpr="format(1 - datum.value, '.4~f')"),
    )
    methods = [row["method"] for row in rows]
    looks = look(methods)
    marks = [
        {
            "family": family(row["method"]),
            "seconds": row["seconds"],
            "miss": 1 - row[name],
            "low": 1 - row.get(f"{name}_low", row[name]),
            "high": 1 - row.get(f"{name}_high", row[name]),
            "on": 1 if row["pareto"][name] else 0.15,
        }
        for row in rows
    ]
    front = sorted((mark for mark in marks if mark["on"] == 1), key=lambda mark: (mark["seconds"], mark["miss"]))
    line = [*front, {**front[-1], "seconds": across.high}]
    drawn = [
        alt.Chart(alt.Data(values=line)).mark_line(interpolate="step-after", color=GREY, strokeWidth=1.5).encode(x, y),
        alt.Chart(alt.Data(values=marks))
        .mark_rule(opacity=0.6, strokeWidth=1.5)
        .encode(x, y="low:Q", y2="high:Q", color=looks["color"]),
        *_labels(marks, short_names(methods), across, down, x, y),
        alt.Chart(alt.Data(values=marks))
        .mark_point(size=90, strokeWidth=1.5)
        .encode(
            x,
            y,
            **looks,
            fillOpacity=alt.FillOpacity("on:Q", scale=None),
        ),
    ]
    return alt.layer(*drawn).properties(width=WIDTH, height=HEIGHT)


def _labels(marks: list[dict[str, Any]], texts: list[str], across: Scale, down: Scale, x: Any, y: Any) -> list[Any]:
    """Names beside marks, and lines from one to the other."""
    points = [(across.pixel(mark["seconds"]), down.pixel(mark["miss"])) for mark in marks]
    places = place_labels(points, texts, WIDTH, HEIGHT)
    named = [
        {**mark, "text": text, "to_seconds": across.value(a), "to_miss": down.value(b)}
        for mark, text, (a, b) in zip(marks, texts, places, strict=True)
    ]
    base = alt.Chart(alt.Data(values=named))
    lines = base.mark_rule(color=GREY, strokeWidth=0.6).encode(x, y, x2="to_seconds:Q", y2="to_miss:Q")
    behind = base.mark_text(fontSize=FONT_SIZE, stroke="white", strokeWidth=4)
    names = base.mark_text(fontSize=FONT_SIZE, color="#333333")
    at = {"x": "to_seconds:Q", "y": "to_miss:Q", "text": "text:N"}
    return [lines, behind.encode(**at), names.encode(**at)]


def _memory(rows: list[dict[str, Any]]) -> Any:
    """Bytes that a method holds beside the rows, all layers together."""
    methods = [row["method"] for row in rows]
    names, sizes = short_names(methods), [row["index_bytes"] / MIB for row in rows]
    values = [
        {"method": name, "family": family(method), "mib": size, "text": f"{size:,.1f}"}
        for name, method, size in zip(names, methods, sizes, strict=True)
    ]
    room = alt.Scale(domain=[0, 1.15 * max(*sizes, 0.1)], nice=False)
    bars = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X("mib:Q", title="MiB beside the rows, all layers", scale=room),
        y=alt.Y("method:N", title=None, sort=names, axis=alt.Axis(labelLimit=220)),
    )
    filled = bars.mark_bar().encode(color=look(methods)["color"])
    told = bars.mark_text(align="left", dx=4, fontSize=FONT_SIZE, color="#333333").encode(text="text:N")
    return (filled + told).properties(width=WIDTH, height=HEIGHT)
