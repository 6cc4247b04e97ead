"""Compiled loops of the exact search. Each works on a range of queries and releases the interpreter's lock."""

import numpy as np
from numba import njit

from leadline.knn.arrays import Array
from leadline.knn.distance import compiled, squared_distance

RUN = 64  # scores that are reduced to their minimum before any is looked at alone


@compiled
def centre(rows: Array, centre_of_bank: Array, scale: float, rounded: Array, norms: Array) -> None:
    """rounded[i] = float32(scale * (rows[i] - centre)), norms[i] = the float64 squared norm of what was rounded."""
    for i in range(rows.shape[0]):
        norm = 0.0
        for j in range(rows.shape[1]):
            value = np.float32((np.float64(rows[i, j]) - centre_of_bank[j]) * scale)
            rounded[i, j] = value
            norm += np.float64(value) * np.float64(value)
        norms[i] = norm


@compiled
def largest_square(rows: Array, centre_of_bank: Array) -> float:
    """The largest squared distance of a row from the centre, in float64."""
    largest = 0.0
    for i in range(rows.shape[0]):
        norm = 0.0
        for j in range(rows.shape[1]):
            difference = np.float64(rows[i, j]) - centre_of_bank[j]
            norm += difference * difference
        largest = max(largest, norm)
    return largest


@compiled
def _sift(values: Array, rows: Array, value: float, row: int) -> None:
    """Replace the root of a max-heap."""
    size = values.shape[0]
    place = 0
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        if child + 1 < size and values[child + 1] > values[child]:
            child += 1
        if values[child] <= value:
            break
        values[place] = values[child]
        rows[place] = rows[child]
        place = child
    values[place] = value
    rows[place] = row


# The minimum of a run is the one place where the order of operations does not matter: there are no NaN.
@njit(nogil=True, cache=True, fastmath={"nnan", "nsz"})
def _smallest(scores: Array) -> float:
    low = scores[0]
    for j in range(1, scores.shape[0]):
        low = min(low, scores[j])
    return low


@compiled
def keep_smallest(scores: Array, first_row: int, lows: Array, rows: Array) -> None:
    """Take the scores [Q, M] of bank rows first_row … into the max-heaps lows [Q, C] and rows [Q, C]."""
    for i in range(scores.shape[0]):
        top = lows[i, 0]
        for start in range(0, scores.shape[1], RUN):
            stop = min(start + RUN, scores.shape[1])
            if _smallest(scores[i, start:stop]) >= top:
                continue
            for j in range(start, stop):
                if scores[i, j] < top:
                    _sift(lows[i], rows[i], scores[i, j], first_row + j)
                    top = lows[i, 0]


@compiled
def classify(
    lows: Array, rows: Array, slack_of_row: Array, slack_of_query: Array, k: int, complete: bool,
    chosen: Array, n_sure: Array, n_open: Array, limit: Array,
) -> None:  # fmt: skip
    """Sort the candidates of each query into surely in, open and surely out.

    A candidate's true score lies between its low and low + slack of its row + slack of its query. `chosen[i]` gets the
    n_sure[i] sure rows and then the n_open[i] open ones; n_open is 0 where the k nearest are certain, -1 where the
    candidates may not hold them all. `limit[i]` is a bound on the k-th true score. `complete`: the candidates are
    all the rows that there are.
    """
    size = rows.shape[1]
    for i in range(rows.shape[0]):
        highs = np.empty(size)
        for c in range(size):
            highs[c] = np.float64(lows[i, c])
            if rows[i, c] >= 0:
                highs[c] += slack_of_row[rows[i, c]] + slack_of_query[i]
        limit[i] = np.sort(highs)[k - 1]
        if not complete and lows[i, 0] <= limit[i]:
            n_open[i] = -1
            continue
        order = np.sort(lows[i])
        sure = 0
        for c in range(size):
            # Sure: at most k rows, itself among them, can have a true score as low as its highest.
            if rows[i, c] >= 0 and (k >= size or np.float64(order[k]) > highs[c]):
                chosen[i, sure] = rows[i, c]
                sure += 1
        n_sure[i] = sure
        opened = 0
        if sure < k:
            for c in range(size):
                if rows[i, c] < 0 or np.float64(lows[i, c]) > limit[i]:
                    continue
                if k >= size or np.float64(order[k]) > highs[c]:
                    continue
                chosen[i, sure + opened] = rows[i, c]
                opened += 1
            if sure + opened == k:
                n_sure[i] = k
                opened = 0
        n_open[i] = opened


@compiled
def _insert(distances: Array, rows: Array, distance: float, row: int) -> None:
    """Insert into a list kept in the order of (distance, row); its last entry is dropped."""
    last = rows.shape[0] - 1
    if distance > distances[last] or (distance == distances[last] and row > rows[last]):
        return
    place = last
    while place > 0 and (
        distances[place - 1] > distance or (distances[place - 1] == distance and rows[place - 1] > row)
    ):
        distances[place] = distances[place - 1]
        rows[place] = rows[place - 1]
        place -= 1
    distances[place] = distance
    rows[place] = row


@compiled
def rank_open(
    queries: Array, which: Array, bank_rows: Array, row_ids: Array, places: Array, chosen: Array, n_sure: Array,
    n_open: Array, k: int,
) -> None:  # fmt: skip
    """Fill chosen[i, n_sure:k] with the nearest of the open rows; places[p] is where they lie in bank_rows."""
    nothing = np.iinfo(np.int64).max
    p = 0
    for i in which:
        need = k - n_sure[i]
        distances = np.full(need, np.inf)
        rows = np.full(need, nothing)
        for _ in range(n_open[i]):
            place = places[p]
            p += 1
            distance = squared_distance(queries[i], bank_rows[place])
            _insert(distances, rows, distance, row_ids[place])
        chosen[i, n_sure[i] : k] = rows


@compiled
def rank_below(
    scores: Array, limit: Array, queries: Array, bank_rows: Array, first_row: int, distances: Array, rows: Array
) -> None:
    """Rank every row whose score is at most the query's limit."""
    for i in range(scores.shape[0]):
        for j in range(scores.shape[1]):
            if np.float64(scores[i, j]) <= limit[i]:
                distance = squared_distance(queries[i], bank_rows[j])
                _insert(distances[i], rows[i], distance, first_row + j)
