"""Exact nearest neighbours: a float32 screen with a proved error bound, and float64 where the bound leaves a doubt.

The proof of the bound is in docs/decisions/0002-exact-votes.md; the names here are its names.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace

import numpy as np
import torch

from leadline.errors import LeadlineError
from leadline.knn import cells, kernels
from leadline.knn.arrays import Array, Rows
from leadline.knn.cells import Cells
from leadline.knn.threads import spread

QUERY_TILE = 512  # queries and rows of one product: small enough that its scores stay in the processor's cache
BANK_TILE = 4096
TILE_BYTES = 64 << 20  # of one tile of bank rows, in float32: narrower than BANK_TILE where embeddings are wide
SPARE = 34  # candidates kept beyond k
SPARE_OF_CELLS = 66
NARROW = 64  # values of a row below which all distances are computed in float64
ROUNDING = 2.0**-24  # of float32
UNDERFLOW = 1e-30  # of anything that float32 rounds to zero, once the longest row has length 1
LARGEST = 1e150  # beyond it the square of a difference is no float64


@dataclass(frozen=True)
class Cost:
    """What a search did, in numbers that depend on its input and on the number of threads alone.

    pairs: of a query and a row that were looked at; certified: queries whose neighbours the screen alone settled;
    reranked: queries with open rows among their candidates; fell_through: queries screened a second time, without a
    limit on the number of candidates.
    """

    pairs: int
    certified: int
    reranked: int
    fell_through: int


@dataclass(frozen=True)
class _Frame:
    """The coordinates of a search: centred on the bank's mean, the longest vector scaled to length at most 1."""

    centre: Array
    scale: float
    slack_rows: (
        float  # a row's true score exceeds its low by at most slack_rows * its norm + slack_queries * the query's
    )
    slack_queries: float

    def place(self, rows: Array) -> tuple[Array, Array]:
        """Rounded coordinates float32 [n, D] and their squared norms float64 [n]."""
        rounded = np.empty(rows.shape, np.float32)
        norms = np.empty(len(rows))
        kernels.centre(rows, self.centre, self.scale, rounded, norms)
        return rounded, norms


class Bank:
    """Bank rows made ready for any number of searches: read through once, and cut into cells where that pays.

    rows [M, D], real; device: where products run ("cpu" or a CUDA device; cells are of the CPU only).
    Raises LeadlineError for values that are not finite and for an unknown device.
    """

    def __init__(self, rows: Rows, device: str | torch.device = "cpu") -> None:
        self._rows = rows
        self._device = torch.device(device)
        if self._device.type not in _KEEP:
            raise LeadlineError(f"device: {device} has no search; allowed: {', '.join(_KEEP)}")
        self._centre, self._longest = _survey(rows)
        self._cells: Cells | None = None
        self._columns: Array | None = None
        if self._device.type == "cpu" and cells.pays(*rows.shape):
            narrow = rows.shape[1] < NARROW
            dtype = torch.float32 if narrow else cells.low_precision()
            self._cells = cells.cut(rows, _scale(4 * self._longest), self._centre, dtype)
            if narrow:
                self._columns = np.ascontiguousarray(rows[:][self._cells.order].T)

    def search(self, queries: Array, k: int, exclude: Array | None = None) -> tuple[Array, Cost]:
        """The k nearest rows of each query by Euclidean distance in float64, ties by lower row.

        queries [Q, D], real; exclude int64 [Q], the row that a query must not have, -1 for none. Returns rows int64
        [Q, k], ascending in each query (the set is exact; its order is not by distance), and the Cost.

        Raises LeadlineError for values that are not finite and for fewer than k rows to choose from.
        """
        n_bank = self._rows.shape[0]
        n_excluded = 0 if exclude is None else int((exclude >= 0).any())
        if n_bank - n_excluded < k:
            raise LeadlineError(f"bank: {n_bank} rows are too few for k={k} neighbours; lower k or give more rows")
        if not len(queries):
            return np.empty((0, k), np.int64), Cost(0, 0, 0, 0)
        _refuse_non_finite(queries, 0, "query")
        own = np.full(len(queries), -1) if exclude is None else exclude

        def part(s: slice) -> tuple[Array, Cost]:
            return self._search(queries[s], k, own[s])

        with _full_precision():
            parts = spread(part, len(queries)) if self._device.type == "cpu" else [part(slice(None))]
        cost = Cost(*(sum(counts) for counts in zip(*(astuple(cost) for _, cost in parts), strict=True)))
        return np.sort(np.concatenate([chosen for chosen, _ in parts]), axis=1), cost

    def _search(self, queries: Array, k: int, exclude: Array) -> tuple[Array, Cost]:
        longest = kernels.largest_square(queries, self._centre)
        # The bounds of the cells are for queries at most twice as far out as the bank's rows.
        in_cells = self._cells if longest <= 4 * self._longest else None
        if self._device.type == "cpu" and queries.shape[1] < NARROW:
            return _search_narrow(self._rows, in_cells, self._columns, queries, k, exclude)
        frame = _frame(self._centre, max(longest, self._longest), queries.shape[1])
        if in_cells is None:
            return _search_plain(self._rows, frame, queries, k, exclude, self._device)
        return _search_cells(self._rows, in_cells, frame, queries, k, exclude)


