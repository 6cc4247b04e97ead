"""Compiled loops of the exact search. Each works on a range of queries and releases the interpreter's lock."""

import numpy as np
from numba import njit

from leadline.knn.arrays import Array
from leadline.knn.distance import compiled, squared_distance

NARROW_RUN = 256  # rows whose distances are computed side by side
RUN = 64  # scores that are reduced to their minimum before any is looked at alone


# Apart, and without fastmath: callers may add in any order, but each coordinate is one difference, rounded, times a
# power of two. Multiplied out it would lose what an offset hides.
@compiled
def _scaled(value: float, centre_of_it: float, scale: float) -> float:
    return (np.float64(value) - centre_of_it) * scale


@compiled
def centre(rows: Array, centre_of_bank: Array, scale: float, rounded: Array, norms: Array) -> None:
    """rounded[i] = float32(scale * (rows[i] - centre)), norms[i] = the float64 squared norm of what was rounded."""
    for i in range(rows.shape[0]):
        norm = 0.0
        for j in range(rows.shape[1]):
            value = np.float32(_scaled(rows[i, j], centre_of_bank[j], scale))
            rounded[i, j] = value
            norm += np.float64(value) * np.float64(value)
        norms[i] = norm


# Lengths are bounds, rounded up by those who use them: their sums may be taken in any order.
@njit(nogil=True, cache=True, fastmath={"reassoc", "nnan", "nsz", "contract"})
def round_to_bfloat16(
    rows: Array, which: Array, centre_of_cell: Array, scale: float, bits: Array, floats: Array, rounded: Array,
    squares: Array, residuals: Array,
) -> None:  # fmt: skip
    """rounded[i] = the bits of bfloat16(scale * (rows[which[i]] - centre)), to nearest even.

    squares[i]: the squared length before rounding; residuals[i]: the squared length of what was lost. bits int32 [D]
    and floats float32 [D] are one buffer seen in two ways.
    """
    width = rows.shape[1]
    for i in range(which.shape[0]):
        row = rows[which[i]]
        square = 0.0
        for j in range(width):
            value = _scaled(row[j], centre_of_cell[j], scale)
            square += value * value
            floats[j] = np.float32(value)
        squares[i] = square
        for j in range(width):
            up = bits[j] + np.int32(0x7FFF) + ((bits[j] >> np.int32(16)) & np.int32(1))
            rounded[i, j] = np.int16(up >> np.int32(16))
            bits[j] = np.int32(up & np.int32(-65536))
        lost = 0.0
        for j in range(width):
            value = np.float32(_scaled(row[j], centre_of_cell[j], scale))
            difference = np.float64(value) - np.float64(floats[j])
            lost += difference * difference
        residuals[i] = lost


@compiled
def round_to_float32(
    rows: Array, which: Array, centre_of_cell: Array, scale: float, rounded: Array, squares: Array
) -> None:
    """rounded[i] = float32(scale * (rows[which[i]] - centre)), squares[i] = its squared length before rounding."""
    for i in range(which.shape[0]):
        row = rows[which[i]]
        square = 0.0
        for j in range(row.shape[0]):
            value = _scaled(row[j], centre_of_cell[j], scale)
            rounded[i, j] = np.float32(value)
            square += value * value
        squares[i] = square


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
    lows: Array,
    highs: Array,
    rows: Array,
    k: int,
    whole: Array,
    chosen: Array,
    n_sure: Array,
    n_open: Array,
) -> None:
    """Sort the candidates of each query into surely in, open and surely out.

    A candidate's true score lies between its low and its high. `chosen[i]` gets the n_sure[i] sure rows and then the
    n_open[i] open ones; n_open is 0 where the k nearest are certain, -1 where `whole[i]` says that the candidates may
    not hold them all.
    """
    size = rows.shape[1]
    for i in range(rows.shape[0]):
        if not whole[i]:
            n_open[i] = -1
            continue
        limit = np.sort(highs[i])[k - 1]  # the k-th true score is no higher
        order = np.sort(lows[i])
        sure = 0
        for c in range(size):
            # Sure: at most k rows, itself among them, can have a true score as low as its high.
            if rows[i, c] >= 0 and (k >= size or order[k] > highs[i, c]):
                chosen[i, sure] = rows[i, c]
                sure += 1
        n_sure[i] = sure
        opened = 0
        if sure < k:
            for c in range(size):
                if rows[i, c] < 0 or lows[i, c] > limit or k >= size or order[k] > highs[i, c]:
                    continue
                chosen[i, sure + opened] = rows[i, c]
                opened += 1
            if sure + opened == k:
                n_sure[i] = k
                opened = 0
        n_open[i] = opened


