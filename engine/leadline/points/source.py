"""What every source of points gives, and the checks that all of them make."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from leadline.errors import LeadlineError
from leadline.points.images import decode

TRAIN, TEST = 0, 1
PART_NAMES = ("train", "test")
# Names are held for every class up to the highest label, so a label that is really an id must not fill the memory.
MAX_CLASSES = 1_000_000


class Inputs(Protocol):
    """The inputs of a source, read by point id."""

    @property
    def full_scale(self) -> int | None:
        """The pixel value that stands for 1.0 where inputs are images; None where they are numbers."""

    def read(self, ids: NDArray[np.int64]) -> Iterator[tuple[int, Image.Image | NDArray[Any]]]:
        """Pairs of a position in `ids` and the input of that point, in any order, each position once.

        An image is RGB or an array uint8 [C, H, W]; numbers are an array [...] of real numbers, not checked to be
        finite. Raises LeadlineError that names the file, and the row where it has rows, that cannot be read.
        """

    def where(self, point_id: int) -> str:
        """The file of a point, and its row where the file has rows, for messages."""

    def content(self) -> Iterator[bytes]:
        """The inputs as they are stored, in the order of ids, cut so that different inputs give different bytes."""


class EncodedInputs(ABC):
    """Images in files or columns, decoded when they are read."""

    full_scale = 255

    @abstractmethod
    def encoded(self, ids: NDArray[np.int64]) -> Iterator[tuple[int, bytes]]:
        """Pairs as `Inputs.read` gives them, of images as they are stored."""

    @abstractmethod
    def where(self, point_id: int) -> str:
        """As of Inputs."""

    def read(self, ids: NDArray[np.int64]) -> Iterator[tuple[int, Image.Image]]:
        for position, encoded in self.encoded(ids):
            yield position, decode(encoded, self.where(int(ids[position])))


@dataclass(frozen=True)
class Source:
    """Points before preprocessing: the training part first, then the test part, each in the source's own order.

    labels int32 [N], below the number of label_names; parts uint8 [N], TRAIN or TEST; keys: N names at the source.
    """

    inputs: Inputs
    labels: NDArray[np.int32]
    parts: NDArray[np.uint8]
    keys: list[str]
    label_names: tuple[str, ...]


def checked_labels(labels: NDArray[np.integer[Any]], classes: int, where: Callable[[int], str]) -> NDArray[np.int32]:
    """The same labels as int32, all of 0 … classes - 1. Raises LeadlineError that names the first one that is not."""
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if wrong.size:
        raise LeadlineError(
            f"{where(int(wrong[0]))}: label {labels[wrong[0]]} is not a class from 0 to {classes - 1}; "
            "mend it or leave the row out"
        )
    return labels.astype(np.int32)


def numbered_names(labels: NDArray[np.int32]) -> tuple[str, ...]:
    """Names for labels that have none: the numbers 0 … highest label, as text."""
    return tuple(str(number) for number in range(int(labels.max()) + 1))


def two_parts(train: int, test: int) -> NDArray[np.uint8]:
    """The parts, uint8 [train + test], of so many training points and then so many test points."""
    return np.repeat(np.array([TRAIN, TEST], dtype=np.uint8), [train, test])


def numbered_keys(part: int, rows: NDArray[np.int64]) -> list[str]:
    """Names of points that have only a row: train/00012."""
    return [f"{PART_NAMES[part]}/{row:05d}" for row in rows]
