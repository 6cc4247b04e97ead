"""Actors that do units: started, fed, replaced when they die."""

import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError, RayTaskError

from leadline.cluster.schedule import Schedule, Thing, Unit
from leadline.cluster.units import Bench
from leadline.config import Engine
from leadline.errors import LeadlineError, one_line

SECONDS_TO_ANSWER = 10
TRIES = 3  # of a unit
MEND = "give it more memory, or lower engine.group_size or engine.query_block"
OBJECT_STORE = 80 << 20  # bytes: nothing but small records passes through it; Ray wants 75 MiB at least


class Done(NamedTuple):
    """Of a unit: its work, in its stage's measure, the seconds that it took its actor, and the most bytes that this
    actor ever had resident, mapped files among them.
    """

    work: int
    seconds: float
    peak_memory: int


class Place(NamedTuple):
    """Where an actor is: Ray's id of its node, the host's name, its process."""

    node: str
    host: str
    pid: int


class Ended(NamedTuple):
    """How a try of a unit ended.

    state: "done"; "again", it is tried once more; "divided", its `instead` take its place; or "set_aside". place:
    whose it was, None for a unit that is set aside because it needs what another would have made. began, ended: from
    where it was given to the actor to where the answer came, seconds since 1970 by the driver's clock. tries: of this
    unit so far. done: None unless it is. died: the actor is lost.
    """

    state: str
    place: Place | None
    began: float
    ended: float
    tries: int
    done: Done | None = None
    error: str | None = None
    died: bool = False


def lost(error: str) -> Ended:
    """Of a unit that is set aside untried."""
    return Ended("set_aside", None, now := time.time(), now, 0, error=error)


@contextmanager
def connected(engine: Engine, address: str | None) -> Iterator[bool]:
    """Ray: of a cluster at `address` or RAY_ADDRESS, else of this machine alone; yields whether it is the latter."""
    address = address or os.environ.get("RAY_ADDRESS")
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address:
        try:
            _knock(address)
            ray.init(address=address, **quiet)
        except (OSError, RuntimeError, ValueError) as error:
            raise LeadlineError(
                f"--address {address}: no Ray cluster answers there ({one_line(error)}); start one or drop it"
            ) from None
    else:
        wanted = (engine.workers or 1) * engine.threads
        ray.init(
            address="local", num_cpus=max(wanted, os.cpu_count() or 1), include_dashboard=False,
            object_store_memory=OBJECT_STORE, **quiet,
        )  # fmt: skip
    try:
        yield not address
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raises OSError where nobody listens at host:port: Ray itself would go on trying for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=SECONDS_TO_ANSWER).close()


@dataclass(eq=False)
class _Worker:
    """warm: what it has ready for the next unit, from the last one; place: from when it answers on; began: its unit."""

    actor: Any
    warm: Thing | None = None
    place: Place | None = None
    began: float = 0.0

    def ended(
        self, state: str, tries: int, done: Done | None = None, error: str | None = None, died: bool = False
    ) -> Ended:
        return Ended(state, self.place, self.began, time.time(), tries, done, error, died)


@dataclass(frozen=True)
class Failure:
    """A unit that was set aside, and how many others with it, because they need what it makes.

    trace: of an error that is not the user's to mend; empty otherwise.
    """

    unit: str
    error: str
    trace: str
    others: int


