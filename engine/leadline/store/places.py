"""Where files lie: on a file system, as `pathlib.Path`, or in an object store, as `ObjectPath`.

Credentials come from the environment (AWS_*, GOOGLE_*) of each process and are never part of a place.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from leadline.errors import LeadlineError, StorageError, one_line

if TYPE_CHECKING:
    from obstore.store import ObjectStore

SCHEMES = ("s3://", "gs://")
BYTES = 8 << 20  # of one request when an object is read piece by piece


@dataclass(frozen=True, order=True)
class ObjectPath:
    """An object, or the folder that the first parts of the names of others make, in a bucket.

    It has those methods of `pathlib.Path` that a run needs, and no connection, so that it can be sent to an actor. What
    the store refuses, or does not answer, raises StorageError.

    bucket: with its scheme, as s3://mine; key: inside it.
    """

    bucket: str
    key: PurePosixPath

    def __str__(self) -> str:
        return self.bucket if self.key == PurePosixPath() else f"{self.bucket}/{self.key}"

    def __truediv__(self, name: str) -> "ObjectPath":
        return ObjectPath(self.bucket, self.key / name)

    @property
    def name(self) -> str:
        return self.key.name

    @property
    def parent(self) -> "ObjectPath":
        return ObjectPath(self.bucket, self.key.parent)

    def with_name(self, name: str) -> "ObjectPath":
        return ObjectPath(self.bucket, self.key.with_name(name))

    def with_suffix(self, suffix: str) -> "ObjectPath":
        return ObjectPath(self.bucket, self.key.with_suffix(suffix))

    def is_file(self) -> bool:
        return self.size() is not None

    def exists(self) -> bool:
        """Whether it is an object, or a folder that holds one."""
        return self.is_file() or any(True for _ in self.rglob("*"))

    def size(self) -> int | None:
        """Bytes of the object; None where there is none."""
        import obstore

        with _asking(self):
            try:
                return int(obstore.head(_store(self.bucket), str(self.key))["size"])
            except FileNotFoundError:
                return None

    def iterdir(self) -> Iterator["ObjectPath"]:
        """The objects of the folder itself, not those of folders in it."""
        import obstore

        with _asking(self):
            for entry in obstore.list_with_delimiter(_store(self.bucket), _prefix(self))["objects"]:
                yield ObjectPath(self.bucket, PurePosixPath(entry["path"]))

    def rglob(self, pattern: str) -> Iterator["ObjectPath"]:
        """All objects below the folder whose names match."""
        import obstore

        with _asking(self):
            for entries in obstore.list(_store(self.bucket), _prefix(self), chunk_size=1000):
                for entry in entries:
                    path = PurePosixPath(entry["path"])
                    if path.match(pattern):
                        yield ObjectPath(self.bucket, path)

    def open(self, mode: str) -> io.BufferedReader:
        """For reading bytes ("rb"), by ranges. Raises FileNotFoundError."""
        assert mode == "rb"
        return io.BufferedReader(_Reader(self), BYTES)

    def read_bytes(self) -> bytes:
        """Raises FileNotFoundError."""
        import obstore

        with _asking(self):
            return obstore.get(_store(self.bucket), str(self.key)).bytes().to_bytes()

    def read_text(self) -> str:
        """Raises FileNotFoundError."""
        return self.read_bytes().decode()

    def download(self, target: Path) -> None:
        """Write the object's bytes to a file. Raises FileNotFoundError."""
        import obstore

        with _asking(self), target.open("wb") as opened:
            for piece in obstore.get(_store(self.bucket), str(self.key)).stream(BYTES):
                opened.write(piece)

    def upload(self, source: Path) -> None:
        """Make a file the object's contents. The object is seen whole or not at all, and the old one until then."""
        import obstore

        with _asking(self, put=True):
            obstore.put(_store(self.bucket), str(self.key), source)

    def create(self, text: str) -> bool:
        """Make an object with this text, unless there is one: False. Of several who try at once, one succeeds."""
        import obstore
        from obstore.exceptions import AlreadyExistsError

        with _asking(self, put=True):
            try:
                obstore.put(_store(self.bucket), str(self.key), text.encode(), mode="create")
            except AlreadyExistsError:
                return False
        return True

    def remove_all(self) -> None:
        """Remove all objects below the folder."""
        import obstore

        with _asking(self):
            for entries in obstore.list(_store(self.bucket), _prefix(self), chunk_size=1000):
                obstore.delete(_store(self.bucket), [entry["path"] for entry in entries])


