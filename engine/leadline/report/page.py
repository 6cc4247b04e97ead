"""`leadline report`: a run in one page that opens from disk, with no network."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined

from leadline.errors import LeadlineError
from leadline.knn.arrays import Array
from leadline.points import Points
from leadline.query import Run, quoted
from leadline.report.charts import CLASSES, Charts, plane_chart
from leadline.report.pictures import data_uri, points_of, small_picture
from leadline.report.summary import hardest
from leadline.store.files import replacing
from leadline.study.kinds import KINDS
from leadline.study.plane import Plane, read_plane

TYPICAL = 12  # images of each kind
HARDEST = 12  # points that are shown with the trail of their votes
MEANINGS = {
    "easy": "decided early, whether or not the network was trained on them",
    "looks like a different class": "decided early held out, as another class often; their given label comes in late",
    "ambiguous unless the label is given": "decided late held out; networks that are trained on them have no trouble",
    "ambiguous": "decided late even by networks that are trained on them",
}


@dataclass(frozen=True)
class Chart:
    """A chart of the page: its heading, the sentence that says how to read it, and its Vega-Lite specification."""

    title: str
    reads: str
    spec: dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A kind of points: its name, what it means, how many points are of it, and its most typical points' pictures."""

    name: str
    means: str
    n: int
    pictures: Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Chapter:
    """What the page says of one architecture. trails: the hardest points, each with its votes by probe."""

    architecture: str
    probes: Sequence[str]
    charts: Sequence[Chart]
    kinds: Sequence[Kind]
    beyond: tuple[float, float] | None
    trails: Sequence[dict[str, Any]]


