"""Compiled loops of the exact search. Each works on a range of queries and releases the interpreter's lock."""

from typing import NamedTuple

import numpy as np
from numba import njit

from leadline.knn.arrays import Array
from leadline.knn.distance import compiled, squared_distance
from leadline.knn.product import GROUP, PANEL, WORD, lowest_bit, reach

FLOAT32 = 2.0**-24  # unit roundoff
MARGIN = 1e-6  # of float32 and float64 arithmetic on bounds, beside which it is negligible
UNDERFLOW = 1e-30  # of anything that float32 rounds to zero, once the longest row has length 1
FAR = 1e60  # squared length of a query whose products may overflow: it is compared with every row
SMALLEST, LARGEST = 1e-30, 1e30  # of the values that integers stand for
CHUNK = 512  # squares that are added up in the rows' own precision, before float64 takes them over
BLOCK = 40 * GROUP  # queries that are rounded together
CACHED = 1 << 18  # bytes of panels that stay in the processor's cache while a block of queries goes over them
ALL_BITS = np.int64(-1 if PANEL == 64 else (1 << PANEL) - 1)
NEAREST = 4  # cells that a query visits before it asks which others matter

# Lengths are bounds, rounded up by those who use them: their sums may be taken in any order.
_any_order = njit(nogil=True, cache=True, fastmath={"reassoc", "nnan", "nsz", "contract"})


class Cells(NamedTuple):
    """Bank rows in panels of PANEL, sorted by cell and in it by distance from its centre; see `leadline.knn.screen`.

    order int64 [P * PANEL]: the bank's row at each place, -1 for none; first int64 [C + 1]: each cell's first panel;
    centres float64 [C, m]; scale: of coordinates; radii float64 [C]: the longest row; apart float64 [C, C]: distances
    of centres; inner, outer float64 [P]: the least and largest length in each panel; values: the panels as
    `product.reach` takes them; bias float32 [P, PANEL]: minus half the squared length, and what rounding took away from
    the row times `usual`, rounded up; usual: about the length of a query; units float32 [P, PANEL]: what an integer
    stands for; whole: the largest integer, 0 where values are none; residuals, lengths float64 [C]: the largest of what
    rounding took away from a row, and of the rounded rows' lengths; smallest: the least that it took from any. slip:
    squared distances from centres are off by at most slip * (1 + the squared length of the vector).
    """

    order: Array
    first: Array
    centres: Array
    scale: float
    radii: Array
    apart: Array
    inner: Array
    outer: Array
    values: Array
    bias: Array
    usual: float
    units: Array
    whole: int
    residuals: Array
    smallest: float
    lengths: Array
    slip: float


class Question(NamedTuple):
    """Q queries. points [Q, m]: as the cells see them; queries [Q, D]: as they were given; own int64 [Q]: the bank row
    that each must not have; to_centres float64 [C, Q]: distances; near int64 [Q, NEAREST]: the nearest cells; lengths
    float64 [Q]: squared, from the middle of the centres; grow, slips float64 [Q]: a distance between points is at most
    grow times the scaled distance of their queries, and a slip. exact: measured in float64, in the units of the rows;
    else in the rows' precision, scaled by scale, to within error of itself. unit: from measured squared distances to
    scaled ones. k: neighbours.
    """

    points: Array
    queries: Array
    own: Array
    to_centres: Array
    near: Array
    lengths: Array
    grow: float
    slips: Array
    exact: bool
    scale: float
    error: float
    unit: float
    k: int


# Apart, and without fastmath: callers may add in any order, but each coordinate is one difference, rounded, times a
# power of two. Multiplied out it would lose what an offset hides.
@compiled
def _scaled(value: float, centre: float, scale: float) -> float:
    return (np.float64(value) - centre) * scale


@compiled
def _scaled_difference(a: float, b: float, scale: float) -> float:
    return (a - b) * scale


@compiled
def place(rows: Array, centre: Array, scale: float, placed: Array) -> None:
    """placed[i] = float32(scale * (rows[i] - centre))."""
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            placed[i, j] = np.float32(_scaled(rows[i, j], centre[j], scale))


# Sums of finite and other numbers may be taken in any order, but what is not a number must stay so.
_any_order_of_all = njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})


