"""How far a run is: a bar in a terminal, plain lines in a log."""

import time
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

    def plan(self, name: str, measure: str, units: int, done: int) -> None:
        """Announce a stage, of which `done` units are there from an earlier try."""
        bar = self._bars.add_task(name, total=units, completed=done, rate="") if self._bars else None
        self._stages[name] = _Stage(name, measure, units, done, bar)
        if done and not self._bars:
            self.say(f"{name:>8}  {done}/{units} units are there already")

    def advance(self, name: str, work: int) -> None:
        """One more unit of a stage, which held so much work (points, votes, steps)."""
        stage = self._stages[name]
        stage.advance(work)
        if self._bars is not None and stage.bar is not None:
            self._bars.update(stage.bar, completed=stage.done, rate=stage.rate_text())
        elif stage.is_due():
            self.say(stage.line())

    def start(self, name: str) -> None:
        """A stage's time runs from here until `stop`, and again from the next start."""
        self._stages[name].started = time.perf_counter()
        self._stages[name].said = time.monotonic()

    def stop(self, name: str) -> None:
        stage = self._stages[name]
        stage.seconds = stage.elapsed()
        stage.started = None

    def report(self) -> dict[str, dict[str, float | int | str]]:
        """Units and work done by this process, with seconds, by stage."""
        return {
            stage.name: {
                "units": stage.here,
                "work": stage.work,
                "measure": stage.measure,
                "seconds": round(stage.elapsed(), 3),
            }
            for stage in self._stages.values()
        }


class _Stage:
    def __init__(self, name: str, measure: str, units: int, done: int, bar: TaskID | None) -> None:
        self.name, self.measure, self.units, self.done, self.bar = name, measure, units, done, bar
        self.here = 0  # units done by this process, from which the rate is told
        self.work = 0
        self.seconds = 0.0
        self.started: float | None = None
        self.said = time.monotonic()

    def elapsed(self) -> float:
        return self.seconds + (time.perf_counter() - self.started if self.started is not None else 0.0)

    def advance(self, work: int) -> None:
        self.done += 1
        self.here += 1
        self.work += work

    def is_due(self) -> bool:
        now = time.monotonic()
        if self.done < self.units and now - self.said < SECONDS_BETWEEN_LINES:
            return False
        self.said = now
        return True

    def rate_text(self) -> str:
        return f"{self.work / max(self.elapsed(), 1e-9):,.0f} {self.measure}/s"

    def line(self) -> str:
        left = (self.units - self.done) * self.elapsed() / max(self.here, 1)
        time_left = f"{left:.0f} s left" if self.done < self.units else f"took {self.elapsed():.1f} s"
        return f"{self.name:>8}  {self.done}/{self.units} units  {self.rate_text()}  {time_left}"
