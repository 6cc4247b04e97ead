"""The log of a run: what befell its units, a session at a time. No result depends on it; a kill loses its last lines.

A session is one driver's time with a run. Its record (`RunDirectory.session`) tells who the driver is, when it was last
alive, and how far it is; it is replaced every few seconds. Its units (`RunDirectory.log`) are JSON objects, one a line,
in files that are written whole and never changed, since a run may lie where nothing can be appended.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from leadline.errors import LeadlineError, StorageError
from leadline.store.directory import RunDirectory
from leadline.store.files import read_json, replacing, write_json
from leadline.store.places import Place

SECONDS = 5.0  # between two signs of life
# How a try of a unit may fail, and in what words that is told.
FAILED = {"again": "tried again", "divided": "done in parts", "set_aside": "set aside"}
Record = dict[str, Any]


@contextmanager
def session_log(
    directory: RunDirectory, take: Callable[[], tuple[list[Record], Record]], say: Callable[[str], None]
) -> Iterator[None]:
    """Log a session of a run, every few seconds and when the block ends.

    take: gives the units that ended since it was last called, and how far the session is; called from a thread.
    say: is told when the log could not be written; it is tried again, and raised (OSError, StorageError) only at the
    end.
    """
    began = time.time()
    name = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(began))}-{uuid.uuid4().hex[:4]}"
    about: Record = {
        "session": name, "began": began, "host": socket.gethostname(), "pid": os.getpid(),
        "outcome": None, "error": None,
    }  # fmt: skip
    waiting: list[Record] = []
    numbers, over = count(), threading.Event()

    def write() -> None:
        units, state = take()
        waiting.extend(units)
        if waiting:
            with replacing(directory.log(name, next(numbers))) as beside:
                beside.write_text("".join(json.dumps(unit, allow_nan=False) + "\n" for unit in waiting))
            waiting.clear()
        write_json(directory.session(name), {**about, "last": time.time(), **state})

    def beat() -> None:
        while not over.wait(SECONDS):
            try:
                write()
            except (OSError, StorageError) as error:
                say(f"the log of the run cannot be written, and is tried again: {error}")

    write()
    thread = threading.Thread(target=beat, name="leadline-log", daemon=True)
    thread.start()
    try:
        yield
    except BaseException as error:
        about |= {"outcome": "failed", "error": str(error) or type(error).__name__}
        raise
    else:
        about["outcome"] = "finished"
    finally:
        over.set()
        thread.join()
        write()


def sessions(directory: RunDirectory) -> list[Record]:
    """The records of a run's sessions, oldest first; none where nothing was logged."""
    return [read_json(path) for path in directory.sessions()]


def ended_units(directory: RunDirectory, session: str, *, since: float = -float("inf")) -> Iterator[Record]:
    """The tries of units that ended in a session, in this order; since: seconds since 1970, later ones alone.

    Raises LeadlineError for a file that is damaged.
    """
    paths = directory.logs(session)
    first = len(paths)
    while first and _last(paths[first - 1]) >= since:
        first -= 1
    for path in paths[first:]:
        yield from (unit for unit in _units(path) if unit["ended"] >= since)


def _last(path: Place) -> float:
    return float(_units(path)[-1]["ended"])


def _units(path: Place) -> list[Record]:
    try:
        units = [json.loads(line) for line in path.read_text().splitlines()]
        if not units:
            raise ValueError("it is empty")
        return units
    except (OSError, ValueError) as error:
        raise LeadlineError(f"{path}: damaged ({error}); delete it: nothing but the log is lost") from None