@njit(nogil=True, cache=True, fastmath={"nnan", "nsz", "contract"})
def _lowest(products: Array, squares: Array, slopes: Array, lengths: Array, a: float, r: float, u: float) -> float:
    """The least of the lower bounds of a run of rows, but for rounding in float32: see `admit`."""
    low = squares[0] - a * slopes[0] - r * lengths[0] - (products[0] + products[0]) - u * abs(products[0])
    for j in range(1, products.shape[0]):
        p = products[j]
        low = min(low, squares[j] - a * slopes[j] - r * lengths[j] - (p + p) - u * abs(p))
    return low


@compiled
def _push(keys: Array, highs: Array, rows: Array, key: float, high: float, row: int) -> None:
    """Replace the root of a max-heap of keys that carries highs and rows with them."""
    size = keys.shape[0]
    place = 0
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        if child + 1 < size and keys[child + 1] > keys[child]:
            child += 1
        if keys[child] <= key:
            break
        keys[place] = keys[child]
        highs[place] = highs[child]
        rows[place] = rows[child]
        place = child
    keys[place] = key
    highs[place] = high
    rows[place] = row


@compiled
def _push_key(keys: Array, key: float) -> None:
    """Replace the root of a max-heap."""
    size = keys.shape[0]
    place = 0
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        if child + 1 < size and keys[child + 1] > keys[child]:
            child += 1
        if keys[child] <= key:
            break
        keys[place] = keys[child]
        place = child
    keys[place] = key


@compiled
def admit(
    products: Array, which: Array, query_squares: Array, query_residuals: Array, first: int, squares: Array,
    squares32: Array, slopes: Array, lengths: Array, order: Array, own: Array, result: float, exact: float,
    lows: Array, highs: Array, rows: Array, nearest: Array, bits: Array, floats: Array, is_bfloat16: bool,
) -> None:  # fmt: skip
    """Take the rows of a tile that may be among a query's k nearest into its candidates.

    products [n, m >= rows]: float32, or int16 that are the bits of bfloat16; which int64 [n]: the queries; first: the
    place of the tile's first row. A squared distance is alpha + beta - 2 product, to within E = |a| slope + residual of
    the query * length of the row + 2 result |product| + exact (alpha + beta), where alpha = |a|^2 and beta are the
    squared lengths (docs/decisions/0004-cells.md). Candidates are kept in a max-heap of their lower bounds, the k
    lowest upper bounds in another.
    """
    n_rows = squares.shape[0]
    largest = squares.max()
    for i in range(which.shape[0]):
        query = which[i]
        alpha, residual = query_squares[i], query_residuals[i]
        a = np.sqrt(alpha)
        a32, r32, u32 = np.float32(a), np.float32(residual), np.float32(2 * result)
        # Float32 arithmetic on numbers no larger than these errs by less.
        slack = 4e-6 * (alpha + largest) + 1e-36
        allowed = np.float32(nearest[query, 0] - alpha + slack)
        for start in range(0, n_rows, RUN):
            stop = min(start + RUN, n_rows)
            if is_bfloat16:
                for j in range(stop - start):
                    bits[j] = np.int32(products[i, start + j]) << np.int32(16)
            else:
                for j in range(stop - start):
                    floats[j] = products[i, start + j]
            low = _lowest(
                floats[: stop - start], squares32[start:stop], slopes[start:stop], lengths[start:stop], a32, r32, u32
            )
            if low > allowed:
                continue
            for j in range(start, stop):
                place = first + j
                if place == own[query]:
                    continue
                product = np.float64(floats[j - start])
                middle = alpha + squares[j] - 2 * product
                error = a * slopes[j] + residual * lengths[j] + 2 * result * abs(product)
                error = (error + exact * (alpha + squares[j])) * (1 + 1e-6) + 1e-30
                if middle - error > nearest[query, 0]:
                    continue
                if middle + error < nearest[query, 0]:
                    _push_key(nearest[query], middle + error)
                if middle - error < lows[query, 0]:
                    _push(lows[query], highs[query], rows[query], middle - error, middle + error, order[place])
            allowed = np.float32(nearest[query, 0] - alpha + slack)


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
def _add_squares(value: float, column: Array, sums: Array) -> None:
    for j in range(column.shape[0]):
        difference = value - np.float64(column[j])
        sums[j] += difference * difference


