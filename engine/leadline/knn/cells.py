"""A bank cut into cells, so that most pairs are never looked at and the rest are looked at in low precision.

Rows are grouped by k-means, and within a cell sorted by their distance from its centre. A query begins in its own
cell, which gives a tight bound on its k-th distance; the triangle inequality then leaves out whole cells and, in those
that it visits, all rows but a ring. Rows and queries are centred on the cell before they are rounded, so that the
rounding is small beside the distances. The names of the bound are those of docs/decisions/0004-cells.md.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from leadline.knn import kernels
from leadline.knn.arrays import Array, Rows

SAMPLE = 256  # rows a cell that k-means looks at
ROUNDS = 6  # of k-means: where the centres lie changes the speed, never the answer
QUERY_TILE = 256
ROW_TILE = 1024
SHAPE = 128  # tiles have a multiple of so many rows, so that few shapes of product are prepared
FLOAT32 = 2.0**-24  # unit roundoffs
BFLOAT16 = 2.0**-8
SMALLEST = 4096  # rows of a bank that is cut
MEMORY = 4 << 30  # bytes of its copy in low precision
MARGIN = 1e-6  # of float32 and float64 arithmetic on bounds, beside which it is negligible


@dataclass(frozen=True)
class Cells:
    """A bank of M rows, sorted by cell and by distance from the cell's centre.

    order int64 [M]: the bank's row at each place; place int64 [M]: its inverse; edges int64 [C + 1]: first place of
    each cell; centres float64 [C, D]; scale: a power of two; rounded [M + SHAPE, D]: float32 or bfloat16, the scaled
    and centred rows; squares, radii float64 [M]: squared length before rounding, and length; squares32, slopes, lengths
    float32 [M]: the row's part of a product's error, rounded up (see `kernels.admit`).
    """

    order: Array
    place: Array
    edges: Array
    centres: Array
    scale: float
    rounded: torch.Tensor
    squares: Array
    radii: Array
    squares32: Array
    slopes: Array
    lengths: Array


def pays(n_bank: int, width: int) -> bool:
    """Whether to cut a bank: not where it has few rows, nor where the copy in low precision is larger than MEMORY."""
    return n_bank >= SMALLEST and 2 * n_bank * width <= MEMORY


def low_precision() -> torch.dtype:
    """bfloat16 where the processor multiplies it natively, else float32."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def cut(bank: Rows, scale: float, mean: Array, dtype: torch.dtype) -> Cells:
    """Cut a bank into about sqrt(M) / 4 cells."""
    n_bank, width = bank.shape
    n_cells = max(1, int(np.sqrt(n_bank) / 4))
    centres = _kmeans(bank, n_cells, mean, scale)
    cell, radius = _assign(bank, centres, scale)
    order = np.lexsort((radius, cell))
    place = np.empty(n_bank, np.int64)
    place[order] = np.arange(n_bank)
    edges = np.searchsorted(cell[order], np.arange(n_cells + 1))
    rounded = torch.zeros(n_bank + SHAPE, width, dtype=dtype)
    squares, residuals = np.empty(n_bank), np.empty(n_bank)
    for c in range(n_cells):
        for first in range(edges[c], edges[c + 1], ROW_TILE):
            stop = min(first + ROW_TILE, edges[c + 1])
            wanted = np.sort(order[first:stop])
            rows = bank[wanted]
            where = np.searchsorted(wanted, order[first:stop])
            _round(
                rows, where, centres[c], scale, rounded[first:stop], squares[first:stop],
                residuals[first:stop],
            )  # fmt: skip
    gamma, _, _ = _bounds(width, dtype)
    radii = np.sqrt(squares)
    lengths = radii + residuals  # no rounded row is longer
    return Cells(
        order, place, edges, centres, scale, rounded, squares, radii, squares.astype(np.float32),
        _up(2 * (residuals + gamma * lengths)), _up(2 * (1 + gamma) * lengths),
    )  # fmt: skip


def _up(values: Array) -> Array:
    """Float32, no smaller."""
    return np.nextafter(values.astype(np.float32), np.float32(np.inf))


def _kmeans(bank: Rows, n_cells: int, mean: Array, scale: float) -> Array:
    """Centres float64 [C, D] from a sample, in float32: they decide the speed alone."""
    n_bank = bank.shape[0]
    random = np.random.default_rng(0)
    chosen = np.sort(random.choice(n_bank, min(n_bank, SAMPLE * n_cells), replace=False))
    sample = torch.from_numpy(((bank[chosen] - mean) * scale).astype(np.float32))
    centres = sample[torch.from_numpy(random.choice(len(sample), n_cells, replace=False))].clone()
    for _ in range(ROUNDS):
        nearest = (centres.square().sum(dim=1) - 2 * sample @ centres.T).argmin(dim=1)
        counts = torch.bincount(nearest, minlength=n_cells)
        sums = torch.zeros_like(centres).index_add_(0, nearest, sample)
        filled = counts > 0
        centres[filled] = sums[filled] / counts[filled, None]
    return centres.double().numpy() / scale + mean


