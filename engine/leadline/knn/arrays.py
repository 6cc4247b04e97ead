"""What the search reads: rows in order, taken a few at a time, wherever they lie."""

import mmap
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


MAPPED = 32 << 20  # bytes of a mapped file that are in memory at a time


class Rows(Protocol):
    """A [N, D] array of finite real numbers that need not be in memory: numpy arrays, memory maps, shards of either."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: slice | Array, /) -> Array: ...


class Shards:
    """Arrays or memory maps [n_i, ...] of one kind, read as one [n, ...], in the order of `ids`.

    ids: int64 [n], ascending places in their concatenation, or None for all of them. Indices are slices of step 1, or
    places in any order.
    """

    def __init__(self, arrays: Sequence[Array], ids: Array | None = None) -> None:
        self._arrays = arrays
        self._edges = np.cumsum([0, *(len(array) for array in arrays)])
        self._ids = np.arange(self._edges[-1]) if ids is None else ids
        self._dtype = np.result_type(*(array.dtype for array in arrays))
        self.shape: tuple[int, ...] = (len(self._ids), *arrays[0].shape[1:])

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: slice | Array, /) -> Array:
        wanted = self._ids[index]
        out = np.empty((len(wanted), *self.shape[1:]), self._dtype)
        shard_of = np.searchsorted(self._edges, wanted, side="right") - 1
        for shard in np.unique(shard_of):
            here = np.flatnonzero(shard_of == shard)
            places = wanted[here] - self._edges[shard]
            if here[-1] - here[0] == len(here) - 1 and (np.diff(places) == 1).all():
                # A run of rows is read in one piece.
                out[here[0] : here[-1] + 1] = copied(self._arrays[shard], slice(places[0], places[-1] + 1))
            else:
                out[here] = copied(self._arrays[shard], places)
        return out


class Part:
    """Some rows of others, `first` to `stop`, not read before they are asked for."""

    def __init__(self, rows: Rows, first: int, stop: int) -> None:
        self._rows, self._first = rows, first
        self.shape: tuple[int, ...] = (stop - first, *rows.shape[1:])

    def __getitem__(self, index: slice | Array, /) -> Array:
        if not isinstance(index, slice):
            return self._rows[self._first + index]
        start, stop, step = index.indices(self.shape[0])
        return self._rows[self._first + start : self._first + stop : step]


def is_in_memory(rows: Rows) -> bool:
    """Whether rows lie in memory already, so that reading them takes no more."""
    return isinstance(rows, np.ndarray) and _file_of(rows) is None


def copied(rows: Rows, index: slice | Array) -> Array:
    """Contiguous rows in memory: a copy, unless they are a slice of what lies there.

    Pages of a file that is mapped for reading are handed back, or all of it would count as this process's memory.
    """
    file = _file_of(rows) if isinstance(rows, np.ndarray) else None
    if not isinstance(rows, np.ndarray) or file is None:
        return np.ascontiguousarray(rows[index])
    if isinstance(index, slice):
        index = np.arange(*index.indices(len(rows)))
    out = np.empty((len(index), *rows.shape[1:]), rows.dtype)
    step = max(1, MAPPED // (rows[:1].nbytes or 1))
    for first in range(0, len(index), step):
        out[first : first + step] = rows[index[first : first + step]]
        if isinstance(rows, np.memmap) and rows.mode == "r":
            file.madvise(mmap.MADV_DONTNEED)
    return out


def _file_of(array: Array) -> mmap.mmap | None:
    """The mapped file that an array is a view of."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, mmap.mmap) else None
