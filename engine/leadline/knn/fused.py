"""The kernels of the search on a GPU, in Triton: products that never reach memory, and the lists that they leave.

Numbers are in the frame of `on_device`: bank rows at most 1 long, rounded to float16 or int8 about the centre of their
cell, queries about that of theirs. The proofs are in docs/decisions/0014.
"""

import time
import warnings
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Any

import torch
import triton
import triton.language as tl
from triton.errors import TritonError
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from leadline.errors import one_line


@dataclass(frozen=True)
class Shape:
    """How a product of tiles is cut: rows of a tile, warps that make it, and stages of rows on their way."""

    rows: int
    warps: int
    stages: int


QUERIES = 128  # of a tile
ON_HOPPER = {0: Shape(128, 4, 3), 512: Shape(256, 8, 3)}  # by the least width, as measured on an H100
# Tried on other GPUs, some of which have not the shared memory for the first.
SHAPES = (Shape(256, 8, 3), Shape(256, 8, 2), Shape(128, 8, 3), Shape(128, 4, 3), Shape(128, 4, 2), Shape(128, 4, 1))
TRIED = 32  # tiles of queries, and of rows, that a shape is tried on
BY_TILE_FROM = 9  # generation of GPUs that bring a tile of rows from memory in one piece
FLUSHES = 10  # for which Triton 3.6 compiles the product only where an accumulator is added to another
DEPTH = 64  # float16 values of a row that one step multiplies; of int8 twice as many
FLUSH = 4096  # values that one accumulator adds up
RUN = 16  # rows of which the nearest alone is estimated: every eighth of 128, as one thread holds them; at most 16
CAPACITY = 512  # runs that a query keeps
STEP = 1024  # runs that are looked through together
GROUP = 32  # tiles of queries that meet a tile of rows together, while it is in the cache
UNIT = 2.0**12  # that values are multiplied by before they are rounded: float16 ends at 65504, and thins out at 2^-14
LEVELS = 127  # of int8, of the largest value of a row
# Between levels: a row of less is all lost, and no product of steps is a subnormal.
LEAST_STEP = tl.constexpr(2.0**-60)
WIDEST = (2**31 - 1) // LEVELS**2  # rows of int8 whose products an int32 holds
GONE = -(1 << 30)  # candidates of a query that is not searched here
LANES, LEAF = 8, 128  # numpy's pairwise sum: lanes of a leaf, squares of a leaf
ROUNDOFF = 2.0**-23  # of a sum in float32: tensor cores may cut off where others round
SLACK = 2.0**-20  # of float32 arithmetic on bounds
_LAUNCHING = Lock()
LEAST = tl.constexpr(-1e38)  # below any score of a row, above that of no row


@triton.jit
def _error(a, lam, rho, slip, longest, lost, gamma, SLACK: tl.constexpr):
    """What an estimated squared distance may be off by: see docs/decisions/0014."""
    product = rho * longest + lam * lost + gamma * (lam + rho) * longest
    length = tl.sqrt(a) + lam + rho + longest
    return (2 * product + SLACK * length * length) * 1.001 + slip


@triton.jit
def _place(pid, n_tiles, n_query_tiles, GROUP: tl.constexpr):
    """Which tile of queries meets which of its nearest tiles of rows: queries in groups, so that a tile of rows is read
    once from memory for all of a group."""
    group = pid // (GROUP * n_tiles)
    in_group = tl.minimum(n_query_tiles - group * GROUP, GROUP)
    inside = pid - group * GROUP * n_tiles
    return group * GROUP + inside % in_group, inside // in_group


