"""A study's tables as files, figures and a page."""

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import altair as alt
import pyarrow as pa
from PIL import Image

from leadline.errors import LeadlineError
from leadline.knn.arrays import Array
from leadline.query import Run
from leadline.report.pictures import picture
from leadline.report.plots import COLOURS, finished, save_chart
from leadline.store.files import replacing
from leadline.study.accuracy import accuracy, again, write_again
from leadline.study.analyses import ANALYSES, Material, material_of, plane_of_ensemble
from leadline.study.claims import claims
from leadline.study.ensembles import Ensemble, read_ensembles
from leadline.study.kinds import KINDS
from leadline.study.networks import Networks
from leadline.study.tables import keep_tables, kept_tables

WIDTH, HEIGHT = 230, 170  # of a panel
SHOWN = 60  # rows of a table that the page shows whole; longer ones are in their file and figure
TILE, COLUMNS = 56, 12  # pixels of an example image, and images of a row


@dataclass(frozen=True)
class Section:
    """A table of the study: what it is called, how to read it, and its figure, None where the table tells it all."""

    title: str
    reads: str
    draw: Callable[[list[dict[str, Any]]], Any] | None = None


def write_study(
    run: Run, folder: Path, only: Sequence[str] = (), others: Sequence[Run] = (), tell: Callable[[str], None] = print
) -> Path:
    """Make a study of a finished run: tables as CSV, figures as SVG, and page.md that shows them. Returns the page.

    only: names of analyses, by default all; others: runs that were trained again (see `write_again`), compared with
    this one by the analysis `accuracy`. What networks are asked again is kept in the folder, and so are the tables of
    each analysis: the page shows those that were made now and those that were made before of the run as it is.
    Analyses that need what the run has not got (corrupted labels, checkpoints, several members) give no table.

    Raises LeadlineError for an unknown name, others without `accuracy`, a run that is not finished, and one of others
    that is not this one again.
    """
    analyses: dict[str, Callable[[Material], dict[str, pa.Table]]] = {**ANALYSES, "accuracy": accuracy}
    unknown = [name for name in only if name not in analyses]
    if unknown:
        raise LeadlineError(f"--only: {unknown[0]!r} is no analysis; allowed: {', '.join(analyses)}")
    chosen = [name for name in analyses if name in (only or analyses)]
    if others and "accuracy" not in chosen:
        raise LeadlineError("--again: runs that were trained again are compared by accuracy; name it in --only too")
    ensembles = read_ensembles(run)
    material = material_of(ensembles, Networks(run, folder / "networks", tell))
    compared = again(material, others) if others else {}
    folder.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        tell(name)
        keep_tables(run, folder / "tables", name, analyses[name](material))
    if others:
        keep_tables(run, folder / "tables", "again", compared)
    if "accuracy" in chosen:
        for ensemble in material.ensembles:
            write_again(ensemble, folder / "again" / ensemble.architecture)
    if "kinds" in chosen:
        for ensemble in material.ensembles:
            _draw_typical(ensemble, material.networks, folder)
    tables = kept_tables(run, folder / "tables")
    if (held := claims(tables)) is not None:
        tables["claims"] = held
    sheets = [sheet for ensemble in material.ensembles if (sheet := _sheet(folder, ensemble)).exists()]
    return _write_page(tables, folder, _about(run, ensembles), sheets if "kinds" in tables else [])


def _about(run: Run, ensembles: Sequence[Ensemble]) -> list[str]:
    """What was studied, for the head of the page."""
    said = [
        f"{_plain(one.architecture)}: {len(one.members)} members, {one.n_probes} probes" for one in ensembles
    ]  # fmt: skip
    manifest, one = run.manifest, ensembles[0]
    corrupted = f", {int(one.corrupted.sum()):,} labels corrupted" if one.corrupted.any() else ""
    return [
        f"# Study of {manifest['name']}",
        f"{len(one.labels):,} points ({int(one.in_test.sum()):,} in part test{corrupted}), k = "
        f"{manifest['configuration']['k']}. {'; '.join(said)}.",
        "Intervals are of 95 %, by the bootstrap over members: what other members, trained on the same data, would "
        "have given. Where there is one member there is none.",
        f"Configuration {manifest['fingerprint'][:16]}, data {manifest['data']['fingerprint'][:16]}, leadline "
        f"{manifest['versions']['leadline']}, torch {manifest['versions']['torch']}.",
    ]


def _draw_typical(ensemble: Ensemble, networks: Networks, folder: Path) -> None:
    """A picture of the most typical images of each kind, where points are images."""
    plane = plane_of_ensemble(ensemble)
    if len(networks.points.input_shape) == 3 and plane.beyond is not None:
        write_sheet(_sheet(folder, ensemble), [networks.points.read(ids) for ids in plane.typical(COLUMNS)])


def _sheet(folder: Path, ensemble: Ensemble) -> Path:
    return folder / f"kinds-{ensemble.architecture}.png"


