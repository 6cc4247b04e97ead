"""Files that are whole or not there."""

import hashlib
import io
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from leadline.errors import LeadlineError
from leadline.knn.arrays import Array
from leadline.store.places import ObjectPath, Place

PART = ".part"  # end of the name of a file that is being written


@contextmanager
def replacing(place: Place) -> Iterator[Path]:
    """Give a path of this machine to write to; when the block ends well, what was written takes its place.

    On a file system it is beside `place`, is flushed to disk and renamed: a kill at any moment leaves the old file or
    the new one. What an earlier kill left is overwritten by nobody, since each writer has a name of its own, and is
    removed by `sweep`. For an object store it is in a temporary folder and uploaded, and seen when all of it is there.
    """
    if isinstance(place, ObjectPath):
        with _temporary() as folder:
            beside = folder / place.name
            yield beside
            place.upload(beside)
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(place)
    try:
        yield beside
        with beside.open("rb+") as written:
            os.fsync(written.fileno())
        beside.replace(place)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def filling(folder: Place) -> Iterator[Path]:
    """Give a folder of this machine, into which files are written whole; in an object store they lie when it ends well.

    For writers that make several files, each beside its place and then renamed.
    """
    if isinstance(folder, ObjectPath):
        with _temporary() as local:
            yield local
            for path in sorted(local.iterdir()):
                (folder / path.name).upload(path)
        return
    folder.mkdir(parents=True, exist_ok=True)
    yield folder


@contextmanager
def fetched(place: Place, *others: Place, sha256: str | None = None) -> Iterator[Path]:
    """Give a path of this machine to read from: the file itself, or a copy that lasts as long as the block.

    others: of the same folder, and again beside it. Raises LeadlineError for a file that is not there, or is another
    than the one with this digest.
    """
    if isinstance(place, Path):
        if sha256 is not None:
            check(place, sha256)
        yield place
        return
    with _temporary() as folder:
        for one in (place, *others):
            assert isinstance(one, ObjectPath)
            try:
                one.download(folder / one.name)
            except FileNotFoundError:
                raise _not_the_one(one) from None
        if sha256 is not None and digest(folder / place.name) != sha256:
            raise _not_the_one(place)
        yield folder / place.name


def create(place: Place, value: Mapping[str, Any]) -> bool:
    """Write a JSON object unless there is a file of this name: then False. Of several who try at once, one succeeds."""
    if isinstance(place, ObjectPath):
        return place.create(_as_text(value))
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(place)
    try:
        beside.write_text(_as_text(value))
        try:
            os.link(beside, place)  # which, unlike a rename, fails where there is one, and shows the file whole
        except FileExistsError:
            raise
        except OSError:  # no hard links on this file system: as exclusive, but for a moment it is seen empty
            with place.open("x") as opened:
                opened.write(_as_text(value))
    except FileExistsError:
        return False
    finally:
        beside.unlink(missing_ok=True)
    return True


def names(folder: Place) -> frozenset[str]:
    """Of the files in a folder, in one question to the store; none where there is no folder."""
    if isinstance(folder, Path) and not folder.is_dir():
        return frozenset()
    return frozenset(path.name for path in folder.iterdir())


def remove(folder: Place) -> None:
    """Remove a folder with all that is in it, if it is there."""
    if isinstance(folder, ObjectPath):
        folder.remove_all()
    else:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _temporary() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="leadline-") as folder:
        yield Path(folder)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}{PART}")


def sweep(folder: Place) -> None:
    """Remove what writers that were killed left half written below a folder; object stores show nothing of it."""
    if isinstance(folder, Path):
        for leftover in folder.rglob(f".*{PART}"):
            leftover.unlink(missing_ok=True)


def write_json(place: Place, value: Mapping[str, Any]) -> None:
    with replacing(place) as beside:
        beside.write_text(_as_text(value))


def _as_text(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def read_json(place: Place) -> dict[str, Any]:
    """Raises LeadlineError where the file is not a JSON object."""
    try:
        value = json.loads(place.read_text())
    except (OSError, ValueError) as error:
        raise LeadlineError(f"{place}: damaged ({error}); delete it and run the same command again") from None
    if not isinstance(value, dict):
        raise LeadlineError(f"{place}: damaged (not a JSON object); delete it and run the same command again")
    return value


def write_array(place: Place, array: Array) -> None:
    with replacing(place) as beside, beside.open("wb") as opened:
        np.save(opened, array, allow_pickle=False)


@contextmanager
def writing_rows(place: Place, n: int, width: int) -> Iterator[Callable[[Array], None]]:
    """Write a .npy of float32 [n, width], some rows after others, with what is yielded; none of them stays in memory.

    Raises ValueError where the rows that came are not n.
    """
    with replacing(place) as beside, beside.open("wb") as opened:
        about = {"descr": "<f4", "fortran_order": False, "shape": (n, width)}
        np.lib.format.write_array_header_1_0(opened, about)
        begin = opened.tell()
        yield lambda rows: rows.astype("<f4", order="C", copy=False).tofile(opened)
        if opened.tell() - begin != 4 * n * width:
            raise ValueError(f"{place}: {opened.tell() - begin} bytes came, not {n} rows of {width} values")


def read_array(place: Place) -> Array:
    """Into memory, wherever the file lies."""
    return np.asarray(np.load(io.BytesIO(place.read_bytes()), allow_pickle=False))


def check(place: Place, sha256: str) -> None:
    """Raises LeadlineError for a file that is not there, or is another than the one with this digest."""
    if not place.is_file() or digest(place) != sha256:
        raise _not_the_one(place)


def _not_the_one(place: Place) -> LeadlineError:
    return LeadlineError(
        f"{place}: missing, damaged or changed (its SHA-256 is not the recorded one); restore it, or delete it and "
        "run the same command again"
    )


def digest(place: Place) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Raises LeadlineError where it cannot be read."""
    try:
        with place.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise LeadlineError(f"{place}: {error.strerror}; give a file that can be read") from None
