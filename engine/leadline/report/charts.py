"""Charts of a run, of what DuckDB has added up: none holds a row for each point, however many there are."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import altair as alt
import numpy as np

from leadline.errors import LeadlineError
from leadline.query import Run, quoted
from leadline.report.plots import COLOURS
from leadline.study.kinds import KINDS
from leadline.study.plane import Plane, read_plane
from leadline.study.relations import mean_over_members
from leadline.study.rows import rows_of
from leadline.study.scores import architectures

HEIGHT = 260  # pixels of a chart; its width is that of the place where it is shown
CELLS = 48  # of the plane along each axis, at most
CLASSES = 30  # that a chart of classes shows: the deepest
SPLITS = ("training", "held out")
MEASURES = {
    "accuracy": "share of members that are right",
    "consistency": "share of members that say what most say",
    "entropy": "entropy of the softmax, in nats",
}  # by held-out depth


class Charts:
    """Charts of a finished run, a call each: an altair chart, which a notebook shows and `.save("x.svg")` writes.

    architecture: one of the run's, by default its first. Intervals are of 95 % over members, as the study makes them.
    Raises LeadlineError for a run that is not finished, and an architecture that it has not got.
    """

    def __init__(self, run: Run) -> None:
        run.refuse_unfinished()
        self._run = run
        self._by_depth = lru_cache(self._read_by_depth)  # a page draws each measure
        self.architectures = architectures(run)
        found = run.sql("SELECT DISTINCT architecture, n_probes FROM members").to_pylist()
        self._n_probes = {row["architecture"]: row["n_probes"] for row in found}

    def probe_accuracy(self, architecture: str | None = None) -> alt.LayerChart:
        """How often the vote at each probe is the given label, in training and held out."""
        name = self._named(architecture)
        found = self._run.sql(f"""
            SELECT member, probe, name, train_accuracy AS "training", held_out_accuracy AS "held out"
            FROM probes WHERE architecture = {quoted(name)} ORDER BY member, probe
        """)
        probes = found["name"].to_pylist()[: self._n_probes[name]]
        rows = []
        for split in SPLITS:
            shares = np.array(found[split].to_pylist(), np.float64).reshape(-1, len(probes))
            estimate = rows_of(mean_over_members(shares), is_share=True)
            rows += [
                {"probe": f"{number} {probe}", "split": split, **one}
                for number, (probe, one) in enumerate(zip(probes, estimate, strict=True))
                if one["value"] is not None
            ]
        x = alt.X("probe:O", title="probe, from the input to the softmax", sort=None, axis=alt.Axis(labelAngle=-40))
        return _lines(rows, x, "share of votes that are the given label", percent=True)

    def depths(self, architecture: str | None = None) -> alt.Chart:
        """How many points, of all members, are decided at each depth."""
        found = self._run.sql(f"""
            SELECT d.in_training, d.depth, count(*) AS n FROM depths d JOIN members m ON d.member = m.member
            WHERE m.architecture = {quoted(self._named(architecture))} GROUP BY ALL ORDER BY ALL
        """).to_pylist()
        total = {split: sum(row["n"] for row in found if row["in_training"] == split) for split in (True, False)}
        rows = [
            {
                "depth": row["depth"],
                "split": SPLITS[not row["in_training"]],
                "share": row["n"] / total[row["in_training"]],
                "points": row["n"],
            }
            for row in found
        ]
        return _sized(
            alt.Chart(alt.Data(values=rows))
            .mark_bar()
            .encode(
                x=alt.X("depth:O", title="depth", axis=alt.Axis(labelAngle=0)),
                xOffset=alt.XOffset("split:N", sort=list(SPLITS)),
                y=alt.Y("share:Q", title="share of points", axis=alt.Axis(format="%")),
                color=_by_split(),
                tooltip=[
                    "split:N", "depth:O", alt.Tooltip("share:Q", format=".2%"), alt.Tooltip("points:Q", format=","),
                ],
            )
        )  # fmt: skip

    def by_depth(self, measure: str = "accuracy", architecture: str | None = None) -> alt.LayerChart:
        """A measure of the points that a member holds out, by their depth in it: accuracy, consistency or entropy.

        Consistency is of points that another member holds out too: one alone always agrees with itself.
        """
        if measure not in MEASURES:
            raise LeadlineError(f"measure: {measure!r} is none; allowed: {', '.join(MEASURES)}")
        name = self._named(architecture)
        found = self._by_depth(name)
        members = sorted({row["member"] for row in found})
        values = np.full((max(len(members), 1), self._n_probes[name] + 1), np.nan)
        points = np.zeros(values.shape[1], np.int64)
        for row in found:
            values[members.index(row["member"]), row["depth"]] = np.nan if row[measure] is None else row[measure]
            points[row["depth"]] += row["n_with_peers" if measure == "consistency" else "n"]
        estimate = rows_of(mean_over_members(values), is_share=measure != "entropy")
        rows = [
            {"depth": depth, "split": "held out", **one, "n": int(points[depth])}
            for depth, one in enumerate(estimate)
            if one["value"] is not None
        ]
        x = alt.X("depth:O", title="depth", axis=alt.Axis(labelAngle=0))
        return _lines(rows, x, MEASURES[measure], percent=measure != "entropy")

    def plane(self, architecture: str | None = None) -> alt.LayerChart:
        """How many points have which mean depths, held out and in training, with the corners of the kinds."""
        name = self._named(architecture)
        return plane_chart(read_plane(self._run, name), self._n_probes[name])

    def classes(self, architecture: str | None = None) -> alt.LayerChart:
        """Mean depth of the points of each class, of the deepest classes where there are many."""
        rows = self._run.sql(f"""
            SELECT coalesce(p.label_name, p.label::VARCHAR) AS class, avg(e.mean_depth_held_out) AS "held out",
                avg(e.mean_depth_training) AS "training", count(*) AS points
            FROM ensemble e JOIN points p USING (point_id)
            WHERE e.architecture = {quoted(self._named(architecture))}
            GROUP BY p.label, p.label_name ORDER BY coalesce("held out", "training") DESC, p.label LIMIT {CLASSES}
        """).to_pylist()
        order = [row["class"] for row in rows]
        long = [
            {"class": row["class"], "split": split, "depth": row[split], "points": row["points"]}
            for row in rows
            for split in SPLITS
            if row[split] is not None
        ]
        base = alt.Chart(alt.Data(values=long)).encode(
            y=alt.Y("class:N", title=None, sort=order, axis=alt.Axis(labelLimit=160))
        )
        span = base.mark_rule(opacity=0.5).encode(x=alt.X("min(depth):Q", title="mean depth"), x2="max(depth):Q")
        dots = base.mark_point(filled=True, size=70).encode(
            x=alt.X("depth:Q", title="mean depth", scale=alt.Scale(zero=False)),
            color=_by_split(),
            shape=_by_split(alt.Shape, ["square", "circle"]),
            tooltip=["class:N", "split:N", alt.Tooltip("depth:Q", format=".3f"), alt.Tooltip("points:Q", format=",")],
        )
        return _sized(alt.layer(span, dots), height=max(HEIGHT // 2, 20 * len(order)))

    def members(self, architecture: str | None = None) -> alt.Chart:
        """How accurate each member is on what it holds out, and how deep that is decided."""
        rows = self._run.sql(f"""
            SELECT m.member, m.held_out_accuracy AS accuracy, avg(d.depth) AS depth, m.n_train AS points
            FROM depths d JOIN members m ON d.member = m.member
            WHERE m.architecture = {quoted(self._named(architecture))} AND NOT d.in_training GROUP BY ALL ORDER BY ALL
        """).to_pylist()
        return _sized(
            alt.Chart(alt.Data(values=rows))
            .mark_point(filled=True, size=90, color=COLOURS[1])
            .encode(
                x=alt.X(
                    "accuracy:Q", title="accuracy, held out", scale=alt.Scale(zero=False), axis=alt.Axis(format=".1%")
                ),
                y=alt.Y("depth:Q", title="mean depth, held out", scale=alt.Scale(zero=False)),
                tooltip=[
                    "member:N", alt.Tooltip("accuracy:Q", format=".2%"), alt.Tooltip("depth:Q", format=".3f"),
                    alt.Tooltip("points:Q", title="training points", format=","),
                ],
            )
        )  # fmt: skip

    def stages(self) -> alt.Chart:
        """How long workers were at each stage, added up."""
        told = self._run.manifest["stages"]
        rows = [{"stage": name, "hours": of["worker_seconds"] / 3600, **of} for name, of in told.items()]
        return _sized(
            alt.Chart(alt.Data(values=rows))
            .mark_bar(color=COLOURS[0])
            .encode(
                x=alt.X("worker_seconds:Q", title="seconds of workers"),
                y=alt.Y("stage:N", title=None, sort=list(told)),
                tooltip=[
                    "stage:N", alt.Tooltip("units:Q", format=","), alt.Tooltip("worker_seconds:Q", format=",.1f"),
                    alt.Tooltip("hours:Q", format=",.2f"),
                ],
            ),
            height=28 * max(len(rows), 1),
        )  # fmt: skip

    def _read_by_depth(self, name: str) -> list[dict[str, Any]]:
        """All MEASURES of each member at each depth, held out, from one pass over the depths of an architecture."""
        rows: list[dict[str, Any]] = self._run.sql(f"""
            SELECT d.member, d.depth, avg((d.prediction = d.label)::DOUBLE) AS accuracy,
                avg((d.prediction = e.consensus_class)::DOUBLE) FILTER (e.n_held_out > 1) AS consistency,
                avg(d.entropy) AS entropy, count(*) AS n, count(*) FILTER (e.n_held_out > 1) AS n_with_peers
            FROM depths d JOIN members m ON d.member = m.member
                JOIN ensemble e ON e.architecture = m.architecture AND e.point_id = d.point_id
            WHERE m.architecture = {quoted(name)} AND NOT d.in_training GROUP BY ALL
        """).to_pylist()
        return rows

    def _named(self, architecture: str | None) -> str:
        if architecture is None:
            return self.architectures[0]
        if architecture not in self.architectures:
            raise LeadlineError(
                f"architecture: {architecture!r} is not in the run; {', '.join(self.architectures)} are"
            )
        return architecture


def plane_chart(plane: Plane, n_probes: int) -> alt.LayerChart:
    """The density of points over their mean depths, at most CELLS cells along each axis; thresholds as lines."""
    step = next((step for step in (0.25, 0.5, 1) if n_probes / step < CELLS), n_probes / (CELLS - 1))
    both = ~np.isnan(plane.held_out + plane.training)
    places = np.floor(np.stack([plane.held_out[both], plane.training[both]]) / step)
    found, counts = np.unique(places, axis=1, return_counts=True)
    values = [
        {"x": x * step, "x2": (x + 1) * step, "y": y * step, "y2": (y + 1) * step, "points": n}
        for (x, y), n in zip(found.T.tolist(), counts.tolist(), strict=True)
    ]
    top, room = n_probes + step, 0.07 * n_probes  # for the names of the corners, below and above
    edge = alt.Scale(domain=[0, top], nice=False)
    high = alt.Scale(domain=[-room, top + room], nice=False)
    ticks = alt.Axis(values=list(range(n_probes + 1)), format="d", labelOverlap=True)
    rectangles = (
        alt.Chart(alt.Data(values=values))
        .mark_rect()
        .encode(
            x=alt.X("x:Q", title="mean depth, held out", scale=edge, axis=ticks), x2="x2:Q",
            y=alt.Y("y:Q", title="mean depth, in training", scale=high, axis=ticks), y2="y2:Q",
            color=alt.Color(
                "points:Q", title="points", scale=alt.Scale(type="log", scheme="viridis"), legend=alt.Legend(format=",")
            ),
            tooltip=[
                alt.Tooltip("x:Q", title="held out, from", format=".2f"),
                alt.Tooltip("y:Q", title="in training, from", format=".2f"), alt.Tooltip("points:Q", format=","),
            ],
        )
    )  # fmt: skip
    layers: list[Any] = [rectangles]
    if plane.beyond is not None:
        # Deep is what lies beyond the threshold, so the line is drawn where the threshold's cell ends.
        for axis, beyond in zip("xy", plane.beyond, strict=True):
            at = alt.Chart(alt.Data(values=[{"at": (np.floor(beyond / step) + 1) * step}]))
            layers.append(at.mark_rule(strokeDash=[5, 3], strokeWidth=1.5).encode(**{axis: "at:Q"}))
        for number, kind in enumerate(KINDS):
            right, up = divmod(number, 2)
            corner = alt.Chart(alt.Data(values=[{"x": right * top, "y": top if up else 0, "kind": kind}]))
            align, baseline, dy = ("right" if right else "left", "bottom" if up else "top", -4 if up else 4)
            layers.append(
                corner.mark_text(align=align, baseline=baseline, dy=dy, fontSize=11).encode(
                    x="x:Q", y="y:Q", text="kind:N"
                )
            )
    return _sized(alt.layer(*layers), height=360)


def _lines(rows: list[dict[str, Any]], x: alt.X, title: str, *, percent: bool) -> alt.LayerChart:
    """A line for each split, with its interval where there is one."""
    axis = alt.Axis(format="%") if percent else alt.Axis()
    form = ".2%" if percent else ".3f"
    of_both = len({row["split"] for row in rows}) > 1
    base = alt.Chart(alt.Data(values=rows)).encode(x=x, color=_by_split(legend=of_both))
    known = base.transform_filter("isValid(datum.low)")
    band = known.mark_area(opacity=0.25, line=False).encode(y=alt.Y("low:Q", title=title, axis=axis), y2="high:Q")
    line = base.mark_line(point=alt.OverlayMarkDef(filled=True, size=45), strokeWidth=2).encode(
        y=alt.Y("value:Q", title=title, axis=axis, scale=alt.Scale(zero=False)),
        tooltip=[
            x.shorthand, "split:N", alt.Tooltip("value:Q", format=form), alt.Tooltip("low:Q", format=form),
            alt.Tooltip("high:Q", format=form), alt.Tooltip("n:Q", format=","),
        ],
    )  # fmt: skip
    return _sized(alt.layer(band, line))


def _by_split(channel: Any = alt.Color, looks: Sequence[str] = COLOURS[:2], *, legend: bool = True) -> Any:
    scale = alt.Scale(domain=list(SPLITS), range=list(looks))
    return channel("split:N", title=None, scale=scale, legend=alt.Legend(orient="top") if legend else None)


def _sized(chart: Any, height: int = HEIGHT) -> Any:
    return chart.properties(width="container", height=height)
