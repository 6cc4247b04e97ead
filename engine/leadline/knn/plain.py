"""The search in plain torch, for CUDA: all pairs in float32 with a proved error bound, then float64 where it must.

The proof of the bound is in docs/decisions/0002-exact-votes.md; the names here are its names.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from leadline.knn import kernels
from leadline.knn.arrays import Array, Rows, copied
from leadline.knn.kernels import FLOAT32, UNDERFLOW
from leadline.knn.rank import rank_doubtful
from leadline.knn.screen import scale_of

QUERY_TILE = 512  # queries and rows of one product
BANK_TILE = 4096
TILE_BYTES = 64 << 20  # of one tile of bank rows, in float32: narrower than BANK_TILE where embeddings are wide
SPARE = 34  # candidates kept beyond k


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
        kernels.place(rows, self.centre, self.scale, rounded)
        kernels.square_lengths(rounded, np.zeros(rows.shape[1]), 1.0, norms)
        return rounded, norms


def search(
    bank: Rows, centre: Array, longest: float, queries: Array, k: int, exclude: Array, device: torch.device
) -> tuple[Array, tuple[int, int, int]]:
    """The k nearest rows int64 [Q, k] of queries [Q, D]; and how many were certified, re-ranked, and fell through.

    centre float64 [D]: near the bank's mean; longest: the largest squared distance of a row from it; exclude int64 [Q]:
    the row that each must not have, -1 for none.
    """
    n_bank, n_queries = bank.shape[0], len(queries)
    squares = np.empty(n_queries)
    kernels.square_lengths(queries, centre, 1.0, squares)
    frame = _frame(centre, max(longest, squares.max()), queries.shape[1])
    rounded, norms = frame.place(queries)
    slack_rows = np.empty(n_bank)
    size = min(k + SPARE, n_bank)
    lows = torch.full((n_queries, size), torch.inf, device=device)
    rows = torch.full((n_queries, size), -1, device=device)
    for tile, first, scores in _screen(bank, frame, rounded, exclude, slack_rows, device):
        _keep_smallest(scores, first, lows[tile], rows[tile])
    low, row = lows.cpu().numpy().astype(np.float64), rows.cpu().numpy()
    slack = slack_rows[row] + _doubled(frame.slack_queries * norms)[:, None]
    high = low + np.where(row >= 0, slack, 0.0)
    limit = np.partition(high, k - 1, axis=1)[:, k - 1]
    whole = (low.max(axis=1) > limit) | (size == n_bank)
    chosen = np.empty(row.shape, np.int64)
    n_sure, n_open = np.zeros(n_queries, np.int64), np.zeros(n_queries, np.int64)
    kernels.classify(low, high, row, k, whole, chosen, n_sure, n_open)
    doubtful, lost = np.flatnonzero(n_open > 0), np.flatnonzero(n_open < 0)
    rank_doubtful(bank, queries, doubtful, chosen, n_sure, n_open, k)
    nearest = chosen[:, :k]
    if len(lost):
        nearest[lost] = _rank_lost(bank, frame, queries[lost], rounded[lost], exclude[lost], limit[lost], k, device)
    return nearest, (n_queries - len(doubtful) - len(lost), len(doubtful), len(lost))


def _frame(centre: Array, longest: float, width: int) -> _Frame:
    gamma = (width + 4) * FLOAT32 / (1 - (width + 4) * FLOAT32)
    exact = 8.0 * (width + 4) * 2.0**-53  # the float64 distance's own rounding
    return _Frame(
        centre,
        scale_of(longest),
        slack_rows=2 * gamma + 8 * FLOAT32 + exact,
        slack_queries=gamma + 5 * FLOAT32 + exact,
    )


def _doubled(error: Array) -> Array:
    """From an error either way to the distance between the bounds, rounded up."""
    return (2 * error + 2 * UNDERFLOW) * (1 + 1e-6)


def _screen(
    bank: Rows, frame: _Frame, rounded: Array, exclude: Array, slack_rows: Array | None, device: torch.device
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


def _keep_smallest(scores: torch.Tensor, first: int, lows: torch.Tensor, rows: torch.Tensor) -> None:
    size = lows.shape[1]
    best, where = scores.topk(min(size, scores.shape[1]), dim=1, largest=False)
    kept, order = torch.cat([lows, best], dim=1).topk(size, dim=1, largest=False)
    rows.copy_(torch.cat([rows, where + first], dim=1).gather(1, order))
    lows.copy_(kept)


def _rank_lost(
    bank: Rows, frame: _Frame, queries: Array, rounded: Array, exclude: Array, limit: Array, k: int,
    device: torch.device,
) -> Array:  # fmt: skip
    """Screen again, and rank in float64 every row that the limit admits: for crowds of equal or nearly equal rows."""
    distances = np.full((len(queries), k), np.inf)
    rows = np.full((len(queries), k), np.iinfo(np.int64).max)
    n_bank = bank.shape[0]
    for tile, first, scores in _screen(bank, frame, rounded, exclude, None, device):
        score = scores.cpu().numpy()
        block = copied(bank, slice(first, min(first + score.shape[1], n_bank)))
        kernels.rank_below(score, limit[tile], queries[tile], block, first, distances[tile], rows[tile])
    return rows


def _tiles(bank: Rows) -> Iterator[tuple[int, Array]]:
    """The bank's rows a tile at a time, cut by the row's number alone."""
    n_bank, width = bank.shape
    step = max(64, min(BANK_TILE, TILE_BYTES // (4 * width)))
    for first in range(0, n_bank, step):
        yield first, copied(bank, slice(first, min(first + step, n_bank)))