@triton.jit(do_not_specialize=["first", "n_tiles", "n_query_tiles", "stride", "n_bank_tiles", "n_cells"])
def _near(
    out, limit, lam, slip, far, query_cell, inner, outer, apart, order, order_cell, first, n_tiles, n_query_tiles,
    stride, n_bank_tiles, n_cells, QUERIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Which pairs of tiles may hold a neighbour that is not known yet: by ball, ring and plane of 0014."""
    pid = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pid < n_tiles * n_query_tiles
    query_tile, t = pid // n_tiles, pid % n_tiles
    own = tl.load(query_cell + query_tile, mask=inside, other=0)
    nearest = own.to(tl.int64) * n_bank_tiles + first + t
    tile = tl.load(order + nearest, mask=inside, other=0)
    cell = tl.load(order_cell + nearest, mask=inside, other=0)
    between = tl.load(apart + own.to(tl.int64) * n_cells + cell, mask=inside, other=0) * 1.00001
    r_inner, r_outer = tl.load(inner + tile), tl.load(outer + tile)
    i = query_tile[:, None] * QUERIES + tl.arange(0, QUERIES)[None, :]
    there = inside[:, None] & (i >= 0)
    t_i = tl.load(limit + i, mask=there, other=-1.0)
    l_i, s_i = tl.load(lam + i, mask=there, other=0), tl.load(slip + i, mask=there, other=0)
    a = tl.load(far + cell.to(tl.int64)[:, None] * stride + i, mask=there, other=0)
    reach = tl.sqrt(tl.maximum(t_i, 0)) * 1.00001
    least = tl.sqrt(tl.maximum(a * 0.99999 - s_i, 0)) - reach
    most = tl.sqrt(a * 1.00001 + s_i) + reach
    beyond = a * 0.99999 - l_i * l_i * 1.00001 - 4 * s_i
    near = (least <= r_outer[:, None]) & (most >= r_inner[:, None])
    near = near & (beyond <= 2 * (between[:, None] + tl.sqrt(s_i)) * reach) & (t_i >= 0)
    tl.store(out + pid, tl.max(near.to(tl.int32), axis=1).to(tl.int8), mask=inside)


@triton.jit
def _values(rows, first, k, padded, BY_TILE: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """Values k to k + DEPTH of ROWS rows: in one piece where the GPU can, else by the addresses of all."""
    if BY_TILE:
        part = rows.load([first, k])
    else:
        d = k + tl.arange(0, DEPTH)
        at = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None] * padded + d[None, :]
        part = tl.load(rows + at, mask=d[None, :] < padded, other=0)
    return part


@triton.jit(do_not_specialize=["first", "n_tiles", "n_query_tiles", "stride", "bias_stride", "n_bank_tiles"])
def _screen(
    queries, rows, query_step, row_step, limit, lam, rho, slip, far, query_cell, longest, lost, bias, order, order_cell,
    todo, best_out, masks_out, flags, first, n_tiles, n_query_tiles, stride, bias_stride, n_bank_tiles, width, padded,
    gamma, BOUND: tl.constexpr, PRUNE: tl.constexpr, NARROW: tl.constexpr, EIGHT: tl.constexpr, FLUSHED: tl.constexpr,
    BY_TILE: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, FLUSH: tl.constexpr,
    RUN: tl.constexpr, GROUP: tl.constexpr, SLACK: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """One tile of queries against the t-th nearest tile of rows, first <= t < first + n_tiles.

    Of each run of rows the best score comes out, or, in BOUND, the squared distance that it proves; and which of its
    rows may be within the query's limit. Where none of the tile may, nothing is written.
    """
    pid = tl.program_id(0)
    if PRUNE:
        pid = tl.load(todo + pid).to(tl.int32)
    query_tile, t = _place(pid, n_tiles, n_query_tiles, GROUP)
    own = tl.load(query_cell + query_tile)
    nearest = own.to(tl.int64) * n_bank_tiles + first + t
    tile = tl.load(order + nearest)
    cell = tl.load(order_cell + nearest)
    i = query_tile * QUERIES + tl.arange(0, QUERIES)
    j = tile * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((QUERIES, ROWS), tl.float32)
    if NARROW:
        for d in range(width):
            q = tl.load(queries + i.to(tl.int64) * width + d)
            x = tl.load(rows + j.to(tl.int64) * width + d)
            difference = q[:, None] - x[None, :]
            total += difference * difference
    elif EIGHT:
        whole = tl.zeros((QUERIES, ROWS), tl.int32)
        for k in range(0, width, DEPTH):
            of_queries = _values(queries, query_tile * QUERIES, k, padded, BY_TILE, QUERIES, DEPTH)
            of_rows = _values(rows, tile * ROWS, k, padded, BY_TILE, ROWS, DEPTH)
            whole = tl.dot(of_queries, of_rows.T, whole, out_dtype=tl.int32)
        total = whole.to(tl.float32) * (tl.load(query_step + i)[:, None] * tl.load(row_step + j)[None, :])
    elif FLUSHED:
        for start in range(0, width, FLUSH):
            part = tl.zeros((QUERIES, ROWS), tl.float32)
            for k in range(start, tl.minimum(start + FLUSH, width), DEPTH):
                of_queries = _values(queries, query_tile * QUERIES, k, padded, BY_TILE, QUERIES, DEPTH)
                part = tl.dot(of_queries, _values(rows, tile * ROWS, k, padded, BY_TILE, ROWS, DEPTH).T, part)
            total += part
    else:
        for k in range(0, width, DEPTH):
            of_queries = _values(queries, query_tile * QUERIES, k, padded, BY_TILE, QUERIES, DEPTH)
            total = tl.dot(of_queries, _values(rows, tile * ROWS, k, padded, BY_TILE, ROWS, DEPTH).T, total)
    a = tl.load(far + cell.to(tl.int64) * stride + i)
    t_i = tl.load(limit + i)
    shift = tl.load(bias + own.to(tl.int64) * bias_stride + j)
    if NARROW:
        score = -0.5 * total + shift[None, :]
        edge = tl.maximum(-0.5 * t_i * 1.00001 - 1e-30, LEAST)
    else:
        score = total * PRODUCT + shift[None, :]
        l_i, r_i, s_i = tl.load(lam + i), tl.load(rho + i), tl.load(slip + i)
        error = _error(a, l_i, r_i, s_i, tl.load(longest + tile), tl.load(lost + tile), gamma, SLACK)
        edge = 0.5 * (a - t_i - error)
        edge = tl.maximum(edge - SLACK * tl.abs(edge), LEAST)
    # A run is of rows that one thread holds, so that its nearest is found without a word to the others.
    runs: tl.constexpr = ROWS // RUN
    best = tl.reshape(tl.max(tl.reshape(score, (QUERIES, runs // 8, RUN, 8)), axis=2), (QUERIES, runs))
    at = i.to(tl.int64)[:, None] * (n_tiles * runs) + (t * runs + tl.arange(0, runs))[None, :]
    if BOUND:
        above = -2 * best * 1.00001 + 1e-30 if NARROW else a[:, None] - 2 * best + error[:, None]
        tl.store(best_out + at, tl.maximum(above, 0))
    elif tl.max(tl.max((best >= edge[:, None]).to(tl.int32), axis=1), axis=0) > 0:
        bit = 1 << (tl.arange(0, ROWS) // 8 % RUN)
        reached = tl.where(score >= edge[:, None], bit[None, :], 0)
        bits = tl.reshape(tl.sum(tl.reshape(reached, (QUERIES, runs // 8, RUN, 8)), axis=2), (QUERIES, runs))
        tl.store(best_out + at, best, mask=best >= edge[:, None])  # the others are never read
        tl.store(masks_out + at, bits.to(tl.int16))
        tl.store(flags + query_tile * n_tiles + t, 1)


@triton.jit(do_not_specialize=["first", "n_tiles", "stride", "n_bank_tiles"])
def _collect(
    counts, estimates, candidates, masks, far, query_cell, order, order_cell, best, bits, flags, first, n_tiles, stride,
    n_bank_tiles, NARROW: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, RUN: tl.constexpr,
    CAPACITY: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Put the runs of a query with rows that may be within its limit into its list; count what finds no room too."""
    i = tl.program_id(0)
    found = tl.load(counts + i)
    if found < 0:
        return
    runs: tl.constexpr = ROWS // RUN
    query_tile = i // QUERIES
    own = tl.load(query_cell + query_tile)
    n = n_tiles * runs
    base = i.to(tl.int64) * CAPACITY
    for begin in range(0, n, STEP):
        at = begin + tl.arange(0, STEP)
        t = at // runs
        flagged = tl.load(flags + query_tile * n_tiles + t, mask=at < n, other=0) > 0
        if tl.max(flagged.to(tl.int32), axis=0) > 0:
            mask = tl.load(bits + i.to(tl.int64) * n + at, mask=flagged, other=0).to(tl.int32) & 0xFFFF
            hit = mask != 0
            number = tl.sum(hit.to(tl.int32), axis=0)
            if number > 0:
                nearest = own.to(tl.int64) * n_bank_tiles + first + t
                tile = tl.load(order + nearest, mask=hit, other=0)
                estimate = -2 * tl.load(best + i.to(tl.int64) * n + at, mask=hit, other=0)
                if NARROW == 0:
                    cell = tl.load(order_cell + nearest, mask=hit, other=0)
                    estimate += tl.load(far + cell.to(tl.int64) * stride + i, mask=hit, other=0)
                to = found + tl.cumsum(hit.to(tl.int32), axis=0) - 1
                room = hit & (to < CAPACITY)
                tl.store(estimates + base + to, estimate, mask=room)
                tl.store(candidates + base + to, tile * runs + at % runs, mask=room)
                tl.store(masks + base + to, mask, mask=room)
                found += number
    tl.store(counts + i, found)


@triton.jit
def _ordered(values):
    """float32 as int32 of the same order."""
    bits = values.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _smallest(values, weights, k):
    """The k-th smallest of int32, each as often as its weight says, by halving of what it may be."""
    low = tl.full((), -2147483648, tl.int64)
    high = tl.full((), 2147483647, tl.int64)
    for _ in range(32):
        middle = low + (high - low) // 2
        enough = tl.sum(tl.where(values <= middle.to(tl.int32), weights, 0), axis=0) >= k
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    return high.to(tl.int32)


@triton.jit
def _ones(bits):
    """How many bits of the lower sixteen are set."""
    bits = bits - ((bits >> 1) & 0x5555)
    bits = (bits & 0x3333) + ((bits >> 2) & 0x3333)
    bits = (bits + (bits >> 4)) & 0x0F0F
    return (bits + (bits >> 8)) & 0x1F


@triton.jit
def _float(ordered):
    bits = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["k", "n"])