def _write_page(tables: Mapping[str, pa.Table], folder: Path, about: Sequence[str], sheets: Sequence[Path]) -> Path:
    lines = [line for paragraph in about for line in (paragraph, "")]
    for name, section in SECTIONS.items():
        if name in tables:
            lines += _section(name, section, tables[name], folder)
    for sheet in sheets:
        what = f"The most typical images of each kind, {sheet.stem.removeprefix('kinds-')}"
        lines += [
            f"## {what}",
            "",
            f"A line of images for each: {', '.join(KINDS)}.",
            "",
            f"![{what}]({sheet.name})",
            "",
        ]
    page = folder / "page.md"
    with replacing(page) as beside:
        beside.write_text("\n".join(lines))
    return page


def write_sheet(path: Path, rows: Sequence[Array]) -> None:
    """A picture of example images: one row of images (see `picture`) a line."""
    height, width = TILE * len(rows), TILE * COLUMNS
    sheet = Image.new("RGB", (width, height), "white")
    for y, images in enumerate(rows):
        for x, values in enumerate(images[:COLUMNS]):
            if (image := picture(values)) is not None:
                tile = image.resize((TILE - 2, TILE - 2), Image.Resampling.NEAREST)
                sheet.paste(tile, (x * TILE, y * TILE))
    with replacing(path) as beside:
        sheet.save(beside, format="PNG")


def _section(name: str, section: Section, table: pa.Table, folder: Path) -> Iterator[str]:
    rows = table.to_pylist()
    with replacing(folder / f"{name}.csv") as beside, beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, table.column_names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _figure(value) for key, value in row.items()} for row in rows)
    yield f"## {section.title}"
    yield from ("", section.reads, "")
    if section.draw:
        chart = finished(section.draw(rows), section.title, [])
        save_chart(chart, folder / f"{name}.svg")
        yield from (f"![{section.title}]({name}.svg)", "")
    if len(rows) <= SHOWN:
        yield from _markdown(table.column_names, rows)
    yield from (f"Table: [{name}.csv]({name}.csv)", "")


