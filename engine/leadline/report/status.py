"""How far a run is and who works on it, from the run's own records."""

import time
from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from leadline.store import RunDirectory
from leadline.store.log import FAILED, ended_units, sessions

WINDOW = 300.0  # seconds over which rates are told while a run goes on
SILENT = 60.0  # seconds without a sign of life, after which a driver is taken for dead; it gives one every 5
SHOWN = 20  # workers that are shown in a terminal
SECONDS = 2.0  # between two looks at a run that is followed

Record = dict[str, Any]


def status_of(directory: RunDirectory) -> Record:
    """How far a run is, as plain values that JSON can hold.

    state: "complete", or of the last driver: "running"; "silent", no sign of life for a minute; "failed"; "stopped", it
    ended well before the tables were made (`--train-only`); "unknown" where nothing was logged. stages: of the last
    session; units that earlier ones left are `there`, and among those `done`; rate: work a second, over the last
    minutes of a running session, else over all of it. seconds_left: what its stages' units took so far, shared among
    the workers; None where nothing runs or nothing is known, and too little while `is_at_least`. workers: of the last
    session; peak_memory: bytes resident, mapped files among them. failures: the latest 20 of the last session.
    Raises LeadlineError where there is no run.
    """
    manifest, now = directory.read_manifest(), time.time()
    all_sessions = sessions(directory)
    last = all_sessions[-1] if all_sessions else None
    state = _state(manifest, last, now)
    stages = _stages(directory, last, state) if last else {}
    workers = [worker for worker in last["workers"] if not worker["died"]] if last else []
    unknown, seconds_left = _time_left(all_sessions, stages, len(workers))
    is_running = state == "running"
    return {
        "name": manifest["name"],
        "directory": str(directory.root),
        "state": state,
        "points": manifest["data"]["points"],
        "sessions": [{key: s[key] for key in ("session", "began", "last", "outcome", "error")} for s in all_sessions],
        "driver": {key: last[key] for key in ("host", "pid", "began", "last", "error")} if last else None,
        "age": max(now - last["last"], 0.0) if last else None,
        "stages": stages,
        "seconds_left": seconds_left if is_running else None,
        "is_at_least": unknown and is_running,
        "workers": last["workers"] if last else [],
        "failures": last["failures"] if last else [],
    }


def follow(directory: RunDirectory) -> Iterator[Record]:
    """Its status again and again, until its driver has ended; that of a silent one may begin again."""
    while True:
        status = status_of(directory)
        yield status
        if status["state"] in ("complete", "failed", "stopped"):
            return
        time.sleep(SECONDS)


def _state(manifest: Record, last: Record | None, now: float) -> str:
    if manifest["status"] == "complete":
        return "complete"
    if last is None:
        return "unknown"
    if last["outcome"] is None:
        return "running" if now - last["last"] < SILENT else "silent"
    return "failed" if last["outcome"] == "failed" else "stopped"


def _stages(directory: RunDirectory, last: Record, state: str) -> dict[str, Record]:
    rates = dict(_rates(directory, last)) if state == "running" else {}
    told = {}
    for name, stage in last["stages"].items():
        own = stage["work"] / stage["seconds"] if stage["seconds"] else None
        told[name] = {**stage, "rate": rates.get(name, own)}
    return told


def _rates(directory: RunDirectory, last: Record) -> Iterator[tuple[str, float]]:
    """Work a second of the stages that were at work in the last minutes of a session."""
    since = last["last"] - WINDOW
    work: dict[str, int] = {}
    span: dict[str, tuple[float, float]] = {}
    for unit in ended_units(directory, last["session"], since=since):
        if unit["state"] == "done":
            stage = unit["stage"]
            first, _ = span.get(stage, (unit["began"], 0.0))
            work[stage] = work.get(stage, 0) + unit["work"]
            span[stage] = max(min(first, unit["began"]), since), unit["ended"]
    for stage, (first, stop) in span.items():
        yield stage, work[stage] / max(stop - first, 1e-9)