def _search_narrow(
    bank: Rows, in_cells: Cells | None, columns: Array | None, queries: Array, k: int, exclude: Array
) -> tuple[Array, Cost]:
    """By float64 distances alone, which cost no more than a product and a look at its result where rows are narrow."""
    if in_cells is not None and columns is not None:
        rows, pairs = cells.nearest(in_cells, columns, queries, k, exclude)
    else:
        distances = np.full((len(queries), k), np.inf)
        rows = np.full((len(queries), k), np.iinfo(np.int64).max)
        every, pairs = np.arange(len(queries)), len(queries) * bank.shape[0]
        for first, tile in _tiles(bank):
            order = np.arange(first, first + len(tile))
            kernels.nearest_of_columns(
                queries, every, np.ascontiguousarray(tile.T), 0, len(tile), order, exclude, distances, rows
            )
    return rows, Cost(pairs=pairs, certified=len(queries), reranked=0, fell_through=0)


def _search_cells(
    bank: Rows, sorted_bank: Cells, frame: _Frame, queries: Array, k: int, exclude: Array
) -> tuple[Array, Cost]:
    """By cells, and for the queries whose candidates they could not hold, plainly."""
    found = cells.screen(sorted_bank, queries, k, exclude, k + SPARE_OF_CELLS)
    whole = found.lows.max(axis=1) > found.nearest
    chosen, cost, lost = _settle(bank, queries, k, found.lows, found.highs, found.rows, whole)
    cost = replace(cost, pairs=found.pairs)
    if len(lost):
        chosen[lost], again = _search_plain(bank, frame, queries[lost], k, exclude[lost], "cpu")
        cost = replace(cost, pairs=cost.pairs + again.pairs)
    return chosen, cost


def _search_plain(
    bank: Rows, frame: _Frame, queries: Array, k: int, exclude: Array, device: str | torch.device
) -> tuple[Array, Cost]:
    """By tiles of all rows, in float32 about one centre."""
    n_bank = bank.shape[0]
    rounded, norms = frame.place(queries)
    slack_rows = np.empty(n_bank)
    size = min(k + SPARE, n_bank)
    lows = torch.full((len(queries), size), torch.inf, device=device)
    rows = torch.full((len(queries), size), -1, device=device)
    keep = _KEEP[torch.device(device).type]
    for tile, first, scores in _screen(bank, frame, rounded, exclude, slack_rows, device):
        keep(scores, first, lows[tile], rows[tile])
    low, row = lows.cpu().numpy().astype(np.float64), rows.cpu().numpy()
    slack = slack_rows[row] + _doubled(frame.slack_queries * norms)[:, None]
    high = low + np.where(row >= 0, slack, 0.0)
    limit = np.partition(high, k - 1, axis=1)[:, k - 1]
    whole = (low.max(axis=1) > limit) | (size == n_bank)
    chosen, cost, lost = _settle(bank, queries, k, low, high, row, whole)
    if len(lost):
        chosen[lost] = _rank_lost(bank, frame, queries[lost], rounded[lost], exclude[lost], limit[lost], k, device)
    return chosen, replace(cost, pairs=len(queries) * n_bank)