Place = Path | ObjectPath


def place_of(uri: str | Path) -> Place:
    """A path of this machine, made absolute, or the place of s3://bucket/prefix or gs://bucket/prefix.

    Raises LeadlineError for another scheme, and a URI without a bucket.
    """
    text = str(uri)
    if "://" not in text:
        return Path(text).absolute()
    scheme = text.partition("://")[0] + "://"
    bucket, _, key = text.removeprefix(scheme).partition("/")
    if scheme not in SCHEMES or not bucket:
        raise LeadlineError(f"{text}: no place of a run; give a path, s3://bucket/prefix or gs://bucket/prefix")
    return ObjectPath(scheme + bucket, PurePosixPath(key.strip("/")))


def for_arrow(place: Place) -> tuple[str, Any]:
    """A place as Arrow's data sets take it: the path, and the file system that it is in, None for this machine's."""
    if isinstance(place, Path):
        return str(place), None
    return f"{place.bucket.partition('://')[2]}/{place.key}", _arrow_file_system(place.bucket)


class _Reader(io.RawIOBase):
    """An object, read by ranges."""

    def __init__(self, place: ObjectPath) -> None:
        super().__init__()
        self._place, self._at = place, 0
        size = place.size()
        if size is None:
            raise FileNotFoundError(2, "No such object", str(place))
        self._size = size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        import obstore

        length = min(len(buffer), self._size - self._at)
        if length <= 0:
            return 0
        with _asking(self._place):
            place = self._place
            buffer[:length] = obstore.get_range(_store(place.bucket), str(place.key), start=self._at, length=length)
        self._at += length
        return length


@lru_cache
def _store(bucket: str) -> "ObjectStore":
    """The client of a bucket: one for a process, with connections that it keeps."""
    from obstore.exceptions import BaseError
    from obstore.store import from_url

    try:
        return from_url(bucket, client_options={"allow_http": _endpoint().startswith("http://")})
    except (BaseError, ValueError) as error:
        raise StorageError(f"{bucket}: {_first_line(error)}; see docs/runs.md for what it needs") from None


@lru_cache
def _arrow_file_system(bucket: str) -> Any:
    from pyarrow import fs

    if bucket.startswith("gs://"):
        return fs.GcsFileSystem()
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return fs.S3FileSystem(endpoint_override=_endpoint() or None, region=region)


def _endpoint() -> str:
    """Of an S3 server that is not Amazon's."""
    return os.environ.get("AWS_ENDPOINT_URL", "")


def _prefix(place: ObjectPath) -> str | None:
    return None if place.key == PurePosixPath() else str(place.key)


@contextmanager
def _asking(place: ObjectPath, put: bool = False) -> Iterator[None]:
    """What an object store says, in one line. Where it is written to, what is not found is the bucket."""
    from obstore.exceptions import BaseError

    try:
        yield
    except (BaseError, FileNotFoundError) as error:
        if isinstance(error, FileNotFoundError) and not put:
            raise
        raise StorageError(
            f"{place}: {_first_line(error)}; check the bucket, its region and the credentials in the environment"
        ) from None


def _first_line(error: Exception) -> str:
    """Without the server's answer in XML and the client's own account of it."""
    return one_line(error).partition("Debug source:")[0].strip()
