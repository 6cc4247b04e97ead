"""Arrays on disk in shards, one .npy file each, read as one array: embeddings, and all that is kept by point."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


class ShardedRows:
    """Rows of several .npy files as one [n, D] array, in the order of `ids`; files are mapped, not read.

    paths: the shards in order, of one dtype, [m_i, ...] each; ids: int64 [n], ascending places in their concatenation,
    or None for all of them. Indices are slices or ascending places.
    """

    def __init__(self, paths: Sequence[Path], ids: Array | None = None) -> None:
        self._shards = [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths]
        self._edges = np.cumsum([0, *(len(shard) for shard in self._shards)])
        self._ids = np.arange(self._edges[-1]) if ids is None else ids
        self.shape: tuple[int, ...] = (len(self._ids), *self._shards[0].shape[1:])

    def __getitem__(self, index: slice | Array, /) -> Array:
        wanted = self._ids[index]
        out = np.empty((len(wanted), *self.shape[1:]), self._shards[0].dtype)
        places = np.searchsorted(wanted, self._edges)
        for shard, edge, first, stop in zip(self._shards, self._edges, places, places[1:], strict=False):
            out[first:stop] = shard[wanted[first:stop] - edge]
        return out