def _settle(
    bank: Rows, queries: Array, k: int, lows: Array, highs: Array, rows: Array, whole: Array
) -> tuple[Array, Cost, Array]:
    """The neighbours [Q, k] of the queries whose candidates are whole; the cost; the queries that are not."""
    n_queries = len(queries)
    chosen = np.empty(rows.shape, np.int64)
    n_sure, n_open = np.zeros(n_queries, np.int64), np.zeros(n_queries, np.int64)
    kernels.classify(lows, highs, rows, k, whole, chosen, n_sure, n_open)
    doubtful, lost = np.flatnonzero(n_open > 0), np.flatnonzero(n_open < 0)
    _rank_doubtful(bank, queries, doubtful, chosen, n_sure, n_open, k)
    cost = Cost(0, n_queries - len(doubtful) - len(lost), len(doubtful), len(lost))
    return chosen[:, :k], cost, lost


def by_distance(bank: Rows, queries: Array, rows: Array) -> tuple[Array, Array]:
    """The neighbours of each query in the order of (distance, row), and their Euclidean distances, float64.

    rows int64 [Q, k], as `search` gives them. Returns int64 and float64 [Q, k].
    """
    ordered, distances = np.empty_like(rows), np.empty(rows.shape)
    at_once = _queries_at_once(rows.shape[1], queries.shape[1])
    for start in range(0, len(rows), at_once):
        part = slice(start, start + at_once)
        row_ids, places = np.unique(rows[part], return_inverse=True)
        kernels.sort_by_distance(
            queries[part], bank[row_ids], places.reshape(rows[part].shape), rows[part], ordered[part], distances[part]
        )
    return ordered, distances


