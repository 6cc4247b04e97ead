"""What befalls the units of a run, told to all who follow it: the progress, the run's log, and Ray's metrics."""

import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from leadline.cluster.graph import STAGES
from leadline.cluster.metrics import Metrics
from leadline.cluster.pool import Ended, Seat
from leadline.cluster.progress import Stages
from leadline.cluster.schedule import Unit
from leadline.store import RunDirectory
from leadline.store.log import FAILED, session_log

KEPT = 20  # failures that the session's record quotes, the latest; the log has all


class Watch:
    """Of one session. Holds what was not logged yet, and for each actor that ever was a few numbers."""

    def __init__(self, run: str, stages: Stages) -> None:
        self.stages = stages
        self._metrics = Metrics(run)
        self._lock = threading.Lock()  # the log asks from a thread
        self._ended: list[dict[str, Any]] = []
        self._workers: dict[Seat, dict[str, Any]] = {}
        self._running: dict[Seat, Unit] = {}
        self._failures: deque[dict[str, Any]] = deque(maxlen=KEPT)

    def began(self, unit: Unit, seat: Seat, at: float) -> None:
        """A unit was given to an actor; at: seconds since 1970."""
        self.stages.begin(unit.stage)
        with self._lock:
            worker = self._workers.setdefault(seat, {**seat._asdict(), "units": 0, "peak_memory": 0, "died": False})
            worker |= {"unit": unit.name, "since": at}
            self._running[seat] = unit

    def ended(self, unit: Unit, end: Ended, bytes_written: int = 0) -> None:
        """A try of a unit ended; bytes_written: of embeddings."""
        measure = STAGES[unit.stage]
        if end.done is not None:
            self.stages.advance(unit.stage, end.done.work, end.done.seconds)
        else:
            self.stages.fail(unit.stage, end.state)
            if end.state == "divided":
                self.stages.more(unit.stage, len(unit.instead) - 1)
            if end.state != "set_aside":  # those are told at the end
                self.stages.say(f"{unit.name}: {FAILED[end.state]}: {end.error}")
        self._metrics.ended(unit.stage, measure, end, bytes_written)
        record = {
            "unit": unit.name,
            "stage": unit.stage,
            "group": unit.group,
            "state": end.state,
            **(end.seat._asdict() if end.seat else dict.fromkeys(Seat._fields)),
            "began": end.began,
            "ended": end.ended,
            "seconds": end.done and end.done.seconds,
            "work": end.done and end.done.work,
            "measure": measure,
            "bytes_written": bytes_written,
            "peak_memory": end.done and end.done.peak_memory,
            "tries": end.tries,
            "error": end.error,
        }
        with self._lock:
            self._ended.append(record)
            if end.state != "done" and end.seat:
                self._failures.append({key: record[key] for key in ("unit", "state", "ended", "tries", "error")})
            if end.seat:
                del self._running[end.seat]
                worker = self._workers[end.seat]
                worker |= {"unit": None, "since": end.ended, "died": end.died}
                if end.done is not None:
                    worker["units"] += 1
                    worker["peak_memory"] = end.done.peak_memory

    def take(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """What ended since this was last asked, and how far the session is."""
        with self._lock:
            ended, self._ended = self._ended, []
            stages, running = self.stages.state(), Counter(unit.stage for unit in self._running.values())
            state = {
                "stages": stages,
                "workers": [dict(worker) for worker in self._workers.values()],
                "failures": list(self._failures),
            }
        self._metrics.tell(stages, running)
        return ended, state


@contextmanager
def watched(directory: RunDirectory, run: str, stages: Stages) -> Iterator[Watch]:
    """Log a session of a run in its directory."""
    watch = Watch(run, stages)
    with session_log(directory, watch.take, stages.say):
        yield watch
