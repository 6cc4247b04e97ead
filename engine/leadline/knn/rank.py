"""The last word: candidates in the order of their float64 distances, ties by lower row."""

import numpy as np

from leadline.knn import kernels
from leadline.knn.arrays import Array, Rows, copied, is_in_memory
from leadline.knn.threads import spread

GATHERED = 64 << 20  # bytes of candidate rows that are ranked together


def by_distance(bank: Rows, queries: Rows, rows: Array) -> tuple[Array, Array]:
    """The neighbours of each query in the order of (distance, row), and their squared Euclidean distances, float64.

    rows int64 [Q, k], ascending in each query. Returns int64 and float64 [Q, k].
    """
    ordered, squares = np.empty_like(rows), np.empty(rows.shape)
    at_once = _queries_at_once(rows.shape[1], queries.shape[1])
    for start in range(0, len(rows), at_once):
        part = slice(start, start + at_once)
        asked = copied(queries, part)
        gathered, _, places = _gathered(bank, rows[part])
        kernels.sort_by_distance(asked, gathered, places, rows[part], ordered[part], squares[part])
    return ordered, squares


def merged(rows: Array, squares: Array, k: int) -> tuple[Array, Array]:
    """The k nearest of neighbours that were found in parts of a bank, by (distance, row), and their squared distances.

    rows int64 and squares float64 [Q, n]: their rows in the whole bank and squared distances, in any order. Returns the
    same [Q, k].
    """
    order = np.lexsort((rows, squares))[:, :k]
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(squares, order, axis=1)


def rank_doubtful(
    bank: Rows, queries: Array, which: Array, chosen: Array, n_sure: Array, n_open: Array, k: int
) -> None:
    """Settle open candidates by their float64 distances; reads only the rows that it needs."""
    at_once = _queries_at_once(chosen.shape[1], queries.shape[1])
    for start in range(0, len(which), at_once):
        part = which[start : start + at_once]
        wanted = np.concatenate([chosen[i, n_sure[i] : n_sure[i] + n_open[i]] for i in part])
        gathered, row_ids, places = _gathered(bank, wanted)
        kernels.rank_open(queries, part, gathered, row_ids, places, chosen, n_sure, n_open, k)


def _gathered(bank: Rows, wanted: Array) -> tuple[Array, Array, Array]:
    """Rows in memory, their numbers in the bank, and where among them the wanted ones lie."""
    if isinstance(bank, np.ndarray) and is_in_memory(bank):
        return bank, np.arange(len(bank)), wanted
    row_ids, places = np.unique(wanted, return_inverse=True)
    return copied(bank, row_ids), row_ids, places.reshape(wanted.shape)


def nearest_of(bank: Rows, queries: Array, candidates: Array, counts: Array, k: int) -> Array:
    """The k nearest of each query's candidates by the exact distance, ties by lower row: int64 [Q, k], by distance.

    candidates int64 [Q, n]: different bank rows in the first counts[i] >= k places; they are reordered.
    """
    every, none = np.arange(len(queries)), np.zeros(len(queries), np.int64)

    def part(s: slice) -> None:
        rank_doubtful(bank, queries, every[s], candidates, none, counts, k)

    if len(queries):
        spread(part, len(queries))
    return candidates[:, :k]


def _queries_at_once(candidates: int, width: int) -> int:
    """How many queries' candidate rows are gathered together: float64 rows of at most GATHERED bytes."""
    return max(1, GATHERED // (candidates * width * 8))
