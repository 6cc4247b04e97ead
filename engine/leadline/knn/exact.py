"""Exact nearest neighbours: bounds that are proved leave rows out, and float64 decides wherever they leave a doubt.

The proofs are in docs/decisions: 0002 for the distance that decides, 0004 for the screen.
"""

from dataclasses import astuple, dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch

from leadline.errors import LeadlineError
from leadline.full_precision import full_precision
from leadline.knn import kernels
from leadline.knn.arrays import Array, Rows, copied, is_in_memory
from leadline.knn.rank import by_distance, rank_doubtful
from leadline.knn.screen import NARROW, Screen, cells_of, error_of, prepare, scale_of
from leadline.knn.threads import spread

SPARE = 32  # candidates kept beyond k
LARGEST = 1e145  # beyond it the sum of the squares of many differences is no float64
SURVEYED = 4096  # rows whose mean is the centre
SCALES = 2.0**100  # to which float32 differences may be scaled, either way
MEMORY = 4 << 30  # bytes of a bank and what is made of it
LEAST = 60  # queries that go through a bank together
SHARE = 6  # one part for a tile's rows, the others for what is made of them, the queries, and the work
Tile = tuple[Array, Screen]  # bank rows, and what they are seen through


@dataclass(frozen=True)
class Cost:
    """What a search did.

    pairs: of a query and a row that were screened; measured: of them, in full width; flops: floating-point operations
    of both and of the centres' distances and projections; full_flops: of the products of all pairs, 2 Q M D; visits: of
    a query to a cell, of `cells` possible ones, or on a GPU of a tile of queries to one of rows; certified: queries
    whose neighbours the measured distances settled alone; reranked: queries with open rows, which float64 settled;
    fell_through: queries searched again with all distances in float64.
    """

    pairs: int
    measured: int
    flops: int
    full_flops: int
    visits: int
    cells: int
    certified: int
    reranked: int
    fell_through: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


