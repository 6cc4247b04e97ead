"""Exact nearest neighbours: a float32 screen with a proved error bound, and float64 where the bound leaves a doubt.

The proof of the bound is in docs/decisions/0002-exact-votes.md; the names here are its names.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from leadline.errors import LeadlineError
from leadline.knn import kernels
from leadline.knn.arrays import Array, Rows

QUERY_TILE = 512  # queries and rows of one product: small enough that its scores stay in the processor's cache
BANK_TILE = 4096
TILE_BYTES = 64 << 20  # of one tile of bank rows, in float32: narrower than BANK_TILE where embeddings are wide
SPARE = 34  # candidates kept beyond k
ROUNDING = 2.0**-24  # of float32
UNDERFLOW = 1e-30  # of anything that float32 rounds to zero, once the longest row has length 1
LARGEST = 1e150  # beyond it the square of a difference is no float64


@dataclass(frozen=True)
class Cost:
    """What a search did, in numbers that depend on its input alone.

    pairs: query-row products screened; certified: queries whose neighbours the screen alone settled; reranked:
    queries with open rows among their candidates; fell_through: queries screened a second time, without a limit on
    the number of candidates.
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
        _spread(lambda s: kernels.centre(rows[s], self.centre, self.scale, rounded[s], norms[s]), len(rows))
        return rounded, norms


def search(
    bank: Rows, queries: Array, k: int, exclude: Array | None = None, device: str | torch.device = "cpu"
) -> tuple[Array, Cost]:
    """The k nearest bank rows of each query by Euclidean distance in float64, ties by lower row.

    bank [M, D] and queries [Q, D], real; exclude int64 [Q], the bank row that a query must not have, -1 for none.
    Returns rows int64 [Q, k], ascending in each query (the set is exact; its order is not by distance), and the Cost.

    Raises LeadlineError for values that are not finite, fewer than k rows to choose from, and an unknown device.
    """
    n_bank = bank.shape[0]
    n_excluded = 0 if exclude is None else int((exclude >= 0).any())
    if n_bank - n_excluded < k:
        raise LeadlineError(f"bank: {n_bank} rows are too few for k={k} neighbours; lower k or give more rows")
    if not len(queries):
        return np.empty((0, k), np.int64), Cost(0, 0, 0, 0)
    if exclude is None:
        exclude = np.full(len(queries), -1)
    keep = _KEEP.get(torch.device(device).type)
    if keep is None:
        raise LeadlineError(f"device: {device} has no search; allowed: {', '.join(_KEEP)}")
    frame = _survey(bank, queries)
    rounded, norms = frame.place(queries)
    slack_queries = _doubled(frame.slack_queries * norms)
    slack_rows = np.empty(n_bank)
    size = min(k + SPARE, n_bank)
    lows = torch.full((len(queries), size), torch.inf, device=device)
    rows = torch.full((len(queries), size), -1, device=device)
    for tile, first, scores in _screen(bank, frame, rounded, exclude, slack_rows, device):
        keep(scores, first, lows[tile], rows[tile])

    chosen = np.empty((len(queries), size), np.int64)
    n_sure, n_open = np.zeros(len(queries), np.int64), np.zeros(len(queries), np.int64)
    limit = np.empty(len(queries))
    low, row = lows.cpu().numpy(), rows.cpu().numpy()
    _spread(
        lambda s: kernels.classify(
            low[s], row[s], slack_rows, slack_queries[s], k, size == n_bank, chosen[s], n_sure[s], n_open[s], limit[s]
        ),
        len(queries),
    )
    doubtful, lost = np.flatnonzero(n_open > 0), np.flatnonzero(n_open < 0)
    _rank_doubtful(bank, queries, doubtful, chosen, n_sure, n_open, k)
    if len(lost):
        chosen[lost, :k] = _rank_lost(bank, frame, queries[lost], rounded[lost], exclude[lost], limit[lost], k, device)
    cost = Cost(
        pairs=len(queries) * n_bank,
        certified=len(queries) - len(doubtful) - len(lost),
        reranked=len(doubtful),
        fell_through=len(lost),
    )
    return np.sort(chosen[:, :k], axis=1), cost


def _survey(bank: Rows, queries: Array) -> _Frame:
    """Read the bank twice: its mean, then its longest row; refuse what is not finite."""
    n_bank, width = bank.shape
    total = np.zeros(width)
    for first, rows in _tiles(bank):
        _refuse_non_finite(rows, first, "bank row")
        total += rows.sum(axis=0, dtype=np.float64)
    _refuse_non_finite(queries, 0, "query")
    centre = total / n_bank
    longest = max(kernels.largest_square(rows, centre) for _, rows in _tiles(bank))
    longest = max(longest, kernels.largest_square(queries, centre))
    # A power of two, so that scaling rounds nothing.
    scale = 2.0 ** -np.ceil(np.log2(longest) / 2) if longest > 0 else 1.0
    gamma = (width + 4) * ROUNDING / (1 - (width + 4) * ROUNDING)
    exact = 8.0 * (width + 4) * 2.0**-53  # the float64 distance's own rounding
    return _Frame(
        centre,
        float(scale),
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
    with _full_precision():
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
    score, low, row = scores.numpy(), lows.numpy(), rows.numpy()
    _spread(lambda s: kernels.keep_smallest(score[s], first, low[s], row[s]), len(score))


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
    at_once = max(1, (TILE_BYTES * 4) // (chosen.shape[1] * queries.shape[1] * 8))
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
        rank = partial(_rank_below, score, limit[tile], queries[tile], block, first, distances[tile], rows[tile])
        _spread(rank, len(score))
    return rows


def _rank_below(
    scores: Array, limit: Array, queries: Array, block: Array, first: int, distances: Array, rows: Array, part: slice
) -> None:
    kernels.rank_below(scores[part], limit[part], queries[part], block, first, distances[part], rows[part])


def _tiles(bank: Rows) -> Iterator[tuple[int, Array]]:
    """The bank's rows a tile at a time, cut by the row's number alone."""
    n_bank, width = bank.shape
    step = max(64, min(BANK_TILE, TILE_BYTES // (4 * width)))
    for first in range(0, n_bank, step):
        yield first, np.ascontiguousarray(bank[first : min(first + step, n_bank)])


def _spread(work: Callable[[slice], Any], n: int) -> None:
    """Do the work of n queries on torch's number of threads."""
    threads = min(torch.get_num_threads(), n)
    edges = [n * i // threads for i in range(threads + 1)] if threads else [0, 0]
    slices = [slice(a, b) for a, b in pairwise(edges)]
    if len(slices) == 1:
        work(slices[0])
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, slices))


@contextmanager
def _full_precision() -> Iterator[None]:
    """The bound is of float32 products: TF32 and bfloat16 short cuts are switched off while they run."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
