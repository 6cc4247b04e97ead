"""ImageNet's layout: one folder for each class, images in it."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np
from numpy.typing import NDArray

from leadline.errors import LeadlineError
from leadline.points.source import EncodedInputs, Source, two_parts

if TYPE_CHECKING:
    from leadline.config import ImageFolder

_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
_HASHING_THREADS = 8
_HASHING_BLOCK = 1024  # files handed to the threads at once, so that a million pending ones are never held


def open_image_folder(config: "ImageFolder") -> Source:
    """Images below root/<class>/, sorted by class, then by path; only their names are held.

    Classes are the folders of train and test together, sorted. Keys are the paths from the root. Names that begin with
    a dot are passed over. Raises LeadlineError that names a folder that is missing or has no images.
    """
    train_root = config.train.expanduser()
    train = _images_by_class(train_root, "points.train")
    test_root, test = train_root, dict[str, list[str]]()
    if config.test is not None:
        test_root = config.test.expanduser()
        _refuse_nested(train_root, test_root)
        test = _images_by_class(test_root, "points.test")
    names = tuple(sorted({*train, *test}))
    number = {name: position for position, name in enumerate(names)}
    keys = [path for paths in train.values() for path in paths]
    n_train = len(keys)
    keys += [path for paths in test.values() for path in paths]
    labels = [number[name] for part in (train, test) for name, paths in part.items() for _ in paths]
    return Source(
        inputs=FolderInputs(train_root, test_root, keys, n_train),
        labels=np.array(labels, dtype=np.int32),
        parts=two_parts(n_train, len(keys) - n_train),
        keys=keys,
        label_names=names,
    )


class FolderInputs(EncodedInputs):
    """Images in files, opened when they are read: `keys` are paths below train_root, from n_train on test_root."""

    def __init__(self, train_root: Path, test_root: Path, keys: list[str], n_train: int) -> None:
        self._roots = train_root, test_root
        self._keys = keys
        self._n_train = n_train

    def encoded(self, ids: NDArray[np.int64]) -> Iterator[tuple[int, bytes]]:
        for position, point_id in enumerate(ids.tolist()):
            path = self._path(point_id)
            try:
                encoded = path.read_bytes()
            except OSError as error:
                _refuse(path, error)
            yield position, encoded

    def where(self, point_id: int) -> str:
        return str(self._path(point_id))

    def content(self) -> Iterator[bytes]:
        with ThreadPoolExecutor(_HASHING_THREADS) as pool:
            for start in range(0, len(self._keys), _HASHING_BLOCK):
                block = range(start, min(start + _HASHING_BLOCK, len(self._keys)))
                yield from pool.map(_file_digest, [self._path(point_id) for point_id in block])

    def _path(self, point_id: int) -> Path:
        return self._roots[point_id >= self._n_train] / self._keys[point_id]


def _file_digest(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        _refuse(path, error)


def _refuse(path: str | Path, error: OSError) -> NoReturn:
    raise LeadlineError(f"{path}: cannot be read ({error.strerror}); mend it or leave it out") from None


def _images_by_class(root: Path, key: str) -> dict[str, list[str]]:
    """The images of each class folder as sorted paths from the root, classes in order."""
    if not root.is_dir():
        raise LeadlineError(f"{key}: {root} is not a folder; give one that has a folder of images for each class")
    try:
        classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        _refuse(root, error)
    if not classes:
        raise LeadlineError(f"{key}: {root} has no folders; put the images into one folder for each class")
    images = {name: sorted(_images_below(root, name)) for name in classes}
    for name, paths in images.items():
        if not paths:
            raise LeadlineError(f"{key}: {root / name} has no images ({' '.join(_ENDINGS)}); add some or remove it")
    return images


def _images_below(root: Path, name: str) -> Iterator[str]:
    for folder, folders, files in os.walk(root / name, onerror=_refuse_folder, followlinks=True):
        folders[:] = [sub for sub in folders if not sub.startswith(".")]
        below = Path(folder).relative_to(root).as_posix()
        for file in files:
            if file.lower().endswith(_ENDINGS) and not file.startswith("."):
                yield _checked_name(f"{below}/{file}", root)


def _checked_name(path: str, root: Path) -> str:
    """The same path. Keys go into tables and messages, so they must be UTF-8 and one line."""
    if path.encode("utf-8", "ignore").decode() != path or len(path.splitlines()) != 1:
        raise LeadlineError(f"{root}: the file name {path!a} is not one line of UTF-8; rename the file")
    return path


def _refuse_folder(error: OSError) -> NoReturn:
    _refuse(error.filename, error)


def _refuse_nested(train: Path, test: Path) -> None:
    here, there = train.resolve(), test.resolve()
    if here.is_relative_to(there) or there.is_relative_to(here):
        raise LeadlineError(f"points.test: {test} and {train} of points.train hold one another; give separate folders")