def _bound(bounds, limit, k, n, BLOCK: tl.constexpr):
    """Of each query: the k-th smallest bound, where its limit is above it."""
    i = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    values = tl.load(bounds + i.to(tl.int64) * n + at, mask=at < n, other=float("inf"))
    t_i = tl.load(limit + i)
    kth = _float(_smallest(_ordered(values), (at >= 0).to(tl.int32), k))
    tl.store(limit + i, tl.minimum(t_i, kth))


@triton.jit(do_not_specialize=["stride", "k"])
def _refine(
    counts, estimates, candidates, masks, limit, lam, rho, slip, far, tile_cell, longest, lost, own, n_sure, n_rows, k,
    stride, gamma, FINAL: tl.constexpr, NARROW: tl.constexpr, ROWS: tl.constexpr, RUN: tl.constexpr,
    CAPACITY: tl.constexpr, SLACK: tl.constexpr, GONE: tl.constexpr,
):  # fmt: skip
    """Lower a query's limit to what its candidates prove, and drop those beyond it and its own row.

    FINAL: put those first that are surely among the k nearest, and count them and the rows of all. What a list that
    ran over says counts for nothing.
    """
    i = tl.program_id(0)
    found = tl.load(counts + i)
    at = tl.arange(0, CAPACITY)
    there = at < tl.minimum(found, CAPACITY)
    base = i.to(tl.int64) * CAPACITY + at
    estimate = tl.load(estimates + base, mask=there, other=float("inf"))
    run = tl.load(candidates + base, mask=there, other=0)
    mask = tl.load(masks + base, mask=there, other=0)
    place = tl.load(own + i)
    in_tile = place % ROWS
    own_run = place // ROWS * (ROWS // RUN) + in_tile // (8 * RUN) * 8 + in_tile % 8
    # The nearest of its own run may be the query itself: of the others nothing is known but that they are no nearer.
    mine = (run == own_run) & (place >= 0)
    mask = tl.where(mine, mask & ~(1 << (in_tile // 8 % RUN)), mask)
    rows = _ones(mask)
    there = there & (rows > 0)
    t_i = tl.load(limit + i)
    if NARROW:
        low = estimate * 0.99999 - 1e-30
        high = estimate * 1.00001 + 1e-30
    else:
        tile = run // (ROWS // RUN)
        a = tl.load(far + tl.load(tile_cell + tile).to(tl.int64) * stride + i)
        l_i, r_i, s_i = tl.load(lam + i), tl.load(rho + i), tl.load(slip + i)
        error = _error(a, l_i, r_i, s_i, tl.load(longest + tile), tl.load(lost + tile), gamma, SLACK)
        low, high = estimate - error, estimate + error
        low -= SLACK * tl.abs(low)
        high += SLACK * tl.abs(high)
    low = tl.where(there, low, float("inf"))
    high = tl.where(there & (mine == 0), tl.maximum(high, 0), float("inf"))
    t_i = tl.minimum(t_i, _float(_smallest(_ordered(high), (at >= 0).to(tl.int32), k)))
    keep = there & (low <= t_i)
    n_kept = tl.sum(keep.to(tl.int32), axis=0)
    to = tl.cumsum(keep.to(tl.int32), axis=0) - 1
    over = (found > CAPACITY) | (found < 0)
    if FINAL:
        next_low = _float(_smallest(_ordered(low), tl.where(there, rows, 1), k + 1))
        sure = keep & (rows == 1) & (high < next_low)
        n_first = tl.sum(sure.to(tl.int32), axis=0)
        maybe = keep & (sure == 0)
        of_maybe = n_first + tl.cumsum(maybe.to(tl.int32), axis=0) - 1
        to = tl.where(sure, tl.cumsum(sure.to(tl.int32), axis=0) - 1, of_maybe)
        n_all = tl.sum(tl.where(keep, rows, 0), axis=0)
        over = over | (n_all < k)
        tl.store(n_sure + i, n_first)
        tl.store(n_rows + i, n_all)
    # A query whose list ran over takes no more rows: it is searched another way.
    tl.store(limit + i, tl.where(over, -1.0, t_i))
    tl.store(counts + i, tl.where(over, GONE, n_kept))
    tl.debug_barrier()
    to = i.to(tl.int64) * CAPACITY + to
    tl.store(estimates + to, estimate, mask=keep)
    tl.store(candidates + to, run, mask=keep)
    tl.store(masks + to, mask, mask=keep)


@triton.jit
def _about(source, row, centre, scale, centres, cell, d, width):
    """Some values of a row, scaled, about its cell's centre, in float64; zeros where there is none."""
    inside = (d < width) & (row >= 0)
    x = tl.load(source + row.to(tl.int64) * width + d, mask=inside, other=0).to(tl.float64)
    c = tl.load(centre + d, mask=inside, other=0)
    of_cell = tl.load(centres + cell.to(tl.int64) * width + d, mask=inside, other=0)
    return tl.where(inside, (x - c) * scale - of_cell, 0.0)


@triton.jit
def _round(
    source, order, cell_of, centre, scale, centres, values, steps, squares, lost, width, padded, EIGHT: tl.constexpr,
    BLOCK: tl.constexpr, UNIT: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """A row of the source, scaled about its cell's centre: times UNIT to float16, or EIGHT, to levels either way; its
    squared length, and that of what was lost.

    A place that no row has is filled with zeros.
    """
    place = tl.program_id(0)
    row = tl.load(order + place)
    cell = tl.load(cell_of + place)
    square = tl.zeros((BLOCK,), tl.float64)
    off = tl.zeros((BLOCK,), tl.float64)
    if EIGHT:
        largest = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, padded, BLOCK):
            v = _about(source, row, centre, scale, centres, cell, start + tl.arange(0, BLOCK), width)
            largest = tl.maximum(largest, tl.abs(v))
        step = (tl.max(largest, axis=0) / LEVELS).to(tl.float32)
        step = tl.where(step >= LEAST_STEP, step, 1.0)
        tl.store(steps + place, step)
        unit = step.to(tl.float64)
    for start in range(0, padded, BLOCK):
        d = start + tl.arange(0, BLOCK)
        v = _about(source, row, centre, scale, centres, cell, d, width)
        if EIGHT:
            level = tl.floor(v / unit + 0.5)  # no more than LEVELS: the step is the largest value's share, nearly
            tl.store(values + place.to(tl.int64) * padded + d, level.to(tl.int8), mask=d < padded)
            rest = v - level * unit
        else:
            rounded = tl.clamp((v * UNIT).to(tl.float32), -65504.0, 65504.0).to(tl.float16)
            tl.store(values + place.to(tl.int64) * padded + d, rounded, mask=d < padded)
            rest = v - rounded.to(tl.float64) / UNIT
        square += v * v
        off += rest * rest
    tl.store(squares + place, tl.sum(square, axis=0))
    tl.store(lost + place, tl.sum(off, axis=0))


@triton.jit(do_not_specialize=["k"])
def _expand(
    which, query_of, counts, n_sure, candidates, masks, order, first, chosen, pair_query, pair_row, k,
    ROWS: tl.constexpr, RUN: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a query at a place: rows that are sure to `chosen`, the others one after another to the pairs."""
    number = tl.program_id(0)
    place = tl.load(which + number)
    query = tl.load(query_of + place)
    at = tl.arange(0, BLOCK)
    there = at < tl.load(counts + place)
    sure = at < tl.load(n_sure + place)
    run = tl.load(candidates + place * CAPACITY + at, mask=there, other=0)
    mask = tl.load(masks + place * CAPACITY + at, mask=there, other=0)
    in_tile = run % (ROWS // RUN)
    slot = run // (ROWS // RUN) * ROWS + in_tile // 8 * (8 * RUN) + in_tile % 8
    n_open = tl.where(there & (sure == 0), _ones(mask), 0)
    to = tl.load(first + number) + tl.cumsum(n_open, axis=0) - n_open
    for bit in range(RUN):
        has = there & ((mask >> bit) & 1 == 1)
        row = tl.load(order + slot + bit * 8, mask=has, other=0)
        tl.store(chosen + query * k + at, row, mask=has & sure)
        tl.store(pair_query + to, query, mask=has & (sure == 0))
        tl.store(pair_row + to, row, mask=has & (sure == 0))
        to += (has & (sure == 0)).to(tl.int64)


@triton.jit(do_not_specialize=["k"])
def _choose(which, query_of, n_sure, first, n_open, rows, squares, chosen, k, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Of a query at a place: put the nearest of its open rows, by (distance, row), after those that are sure."""
    number = tl.program_id(0)
    place = tl.load(which + number)
    start, n, sure = tl.load(first + number), tl.load(n_open + number), tl.load(n_sure + place)
    at = tl.arange(0, BLOCK)
    row = tl.load(rows + start + at, mask=at < n, other=0)
    square = tl.load(squares + start + at, mask=at < n, other=float("inf"))
    rank = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, n, STEP):
        other = begin + tl.arange(0, STEP)
        its_row = tl.load(rows + start + other, mask=other < n, other=0)
        its_square = tl.load(squares + start + other, mask=other < n, other=float("inf"))
        nearer = its_square[None, :] < square[:, None]
        before = (its_square[None, :] == square[:, None]) & (its_row[None, :] < row[:, None])
        rank += tl.sum(((nearer | before) & (other < n)[None, :]).to(tl.int32), axis=1)
    to = chosen + tl.load(query_of + place) * k + sure + rank
    tl.store(to, row, mask=(at < n) & (rank < k - sure))


@triton.jit
def _halved(sums, N: tl.constexpr):
    """Neighbours added up, [2 N] to [N]."""
    even, odd = tl.split(tl.reshape(sums, (N, 2)))
    return even + odd


@triton.jit
def _measure(
    queries, rows, which_query, which_row, starts, sizes, out, width, n_leaves, last, tail, BLOCK: tl.constexpr,
    LANES: tl.constexpr, LEAF: tl.constexpr,
):  # fmt: skip
    """Of a pair and BLOCK leaves, a whole branch of numpy's tree: the sum of their squares, as numpy rounds it."""
    pair = tl.program_id(0)
    q = queries + tl.load(which_query + pair) * width
    x = rows + tl.load(which_row + pair) * width
    leaf = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start, size = tl.load(starts + leaf), tl.load(sizes + leaf)
    lane = tl.arange(0, LANES)
    total = tl.zeros((BLOCK, LANES), tl.float64)
    for step in range(0, LEAF, LANES):
        inside = (step + lane)[None, :] < size[:, None]
        at = start[:, None] + (step + lane)[None, :]
        a = tl.load(q + at, mask=inside, other=0).to(tl.float64)
        difference = a - tl.load(x + at, mask=inside, other=0).to(tl.float64)
        total += difference * difference
    pairs = _halved(tl.reshape(total, (BLOCK * 8,)), BLOCK * 4)
    sums = _halved(_halved(pairs, BLOCK * 2), BLOCK)
    for d in range(tail, width):
        rest = tl.load(q + d).to(tl.float64) - tl.load(x + d).to(tl.float64)
        sums += tl.where(leaf == last, rest * rest, 0.0)
    if BLOCK >= 32:
        sums = _halved(sums, BLOCK // 2)
    if BLOCK >= 16:
        sums = _halved(sums, 8)
    if BLOCK >= 8:
        sums = _halved(sums, 4)
    if BLOCK >= 4:
        sums = _halved(sums, 2)
    if BLOCK >= 2:
        sums = _halved(sums, 1)
    at = pair.to(tl.int64) * (n_leaves // BLOCK) + tl.program_id(1) + tl.arange(0, 1)
    tl.store(out + at, sums)


@dataclass(frozen=True)
class RowTiles:
    """Bank rows [P] in tiles as `shape` says, each of one cell.

    values: float16 or int8 [P, D'] (`round_rows`), or float32 [P, D] where they are narrow; steps float32 [P]: between
    levels of int8; bias float32 [C, P]. Of each tile: cell int32; longest and lost, no less than the lengths of its
    rounded rows and of what rounding took; inner and outer, the least and greatest distance from the centre. apart
    float32 [C, C]: distances of centres; nearest, nearest_cell int32 [C, tiles]: the tiles, those of the nearest cells
    first, and their cells.
    """

    values: torch.Tensor
    steps: torch.Tensor
    bias: torch.Tensor
    cell: torch.Tensor
    longest: torch.Tensor
    lost: torch.Tensor
    inner: torch.Tensor
    outer: torch.Tensor
    apart: torch.Tensor
    nearest: torch.Tensor
    nearest_cell: torch.Tensor
    shape: Shape


@dataclass(frozen=True)
class QueryTiles:
    """Queries [P] in tiles of QUERIES, each of one cell, and what is known of their neighbours.

    values, steps: as of RowTiles; cell int32, of each tile; length, lost, slip float32 [P]: as in 0014; far float32
    [C, P]: squared distances from the centres; own int32 [P]: the place that a query must not have, -1 for none. limit
    float32 [P]: the k nearest rows are within it, squared; -1: a query that is not searched here. counts int32 [P];
    candidates int32 [P, CAPACITY]: runs of rows; estimates float32: the squared distance of the nearest of each; masks
    int32: which of its rows.
    """

    values: torch.Tensor
    steps: torch.Tensor
    cell: torch.Tensor
    length: torch.Tensor
    lost: torch.Tensor
    slip: torch.Tensor
    far: torch.Tensor
    own: torch.Tensor
    limit: torch.Tensor
    counts: torch.Tensor
    estimates: torch.Tensor
    candidates: torch.Tensor
    masks: torch.Tensor

    def part(self, first: int, stop: int) -> "QueryTiles":
        """Some of the tiles."""
        some = slice(first * QUERIES, stop * QUERIES)
        cut = {name: value[some] for name, value in vars(self).items()}
        return QueryTiles(**{**cut, "cell": self.cell[first:stop], "far": self.far[:, some]})


def shape_of(device: torch.device, width: int) -> Shape | None:
    """How products of so wide rows are cut on a device; None where no shape can be had.

    Of a Hopper GPU it is known; others try SHAPES, once for each power of two of the width, some seconds long.
    """
    if is_known(device):
        return next(shape for least, shape in sorted(ON_HOPPER.items(), reverse=True) if width >= least)
    return fastest(device, min(max(DEPTH, triton.next_power_of_2(width)), FLUSH))


@cache
def fastest(device: torch.device, width: int) -> Shape | None:
    """The fastest of SHAPES on a device; None, with a warning, where it has room for none or none compiles for it."""
    seconds, why = {}, ""
    for shape in SHAPES:
        try:
            seconds[shape] = _seconds(shape, device, width)
        except OutOfResources as error:
            why = one_line(error)
        except (RuntimeError, TritonError) as error:
            if isinstance(error, (torch.AcceleratorError, torch.OutOfMemoryError)):
                raise
            why = one_line(error)  # of a compiler that is older than the GPU
    if not seconds:
        warnings.warn(
            f"no kernel of the search runs on {device} ({why}); all is done in float64, which takes many times as "
            "long; try a newer torch",
            RuntimeWarning,
            stacklevel=2,
        )
    return min(seconds, key=seconds.__getitem__) if seconds else None


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """One at a time: a kernel that one thread is loading is not ready for the next one."""
    with _LAUNCHING:
        kernel[grid](*arguments, **options)


def is_known(device: torch.device) -> bool:
    """Whether ON_HOPPER is of such a device."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) == (9, 0)


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU."""
    return bool(triton.knobs.runtime.interpret)


def roundoff(width: int, dtype: torch.dtype) -> float:
    """Relative error of a product of so many rounded values, as the kernel adds it up: gamma in 0014."""
    if dtype == torch.int8:
        return 2 * ROUNDOFF  # the sum is exact, and three roundings follow
    terms = min(width, FLUSH) + -(-width // FLUSH) + 8
    return 2 * terms * ROUNDOFF * 1.001


def round_rows(
    rows: torch.Tensor, order: torch.Tensor, cell: torch.Tensor, centre: torch.Tensor, scale: float,
    centres: torch.Tensor, dtype: torch.dtype = torch.float16,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """rows[order], scaled, about the centres of their cells, times UNIT in float16 or in steps of their own in int8.

    rows [N, D]; order int64 and cell int32 [P], order -1 for zeros; centre float64 [D]; centres float64 [C, D]. Returns
    values [P, D'], D' a multiple of 16; steps float32 [P], of int8 alone; and float64 [P]:
    squared lengths of the rows before they were rounded, and of what rounding took.
    """
    n, width, eight = len(order), rows.shape[1], dtype == torch.int8
    padded = -(-width // 16) * 16  # what Triton knows of the addresses of rows, to read many values at once
    values = torch.empty((n, padded), dtype=dtype, device=rows.device)
    steps = torch.empty(n, device=rows.device)
    squares, lost = torch.empty((2, n), dtype=torch.float64, device=rows.device)
    _launch(
        _round, (n,),
        rows, order, cell, centre, scale, centres, values, steps, squares, lost, width, padded, EIGHT=eight,
        BLOCK=min(1024, triton.next_power_of_2(padded)), UNIT=UNIT, LEVELS=LEVELS, num_warps=4,
    )  # fmt: skip
    return values, steps, squares, lost


def screen(q: QueryTiles, r: RowTiles, first: int, n: int, width: int, prune: bool) -> int:
    """Put the runs in the `first` and n - 1 more of each query's nearest tiles, rows of which may be within its limit,
    into its list. Returns how many pairs of tiles were multiplied."""
    runs, device = n * (r.shape.rows // RUN), q.limit.device
    best = torch.empty((len(q.limit), runs), device=device)
    bits = torch.empty((len(q.limit), runs), dtype=torch.int16, device=device)
    flags = torch.zeros((len(q.cell), n), dtype=torch.int8, device=device)
    todo = _to_do(q, r, first, n) if prune else None
    number = len(q.cell) * n if todo is None else len(todo)
    if number:
        _multiply(q, r, first, n, width, todo, best, bits, flags, number)
        _launch(
            _collect, (len(q.limit),),
            q.counts, q.estimates, q.candidates, q.masks, q.far, q.cell, r.nearest, r.nearest_cell, best, bits, flags,
            first, n, q.far.stride(0), len(r.cell), NARROW=_is_narrow(q), QUERIES=QUERIES, ROWS=r.shape.rows, RUN=RUN,
            CAPACITY=CAPACITY, STEP=min(STEP, triton.next_power_of_2(runs)), num_warps=1,
        )  # fmt: skip
    return number


def bound(q: QueryTiles, r: RowTiles, n: int, k: int, width: int) -> None:
    """Lower each query's limit to what k of the rows of its n nearest tiles prove."""
    runs = n * (r.shape.rows // RUN)
    bounds = torch.empty((len(q.limit), runs), device=q.limit.device)
    _multiply(q, r, 0, n, width, None, bounds, None, None, len(q.cell) * n)
    _launch(_bound, (len(q.limit),), bounds, q.limit, k, runs, BLOCK=triton.next_power_of_2(runs), num_warps=2)


def refine(q: QueryTiles, r: RowTiles, k: int, width: int, ends: torch.Tensor | None = None) -> None:
    """Lower limits to what the candidates prove, and drop those beyond them.

    ends int32 [2, P], asked for when all rows were seen: how many are first in each list that are surely among the k
    nearest, one row each, and how many rows there are in all of it.
    """
    n_sure, n_rows = (q.counts, q.counts) if ends is None else ends
    _launch(
        _refine, (len(q.limit),),
        q.counts, q.estimates, q.candidates, q.masks, q.limit, q.length, q.lost, q.slip, q.far, r.cell, r.longest,
        r.lost, q.own, n_sure, n_rows, k, q.far.stride(0), roundoff(width, q.values.dtype), FINAL=ends is not None,
        NARROW=_is_narrow(q), ROWS=r.shape.rows, RUN=RUN, CAPACITY=CAPACITY, SLACK=SLACK, GONE=GONE,
        num_warps=2,
    )  # fmt: skip


def expand(
    q: QueryTiles, r: RowTiles, order: torch.Tensor, which: torch.Tensor, query_of: torch.Tensor, n_sure: torch.Tensor,
    n_open: torch.Tensor, chosen: torch.Tensor, most: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Of queries at some places, int64 `which`: rows that are sure into chosen [Q, k], int64; pairs with the others.

    order: the row at each place of RowTiles, query_of: the query at each of QueryTiles; n_open int64: of each
    of them; most: rows that any of their lists has.
    """
    first = n_open.cumsum(0) - n_open
    pairs = torch.empty((2, int(n_open.sum())), dtype=torch.int64, device=which.device)
    _launch(
        _expand, (len(which),),
        which, query_of, q.counts, n_sure, q.candidates, q.masks, order, first, chosen, pairs[0], pairs[1],
        chosen.shape[1], ROWS=r.shape.rows, RUN=RUN, CAPACITY=CAPACITY,
        BLOCK=min(most, CAPACITY), num_warps=1 if most <= 64 else 4,
    )  # fmt: skip
    return pairs[0], pairs[1]


def choose(
    which: torch.Tensor, query_of: torch.Tensor, n_sure: torch.Tensor, n_open: torch.Tensor, rows: torch.Tensor,
    squares: torch.Tensor, chosen: torch.Tensor, most: int,
) -> None:  # fmt: skip
    """Fill chosen with the nearest of the open rows of these queries, whose pairs are as `expand` gives them.

    most: as there.
    """
    first = n_open.cumsum(0) - n_open
    _launch(
        _choose, (len(which),),
        which, query_of, n_sure, first, n_open, rows, squares, chosen, chosen.shape[1], BLOCK=most,
        STEP=min(most, 32), num_warps=4,
    )  # fmt: skip


def measure(
    queries: torch.Tensor, rows: torch.Tensor, which_query: torch.Tensor, which_row: torch.Tensor,
    starts: torch.Tensor, sizes: torch.Tensor, last: int, tail: int,
) -> torch.Tensor:  # fmt: skip
    """Sums of squares of pairs, float64 [P, n]: of branches of numpy's tree, to be added up two by two.

    starts, sizes int32 [leaves], a power of two: of the leaves, sizes in whole lanes; after the last leaf's come the
    values from `tail` on.
    """
    n, block = len(which_query), min(32, len(starts))
    out = torch.empty((n, len(starts) // block), dtype=torch.float64, device=rows.device)
    _launch(
        _measure, (n, len(starts) // block),
        queries, rows, which_query, which_row, starts, sizes, out, rows.shape[1], len(starts), last, tail, BLOCK=block,
        LANES=LANES, LEAF=LEAF, num_warps=4 if block > 8 else 1, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _seconds(shape: Shape, device: torch.device, width: int) -> float:
    """Of products of tiles of zeros, no row of which is within any limit."""
    n_queries, n_rows = TRIED * QUERIES, TRIED * shape.rows

    def zeros(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype, device=device)

    cell, lists = zeros(TRIED, dtype=torch.int32), zeros(1, dtype=torch.int32)
    by_query, by_tile = zeros(n_queries), zeros(TRIED)
    r = RowTiles(
        values=zeros(n_rows, width, dtype=torch.float16), steps=by_tile, bias=zeros(1, n_rows) - torch.inf, cell=cell,
        longest=by_tile, lost=by_tile, inner=by_tile, outer=by_tile, apart=zeros(1, 1),
        nearest=torch.arange(TRIED).to(cell)[None], nearest_cell=cell[None], shape=shape,
    )  # fmt: skip
    q = QueryTiles(
        values=zeros(n_queries, width, dtype=torch.float16), steps=by_query, cell=cell, length=by_query, lost=by_query,
        slip=by_query, far=by_query[None], own=lists, limit=by_query, counts=lists, estimates=by_query,
        candidates=lists, masks=lists,
    )  # fmt: skip
    best = torch.empty((n_queries, n_rows // RUN), device=device)
    bits, flags = best.to(torch.int16), torch.zeros((TRIED, TRIED), dtype=torch.int8, device=device)
    took = []
    for _ in range(4):  # the first compiles
        started = time.perf_counter()
        _multiply(q, r, 0, TRIED, width, None, best, bits, flags, TRIED * TRIED)
        flags.any().item()
        took.append(time.perf_counter() - started)
    return min(took)


def _generation(device: torch.device) -> int:
    """The first number of a GPU's compute capability; of Triton's interpreter that of a Hopper."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else BY_TILE_FROM


def _is_narrow(q: QueryTiles) -> bool:
    return q.values.dtype == torch.float32


def _to_do(q: QueryTiles, r: RowTiles, first: int, n: int) -> torch.Tensor:
    """The pairs of tiles that are not left out, as `_place` counts them, int64."""
    near = torch.empty((len(q.cell), n), dtype=torch.int8, device=q.limit.device)
    block = 16
    _launch(
        _near, (triton.cdiv(near.numel(), block),),
        near, q.limit, q.length, q.slip, q.far, q.cell, r.inner, r.outer, r.apart, r.nearest, r.nearest_cell, first, n,
        len(q.cell), q.far.stride(0), len(r.cell), len(r.apart), QUERIES=QUERIES, BLOCK=block, num_warps=4,
    )  # fmt: skip
    whole = len(near) // GROUP * GROUP
    groups = [near[:whole].view(-1, GROUP, n).transpose(1, 2).flatten(), near[whole:].T.flatten()]
    return torch.cat(groups).nonzero()[:, 0]


def _multiply(
    q: QueryTiles, r: RowTiles, first: int, n: int, width: int, todo: torch.Tensor | None, best: torch.Tensor,
    bits: torch.Tensor | None, flags: torch.Tensor | None, number: int,
) -> None:  # fmt: skip
    narrow, eight = _is_narrow(q), q.values.dtype == torch.int8
    depth = 2 * DEPTH if eight else DEPTH
    generation = _generation(q.limit.device)
    by_tile = not narrow and generation >= BY_TILE_FROM
    queries: Any = TensorDescriptor.from_tensor(q.values, [QUERIES, depth]) if by_tile else q.values
    rows: Any = TensorDescriptor.from_tensor(r.values, [r.shape.rows, depth]) if by_tile else r.values
    _launch(
        _screen, (number,),
        queries, rows, q.steps, r.steps, q.limit, q.length, q.lost, q.slip, q.far, q.cell, r.longest, r.lost, r.bias,
        r.nearest, r.nearest_cell, q.cell if todo is None else todo, best, best if bits is None else bits,
        best if flags is None else flags, first, n, len(q.cell), q.far.stride(0), 0 if narrow else r.bias.stride(0),
        len(r.cell), width, q.values.shape[1], roundoff(width, q.values.dtype), BOUND=bits is None,
        PRUNE=todo is not None, NARROW=narrow, EIGHT=eight, FLUSHED=width > FLUSH or generation == FLUSHES,
        BY_TILE=by_tile, QUERIES=QUERIES, ROWS=r.shape.rows, DEPTH=depth, FLUSH=FLUSH, RUN=RUN, GROUP=GROUP,
        SLACK=SLACK, PRODUCT=1.0 if eight else UNIT**-2, num_warps=r.shape.warps, num_stages=r.shape.stages,
    )  # fmt: skip