def _queries_at_once(candidates: int, width: int) -> int:
    """How many queries' candidate rows are gathered together: float64 rows of at most 4 * TILE_BYTES."""
    return max(1, (TILE_BYTES * 4) // (candidates * width * 8))


def _survey(bank: Rows) -> tuple[Array, float]:
    """The bank's mean, float64 [D], and the largest squared distance from it; what is not finite is refused."""
    n_bank, width = bank.shape
    total = np.zeros(width)
    for first, rows in _tiles(bank):
        _refuse_non_finite(rows, first, "bank row")
        total += rows.sum(axis=0, dtype=np.float64)
    centre = total / max(n_bank, 1)
    return centre, max((kernels.largest_square(rows, centre) for _, rows in _tiles(bank)), default=0.0)


def _scale(longest: float) -> float:
    """The power of two, so that scaling rounds nothing, that makes a squared length at most 1."""
    return float(2.0 ** -np.ceil(np.log2(longest) / 2)) if longest > 0 else 1.0


def _frame(centre: Array, longest: float, width: int) -> _Frame:
    gamma = (width + 4) * ROUNDING / (1 - (width + 4) * ROUNDING)
    exact = 8.0 * (width + 4) * 2.0**-53  # the float64 distance's own rounding
    return _Frame(
        centre,
        _scale(longest),
        slack_rows=2 * gamma + 8 * ROUNDING + exact,
        slack_queries=gamma + 5 * ROUNDING + exact,
    )


def _refuse_non_finite(rows: Array, first: int, what: str) -> None:
    # NaN fails every comparison, so it is found by this one too.
    good = np.abs(rows).max(axis=1).astype(np.float64) < LARGEST
    if not good.all():
        number = first + int(np.flatnonzero(~good)[0])
        raise LeadlineError(
            f"{what} {number}: holds a value that is not finite, or beyond {LARGEST:g}; remove or mend it"
        )


def _doubled(error: Array) -> Array:
    """From an error either way to the distance between the bounds, rounded up."""
    return (2 * error + 2 * UNDERFLOW) * (1 + 1e-6)


def _screen(
    bank: Rows, frame: _Frame, rounded: Array, exclude: Array, slack_rows: Array | None, device: str | torch.device
) -> Iterator[tuple[slice, int, torch.Tensor]]:
    """Scores of every tile of queries against every tile of rows: (queries, first row, float32 [queries, rows]).

    A score plus the query's squared norm is never above the squared distance: it is lowered by the row's error. The
    tensor is reused by the next step. `slack_rows` is filled with what a score may be too low by.
    """
    queries = torch.from_numpy(rounded).to(device)
    buffer = torch.empty(QUERY_TILE * BANK_TILE, device=device)
    for first, rows in _tiles(bank):
        stop = first + len(rows)
        placed, norms = frame.place(rows)
        error = frame.slack_rows * norms
        if slack_rows is not None:
            slack_rows[first:stop] = _doubled(error)
        lowered = np.nextafter((norms - error - UNDERFLOW).astype(np.float32), np.float32(-np.inf))
        bias, block = torch.from_numpy(lowered).to(device), torch.from_numpy(placed).to(device)
        for start in range(0, len(queries), QUERY_TILE):
            tile = slice(start, min(start + QUERY_TILE, len(queries)))
            scores = buffer[: (tile.stop - start) * len(rows)].view(-1, len(rows))
            torch.addmm(bias, queries[tile], block.T, alpha=-2, out=scores)
            own = exclude[tile]
            here = np.flatnonzero((own >= first) & (own < stop))
            scores[here, own[here] - first] = torch.inf
            yield tile, first, scores


def _keep_on_cpu(scores: torch.Tensor, first: int, lows: torch.Tensor, rows: torch.Tensor) -> None:
    kernels.keep_smallest(scores.numpy(), first, lows.numpy(), rows.numpy())


def _keep_on_gpu(scores: torch.Tensor, first: int, lows: torch.Tensor, rows: torch.Tensor) -> None:
    size = lows.shape[1]
    best, where = scores.topk(min(size, scores.shape[1]), dim=1, largest=False)
    kept, order = torch.cat([lows, best], dim=1).topk(size, dim=1, largest=False)
    rows.copy_(torch.cat([rows, where + first], dim=1).gather(1, order))
    lows.copy_(kept)
    # The first place is the largest low, as in the heap of the CPU.
    lows.copy_(lows.flip(1))
    rows.copy_(rows.flip(1))


_KEEP: dict[str, Callable[[torch.Tensor, int, torch.Tensor, torch.Tensor], None]] = {
    "cpu": _keep_on_cpu,
    "cuda": _keep_on_gpu,
}


def _rank_doubtful(
    bank: Rows, queries: Array, which: Array, chosen: Array, n_sure: Array, n_open: Array, k: int
) -> None:
    """Settle open candidates by their float64 distances; reads only the rows that it needs."""
    at_once = _queries_at_once(chosen.shape[1], queries.shape[1])
    for start in range(0, len(which), at_once):
        part = which[start : start + at_once]
        wanted = np.concatenate([chosen[i, n_sure[i] : n_sure[i] + n_open[i]] for i in part])
        row_ids, places = np.unique(wanted, return_inverse=True)
        kernels.rank_open(queries, part, bank[row_ids], row_ids, places, chosen, n_sure, n_open, k)


def _rank_lost(
    bank: Rows, frame: _Frame, queries: Array, rounded: Array, exclude: Array, limit: Array, k: int,
    device: str | torch.device,
) -> Array:  # fmt: skip
    """Screen again, and rank in float64 every row that the limit admits: for crowds of equal or nearly equal rows."""
    distances = np.full((len(queries), k), np.inf)
    rows = np.full((len(queries), k), np.iinfo(np.int64).max)
    n_bank = bank.shape[0]
    for tile, first, scores in _screen(bank, frame, rounded, exclude, None, device):
        score = scores.cpu().numpy()
        block = bank[first : min(first + score.shape[1], n_bank)]
        kernels.rank_below(score, limit[tile], queries[tile], block, first, distances[tile], rows[tile])
    return rows


def _tiles(bank: Rows) -> Iterator[tuple[int, Array]]:
    """The bank's rows a tile at a time, cut by the row's number alone."""
    n_bank, width = bank.shape
    step = max(64, min(BANK_TILE, TILE_BYTES // (4 * width)))
    for first in range(0, n_bank, step):
        yield first, np.ascontiguousarray(bank[first : min(first + step, n_bank)])


@contextmanager
def _full_precision() -> Iterator[None]:
    """The bounds are of the products as they are asked for: short cuts by TF32 and bfloat16 are switched off."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
