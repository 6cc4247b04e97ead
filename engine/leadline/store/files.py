"""Files that are whole or not there."""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from leadline.errors import LeadlineError

PART = ".part"  # end of the name of a file that is being written


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; when the block ends well, flush it to disk and rename it to `path`.

    A kill at any moment leaves the old file or the new one. What an earlier kill left is overwritten by nobody, since
    each writer has a name of its own, and removed by `sweep`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PART}")
    try:
        yield beside
        with beside.open("rb+") as written:
            os.fsync(written.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what writers that were killed left half written below a folder."""
    for leftover in folder.rglob(f".*{PART}"):
        leftover.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    with replacing(path) as beside:
        beside.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Raises LeadlineError where the file is not a JSON object."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise LeadlineError(f"{path}: damaged ({error}); delete it and run the same command again") from None
    if not isinstance(value, dict):
        raise LeadlineError(f"{path}: damaged (not a JSON object); delete it and run the same command again")
    return value


def check(path: Path, sha256: str) -> None:
    """Raises LeadlineError for a file that is not there, or is another than the one with this digest."""
    if not path.is_file() or digest(path) != sha256:
        raise LeadlineError(
            f"{path}: missing, damaged or changed (its SHA-256 is not the recorded one); restore it, or delete it and "
            "run the same command again"
        )


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Raises LeadlineError where it cannot be read."""
    try:
        with path.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise LeadlineError(f"{path}: {error.strerror}; give a file that can be read") from None