def _markdown(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """value, low and high in one column."""
    kept = [column for column in columns if column not in ("low", "high")]
    yield "| " + " | ".join("value (95 % interval)" if c == "value" else c.replace("_", " ") for c in kept) + " |"
    yield "|" + "|".join("---" for _ in kept) + "|"
    for row in rows:
        cells = []
        for column in kept:
            text = str(_shown(row[column]))
            if column == "value" and row.get("low") is not None:
                text += f" ({_shown(row['low'])} to {_shown(row['high'])})"
            cells.append(_plain(text))
        yield "| " + " | ".join(cells) + " |"
    yield ""


def _plain(text: str) -> str:
    """A name that a user gave, such that it is text in a page and in a cell of a table."""
    return re.sub(r"([\\|`\[\]])", r"\\\1", escape(" ".join(text.split()), quote=False))


def _shown(value: Any) -> Any:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else value


def _figure(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _lines(
    rows: list[dict[str, Any]], x: str, colour: str, panels: Sequence[str], title: str, *, log: bool = False,
    points: bool = True,
) -> Any:  # fmt: skip
    """Lines of value over x with their intervals, a panel for each combination of some columns."""
    data, order = _panels(rows, panels)
    names = list(dict.fromkeys(row[colour] for row in rows))
    # Layers of a deep network are more than there are colours that all eyes tell apart: they go from dark to light.
    kind, look = ("N", {"range": list(COLOURS)}) if len(names) <= len(COLOURS) else ("O", {"scheme": "viridis"})
    scale = alt.Scale(type="symlog") if log else alt.Scale()
    base = alt.Chart(alt.Data(values=data)).encode(
        x=alt.X(f"{x}:Q", title=x.replace("_", " "), scale=scale),
        color=alt.Color(
            f"{colour}:{kind}", title=None, scale=alt.Scale(domain=names, **look), sort=names,
            legend=alt.Legend(orient="bottom", labelLimit=400),
        ),
    )  # fmt: skip
    y = alt.Y("value:Q", title=title, scale=alt.Scale(zero=False))
    band = (
        base.transform_filter("isValid(datum.low)")
        .mark_area(opacity=0.2)
        .encode(y=alt.Y("low:Q", title=title), y2="high:Q")
    )
    line = base.mark_line(point=points, strokeWidth=1.5).encode(y=y)
    layer = alt.layer(band, line).properties(width=WIDTH, height=HEIGHT)
    return layer.facet(alt.Facet("panel:N", title=None, sort=order), columns=3).resolve_scale(y="independent")


def _dots(rows: list[dict[str, Any]], label: str, panels: Sequence[str], title: str) -> Any:
    """A dot with its interval for each label."""
    data, order = _panels(rows, panels)
    base = alt.Chart(alt.Data(values=data)).encode(
        y=alt.Y(f"{label}:N", title=None, sort=None, axis=alt.Axis(labelLimit=260))
    )
    known = base.transform_filter("isValid(datum.low)")
    rule = known.mark_rule(color=COLOURS[0], strokeWidth=2).encode(x=alt.X("low:Q", title=title), x2="high:Q")
    dot = base.mark_point(color=COLOURS[0], filled=True, size=50).encode(
        x=alt.X("value:Q", title=title, scale=alt.Scale(zero=False))
    )
    layer = alt.layer(rule, dot).properties(width=WIDTH * 1.3)
    return layer.facet(alt.Facet("panel:N", title=None, sort=order), columns=2)


def _panels(rows: list[dict[str, Any]], panels: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows with the panel of each, and the panels in the order of the rows, which Vega-Lite would sort by name."""
    data = [{**row, "panel": ", ".join(str(row[name]) for name in panels)} for row in rows]
    return data, list(dict.fromkeys(row["panel"] for row in data))


def _curve(rows: list[dict[str, Any]]) -> Any:
    return _lines(
        [{**row, "value": row["risk"]} for row in rows], "coverage", "ordered_by", ["architecture"],
        "share of wrong answers", points=False,
    )  # fmt: skip


SECTIONS: dict[str, Section] = {
    "claims": Section(
        "The claims of the paper's abstract, on this run",
        "A claim holds where the whole interval lies on the side that it says, and is open where the interval holds 0. "
        "The sections below have the tables that these are from.",
    ),
    "relations_by_depth": Section(
        "Depth against the other measures",
        "Each panel is one measure, averaged over the points of one mean depth; bands are 95 % intervals over members.",
        lambda rows: _lines(rows, "depth", "split", ["architecture", "measure"], "mean"),
    ),
    "rank_correlations": Section(
        "Rank correlations with depth",
        "Spearman's correlation over points: 1 where the measure rises with depth throughout, -1 where it falls.",
        lambda rows: _dots(rows, "measure", ["architecture", "split"], "rank correlation with depth"),
    ),
    "between_architectures": Section(
        "Depth in one architecture against depth in another",
        "Near 1, depth is a property of the point; near 0, of the network.",
    ),
    "kinds": Section(
        "Kinds of difficulty",
        "Points by how deep they are held out and in training, where deep is beyond the threshold given (by default "
        "the 75 % quantile). Points that no member holds out, or none was trained on, are unplaced.",
    ),
    "kinds_by_layer": Section(
        "How networks come to each kind",
        "Share of votes that are the given label, by layer: kinds are worked out at different layers.",
        lambda rows: _lines(rows, "probe", "kind", ["architecture", "split"], "probe accuracy"),
    ),
    "probe_accuracy": Section(
        "Probe accuracy by layer",
        "Where votes in training are the given labels more often than held out, the layer memorises; where corrupted "
        "points are given their clean labels, it generalises.",
        lambda rows: _lines(
            [{**row, "what": f"{row['points']}, against {row['against']}"} for row in rows], "probe", "what",
            ["architecture", "split"], "share of votes",
        ),
    ),
    "probes_by_step": Section(
        "Probes along training",
        "A layer has converged where its votes are those that it has at the end of training.",
        lambda rows: _lines(
            [{**row, "layer": f"{row['probe']} {row['name']}"} for row in rows], "step", "layer",
            ["architecture", "measure"], "share of votes", log=True,
        ),
    ),
    "step_of_convergence": Section(
        "The step at which each probe has converged",
        "The first step from which on at least 95 % of a probe's votes are those at the last step; to the resolution "
        "of the steps that were kept.",
    ),
    "depth_by_step": Section(
        "Mean depth along training",
        "Depth is against the network's own class at that step.",
        lambda rows: _lines(rows, "step", "split", ["architecture"], "mean depth", log=True),
    ),
    "corrupted_labels": Section(
        "Finding corrupted labels",
        "Precision where as many points are flagged as are corrupted, and average precision; all from the same "
        "members.",
        lambda rows: _dots(rows, "score", ["architecture", "measure"], "share"),
    ),
    "early_read_out": Section(
        "Better accuracy: early read-out",
        "Each member is read at the layer whose votes are best on its validation points, by the labels given there; "
        "accuracy is on the untouched part.",
    ),
    "trained_again": Section(
        "Better accuracy: trained again without the points that depth marks",
        "The same members and seeds, with the marked points dropped, or given the class that members hold out give "
        "them; accuracy is on the untouched part.",
    ),
    "rejection": Section(
        "Rejecting answers",
        "Area under the risk-coverage curve (AURC, lower is better) of the ensemble's answers, by what they are "
        "ordered by, and how much depth takes from it.",
    ),
    "risk_coverage": Section(
        "Risk against coverage",
        "Share of wrong answers among those that are kept, the most confident first.",
        _curve,
    ),
    "how_many_members": Section(
        "How many members are enough",
        "Rank correlation of the mean depths of m members with those of m others.",
        lambda rows: _lines(rows, "members", "split", ["architecture"], "rank correlation"),
    ),
    "probe_accuracy_by_k": Section(
        "Probe accuracy by the number of neighbours",
        "Where lines lie together, k does not matter.",
        lambda rows: _lines(
            [{**row, "neighbours": f"k = {row['k']}"} for row in rows], "probe", "neighbours",
            ["architecture", "split"], "probe accuracy",
        ),
    ),
    "depth_by_k": Section("Depth by the number of neighbours", "Beside the run's own k."),
}  # fmt: skip