@_any_order_of_all
def square_lengths(rows: Array, centre: Array, scale: float, squares: Array) -> None:
    """squares[i] = the squared length of scale * (rows[i] - centre), in float64; NaN or infinity where a value is."""
    for i in range(rows.shape[0]):
        square = 0.0
        for j in range(rows.shape[1]):
            value = _scaled(rows[i, j], centre[j], scale)
            square += value * value
        squares[i] = square


@_any_order
def _round(
    point: Array, centre: Array, scale: float, floats: Array, packed: Array, whole: int
) -> tuple[float, float, float]:
    """packed = scale * (point - centre), rounded: float32 [K], bfloat16 (its bits, uint16), or int16 or int8, integers
    of up to `whole` that stand for so many units.

    Returns the squared length before rounding, no less than the length of what was lost, and the unit (a float32; 1
    where packed is not of integers). whole: 0 where it is not. floats float32 [m]: for use here. What of `packed` lies
    beyond the point's m values is left alone.
    """
    width = point.shape[0]
    square, unit = 0.0, np.float32(1)
    for j in range(width):
        value = _scaled(point[j], centre[j], scale)
        square += value * value
        floats[j] = np.float32(value)
    lost = 0.0
    if whole > 0:
        largest, most = np.float32(SMALLEST), np.float32(whole)
        for j in range(width):
            largest = max(largest, abs(floats[j]))
        unit = min(largest, np.float32(LARGEST)) / most
        per = np.float32(1) / unit
        for j in range(width):
            integer = min(max(np.rint(floats[j] * per), -most), most)
            packed[j] = np.int32(integer)
            difference = np.float64(floats[j]) - np.float64(unit) * np.float64(integer)
            lost += difference * difference
    elif packed.itemsize == 2:
        bits = floats.view(np.int32)
        for j in range(width):
            # To the nearest, of two the even one.
            up = bits[j] + np.int32(0x7FFF) + ((bits[j] >> np.int32(16)) & np.int32(1))
            packed[j] = np.uint16(up >> np.int32(16))
            bits[j] = np.int32(up & np.int32(-65536))
        for j in range(width):
            difference = np.float64(np.float32(_scaled(point[j], centre[j], scale))) - np.float64(floats[j])
            lost += difference * difference
    else:
        for j in range(width):
            packed[j] = floats[j]
    return square, (np.sqrt(lost) + FLOAT32 * np.sqrt(square)) * (1 + MARGIN), np.float64(unit)


@compiled
def _apart(values: Array) -> int:
    """Values from one row to the next, where rows lie as `product.reach` takes queries for panels of these values.

    A little more than a row has: at a distance of a power of two they would drive each other out of the cache.
    """
    return values.shape[1] * values.shape[2] // PANEL + 64 // values.itemsize


@compiled
def fill(
    points: Array, centres: Array, scale: float, order: Array, cell: Array, first: int, stop: int, values: Array,
    bias: Array, usual: float, units: Array, whole: int, inner: Array, outer: Array, residuals: Array, smallest: Array,
    lengths: Array,
) -> None:  # fmt: skip
    """Round rows into the panels first … stop; names as in `Cells`, but residuals, smallest, lengths [P] are of panels,
    whose cells are `cell` int64 [P].
    """
    # As words of 32 bits, each of which is one of float32, two of bfloat16 or int16, or four of int8. To add 128 to
    # each of these is to turn their highest bits over.
    words, turned = values.view(np.int32), np.int32(-0x7F7F7F80 if values.itemsize == 1 else 0)
    packed = np.zeros((PANEL, _apart(values)), values.dtype)
    packed_words, floats = packed.view(np.int32), np.empty(points.shape[1], np.float32)
    for panel in range(first, stop):
        for i in range(PANEL):
            row = order[panel * PANEL + i]
            if row < 0:
                bias[panel, i], units[panel, i] = -np.inf, 0
                packed[i] = 0
                continue
            square, lost, units[panel, i] = _round(points[row], centres[cell[panel]], scale, floats, packed[i], whole)
            length = np.sqrt(square)
            of_row, half = usual * lost, 0.5 * square
            bias[panel, i] = np.float32(of_row - half + 4 * FLOAT32 * (of_row + half))
            inner[panel] = min(inner[panel], length * (1 - MARGIN))
            outer[panel] = max(outer[panel], length * (1 + MARGIN))
            residuals[panel], smallest[panel] = max(residuals[panel], lost), min(smallest[panel], lost)
            lengths[panel] = max(lengths[panel], length + lost)
        for s in range(words.shape[1]):
            for i in range(PANEL):
                words[panel, s, i] = packed_words[i, s] ^ turned


