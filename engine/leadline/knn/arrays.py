"""What the search reads: rows in order, taken a few at a time, wherever they lie."""

from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


class Rows(Protocol):
    """A [N, D] array of finite real numbers that need not be in memory: numpy arrays, memory maps, shards of either."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: slice | Array, /) -> Array: ...