def write_report(run: Run, path: Path) -> None:
    """Write the page of a finished run, one HTML file that needs no other.

    Where the data are no longer at hand there are no pictures, and the page says why. Raises LeadlineError for a run
    that is not finished or is damaged.
    """
    charts = Charts(run)
    points: Points | None = None
    missing = ""
    try:
        points = points_of(run)
    except LeadlineError as error:
        missing = str(error)
    environment = Environment(
        loader=PackageLoader("leadline.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template("report.html").render(
        run=run.manifest,
        facts=list(_facts(run)),
        stages=_chart(
            "Where the time went",
            "Seconds that workers were at each stage, added up over all of them; a stage is described in the "
            "documentation of runs.",
            charts.stages(),
        ),
        chapters=[_chapter(run, charts, name, points) for name in charts.architectures],
        missing=missing,
        vega=vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        beside.write_text(page, encoding="utf-8")


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    """What was run, and how sure it is."""
    manifest = run.manifest
    config, versions = manifest["configuration"], manifest["versions"]
    (told,) = run.sql("""
        SELECT count(*) AS n, count(*) FILTER (part = 'test') AS test, count(DISTINCT label) AS classes,
            count(*) FILTER (clean_label IS NOT NULL AND clean_label <> label) AS corrupted
        FROM points
    """).to_pylist()
    corrupted = f", {told['corrupted']:,} labels corrupted" if told["corrupted"] else ""
    yield "points", f"{told['n']:,}, {told['test']:,} of them in part test, {told['classes']:,} classes{corrupted}"
    for row in run.sql("""
        SELECT architecture, count(*) AS n, any_value(n_probes) AS probes, avg(held_out_accuracy) AS accuracy,
            any_value(audit_sample) AS sample, avg(depth_agreement) AS agreement, min(depth_agreement_low) AS low
        FROM members GROUP BY architecture ORDER BY architecture
    """).to_pylist():
        accuracy = f", {row['accuracy']:.2%} accurate held out" if row["accuracy"] is not None else ""
        yield row["architecture"], f"{row['n']:,} members, {row['probes']} probes{accuracy}"
        if row["agreement"] is not None:
            yield (
                "audit",
                f"{row['agreement']:.2%} of depths are those of exact votes (at least {row['low']:.2%} in each member, "
                f"95 %), measured on {row['sample']:,} points of each",
            )
    methods = run.sql("SELECT DISTINCT method, reduction FROM probes ORDER BY ALL").to_pylist()
    said = "; ".join(
        row["method"] + ("" if row["reduction"] == "none" else f" of {row['reduction']}") for row in methods
    )
    yield "votes", f"of the {config['k']} nearest training points, {said}"
    yield "configuration", manifest["fingerprint"]
    yield "data", manifest["data"]["fingerprint"]
    yield "made with", ", ".join(f"{name} {version}" for name, version in versions.items())


def _chapter(run: Run, charts: Charts, architecture: str, points: Points | None) -> Chapter:
    plane = read_plane(run, architecture)
    named = run.sql(f"""
        SELECT probe, any_value(name) AS name FROM probes WHERE architecture = {quoted(architecture)}
        GROUP BY probe ORDER BY probe
    """)
    return Chapter(
        architecture=architecture,
        probes=named["name"].to_pylist(),
        charts=_charts(charts, architecture, plane_chart(plane, len(named))),
        kinds=[] if plane.beyond is None else _kinds(run, architecture, plane, points),
        beyond=plane.beyond,
        trails=_trails(run, architecture, len(named), points),
    )


def _charts(charts: Charts, architecture: str, plane: alt.LayerChart) -> list[Chart]:
    by_depth = partial(charts.by_depth, architecture=architecture)
    return [
        _chart(
            "How right is each layer?",
            "At every probe the nearest training points vote for a class: the higher a line, the more often the vote "
            "is the label that was given. Where training is far above held out, the layer has memorised.",
            charts.probe_accuracy(architecture),
        ),
        _chart(
            "How deep are points decided?",
            "Depth is the number of layers until all later votes agree with the network's own answer; at depth 0 the "
            "input's neighbours already give it.",
            charts.depths(architecture),
        ),
        _chart(
            "Are deep points answered wrongly?",
            "Of points that a member was not trained on, by their depth in it: the share that it gets right. The band "
            "is what other members may have given (95 %).",
            by_depth("accuracy"),
        ),
        _chart(
            "Do members disagree about deep points?",
            "The share of members that answer as most of the members do that hold the point out.",
            by_depth("consistency"),
        ),
        _chart(
            "Are networks unsure about deep points?",
            "The entropy of the network's own softmax: 0 where it is sure of one class.",
            by_depth("entropy"),
        ),
        _chart(
            "Easy, ambiguous, or like another class?",
            "Each cell counts the points of these mean depths. Dashed lines part low from deep; the corners are the "
            "kinds of points below.",
            plane,
        ),
        _chart(
            "Which classes are deep?",
            f"Mean depth of the points of each class (of more than {CLASSES}, the deepest). The farther right, the "
            "later the class is decided.",
            charts.classes(architecture),
        ),
        _chart(
            "How do members differ?",
            "Each dot is one network. Where they lie far apart, more members are needed for a steady mean.",
            charts.members(architecture),
        ),
    ]


def _chart(title: str, reads: str, chart: alt.Chart | alt.LayerChart) -> Chart:
    return Chart(title, reads, chart.to_dict())


def _kinds(run: Run, architecture: str, plane: Plane, points: Points | None) -> list[Kind]:
    typical = plane.typical(TYPICAL)
    told = {row["point_id"]: row for row in _told(run, architecture, np.concatenate(typical))}
    return [
        Kind(
            name=name,
            means=MEANINGS[name],
            n=int((plane.kind == number).sum()),
            pictures=[{**told[point], "picture": _picture(points, point)} for point in typical[number].tolist()],
        )
        for number, name in enumerate(KINDS)
    ]


def _told(run: Run, architecture: str, ids: Array) -> list[dict[str, Any]]:
    """What is said of points, by name: key, label, consensus class and mean depth held out."""
    if not len(ids):
        return []
    rows: list[dict[str, Any]] = run.sql(f"""
        WITH names AS (SELECT label, any_value(label_name) AS name FROM points GROUP BY label)
        SELECT p.point_id, p.key, coalesce(p.label_name, p.label::VARCHAR) AS label,
            coalesce(n.name, e.consensus_class::VARCHAR) AS consensus, e.consensus_class = p.label AS agrees,
            e.mean_depth_held_out
        FROM points p JOIN ensemble e USING (point_id) LEFT JOIN names n ON n.label = e.consensus_class
        WHERE e.architecture = {quoted(architecture)} AND p.point_id IN ({", ".join(map(str, ids.tolist()))})
    """).to_pylist()
    return rows


def _trails(run: Run, architecture: str, n_probes: int, points: Points | None) -> list[dict[str, Any]]:
    """The hardest points, and how the members that hold each out vote for it, probe by probe."""
    ids = hardest(run, HARDEST, architecture=architecture)["point_id"].to_numpy()
    if not len(ids):
        return []
    told = {row["point_id"]: row for row in _told(run, architecture, ids)}
    label_of = {
        row["label"]: row["name"]
        for row in run.sql("SELECT label, any_value(label_name) AS name FROM points GROUP BY label").to_pylist()
    }
    votes: dict[int, list[list[int | None]]] = {}
    chosen = f"point_id IN ({', '.join(map(str, ids.tolist()))})"  # said of both tables, so that neither is read whole
    for row in run.sql(f"""
        SELECT v.point_id, v.winner FROM (FROM votes WHERE {chosen}) v
            JOIN (FROM depths WHERE {chosen} AND NOT in_training) d ON v.member = d.member AND v.point_id = d.point_id
            JOIN members m ON m.member = v.member
        WHERE m.architecture = {quoted(architecture)}
    """).to_pylist():
        votes.setdefault(row["point_id"], []).append(row["winner"])
    return [
        {
            **told[point],
            "picture": _picture(points, point),
            "votes": [
                _vote([winner[probe] for winner in votes[point]], label_of, told[point]) for probe in range(n_probes)
            ],
        }
        for point in ids.tolist()
    ]


def _vote(winners: Sequence[int | None], label_of: dict[int, str], told: dict[str, Any]) -> dict[str, Any] | None:
    """The class that most members' votes are for, ties to the lower; None where none was computed."""
    known = [winner for winner in winners if winner is not None]
    if not known:
        return None
    most = min(set(known), key=lambda winner: (-known.count(winner), winner))
    name = label_of.get(most, str(most))
    sort = "label" if name == told["label"] else "consensus" if name == told["consensus"] else "other"
    return {"name": name, "n": known.count(most), "of": len(known), "sort": sort}


def _picture(points: Points | None, point: int) -> str | None:
    if points is None:
        return None
    png = small_picture(points.read(np.array([point]))[0])
    return None if png is None else data_uri(png)
