"""Batches of points that are gone through several times, and read once as far as there is room for them."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Batch = tuple[NDArray[np.int64], Tensor]


class KeptBatches:
    """Batches of points in their order, each time: the ids as given, and the inputs [n, ...] where `read` puts them.

    read: makes the batches of some ids, one after another, from any of them on. The first inputs stay, as many as
    `room` bytes hold, and are given again, not copies of them; the others are read each time. One pass ends before the
    next begins.
    """

    def __init__(
        self, ids: Sequence[NDArray[np.int64]], read: Callable[[Iterable[NDArray[np.int64]]], Iterator[Batch]],
        room: float,
    ) -> None:  # fmt: skip
        self._ids = ids
        self._read = read
        self._room = room
        self._kept: list[Batch] = []

    def __iter__(self) -> Iterator[Batch]:
        yield from self._kept
        for ids, inputs in self._read(self._ids[len(self._kept) :]):
            # Once one had no room, none of those after it is kept.
            self._room -= inputs.nbytes
            if self._room >= 0:
                self._kept.append((ids, inputs))
            yield ids, inputs
