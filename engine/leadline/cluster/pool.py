"""Actors that do units: started, fed, replaced when they die."""

import os
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from leadline.cluster.units import Bench
from leadline.config import Engine
from leadline.errors import LeadlineError, one_line

SECONDS_TO_ANSWER = 10
TRIES = 3  # of a unit whose actor died under it
OBJECT_STORE = 80 << 20  # bytes: nothing but small records passes through it; Ray wants 75 MiB at least

# A unit is the name of a method of Bench and its arguments.
Unit = tuple[str, tuple[Any, ...]]


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


class Pool:
    """Actors of one run, each a Bench with its share of CPUs and GPUs."""

    def __init__(self, engine: Engine, bench: tuple[Any, ...]) -> None:
        self._engine = engine
        self._bench = bench
        self._actors: list[Any] = []
        self._actors = [self._start() for _ in range(self._count())]

    def run(self, units: Sequence[Unit], done: Callable[[int], None]) -> None:
        """Do all units, in the order given as actors come free; `done` is told the work in each.

        A unit whose actor dies is done by a new one, TRIES times at most. The first error of a unit ends the run: units
        are repeatable, so what is done stays done.
        """
        waiting = deque((unit, 1) for unit in units)
        idle = list(self._actors)
        busy: dict[Any, tuple[Any, Unit, int]] = {}
        while waiting or busy:
            while waiting and idle:
                unit, tries = waiting.popleft()
                actor = idle.pop()
                method, arguments = unit
                busy[getattr(actor, method).remote(*arguments)] = (actor, unit, tries)
            (ready,), _ = ray.wait(list(busy), num_returns=1)
            actor, unit, tries = busy.pop(ready)
            try:
                done(ray.get(ready))
            except RayActorError as error:
                if tries == TRIES:
                    what = " ".join([unit[0], *(str(getattr(argument, "name", argument)) for argument in unit[1])])
                    raise LeadlineError(
                        f"unit {what}: its worker died {TRIES} times ({one_line(error)}); "
                        "give it more memory, or lower engine.group_size or engine.query_block"
                    ) from None
                self._actors.remove(actor)
                actor = self._start()
                self._actors.append(actor)
                waiting.append((unit, tries + 1))
            except RayTaskError as error:
                if isinstance(error.cause, LeadlineError):
                    raise error.cause from None
                raise
            idle.append(actor)

    def _start(self) -> Any:
        options = {"num_cpus": self._engine.threads, "num_gpus": self._engine.gpus}
        # What the driver can import, its actors can: a user's module:function lies beside the configuration.
        return ray.remote(_Actor).options(**options).remote(sys.path, self._bench)

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