def _assign(bank: Rows, centres: Array, scale: float) -> tuple[Array, Array]:
    """Cell of each row and its scaled distance from the centre."""
    n_bank = bank.shape[0]
    cell, radius = np.empty(n_bank, np.int64), np.empty(n_bank)
    for first in range(0, n_bank, 4 * ROW_TILE):
        rows = bank[first : min(first + 4 * ROW_TILE, n_bank)]
        distances = distances_from(rows, centres, scale)
        part = slice(first, first + len(rows))
        cell[part] = distances.argmin(axis=1)
        radius[part] = distances.min(axis=1)
    return cell, radius


def distances_from(rows: Array, centres: Array, scale: float) -> Array:
    """Scaled distances float64 [n, C], to within `_slip`."""
    middle = centres.mean(axis=0)
    a = torch.from_numpy((rows - middle) * scale)
    b = torch.from_numpy((centres - middle) * scale)
    squares = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1) - 2 * a @ b.T
    distances: Array = squares.clamp_min_(0).sqrt_().numpy()
    return distances


def _round(
    rows: Array, which: Array, centre: Array, scale: float, rounded: torch.Tensor, squares: Array, residuals: Array
) -> None:
    """Centre, scale and round rows[which]; their squared lengths, and the lengths of what rounding took away."""
    if rounded.dtype == torch.float32:
        kernels.round_to_float32(rows, which, centre, scale, rounded.numpy(), squares)
        residuals[:] = 0
    else:
        bits = np.empty(rows.shape[1], np.int32)
        kernels.round_to_bfloat16(
            rows,
            which,
            centre,
            scale,
            bits,
            bits.view(np.float32),
            rounded.view(torch.int16).numpy(),
            squares,
            residuals,
        )
    np.sqrt(residuals, out=residuals)
    residuals *= 1 + MARGIN
    residuals += FLOAT32 * (1 + MARGIN) * np.sqrt(squares)


@dataclass(frozen=True)
class Found:
    """Candidates of Q queries: lows and highs float64 [Q, S], bounds of the scaled squared distance; rows int64 [Q, S],
    -1 for none; nearest float64 [Q]: a bound on the k-th distance. pairs: products computed."""

    lows: Array
    highs: Array
    rows: Array
    nearest: Array
    pairs: int


def screen(cells: Cells, queries: Array, k: int, exclude: Array, size: int) -> Found:
    """The candidates of queries [Q, D]; exclude int64 [Q]: a bank row each, or -1. size: candidates kept, above k."""
    n_queries, width = queries.shape
    state = _State(
        lows=np.full((n_queries, size), np.inf),
        highs=np.full((n_queries, size), np.inf),
        rows=np.full((n_queries, size), -1),
        nearest=np.full((n_queries, k), np.inf),
        own=np.where(exclude >= 0, cells.place[exclude], -1),
    )
    work = _Work(width, cells.rounded.dtype)

    def look(c: int, which: Array, first: int, stop: int) -> None:
        n = len(which)
        _round(queries, which, cells.centres[c], cells.scale, work.queries[:n], work.squares[:n], work.residuals[:n])
        for row in range(first, stop, ROW_TILE):
            _tile(cells, row, min(row + ROW_TILE, stop), which, state, work)

    pairs = _traverse(cells, queries, state.nearest[:, 0], look)
    return Found(state.lows, state.highs, state.rows, state.nearest[:, 0], pairs)


def nearest(cells: Cells, columns: Array, queries: Array, k: int, exclude: Array) -> tuple[Array, int]:
    """The k nearest rows int64 [Q, k] of queries [Q, D], by float64 distances alone; and the pairs.

    columns [D, M]: the bank's values, in the order of the cells' places.
    """
    distances = np.full((len(queries), k), np.inf)
    rows = np.full((len(queries), k), np.iinfo(np.int64).max)
    bound = np.full(len(queries), np.inf)

    def look(c: int, which: Array, first: int, stop: int) -> None:
        kernels.nearest_of_columns(queries, which, columns, first, stop, cells.order, exclude, distances, rows)
        bound[which] = distances[which, k - 1] * (cells.scale * cells.scale * (1 + MARGIN))

    pairs = _traverse(cells, queries, bound, look)
    return rows, pairs


def _traverse(cells: Cells, queries: Array, bound: Array, look: Callable[[int, Array, int, int], None]) -> int:
    """Show `look` what can matter: a cell, some queries, and the first and last + 1 place of rows. Returns the pairs.

    bound [Q]: of the scaled squared k-th distance of each query, which `look` lowers as it goes.
    """
    distances = distances_from(queries, cells.centres, cells.scale)
    order = distances.argsort(axis=1)
    lower = _least_distances(cells, distances, order[:, 0])
    n_cells = len(cells.centres)
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(n_cells)[None], axis=1)
    pairs, first = 0, 0
    for stop in (1, 2, 4, n_cells):
        for c in range(n_cells):
            near = (rank[:, c] >= first) & (rank[:, c] < stop)
            which = np.flatnonzero(near & (np.square(lower[:, c]) <= bound))
            if len(which) and cells.edges[c + 1] > cells.edges[c]:
                pairs += _visit(cells, c, which, distances[which, c], bound, look)
        first = stop
    return pairs


