"""Actors that do units: started, fed, replaced when they die."""

import os
import resource
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError, RayTaskError

from leadline.cluster.schedule import Schedule, Thing, Unit
from leadline.cluster.units import UNITS
from leadline.cluster.workbench import Workbench
from leadline.config import Engine
from leadline.errors import LeadlineError, StorageError, one_line
from leadline.store import RunDirectory

MEMORY = Path("/dev/shm")  # a file system in memory
SPARE = 2  # times what a group takes, of free memory, for embeddings to lie there
SECONDS_TO_ANSWER = 10
SECONDS_OF_PATIENCE = 60
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


class Seat(NamedTuple):
    """Where an actor is: Ray's id of its node, the host's name, its process."""

    node: str
    host: str
    pid: int


class Ended(NamedTuple):
    """How a try of a unit ended.

    state: "done"; "again", it is tried once more; "divided", its `instead` take its place; or "set_aside". seat:
    whose it was, None for a unit that is set aside because it needs what another would have made. began, ended: from
    where it was given to the actor to where the answer came, seconds since 1970 by the driver's clock. tries: of this
    unit so far. done: None unless it is. died: the actor is lost.
    """

    state: str
    seat: Seat | None
    began: float
    ended: float
    tries: int
    done: Done | None = None
    error: str | None = None
    died: bool = False


def untried(error: str) -> Ended:
    """Of a unit that is set aside untried."""
    return Ended("set_aside", None, now := time.time(), now, 0, error=error)


@contextmanager
def connected(engine: Engine, address: str | None) -> Iterator[bool]:
    """Ray: of a cluster at `address` or RAY_ADDRESS, else of this machine alone; yields whether it is the latter.

    A process that is connected already, as a notebook may be, stays so; whatever that is counts as a cluster.
    """
    if ray.is_initialized():
        if address:
            raise LeadlineError(f"address {address}: this process is connected to Ray already; leave it out")
        yield False
        return
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


