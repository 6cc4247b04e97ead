"""How far a run is: a bar in a terminal, plain lines in a log."""

import time
from collections import Counter
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class Stages:
    """Progress of named stages, each a known number of units; work is counted in the stage's own measure."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stages: dict[str, _Stage] = {}
        self._bars = (
            Progress(
                TextColumn("{task.description:>8}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=console,
            )
            if console.is_terminal
            else None
        )

    def __enter__(self) -> Self:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()

    def say(self, text: str) -> None:
        """A line above the bars, or in the log."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def plan(self, name: str, measure: str, units: int) -> None:
        """Announce a stage of so many units."""
        bar = self._bars.add_task(name, total=units, rate="") if self._bars else None
        self._stages[name] = _Stage(name, measure, units, bar)

    def found(self, name: str, units: int) -> None:
        """So many units of a stage are there from an earlier try."""
        stage = self._stages[name]
        stage.done += units
        stage.there += units
        if self._bars is not None and stage.bar is not None:
            self._bars.update(stage.bar, completed=stage.done)
        elif units:
            self.say(f"{name:>8}  {stage.done}/{stage.units} units are there already")

    def begin(self, name: str) -> None:
        """A unit of a stage begins; with the first one the stage's time."""
        stage = self._stages[name]
        if stage.began is None:
            stage.began, stage.said = time.perf_counter(), time.monotonic()

    def advance(self, name: str, work: int, seconds: float) -> None:
        """One more unit of a stage, which held so much work (points, votes, steps) and took its worker so long."""
        stage = self._stages[name]
        stage.advance(work, seconds)
        if self._bars is not None and stage.bar is not None:
            self._bars.update(stage.bar, completed=stage.done, rate=stage.rate_text())
        elif stage.is_due():
            self.say(stage.line())

    def more(self, name: str, units: int) -> None:
        """A stage has so many units more than it was planned to have."""
        stage = self._stages[name]
        stage.units += units
        if self._bars is not None and stage.bar is not None:
            self._bars.update(stage.bar, total=stage.units)

    def fail(self, name: str, state: str) -> None:
        """A try of a unit failed: it is tried "again", "set_aside", or "divided"."""
        self._stages[name].failed[state] += 1

    def state(self) -> dict[str, dict[str, float | int | str]]:
        """How far each stage is: its `report`, and units in all, those `there` from earlier tries, and what failed.

        May be asked by another thread.
        """
        return {
            name: {
                **told,
                "units": self._stages[name].units,
                "there": self._stages[name].there,
                "done": self._stages[name].done,
                **{state: self._stages[name].failed[state] for state in ("again", "divided", "set_aside")},
            }
            for name, told in self.report().items()
        }

    def report(self) -> dict[str, dict[str, float | int | str]]:
        """Units and work done in this try, by stage.

        seconds: from the beginning of its first unit to the end of its last, in which other stages were at work too;
        worker_seconds: of all its units together.
        """
        return {
            stage.name: {
                "units": stage.here,
                "work": stage.work,
                "measure": stage.measure,
                "seconds": round(stage.seconds, 3),
                "worker_seconds": round(stage.worker_seconds, 3),
            }
            for stage in list(self._stages.values())  # a copy: another thread may plan one
        }


class _Stage:
    def __init__(self, name: str, measure: str, units: int, bar: TaskID | None) -> None:
        self.name, self.measure, self.units, self.bar = name, measure, units, bar
        self.done = self.there = 0
        self.failed: Counter[str] = Counter()
        self.here = 0  # units done in this try, from which the rate is told
        self.work = 0
        self.began: float | None = None
        self.seconds = self.worker_seconds = 0.0
        self.said = time.monotonic()

    def advance(self, work: int, seconds: float) -> None:
        self.done += 1
        self.here += 1
        self.work += work
        self.worker_seconds += seconds
        if self.began is not None:
            self.seconds = time.perf_counter() - self.began

    def is_due(self) -> bool:
        now = time.monotonic()
        if self.done < self.units and now - self.said < SECONDS_BETWEEN_LINES:
            return False
        self.said = now
        return True

    def rate_text(self) -> str:
        return f"{self.work / max(self.seconds, 1e-9):,.0f} {self.measure}/s"

    def line(self) -> str:
        left = (self.units - self.done) * self.seconds / max(self.here, 1)
        time_left = f"{left:.0f} s left" if self.done < self.units else f"took {self.seconds:.1f} s"
        return f"{self.name:>8}  {self.done}/{self.units} units  {self.rate_text()}  {time_left}"