def _least_distances(cells: Cells, distances: Array, nearest: Array) -> Array:
    """No row of cell c is nearer to query i than [i, c]. distances [Q, C] from the centres; nearest [Q]: the closest.

    The larger of two bounds: a row lies within its cell's radius of the centre; and it lies on its own centre's side of
    the plane midway between that and the query's nearest centre, or it would be in that one's cell.
    """
    slip = _slip(cells.rounded.shape[1])
    reach = np.array([_radius(cells, c) for c in range(len(cells.centres))])
    ball = distances - reach * (1 + MARGIN) - slip
    own = np.take_along_axis(distances, nearest[:, None], axis=1)
    apart = distances_from(cells.centres, cells.centres, cells.scale)[nearest] + slip
    # No length is above 2: so far may the squares be wrong, and a row be nearer to the other centre than to its own.
    error = slip * (2 * (distances + own) + 16)
    plane = (np.square(distances) - np.square(own) - error) / (2 * apart)
    bounds: Array = np.maximum(np.maximum(ball, plane), 0)
    bounds[np.arange(len(nearest)), nearest] = 0
    return bounds


@dataclass(frozen=True)
class _State:
    lows: Array
    highs: Array
    rows: Array
    nearest: Array  # [Q, k]: a max-heap of the k smallest highs; its root bounds the k-th distance
    own: Array


class _Work:
    """Buffers that every tile uses again."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self.queries = torch.zeros(QUERY_TILE, width, dtype=dtype)
        self.squares, self.residuals = np.empty(QUERY_TILE), np.empty(QUERY_TILE)
        self.products = torch.empty(QUERY_TILE * ROW_TILE, dtype=dtype)


def _radius(cells: Cells, c: int) -> float:
    radii = cells.radii[cells.edges[c] : cells.edges[c + 1]]
    return float(radii.max(initial=0.0))


def _slip(width: int) -> float:
    """What `distances_from` may be wrong by: the root of a float64 product's rounding, for lengths of 2 at most."""
    return float(2 * np.sqrt(16 * (width + 8) * 2.0**-53))


def _bounds(width: int, dtype: torch.dtype) -> tuple[float, float, float]:
    """Relative errors of a product: of its sum, of its result's rounding, and of the float64 distance itself."""
    gamma = (width + 4) * FLOAT32 / (1 - (width + 4) * FLOAT32)
    result = BFLOAT16 * (1 + 2 * BFLOAT16) if dtype == torch.bfloat16 else 0.0
    return gamma, result, 16.0 * (width + 4) * 2.0**-53


def _visit(
    cells: Cells, c: int, which: Array, distances: Array, bound: Array, look: Callable[[int, Array, int, int], None]
) -> int:
    """Look at the rows of one cell that can matter to some queries, a tile at a time. Returns the pairs."""
    first, stop = int(cells.edges[c]), int(cells.edges[c + 1])
    # Queries whose rings begin alike share a tile, so that it holds little that none of them needs.
    together = (distances - np.sqrt(bound[which])).argsort()
    which, distances = which[together], distances[together]
    radii = cells.radii[first:stop]
    pairs = 0
    slip = 4 * _slip(cells.centres.shape[1])  # of the distances, and of the order of the rows
    for start in range(0, len(which), QUERY_TILE):
        some, far = which[start : start + QUERY_TILE], distances[start : start + QUERY_TILE]
        width = np.sqrt(bound[some])
        # Only rows in the ring: a row's distance from the query is at least the difference of theirs from the centre.
        low = first + int(np.searchsorted(radii, (far - width).min() * (1 - MARGIN) - slip))
        high = first + int(np.searchsorted(radii, (far + width).max() * (1 + MARGIN) + slip, side="right"))
        if low < high:
            look(c, some, low, high)
            pairs += len(some) * (high - low)
    return pairs


def _tile(cells: Cells, first: int, stop: int, which: Array, state: _State, work: _Work) -> None:
    """The product of one tile of queries with one tile of rows, and what passes from it into the state."""
    n_rows = -(-(stop - first) // SHAPE) * SHAPE
    products = work.products[: QUERY_TILE * n_rows].view(QUERY_TILE, n_rows)
    torch.mm(work.queries, cells.rounded[first : first + n_rows].T, out=products)
    is_bfloat16 = products.dtype == torch.bfloat16
    values = products.view(torch.int16).numpy() if is_bfloat16 else products.numpy()
    rows = slice(first, stop)
    _, result, exact = _bounds(work.queries.shape[1], work.queries.dtype)
    bits = np.empty(kernels.RUN, np.int32)
    kernels.admit(
        values[: len(which)], which, work.squares, work.residuals, first, cells.squares[rows], cells.squares32[rows],
        cells.slopes[rows], cells.lengths[rows], cells.order, state.own, result, exact, state.lows, state.highs,
        state.rows, state.nearest, bits, bits.view(np.float32), is_bfloat16,
    )  # fmt: skip