class Bank:
    """Bank rows made ready for any number of searches on the CPU; on a GPU: `on_device.DeviceBank`.

    rows [M, D], real: an array, or anything that is read in slices; memory_budget: bytes that the search may take
    beside arrays that lie in memory already. A bank that does not fit is read a tile at a time, by each search. plan:
    how it is searched, as a sample of it decided.

    Raises LeadlineError for values that are not finite.
    """

    def __init__(self, rows: Rows, memory_budget: int = MEMORY) -> None:
        n_bank, width = rows.shape
        fits = is_in_memory(rows) or fits_memory(n_bank, width, memory_budget)
        tile, self._at_once = cut(n_bank, width, memory_budget)
        self._step = n_bank if fits else tile
        # Read once, wherever they come from: they may have to be made.
        self._rows = copied(rows, slice(0, n_bank)) if fits else rows
        self._centre, self._longest = survey(self._rows, self._step)
        self._scale = scale_of(self._longest)
        self._ready = self._prepare(0) if fits else None
        self.plan = f"{-(-n_bank // self._step)} tiles of {self._step} rows"
        if self._ready:
            self.plan = self._ready[1].plan

    @property
    def size_bytes(self) -> int:
        """Bytes that are held between searches beside the rows; 0 where each search makes its tiles ready anew."""
        return _held(self._ready[1]) if self._ready else 0

    def search(
        self, queries: Rows, k: int, exclude: Array | None = None, winners_of: Array | None = None
    ) -> tuple[Array, Cost]:
        """The k nearest rows of each query by Euclidean distance in float64, ties by lower row.

        queries [Q, D], real; exclude int64 [Q], the row that a query must not have, -1 for none; winners_of int64 [M],
        not negative: the classes of the rows, where their vote's winner alone is asked for. Returns rows int64 [Q, k],
        ascending in each query (the set is exact; its order is not by distance), and the Cost. With `winners_of` a set
        may hold rows just beyond the k nearest where they do not change the winner.

        Raises LeadlineError for values that are not finite, other widths, and fewer than k rows to choose from.
        """
        n_bank, n_queries = self._rows.shape[0], queries.shape[0]
        refuse_other_width(self._rows, queries)
        refuse_too_few(n_bank, k, exclude)
        own = np.full(n_queries, -1) if exclude is None else exclude
        chosen, cost = np.empty((n_queries, k), np.int64), NOTHING
        with full_precision():
            for first in range(0, n_queries, self._at_once):
                part = slice(first, first + self._at_once)
                asked = copied(queries, part)
                refuse_non_finite(asked, first, "query")
                chosen[part], spent = self._search(asked, k, own[part], winners_of)
                cost += spent
        cost += Cost(0, 0, 0, 2 * n_queries * n_bank * self._rows.shape[1], 0, 0, 0, 0, 0)
        return np.sort(chosen, axis=1), cost

    def by_distance(self, queries: Rows, rows: Array) -> tuple[Array, Array]:
        """Neighbours int64 [Q, k], as `search` gives them, in the order of (distance, row); and their distances.

        These are squared, as they decide, float64 [Q, k].
        """
        return by_distance(self._rows, queries, rows)

    def _search(self, queries: Array, k: int, exclude: Array, winners_of: Array | None) -> tuple[Array, Cost]:
        """Measured in the rows' own precision where that pays, then what is still open in float64."""
        n_queries, width = queries.shape
        if width < NARROW or not 1 / SCALES < self._scale < SCALES:
            _, chosen, cost = self._nearest(queries, k, exclude, k, exact=True)
            return chosen, cost + _settled(n_queries, 0, 0)
        size = k + SPARE
        distances, rows, cost = self._nearest(queries, k, exclude, size, exact=False)
        n_sure, n_open = np.zeros(n_queries, np.int64), np.zeros(n_queries, np.int64)
        kernels.settle(distances, k, self._error(queries, exact=False), n_sure, n_open)
        if winners_of is not None:
            kernels.settle_winners(rows, winners_of, k, int(winners_of.max()) + 1, n_sure, n_open)
        doubtful, lost = np.flatnonzero(n_open > 0), np.flatnonzero(n_open < 0)
        rank_doubtful(self._rows, queries, doubtful, rows, n_sure, n_open, k)
        if len(lost):
            _, rows[lost, :k], again = self._nearest(queries[lost], k, exclude[lost], k, exact=True)
            cost += again
        return rows[:, :k], cost + _settled(n_queries - len(doubtful) - len(lost), len(doubtful), len(lost))

    def _nearest(self, queries: Array, k: int, exclude: Array, size: int, exact: bool) -> tuple[Array, Array, Cost]:
        """The `size` nearest rows of each query: measured squared distances float64 [Q, size], ascending, and rows."""
        distances = np.full((len(queries), size), np.inf)
        rows = np.full((len(queries), size), np.iinfo(np.int64).max)
        cost = NOTHING
        for first in range(0, self._rows.shape[0], self._step):
            ready = self._ready or self._prepare(first)
            cost += self._search_tile(first, ready, queries, k, exclude, exact, distances, rows)
            del ready  # two tiles are never in memory together
        return distances, rows, cost

    def _search_tile(
        self, first: int, ready: Tile, queries: Array, k: int, exclude: Array, exact: bool, distances: Array,
        rows: Array,
    ) -> Cost:  # fmt: skip
        """Take the rows of a tile, `first` and following, into the lists of the queries."""
        tile, screen = ready
        own = np.where((exclude >= first) & (exclude < first + len(tile)), exclude - first, -1)
        error = self._error(queries, exact)
        return _cost(screen, queries, screen.search(tile, first, queries, own, k, error, exact, distances, rows))

    def _error(self, queries: Array, exact: bool) -> float:
        in_float64 = np.result_type(queries, self._rows[:0]) == np.float64
        return error_of(queries.shape[1], in_float64, exact)

    def _prepare(self, first: int) -> Tile:
        tile = copied(self._rows, slice(first, first + self._step))
        with full_precision():
            return tile, prepare(tile, self._centre, self._scale)


def fits_memory(n_bank: int, width: int, memory_budget: int) -> bool:
    """Whether a bank is read once and kept: float32 rows, and as many bytes again for what is made of them, at most."""
    return 8 * n_bank * width <= memory_budget


