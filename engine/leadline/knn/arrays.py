"""What the search reads: rows in order, taken a few at a time, wherever they lie."""

import mmap
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


class Rows(Protocol):
    """A [N, D] array of finite real numbers that need not be in memory: numpy arrays, memory maps, shards of either."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: slice | Array, /) -> Array: ...


class Shards:
    """Arrays [n_i, D], or memory maps of such, read as one [N, D]."""

    def __init__(self, arrays: Sequence[Array]) -> None:
        self._arrays = arrays
        self._edges = np.cumsum([0, *(len(array) for array in arrays)])
        self._dtype = np.result_type(*arrays)
        self.shape = (int(self._edges[-1]), *arrays[0].shape[1:])

    def __getitem__(self, index: slice | Array, /) -> Array:
        """The rows of a slice of step 1, or of places in any order."""
        if isinstance(index, slice):
            first, stop, _ = index.indices(self.shape[0])
            index = np.arange(first, max(first, stop))
        out = np.empty((len(index), *self.shape[1:]), self._dtype)
        shard_of = np.searchsorted(self._edges, index, side="right") - 1
        for shard in np.unique(shard_of):
            here = shard_of == shard
            out[here] = copied(self._arrays[shard], index[here] - self._edges[shard])
        return out


def is_in_memory(rows: Rows) -> bool:
    """Whether rows lie in memory already, so that reading them takes no more."""
    return isinstance(rows, np.ndarray) and _file_of(rows) is None


def copied(rows: Rows, index: slice | Array) -> Array:
    """Contiguous rows in memory: a copy, unless they are a slice of what lies there.

    Pages of a file that is mapped for reading are handed back, or all of it would count as this process's memory.
    """
    if is_in_memory(rows):
        return np.ascontiguousarray(rows[index])
    out = np.array(rows[index])
    file = _file_of(rows) if isinstance(rows, np.ndarray) else None
    if file is not None and isinstance(rows, np.memmap) and rows.mode == "r":
        file.madvise(mmap.MADV_DONTNEED)
    return out


def _file_of(array: Array) -> mmap.mmap | None:
    """The mapped file that an array is a view of."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, mmap.mmap) else None