@dataclass(frozen=True)
class Scratch:
    """Where embeddings lie. placement: "shared", where every worker sees them; "node", on the disk of a node, for its
    workers; "resident", in a worker's own folder, in memory where there is room.

    folder: asked for, None for the worker's choice; name: of the run; session: of this try; size: bytes of the largest
    group of members.
    """

    placement: str
    folder: Path | None
    name: str
    session: str
    size: int

    def open(self) -> Path:
        """A worker's folder, when those of tries and workers that are no more are swept away."""
        folder = self.folder
        if folder is None:
            in_memory = self.placement == "resident" and MEMORY.is_dir() and _free(MEMORY) >= SPARE * self.size
            folder = MEMORY if in_memory else Path(tempfile.gettempdir())
        for old in folder.glob(f"{self.name}-*"):
            session, _, process = old.name.removeprefix(f"{self.name}-").partition("-")
            if session != self.session or (process and not Path("/proc", process).exists()):
                shutil.rmtree(old, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        own = f"-{os.getpid()}" if self.placement == "resident" else ""
        return folder / f"{self.name}-{self.session}{own}"


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


class Ready(NamedTuple):
    """What a worker says when it can do units.

    home: of the groups whose embeddings it can see; folder, free: of its scratch, and the bytes that are free there.
    """

    seat: Seat
    home: str
    folder: str
    free: int


@dataclass(eq=False)
class _Worker:
    """warm: what it has ready for the next unit, from the last one; ready: None until it answers; began: its unit."""

    actor: Any
    ready: Ready | None = None
    warm: Thing | None = None
    began: float = 0.0

    def ended(self, state: str, tries: int, done: Done | None = None, trouble: "_Trouble | None" = None) -> Ended:
        seat = self.ready.seat if self.ready else None
        error, died = (trouble.text, trouble.is_death) if trouble else (None, False)
        return Ended(state, seat, self.began, time.time(), tries, done, error, died)


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
    """Actors of one run, each with a workbench and its share of CPUs and GPUs; they end with the block that uses it.

    bench: what makes a `Workbench`.
    """

    def __init__(
        self, engine: Engine, bench: tuple[Any, ...], scratch: Scratch, is_local: bool, say: Callable[[str], None]
    ) -> None:
        self._engine, self._bench, self._scratch, self._say = engine, bench, scratch, say
        self._deaths = 0  # of actors, since one was ready or did a unit
        self._busy: dict[Any, tuple[_Worker, Unit | None]] = {}
        self._idle: list[_Worker] = []
        self.size = self._count(is_local)
        for _ in range(self.size):
            self._start()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers():
            ray.kill(worker.actor)

    def run(
        self, schedule: Schedule, began: Callable[[Unit, Seat, float], None], ended: Callable[[Unit, Ended], None],
        lost: Callable[[int], None],
    ) -> list[Failure]:  # fmt: skip
        """Do all units of a schedule, to which `ended` may add others. Returns those that were set aside.

        A unit whose actor dies is done by another, and one that raises is tried again, TRIES times in all; what is the
        user's to mend (LeadlineError) is not tried again. Whoever needs nothing of a unit that fails goes on. lost: is
        told the groups whose embeddings went with their home; it drops them from the schedule and adds them anew.
        """
        tries: dict[str, int] = {}
        failures: list[Failure] = []
        while schedule:
            self._feed(schedule, began)
            worker, unit, answer = self._next()
            if isinstance(answer, _Trouble):
                if answer.is_death:
                    ray.kill(worker.actor)  # it may be out of reach alone, and would keep its room
                    self._replace(answer.text)
                elif unit is None:
                    raise LeadlineError(answer.text) if answer.is_final else RuntimeError(answer.trace)
                else:
                    self._idle.append(worker)
                if unit is not None:
                    tries[unit.name] = tries.get(unit.name, 0) + 1
                    failures += self._troubled(schedule, worker, unit, answer, tries[unit.name], ended)
                if answer.is_death and worker.ready and worker.ready.home not in self._homes():
                    for group in schedule.at_home(worker.ready.home):
                        lost(group)
                continue
            self._deaths = 0
            self._idle.append(worker)
            if unit is None:
                self._refuse_if_too_small(answer)
                worker.ready = answer
            else:
                schedule.done(unit)
                ended(unit, worker.ended("done", tries.pop(unit.name, 0) + 1, answer))
        return failures

    def _troubled(
        self, schedule: Schedule, worker: _Worker, unit: Unit, trouble: "_Trouble", tries: int,
        ended: Callable[[Unit, Ended], None],
    ) -> list[Failure]:  # fmt: skip
        """Let a unit that did not go well be tried again, or be set aside. Returns what is to be told at the end."""
        if not trouble.is_final and tries < TRIES:
            schedule.again(unit)
            ended(unit, worker.ended("again", tries, trouble=trouble))
            return []
        set_aside = schedule.fail(unit)
        ended(unit, worker.ended("set_aside" if set_aside else "divided", tries, trouble=trouble))
        for other in set_aside:
            if other is not unit:
                ended(other, untried(f"needs what {unit.name} makes"))
        often = "" if trouble.is_final else f"{TRIES} times: "
        return [Failure(unit.name, often + trouble.text, trouble.trace, len(set_aside) - 1)] if set_aside else []

    def _refuse_if_too_small(self, ready: Ready) -> None:
        if self._scratch.placement != "shared" and self._scratch.size > ready.free:
            raise LeadlineError(
                f"{ready.folder}: {ready.free / 1e9:.2f} GB are free, and the embeddings of a group of members take "
                f"{self._scratch.size / 1e9:.2f} GB; lower engine.group_size, choose a reduction, or set engine.scratch"
            )

    def close(self) -> None:
        """Have the workers give back their scratch."""
        left = [worker.actor.leave.remote() for worker in self._workers() if worker.ready]
        if left:
            ray.wait(left, num_returns=len(left), timeout=SECONDS_TO_ANSWER)

    def _next(self) -> tuple[_Worker, Unit | None, Any]:
        """A worker that has something to say, the unit that it had, and what it says."""
        assert self._busy, "units wait for each other"
        while True:
            answered, _ = ray.wait(list(self._busy), num_returns=1, timeout=SECONDS_OF_PATIENCE)
            if answered:
                break
            if not self._idle and all(unit is None for _, unit in self._busy.values()):
                has = ray.cluster_resources()
                self._say(
                    f"waiting for room for a worker of {self._engine.threads} CPUs and {self._engine.gpus:g} GPUs; the "
                    f"cluster has {has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs"
                )
        worker, unit = self._busy.pop(answered[0])
        try:
            return worker, unit, ray.get(answered[0])
        except RayTaskError as error:
            if isinstance(error.cause, StorageError):
                return worker, unit, _Trouble(str(error.cause))
            if isinstance(error.cause, LeadlineError):
                return worker, unit, _Trouble(str(error.cause), is_final=True)
            return worker, unit, _Trouble(f"{one_line(error.cause)}; {MEND}", trace=str(error))
        except RayError as error:
            return worker, unit, _Trouble(f"its worker died ({one_line(error)}); {MEND}", is_death=True)

    def _replace(self, text: str) -> None:
        self._deaths += 1
        if self._deaths > TRIES * self.size:
            raise LeadlineError(f"no worker stays alive: {text}")
        self._start()

    def _homes(self) -> set[str]:
        return {worker.ready.home for worker in self._workers() if worker.ready}

    def _workers(self) -> list[_Worker]:
        return [*self._idle, *(worker for worker, _ in self._busy.values())]

    def _feed(self, schedule: Schedule, began: Callable[[Unit, Seat, float], None]) -> None:
        """Give every idle worker a unit, as far as there are any that need not wait."""
        self._give(schedule, began, crowd=False)
        if all(unit is None for _, unit in self._busy.values()):
            # Groups wait for what one makes that has no home any more: better a place too full than nothing done.
            self._give(schedule, began, crowd=True)

    def _give(self, schedule: Schedule, began: Callable[[Unit, Seat, float], None], crowd: bool) -> None:
        """crowd: also units of groups without a home to workers whose place is full."""
        for worker in list(self._idle):
            assert worker.ready is not None  # it has answered, or it would not be idle
            held = [other.warm for other, unit in self._busy.values() if unit is not None and other.warm is not None]
            home, shared = worker.ready.home, self._scratch.placement == "shared"
            is_full = not shared and not crowd and self._is_full(schedule, worker.ready)
            unit = schedule.take(worker.warm, held, home, is_full)
            if unit is None:
                continue
            if not shared and not unit.roams and schedule.home(unit.group) is None:
                schedule.settle(unit.group, home)
            self._idle.remove(worker)
            worker.warm, worker.began = unit.warm, time.time()
            began(unit, worker.ready.seat, worker.began)
            self._busy[worker.actor.do.remote(unit.stage, unit.arguments)] = (worker, unit)

    def _is_full(self, schedule: Schedule, ready: Ready) -> bool:
        """Whether no other group may be at home where a worker is: one is searched there, and one may be embedded."""
        both = self._scratch.placement == "node" and 2 * self._scratch.size <= ready.free
        return len(schedule.at_home(ready.home)) >= 1 + both

    def _start(self) -> None:
        """Ask for an actor. It is given units when it answers: until there is room for it, others do them."""
        options = {"num_cpus": self._engine.threads, "num_gpus": self._engine.gpus}
        # What the driver can import, its actors can: a user's module:function lies beside the configuration.
        worker = _Worker(ray.remote(_Actor).options(**options).remote(sys.path, self._bench, self._scratch))
        self._busy[worker.actor.ready.remote()] = (worker, None)

    def _count(self, is_local: bool) -> int:
        """As many actors as are asked for, or as there is room for."""
        resources = ray.cluster_resources()
        cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
        room = self._engine.workers_in(cpus, gpus)
        wanted = self._engine.workers or max(room, 1)
        if wanted > room and is_local:
            # A cluster may grow; this machine does not, and Ray would wait for ever.
            raise LeadlineError(
                f"engine: {wanted} workers of {self._engine.threads} CPUs and {self._engine.gpus:g} GPUs do not fit a "
                f"cluster of {cpus:g} CPUs and {gpus:g} GPUs; lower engine.workers, engine.threads or engine.gpus"
            )
        return wanted


@dataclass(frozen=True)
class _Trouble:
    """text: in one line; trace: of what is no user's mistake; is_final: another try would end the same way."""

    text: str
    trace: str = ""
    is_final: bool = False
    is_death: bool = False


class _Actor:
    def __init__(self, search_path: list[str], bench: tuple[Any, ...], scratch: Scratch) -> None:
        sys.path.extend(path for path in search_path if path not in sys.path)
        self._placement = scratch.placement
        self._folder = None if scratch.placement == "shared" else scratch.open()
        config, stamps, directory = bench
        if self._folder is not None:
            directory = RunDirectory(directory.root, self._folder)
        self._bench = Workbench(config, stamps, directory)

    def ready(self) -> Ready:
        """Answers when the actor can do units."""
        context = ray.get_runtime_context()
        seat = Seat(context.get_node_id(), socket.gethostname(), os.getpid())
        home = context.get_actor_id() if self._placement == "resident" else seat.node
        if self._folder is None:
            return Ready(seat, str(home), "", 0)
        return Ready(seat, str(home), str(self._folder), _free(self._folder.parent))

    def do(self, stage: str, arguments: tuple[Any, ...]) -> Done:
        started = time.perf_counter()
        work = UNITS[stage](self._bench, *arguments)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return Done(work, seconds, peak if sys.platform == "darwin" else peak << 10)  # bytes there, KiB elsewhere

    def leave(self) -> None:
        """Remove the scratch that is this worker's, or its node's."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