@compiled
def _distances_of_run(query: Array, columns: Array, start: int, stop: int, lanes: Array, totals: Array) -> None:
    """totals[j] = squared_distance(query, columns[:, start + j]), the same bits, for a run of rows side by side.

    columns [D, M], D <= 128: the leaf of numpy's pairwise summation. lanes float64 [8, RUN], totals float64 [RUN].
    """
    width = columns.shape[0]
    whole = width - width % 8
    lanes[:] = 0.0
    for d in range(whole):
        _add_squares(np.float64(query[d]), columns[d, start:stop], lanes[d % 8])
    l0, l1, l2, l3, l4, l5, l6, l7 = (
        lanes[0], lanes[1], lanes[2], lanes[3], lanes[4], lanes[5], lanes[6], lanes[7],
    )  # fmt: skip
    for j in range(totals.shape[0]):
        totals[j] = ((l0[j] + l1[j]) + (l2[j] + l3[j])) + ((l4[j] + l5[j]) + (l6[j] + l7[j]))
    for d in range(whole, width):
        _add_squares(np.float64(query[d]), columns[d, start:stop], totals)


@compiled
def nearest_of_columns(
    queries: Array, which: Array, columns: Array, first: int, stop: int, order: Array, exclude: Array, distances: Array,
    rows: Array,
) -> None:  # fmt: skip
    """Take the places first … stop of columns [D, M] into the list of the nearest of some queries, all in float64.

    order [M]: the bank's row at each place; exclude [Q]: the row that a query must not have.
    """
    lanes, totals = np.empty((8, NARROW_RUN)), np.empty(NARROW_RUN)
    last = distances.shape[1] - 1
    for query in which:
        for start in range(first, stop, NARROW_RUN):
            n = min(NARROW_RUN, stop - start)
            _distances_of_run(queries[query], columns, start, start + n, lanes, totals)
            if _smallest(totals[:n]) > distances[query, last]:
                continue
            for j in range(n):
                row = order[start + j]
                if totals[j] <= distances[query, last] and row != exclude[query]:
                    _insert(distances[query], rows[query], totals[j], row)


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
def sort_by_distance(
    queries: Array, bank_rows: Array, places: Array, rows: Array, sorted_rows: Array, distances: Array
) -> None:
    """Put each query's rows [n, k], ascending, into the order of (distance, row); distances are not squared.

    places [n, k]: where the rows lie in bank_rows.
    """
    for i in range(rows.shape[0]):
        squares = np.empty(rows.shape[1])
        for j in range(rows.shape[1]):
            squares[j] = squared_distance(queries[i], bank_rows[places[i, j]])
        # A stable sort leaves equal distances in the order of their rows.
        order = np.argsort(squares, kind="mergesort")
        for j in range(rows.shape[1]):
            sorted_rows[i, j] = rows[i, order[j]]
            distances[i, j] = np.sqrt(squares[order[j]])


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