@_any_order
def _sum_of_squares(query: Array, row: Array, scale: float) -> float:
    total, factor = query.dtype.type(0), query.dtype.type(scale)
    for j in range(query.shape[0]):
        difference = _scaled_difference(query[j], row[j], factor)
        total += difference * difference
    return total


@compiled
def _measure(query: Array, row: Array, scale: float, limit: float) -> float:
    """The scaled squared distance, or infinity where it is above the limit."""
    total = 0.0
    for start in range(0, query.shape[0], CHUNK):
        stop = min(start + CHUNK, query.shape[0])
        total += np.float64(_sum_of_squares(query[start:stop], row[start:stop], scale))
        if total > limit:
            return np.inf
    return total


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


# What follows is given numbers, not whole Cells and Questions: these would be copied for every call.
@compiled
def _limit(kth: float, unit: float, error: float, grow: float, slip: float) -> float:
    """No point of the k nearest rows is farther from the query's point than this; kth: the k-th measured distance."""
    return np.sqrt(kth * unit * (1 + error) + UNDERFLOW) * grow * (1 + 1e-9) + slip


@compiled
def _threshold(
    alpha: float, lost: float, limit: float, longest: float, residual: float, smallest: float, usual: float, width: int
) -> np.float32:
    """What the product and the row's bias reach if the points are within the limit.

    alpha: the squared length of the query's point about the cell's centre; lost: what rounding took from it; longest,
    residual: the cell's `lengths` and `residuals`; smallest, usual: as of `Cells`. The terms are those of
    docs/decisions/0004-screen.md.
    """
    if limit == np.inf or alpha > FAR:
        return np.float32(-np.inf)
    length = np.sqrt(alpha)
    # The row's share of it is in the bias, for a query of the usual length.
    beyond = max(length - usual, 0.0) * residual - max(usual - length, 0.0) * smallest * (1 - 4 * MARGIN)
    of_rounding = lost * longest + beyond
    gamma = (width + 8) * FLOAT32 * (1 + MARGIN)
    of_sum = gamma * ((length + lost) * longest + 0.5 * longest * longest + usual * residual)
    error = (of_rounding + of_sum) * (1 + MARGIN) + (width + 8) * 2.0**-50 * (alpha + limit * limit) + UNDERFLOW
    threshold = 0.5 * (alpha - limit * limit) - error
    return np.float32(threshold - 2 * FLOAT32 * abs(threshold) - UNDERFLOW)


@compiled
def _ring(alphas: Array, limits: Array, first: int, stop: int) -> tuple[float, float]:
    """The least and the largest length of rows that can matter to some queries of a block."""
    least, most = np.inf, 0.0
    for i in range(first, stop):
        length = np.sqrt(alphas[i])
        least = min(least, length * (1 - MARGIN) - limits[i])
        most = max(most, length * (1 + MARGIN) + limits[i])
    return least, most


