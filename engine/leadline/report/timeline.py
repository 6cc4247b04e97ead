"""The timeline of a run as a picture: a row for each worker, its units as bars over time."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import altair as alt

from leadline.errors import LeadlineError
from leadline.report.plots import finished, save_chart
from leadline.store import RunDirectory
from leadline.store.log import FAILED, ended_units, sessions

WIDTH = 1000  # pixels of the time axis; nothing narrower than one of them is drawn by itself
HEIGHT = 700  # pixels of all rows, where they are many
ROW = (4, 18)  # pixels of a row: at least, at most
UNITS = ((180.0, 1.0, "seconds"), (10800.0, 60.0, "minutes"), (float("inf"), 3600.0, "hours"))
# Of stages, in their order; no red, which says that something failed.
COLOURS = (
    "#4c78a8", "#f58518", "#eeca3b", "#9d755d", "#8ca0cb", "#72b7b2", "#b279a2", "#d6a5c9", "#54a24b", "#1b7f79",
    "#bab0ac",
)  # fmt: skip
CROSS = "M-1,-1L1,1M1,-1L-1,1"

Record = dict[str, Any]


@dataclass
class Bar:
    """Units of one worker that are drawn as one: seconds from the picture's left to its ends, and seconds by stage."""

    session: int
    worker: str
    start: float
    stop: float
    stages: dict[str, float] = field(default_factory=dict)
    units: int = 0

    @property
    def stage(self) -> str:
        """The one that took most of it."""
        return max(self.stages, key=self.stages.__getitem__)

    def takes(self, stage: str, start: float, stop: float, pixel: float) -> bool:
        """Whether a unit that comes next is no bar of its own."""
        return start - self.stop < pixel and (self.stage == stage or stop - self.start < pixel)

    def add(self, stage: str, start: float, stop: float) -> None:
        self.stop = stop
        self.stages[stage] = self.stages.get(stage, 0.0) + stop - start
        self.units += 1


def draw_timeline(directory: RunDirectory, path: Path) -> None:
    """Draw the log of a run into an .svg or .png file.

    Sessions are drawn one after another, without the time between them. A worker's units of one stage that follow
    closely are one bar, and so are units that fill no pixel together, by the stage that took most of it: the picture
    stays small, whatever the number of units. Raises LeadlineError for another kind of file, where there is no run,
    and where nothing was logged.
    """
    kind = path.suffix.lstrip(".")
    if kind not in ("svg", "png"):
        raise LeadlineError(f"--out: {path} is no picture that can be drawn; give a name that ends in .svg or .png")
    manifest = directory.read_manifest()
    logged = sessions(directory)
    begins, total = [0.0], 0.0
    for session in logged:
        total += session["last"] - session["began"]
        begins.append(total)
    bars, failures = _bars(directory, logged, begins, total / WIDTH)
    if not bars:
        raise LeadlineError(f"{directory.root}: no unit was logged; wait until one is done, or run it again")
    stages = list(dict.fromkeys(stage for session in logged for stage in session["stages"]))
    chart = _chart(manifest["name"], bars, failures, begins[1:-1], total, stages)
    save_chart(chart, path)


def _bars(
    directory: RunDirectory, logged: list[Record], begins: list[float], pixel: float
) -> tuple[list[Bar], list[Record]]:
    """What is drawn: bars, and tries that failed at a worker."""
    closed: list[Bar] = []
    failures: dict[tuple[str, str, int], Record] = {}  # one for each worker, kind and pixel
    for number, (session, begin) in enumerate(zip(logged, begins[:-1], strict=True), 1):
        open_bars: dict[str, Bar] = {}
        for unit in ended_units(directory, session["session"]):
            if unit["pid"] is None:
                continue  # set aside untried
            worker = f"{unit['host']} {unit['pid']}" + f" (session {number})" * (len(logged) > 1)
            start, stop = (begin + unit[key] - session["began"] for key in ("began", "ended"))
            bar = open_bars.get(worker)
            if bar is None or not bar.takes(unit["stage"], start, stop, pixel):
                bar = open_bars[worker] = Bar(number, worker, start, stop)
                closed.append(bar)
            bar.add(unit["stage"], start, stop)
            if unit["state"] != "done":
                what = FAILED[unit["state"]]
                failures[worker, what, int(stop / pixel)] = {"worker": worker, "at": stop, "what": what}
    return closed, list(failures.values())


def _chart(
    name: str, bars: list[Bar], failures: list[Record], begins: list[float], total: float, stages: list[str]
) -> Any:
    divisor, unit = next((divisor, unit) for below, divisor, unit in UNITS if total < below)
    workers = list(dict.fromkeys(bar.worker for bar in sorted(bars, key=lambda bar: (bar.session, bar.worker))))
    step = min(max(HEIGHT // max(len(workers), 1), ROW[0]), ROW[1])
    rows = [
        {"worker": bar.worker, "start": bar.start / divisor, "stop": bar.stop / divisor, "stage": bar.stage}
        for bar in bars
    ]
    time = alt.X("start:Q", title=unit, scale=alt.Scale(domain=[0, total / divisor], nice=False))
    worker = alt.Y("worker:N", sort=workers, title=None, axis=alt.Axis(labelOverlap=True, ticks=False))
    colour = alt.Color("stage:N", scale=alt.Scale(domain=stages, range=COLOURS), title="stage")
    layers: list[alt.Chart] = [
        alt.Chart(alt.InlineData(rows)).mark_bar(height={"band": 0.8}).encode(x=time, x2="stop", y=worker, color=colour)
    ]
    if begins:
        marks = [{"start": begin / divisor} for begin in begins]
        layers.append(alt.Chart(alt.InlineData(marks)).mark_rule(strokeDash=[4, 3], color="#555").encode(x="start:Q"))
    if failures:
        marks = [{**failure, "start": failure["at"] / divisor} for failure in failures]
        failed = alt.Color(
            "what:N", scale=alt.Scale(domain=list(FAILED.values()), range=["#000", "#888", "#d00"]), title="failed"
        )
        layers.append(
            alt.Chart(alt.InlineData(marks))
            .mark_point(shape=CROSS, size=step * 3, strokeWidth=2, opacity=1)
            .encode(x="start:Q", y=worker, color=failed)
        )
    counts = ((sum(bar.units for bar in bars), "unit"), (len(workers), "worker"), (len(begins) + 1, "session"))
    said = ", ".join(f"{number:,} {word}" + "s" * (number != 1) for number, word in counts)
    chart = alt.layer(*layers).resolve_scale(color="independent").properties(width=WIDTH, height=alt.Step(step))
    return finished(chart, name, [said])