def _time_left(all_sessions: list[Record], stages: dict[str, Record], workers: int) -> tuple[bool, float | None]:
    """Whether there are stages of which no unit was ever timed, and the seconds that all others still take."""
    seconds, unknown = 0.0, False
    for name, stage in stages.items():
        left = stage["units"] - stage["done"] - stage["set_aside"]
        timed = [s["stages"][name] for s in all_sessions if name in s["stages"]]
        units = sum(own["done"] - own["there"] for own in timed)
        if left and units:
            seconds += left * sum(own["worker_seconds"] for own in timed) / units
        unknown = unknown or (left > 0 and not units)
    return unknown, seconds / workers if workers and seconds else None


def as_text(status: Record) -> RenderableType:
    """A status for the terminal."""
    parts: list[RenderableType] = [_plain(line) for line in _lines(status)]
    if status["stages"]:
        parts.append(_stage_table(status["stages"]))
    if status["workers"]:
        parts.append(_worker_table(status["workers"], time.time()))
    for failure in status["failures"]:
        said = f"{_clock(failure['ended'])}  {failure['unit']}: {FAILED[failure['state']]}: {failure['error']}"
        parts.append(_plain(said))
    return Group(*parts)


def _lines(status: Record) -> Iterator[str]:
    yield f"{status['name']}: {status['state']}, {status['points']:,} points, in {status['directory']}"
    driver = status["driver"]
    if driver is None:
        return
    number = len(status["sessions"])
    where = f"driver {driver['host']} process {driver['pid']}"
    if status["state"] in ("running", "silent"):
        yield (
            f"session {number} since {_date(driver['began'])}, {where}, last sign of life {_span(status['age'])} ago"
        )
    else:
        took = _span(driver["last"] - driver["began"])
        yield f"session {number} from {_date(driver['began'])}, {where}, ended after {took}"
    if status["state"] == "silent":
        yield "the driver is dead or cut off; the same command goes on from there"
    if status["state"] == "failed":
        yield f"it failed: {driver['error']}"
    if status["seconds_left"] is not None:
        yield f"about {_span(status['seconds_left'])} left{', and more' * status['is_at_least']}"


def _stage_table(stages: dict[str, Record]) -> Table:
    drawn = Table(box=SIMPLE_HEAD)
    for name in ("stage", "units", "there before", "rate", "tried again", "set aside"):
        drawn.add_column(name, justify="left" if name == "stage" else "right")
    for name, stage in stages.items():
        rate = "-" if stage["rate"] is None else f"{stage['rate']:,.0f} {stage['measure']}/s"
        counts = (stage["there"], stage["again"] + stage["divided"], stage["set_aside"])
        there, again, set_aside = (str(count) if count else "" for count in counts)
        drawn.add_row(name, f"{stage['done']:,}/{stage['units']:,}", there, rate, again, set_aside)
    return drawn


def _worker_table(workers: list[Record], now: float) -> Table:
    drawn = Table(box=SIMPLE_HEAD)
    for name, side in (("worker", "left"), ("units", "right"), ("peak memory", "right"), ("at work on", "left")):
        drawn.add_column(name, justify="right" if side == "right" else "left", overflow="fold")
    by_memory = sorted(workers, key=lambda worker: (worker["died"], -worker["peak_memory"]))
    for worker in by_memory[:SHOWN]:
        at_work = f"{worker['unit']} ({_span(now - worker['since'])})" if worker["unit"] else ""
        name, memory = f"{worker['host']} process {worker['pid']}", f"{worker['peak_memory'] / 1e9:.2f} GB"
        drawn.add_row(name, f"{worker['units']:,}", memory, "died" if worker["died"] else at_work)
    if len(workers) > SHOWN:
        drawn.caption = f"and {len(workers) - SHOWN} others, of less memory"
    return drawn


def _plain(text: str) -> Text:
    return Text(text, overflow="fold")


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(seconds))


def _span(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
