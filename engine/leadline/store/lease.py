"""One driver at a time on a run.

A driver makes a record of itself under the next free number, and renews it as long as it lives. Only the last record
counts, and no number is given twice: to take a run over is to make the next record, which the store lets one of several
do, and whoever finds a record after its own has lost the run. What ends says so in its record, which stays.

Clocks of different machines should agree to some seconds. Where they do not, or a driver is stopped between a look at
the records and what it writes then, two may work on a run for a moment: each finds out at its next renewal, and since
units are published whole and are the same whoever does them, the tables are not the worse for it.
"""

import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from leadline.errors import LeadlineError
from leadline.store.directory import RunDirectory
from leadline.store.files import create, names, read_json, write_json
from leadline.store.places import Place

SECONDS = 60.0  # of silence after which a driver is taken for dead
RENEWAL = 5.0  # seconds between two renewals
LOOK = 1.0  # seconds between two looks at a driver that is waited for
DOUBT = 15.0  # seconds of silence after which another driver waits to see, and is not refused


class Lease:
    """A run that is this process's alone, from now to the end of the `with` block.

    say: takes a line for the user. Raises LeadlineError where another driver has it; not when that one has been silent
    for SECONDS, or was a process of this machine that lives no more. What has been silent for a while may be a driver
    whose machine was lost, and this one its successor, started by whatever looks after jobs: so it waits.
    """

    def __init__(self, directory: RunDirectory, say: Callable[[str], None]) -> None:
        self._root, self._folder, self._say = directory.root, directory.drivers, say
        self._about = {**_here(), "session": uuid.uuid4().hex, "since": time.time()}
        self._number, self._renewed = self._take()
        self._lost = ""  # how, once it is
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._renewer = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._renewer.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._renewer.join()
        try:
            if self.is_held():
                self._write(ended=True)
        except (LeadlineError, OSError):
            if error is None:
                raise  # else that one says more

    def check(self) -> None:
        """Before anything is written on the strength of the lease: raises LeadlineError where another driver has it."""
        if not self.is_held():
            raise LeadlineError(self._lost)

    def is_held(self) -> bool:
        """After a long silence, because this process was stopped or the store did not answer, it looks who has it."""
        if time.time() - self._renewed > SECONDS:
            self._renew()
        return not self._lost

    def _take(self) -> tuple[int, float]:
        """Number of the record that is made, and when. A record that others make first is looked at in turn."""
        while True:
            last = _last(self._folder)
            if last:
                self._await_end(last)
            now = time.time()
            if create(_record(self._folder, last + 1), {**self._about, "renewed": now, "ended": False}):
                return last + 1, now

    def _await_end(self, number: int) -> None:
        has_said = False
        while not _is_over(record := read_json(_record(self._folder, number))):
            by = f"{self._root}: is being computed by {_who(record)}, renewed {_silence(record):.0f} s ago"
            if _silence(record) < DOUBT:
                raise LeadlineError(
                    f"{by}; wait, or run the same command again when it has been silent for {SECONDS:.0f} s"
                )
            if not has_said:
                self._say(f"{by}; this driver takes over if it is silent for {SECONDS:.0f} s")
                has_said = True
            time.sleep(LOOK)

    def _keep(self) -> None:
        while not self._over.wait(RENEWAL) and not self._lost:
            try:
                self._renew()
            except (LeadlineError, OSError):
                continue  # who asks for the lease is told, once it may be another's

    def _renew(self) -> None:
        with self._lock:
            last = _last(self._folder)
            if last == self._number:
                self._write(ended=False)
            else:
                by = f"by {_who(read_json(_record(self._folder, last)))}" if last else "or removed"
                self._lost = f"{self._root}: was taken over {by}, after this driver was silent; this one stops"

    def _write(self, *, ended: bool) -> None:
        now = time.time()
        write_json(_record(self._folder, self._number), {**self._about, "renewed": now, "ended": ended})
        self._renewed = now


def _record(folder: Place, number: int) -> Place:
    return folder / f"{number:06d}.json"


def _last(folder: Place) -> int:
    """The highest number that was given, 0 for none."""
    return max((int(name[:-5]) for name in names(folder) if re.fullmatch(r"\d+\.json", name)), default=0)


def _is_over(record: dict[str, Any]) -> bool:
    """Whether the driver of a record has ended, is silent for too long, or was a process here that is no more."""
    here = _here()["machine"]
    died_here = here is not None and record["machine"] == here and record["started"] != _started(record["process"])
    return record["ended"] or died_here or _silence(record) > SECONDS


def _silence(record: dict[str, Any]) -> float:
    return max(0.0, time.time() - float(record["renewed"]))


def _who(record: dict[str, Any]) -> str:
    return f"{record['host']} (process {record['process']})"


def _here() -> dict[str, Any]:
    """This process, as others can tell it from all others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {Path('/proc/self/ns/pid').readlink()}"  # containers of one machine number alike
    except OSError:
        machine = None  # not Linux: nobody is told dead before its lease is over
    return {
        "host": socket.gethostname(), "process": os.getpid(), "started": _started(os.getpid()), "machine": machine
    }  # fmt: skip


def _started(process: int) -> str | None:
    """When a process of this machine started, in ticks since it booted; None where it lives no more."""
    try:
        state, *others = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else others[18]  # fields 3 and 22 of proc(5)
