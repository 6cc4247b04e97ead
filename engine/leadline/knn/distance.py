"""The distances that decide, in float64 and in one fixed order, so that they are the same bits on every machine.

The squared distance of a query q and a bank row x is the sum of (q_i - x_i)^2 over i, each difference and square
rounded to float64, added in the order of numpy's pairwise summation: what
``np.square(q.astype(np.float64) - x).sum()`` gives. Everything else in `leadline.knn` only bounds this number.
"""

import numpy as np
from numba import njit

from leadline.knn.arrays import Array

# nogil: the callers spread queries over threads. No fastmath: it would change the order of the sum.
compiled = njit(nogil=True, cache=True)

JOIN = -1  # stands in the stack for "add the last two sums"


@compiled
def _square(query: Array, row: Array, i: int) -> float:
    difference = np.float64(query[i]) - np.float64(row[i])
    return difference * difference


@compiled
def _short_sum(query: Array, row: Array, start: int, stop: int) -> float:
    """At most 128 squares, in eight lanes: the leaf of numpy's pairwise summation."""
    if stop - start < 8:
        total = 0.0
        for i in range(start, stop):
            total += _square(query, row, i)
        return total
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = 0.0
    whole = stop - (stop - start) % 8
    for i in range(start, whole, 8):
        s0 += _square(query, row, i)
        s1 += _square(query, row, i + 1)
        s2 += _square(query, row, i + 2)
        s3 += _square(query, row, i + 3)
        s4 += _square(query, row, i + 4)
        s5 += _square(query, row, i + 5)
        s6 += _square(query, row, i + 6)
        s7 += _square(query, row, i + 7)
    total = ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7))
    for i in range(whole, stop):
        total += _square(query, row, i)
    return total


@compiled
def squared_distance(query: Array, row: Array) -> float:
    """Sum of (query[i] - row[i])^2 in float64 and numpy's pairwise order. query, row: [D]."""
    if query.shape[0] <= 128:
        return _short_sum(query, row, 0, query.shape[0])
    # Halves are summed left to right and joined pair by pair; a stack takes the place of recursion, which numba's
    # cache cannot link. 64 levels of halving are more than any width has.
    starts, sizes, sums = np.empty(128, np.int64), np.empty(128, np.int64), np.empty(128)
    starts[0], sizes[0] = 0, query.shape[0]
    todo, done = 1, 0
    while todo > 0:
        todo -= 1
        start, size = starts[todo], sizes[todo]
        if size == JOIN:
            done -= 1
            sums[done - 1] += sums[done]
        elif size <= 128:
            sums[done] = _short_sum(query, row, start, start + size)
            done += 1
        else:
            half = size // 2
            half -= half % 8
            sizes[todo] = JOIN
            starts[todo + 1], sizes[todo + 1] = start + half, size - half
            starts[todo + 2], sizes[todo + 2] = start, half
            todo += 3
    return sums[0]