def cut(n_bank: int, width: int, memory_budget: int) -> tuple[int, int]:
    """Rows of a tile of a bank that does not fit the memory, and queries that go through all tiles together."""
    # Queries, each with its values and its distance from every cell's centre.
    of_a_query = 8 * max(width, cells_of(n_bank))
    return (
        max(kernels.BLOCK, memory_budget // (SHARE * 4 * width)),
        max(LEAST, memory_budget // (SHARE * of_a_query)),
    )


NOTHING = Cost(0, 0, 0, 0, 0, 0, 0, 0, 0)


def _held(made: Any) -> int:
    """Bytes of the arrays and tensors in a record of them."""
    if isinstance(made, (np.ndarray, torch.Tensor)):
        return made.nbytes
    parts = [getattr(made, field.name) for field in fields(made)] if is_dataclass(made) else made
    return sum(_held(part) for part in parts) if is_dataclass(made) or isinstance(made, tuple) else 0


def _settled(certified: int, reranked: int, fell_through: int) -> Cost:
    return Cost(0, 0, 0, 0, 0, 0, certified, reranked, fell_through)


def _cost(screen: Screen, queries: Array, done: Array) -> Cost:
    pairs, measured, visits = (int(count) for count in done)
    n_cells, seen = screen.centres.shape
    in_all = len(queries) * n_cells
    projected = 2 * seen * queries.shape[1] * len(queries) if screen.axes else 0
    flops = 2 * seen * (pairs + in_all) + 3 * queries.shape[1] * measured + projected
    return Cost(pairs, measured, flops, 0, visits, in_all, 0, 0, 0)


def _square_lengths(rows: Array, centre: Array) -> Array:
    squares = np.empty(len(rows))
    spread(lambda s: kernels.square_lengths(rows[s], centre, 1.0, squares[s]), len(rows))
    return squares


def survey(rows: Rows, step: int) -> tuple[Array, float]:
    """About the mean of the first `step` rows, float64 [D], and the largest squared distance from it of all rows.

    Raises LeadlineError for values that are not finite.
    """
    centre, longest = np.zeros(rows.shape[1]), 0.0
    for first in range(0, rows.shape[0], step):
        tile = copied(rows, slice(first, first + step))
        if first == 0:
            centre = tile[:: len(tile) // SURVEYED + 1].mean(axis=0, dtype=np.float64)
        squares = _square_lengths(tile, centre)
        # A value that is not finite makes its row's length so, or all lengths by way of the centre.
        if not np.isfinite(squares).all():
            refuse_non_finite(tile, first, "bank row")
        longest = max(longest, squares.max())
    return centre, float(longest)


def refuse_other_width(bank: Rows | torch.Tensor, queries: Rows | torch.Tensor) -> None:
    """Raise LeadlineError where queries [Q, D] are not as wide as the bank."""
    if queries.shape[1] != bank.shape[1]:
        raise LeadlineError(
            f"queries: rows of {queries.shape[1]} values, the bank's have {bank.shape[1]}; give both alike"
        )


def refuse_too_few(n_bank: int, k: int, exclude: Array | None) -> None:
    """Raise LeadlineError where a query would have fewer than k of n_bank rows to choose from."""
    n_excluded = 0 if exclude is None else int((exclude >= 0).any())
    if n_bank - n_excluded < k:
        raise LeadlineError(f"bank: {n_bank} rows are too few for k={k} neighbours; lower k or give more rows")


def refuse_non_finite(rows: Array, first: int, what: str) -> None:
    """Raise LeadlineError for the first row with a value that has no float64 square; `first`: the number of rows[0]."""
    # NaN fails every comparison, so it is found by these two too.
    good = (rows.max(axis=1).astype(np.float64) < LARGEST) & (rows.min(axis=1).astype(np.float64) > -LARGEST)
    if not good.all():
        number = first + int(np.flatnonzero(~good)[0])
        raise LeadlineError(
            f"{what} {number}: holds a value that is not finite, or beyond {LARGEST:g}; remove or mend it"
        )