@compiled
def _visit(
    cells: Cells, c: int, which: Array, ask: Question, bank: Array, number: int, distances: Array, rows: Array,
    packed: Array, cost: Array,
) -> None:  # fmt: skip
    """Take the rows of one cell into the lists of some queries, which are sorted by distance from its centre."""
    floats, masks = np.empty(cells.centres.shape[1], np.float32), np.empty(GROUP, WORD)
    alphas, losts, limits = np.empty(BLOCK), np.empty(BLOCK), np.empty(BLOCK)
    thresholds, units, starts = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.zeros(BLOCK, np.int32)
    in_cache = max(1, CACHED // (cells.values.shape[1] * cells.values.shape[2] * cells.values.itemsize))
    longest, residual, smallest, usual = cells.lengths[c], cells.residuals[c], cells.smallest, cells.usual
    width = packed.shape[1]
    unit, error, grow, last_of_k = ask.unit, ask.error, ask.grow, ask.k - 1
    for block in range(0, which.shape[0], BLOCK):
        n = min(BLOCK, which.shape[0] - block)
        queries = which[block : block + n]
        thresholds[:] = np.inf
        for i in range(n):
            point, centre = ask.points[queries[i]], cells.centres[c]
            alphas[i], losts[i], units[i] = _round(point, centre, cells.scale, floats, packed[i], cells.whole)
            if packed.itemsize == 1:
                starts[i] = -128 * packed[i].sum()
            limits[i] = _limit(distances[queries[i], last_of_k], unit, error, grow, ask.slips[queries[i]])
            thresholds[i] = _threshold(alphas[i], losts[i], limits[i], longest, residual, smallest, usual, width)
        for first in range(cells.first[c], cells.first[c + 1], in_cache):
            last = min(first + in_cache, cells.first[c + 1]) - 1
            for group in range(0, n, GROUP):
                stop = min(group + GROUP, n)
                least, most = _ring(alphas, limits, group, stop)
                begin = first
                if ask.exact:
                    # In few dimensions the nearest are about as far from the centre as the query is: from there
                    # outwards and then inwards. In many, those close to the centre are near to all.
                    begin += np.searchsorted(cells.outer[first:last], np.sqrt(alphas[group]))
                for step in range(last - first + 1):
                    panel = begin + step if begin + step <= last else last - step
                    if cells.outer[panel] < least or cells.inner[panel] > most:
                        continue
                    cost[0] += 1
                    some = reach(
                        packed, group, cells.values, panel, cells.bias, cells.units, thresholds, starts, units, masks
                    )  # fmt: skip
                    if some == 0:
                        continue
                    tighter = False
                    for i in range(group, stop):
                        query, before = queries[i], distances[queries[i], last_of_k]
                        bits = np.int64(masks[i - group]) & ALL_BITS
                        while bits != 0:
                            row = cells.order[panel * PANEL + lowest_bit(bits)]
                            bits &= bits - 1
                            if row < 0 or row == ask.own[query]:
                                continue
                            cost[1] += 1
                            if ask.exact:
                                distance = squared_distance(ask.queries[query], bank[row])
                            else:
                                limit = distances[query, last_of_k] * (1 + 3 * error) + UNDERFLOW
                                distance = _measure(ask.queries[query], bank[row], ask.scale, limit)
                            if distance < np.inf:
                                _insert(distances[query], rows[query], distance, number + row)
                        if distances[query, last_of_k] < before:
                            limits[i] = _limit(distances[query, last_of_k], unit, error, grow, ask.slips[query])
                            thresholds[i] = _threshold(
                                alphas[i], losts[i], limits[i], longest, residual, smallest, usual, width
                            )
                            tighter = True
                    if tighter:
                        least, most = _ring(alphas, limits, group, stop)


@compiled
def _matters(
    limit: float, to_centre: float, to_own: float, apart: float, radius: float, length: float, slip: float
) -> bool:  # fmt: skip
    """Whether a row of a cell may be within the limit of a query, by two bounds on how near it can be.

    Ball: it lies within the cell's radius of the centre. Plane: it lies on its own centre's side of the plane midway
    between that and the query's nearest centre, or it would be in that one's cell.
    """
    of_query = slip * (1 + length)
    if to_centre - radius - np.sqrt(of_query) > limit:
        return False
    beyond = to_centre * to_centre - to_own * to_own - 2 * (of_query + 2 * slip)
    return not beyond > 2 * (apart + np.sqrt(2 * slip)) * limit


@compiled
def search_cells(
    cells: Cells, ask: Question, bank: Array, number: int, distances: Array, rows: Array, cost: Array
) -> None:  # fmt: skip
    """Take all rows of the bank [M, D] that may be among a query's nearest into its list, near cells first.

    number: of the bank's first row.
    distances float64 [Q, S >= k], rows int64 [Q, S]: kept in the order of (distance, row), filled with infinity and the
    largest row number before. cost int64 [3]: grows by steps of `reach`, pairs measured, and visits of a query to a
    cell.
    """
    n_queries, n_cells = ask.points.shape[0], cells.centres.shape[0]
    packed = np.zeros((BLOCK, _apart(cells.values)), cells.values.dtype)
    which, lengths = np.empty(n_queries, np.int64), np.empty(n_queries)
    limits = np.empty(n_queries)
    for phase in range(NEAREST + 1):
        for query in range(n_queries):
            kth = distances[query, ask.k - 1]
            limits[query] = _limit(kth, ask.unit, ask.error, ask.grow, ask.slips[query])
        for c in range(n_cells):
            n = 0
            for query in range(n_queries):
                if phase < NEAREST:
                    wanted = ask.near[query, phase] == c
                else:
                    wanted = True
                    for i in range(NEAREST):
                        wanted &= ask.near[query, i] != c
                to_centre, own = ask.to_centres[c, query], ask.near[query, 0]
                if wanted and phase > 0:
                    to_own, apart, length = ask.to_centres[own, query], cells.apart[own, c], ask.lengths[query]
                    wanted = _matters(
                        limits[query], to_centre, to_own, apart, cells.radii[c], length, cells.slip
                    )  # fmt: skip
                if wanted:
                    which[n], lengths[n] = query, to_centre
                    n += 1
            if n > 0:
                cost[2] += n
                ready = which[:n][np.argsort(lengths[:n])]
                _visit(cells, c, ready, ask, bank, number, distances, rows, packed, cost)
                for query in ready:
                    kth = distances[query, ask.k - 1]
                    limits[query] = _limit(kth, ask.unit, ask.error, ask.grow, ask.slips[query])


@compiled
def nearest_cells(to_centres: Array, near: Array) -> None:
    """near int64 [Q, n]: the n nearest of C centres, -1 where there are fewer. to_centres float64 [C, Q]."""
    kept = np.full(near.shape, np.inf)
    near[:] = -1
    for c in range(to_centres.shape[0]):
        for query in range(near.shape[0]):
            if to_centres[c, query] < kept[query, near.shape[1] - 1]:
                _insert(kept[query], near[query], to_centres[c, query], c)


@compiled
def settle(distances: Array, k: int, error: float, n_sure: Array, n_open: Array) -> None:
    """Which of a query's list [S], ascending to within `error` of themselves, are surely among the k nearest.

    n_sure[i] are, the first ones; the n_open[i] that follow may be. n_open is 0 where the k nearest are certain, and -1
    where the list may not hold them all.
    """
    size = distances.shape[1]
    for i in range(distances.shape[0]):
        limit = distances[i, k - 1] * (1 + error) + UNDERFLOW  # the k-th is no farther
        if distances[i, k - 1] == np.inf or distances[i, size - 1] * (1 - error) - UNDERFLOW <= limit:
            n_open[i] = -1
            continue
        following = distances[i, k] * (1 - error) - UNDERFLOW
        sure = 0
        while sure < k and distances[i, sure] * (1 + error) + UNDERFLOW < following:
            sure += 1
        last = sure
        while distances[i, last] * (1 - error) - UNDERFLOW <= limit:
            last += 1
        n_sure[i] = sure
        n_open[i] = last - sure if sure < k else 0


@compiled
def settle_winners(rows: Array, codes: Array, k: int, n_classes: int, n_sure: Array, n_open: Array) -> None:
    """Set n_open to 0 where the winner of the vote is the same whichever of the open rows are among the k nearest.

    rows int64 [Q, S]: the sure ones first, then the open ones; codes int64 [M]: the class of each bank row.
    """
    sure, opened = np.empty(n_classes, np.int64), np.empty(n_classes, np.int64)
    for i in range(rows.shape[0]):
        if n_open[i] <= 0:
            continue
        sure[:], opened[:] = 0, 0
        for j in range(n_sure[i] + n_open[i]):
            if j < n_sure[i]:
                sure[codes[rows[i, j]]] += 1
            else:
                opened[codes[rows[i, j]]] += 1
        places = k - n_sure[i]
        winner = np.argmax(sure)
        least = sure[winner] + max(0, places - (n_open[i] - opened[winner]))
        certain = True
        for c in range(n_classes):
            most = sure[c] + min(opened[c], places)
            if c != winner and (most > least or (most == least and c < winner)):
                certain = False
        if certain:
            n_open[i] = 0


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
    queries: Array, bank_rows: Array, places: Array, rows: Array, sorted_rows: Array, sorted_squares: Array
) -> None:
    """Put each query's rows [n, k], ascending, into the order of (squared distance, row).

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
            sorted_squares[i, j] = squares[order[j]]
