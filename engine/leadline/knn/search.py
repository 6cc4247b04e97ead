"""One bank, searched by an index or exactly."""

from dataclasses import replace
from functools import cached_property

import numpy as np
import torch

from leadline.knn.arrays import Array, Rows
from leadline.knn.exact import Bank, Cost
from leadline.knn.indexes import Index


class Search:
    """The neighbours of any queries in bank rows [M, D]: by an index of them, or exactly where `index` is None.

    device, memory_budget: of the exact search (see `Bank`), which is made ready when it is first needed.
    """

    def __init__(self, rows: Rows, index: Index | None, device: str | torch.device, memory_budget: int) -> None:
        self._rows, self._index, self._device, self._memory_budget = rows, index, device, memory_budget

    @cached_property
    def bank(self) -> Bank:
        return Bank(self._rows, self._device, self._memory_budget)

    @property
    def plan(self) -> str:
        """How the bank is searched."""
        return self._index.method if self._index else self.bank.plan

    def search(self, queries: Array, k: int, exclude: Array | None = None) -> tuple[Array, Cost]:
        """k rows of each query, int64 [Q, k], ascending, and what they cost; arguments as those of `Bank.search`.

        An index may find fewer than k rows, where few lie in the cells that it looks into: those queries are searched
        exactly, so that every vote is of k neighbours, and counted as fell_through.
        """
        if self._index is None:
            return self.bank.search(queries, k, exclude)
        rows, cost = self._index.search(queries, k, exclude)
        short = np.flatnonzero((rows < 0).any(axis=1))
        if len(short):
            own = None if exclude is None else exclude[short]
            rows[short], again = self.bank.search(queries[short], k, own)
            cost += replace(again, full_flops=0, certified=0, reranked=0, fell_through=len(short))
        return rows, cost