class Pool:
    """Actors of one run, each a Bench with its share of CPUs and GPUs."""

    def __init__(self, engine: Engine, bench: tuple[Any, ...]) -> None:
        self._engine = engine
        self._bench = bench
        self._deaths = 0  # of actors, since one was ready or did a unit
        self._busy: dict[Any, tuple[_Worker, Unit | None]] = {}
        self._idle: list[_Worker] = []
        for _ in range(self._count()):
            self._start()

    def run(
        self, schedule: Schedule, began: Callable[[Unit, Place, float], None], ended: Callable[[Unit, Ended], None]
    ) -> list[Failure]:
        """Do all units of a schedule, to which `ended` may add others. Returns those that were set aside.

        A unit whose actor dies is done by another, and one that raises is tried again, TRIES times in all; what is the
        user's to mend (LeadlineError) is not tried again. Whoever needs nothing of a unit that fails goes on.
        """
        tries: dict[Unit, int] = {}
        failures: list[Failure] = []
        while schedule:
            self._feed(schedule, began)
            (ready,), _ = ray.wait(list(self._busy), num_returns=1)
            worker, unit = self._busy.pop(ready)
            died = False
            try:
                result = ray.get(ready)
            except RayTaskError as error:
                self._idle.append(worker)
                final = isinstance(error.cause, LeadlineError)
                text, trace = (str(error.cause), "") if final else (one_line(error.cause), str(error))
            except RayError as error:
                self._deaths += 1
                died = True
                self._start()
                final, text, trace = False, f"its worker died ({one_line(error)})", ""
                if self._deaths > TRIES * self._count():
                    raise LeadlineError(f"no worker stays alive: {text}; {MEND}") from None
            else:
                self._deaths = 0
                self._idle.append(worker)
                if unit is None:
                    worker.place = result
                else:
                    schedule.done(unit)
                    ended(unit, worker.ended("done", tries.pop(unit, 0) + 1, result))
                continue
            if unit is None:
                continue
            tries[unit] = tries.get(unit, 0) + 1
            if not final and tries[unit] < TRIES:
                schedule.again(unit)
                ended(unit, worker.ended("again", tries[unit], error=text, died=died))
                continue
            if not final:
                text += f", {TRIES} times; {MEND}"
            set_aside = schedule.fail(unit)
            state = "set_aside" if set_aside else "divided"
            end = worker.ended(state, tries.pop(unit), error=text, died=died)
            if set_aside:
                failures.append(Failure(unit.name, text, trace, len(set_aside) - 1))
            ended(unit, end)
            for other in set_aside:
                if other is not unit:
                    ended(other, lost(f"needs what {unit.name} makes"))
        return failures

    def _feed(self, schedule: Schedule, began: Callable[[Unit, Place, float], None]) -> None:
        """Give every idle worker a unit, as far as there are any that need not wait."""
        for worker in list(self._idle):
            held = [other.warm for other, unit in self._busy.values() if unit is not None and other.warm is not None]
            unit = schedule.take(worker.warm, held=held)
            if unit is None:
                return
            self._idle.remove(worker)
            worker.warm, worker.began = unit.warm, time.time()
            assert worker.place is not None  # it has answered
            began(unit, worker.place, worker.began)
            self._busy[worker.actor.do.remote(unit.stage, unit.arguments)] = (worker, unit)

    def _start(self) -> None:
        """Ask for an actor. It is given units when it answers: until there is room for it, others do them."""
        options = {"num_cpus": self._engine.threads, "num_gpus": self._engine.gpus}
        # What the driver can import, its actors can: a user's module:function lies beside the configuration.
        worker = _Worker(ray.remote(_Actor).options(**options).remote(sys.path, self._bench))
        self._busy[worker.actor.ready.remote()] = (worker, None)

    def _count(self) -> int:
        """As many actors as are asked for, or as there is room for."""
        resources = ray.cluster_resources()
        cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
        room = int(cpus // self._engine.threads)
        if self._engine.gpus:
            room = min(room, int(gpus // self._engine.gpus))
        wanted = self._engine.workers or max(room, 1)
        if wanted > room:
            # Ray would wait for them for ever.
            raise LeadlineError(
                f"engine: {wanted} workers of {self._engine.threads} CPUs and {self._engine.gpus:g} GPUs do not fit a "
                f"cluster of {cpus:g} CPUs and {gpus:g} GPUs; lower engine.workers, engine.threads or engine.gpus"
            )
        return wanted


class _Actor(Bench):
    def __init__(self, search_path: list[str], bench: tuple[Any, ...]) -> None:
        sys.path.extend(path for path in search_path if path not in sys.path)
        super().__init__(*bench)

    def ready(self) -> Place:
        """Answers when the actor can do units."""
        return Place(ray.get_runtime_context().get_node_id(), socket.gethostname(), os.getpid())

    def do(self, stage: str, arguments: tuple[Any, ...]) -> Done:
        """Do a unit: a method of Bench, which returns its work."""
        started = time.perf_counter()
        work = getattr(self, stage)(*arguments)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return Done(work, seconds, peak if sys.platform == "darwin" else peak << 10)  # bytes there, KiB elsewhere
