"""A bank made ready for a search that looks at few of its pairs, and at those in few dimensions and low precision.

Three bounds from below, each cheaper than a distance and none ever above it, leave rows out (docs/decisions/0004):
the triangle inequality leaves out whole cells of rows, and in the others all but a ring; an orthonormal projection,
which lengthens nothing, leaves out most of the rest. Cells live in the space that is projected to. What remains is
measured in full (`kernels.search_cells`).
"""

from dataclasses import dataclass
from math import e, inf, isqrt, log

import numpy as np
import torch

from leadline.knn import kernels, product
from leadline.knn.arrays import Array
from leadline.knn.kernels import FLOAT32, MARGIN, Cells, Question
from leadline.knn.threads import spread

NARROW = 64  # values of a row below which nothing is projected, and everything is measured in float64
SAMPLE = 2048  # rows that decide how a bank is searched
SAMPLE_BYTES = 64 << 20
ASKED = 128  # of them, that stand for queries
K = 30  # neighbours that the decision is made for
WIDTHS = (16, 32, 64, 128, 256)  # of the projection
ROUNDS = 6  # of k-means: where the centres lie changes the speed, never the answer
TILE = 4096  # rows that are projected together
DEPTH = 1024  # values that one float32 product adds up
# Nanoseconds that weigh one choice against another, as measured on a processor with AVX512-BF16: of a value of a pair
# that is screened, where cells leave out half of the pairs; of a pair that is measured, and of each of its values.
SCREENED, MEASURED, OF_A_VALUE = 0.005, 90.0, 0.07
# Of a value of a pair that is screened, where nothing is left out; and how `product.reach` takes it: type, and so many
# side by side.
PLAIN = {torch.float32: 0.02, torch.int16: 0.012, torch.bfloat16: 0.01, torch.int8: 0.005}
PACKED = {
    torch.float32: (np.float32, 1),
    torch.int16: (np.int16, 2),
    torch.bfloat16: (np.uint16, 2),
    torch.int8: (np.int8, 4),
}
WORTH = 0.75  # share of rows in cells that stay, above which one cell does as well
OF_A_CELL = 128  # rows that k-means looks at


@dataclass(frozen=True)
class Axes:
    """An orthonormal projection: matrix float32 [D, m] of norm at most `grow`, applied about the screen's centre.

    slip: a projected point is off by at most slip times the scaled length of its row.
    """

    matrix: torch.Tensor
    grow: float
    slip: float


@dataclass(frozen=True)
class Screen:
    """M bank rows of D values: centre float64 [D] and scale, a power of two, for which no row's length exceeds 1."""

    centre: Array
    scale: float
    axes: Axes | None
    cells: Cells
    plan: str

    def search(
        self, bank: Array, number: int, queries: Array, own: Array, k: int, error: float, exact: bool, kept: Array,
        rows: Array,
    ) -> Array:  # fmt: skip
        """Take all rows of the bank [M, D] that may be among a query's k nearest into its list.

        number: of the bank's first row; own int64 [Q]: the row that each query [Q, D] must not have, -1 for none.
        exact: distances are the float64 ones that decide, else measured to within `error` of themselves. kept float64
        [Q, S >= k], rows int64 [Q, S]: squared distances in the order of (distance, row), filled with infinity and the
        largest row number before. Returns int64 [3]: pairs screened, pairs measured, visits of a query to a cell.
        """

        def part(s: slice) -> Array:
            done = np.zeros(3, np.int64)
            ask = self.ask(queries[s], own[s], k, error, exact)
            kernels.search_cells(self.cells, ask, bank, number, kept[s], rows[s], done)
            return done

        steps, measured, visits = np.sum(spread(part, len(queries)), axis=0)
        return np.array([steps * product.GROUP * product.PANEL, measured, visits])

    @property
    def centres(self) -> Array:
        """Of the cells, float64 [C, m]."""
        return self.cells.centres

    def ask(self, queries: Array, own: Array, k: int, error: float, exact: bool) -> Question:
        """Queries [Q, D] as the cells see them; own int64 [Q]: the bank row that each must not have, -1 for none."""
        cells, lengths = self.cells, np.zeros(len(queries))
        points = _project(queries, self.centre, self.scale, self.axes, lengths)
        to_centres, from_middle = _distances(cells.centres, points, cells.scale)
        near = np.empty((len(queries), kernels.NEAREST), np.int64)
        kernels.nearest_cells(to_centres, near)
        return Question(
            points=points,
            queries=queries,
            own=own,
            to_centres=to_centres,
            near=near,
            lengths=from_middle,
            grow=self.axes.grow if self.axes else 1.0,
            slips=(self.axes.slip if self.axes else 0.0) * (1 + lengths),
            exact=exact,
            scale=self.scale,
            error=error,
            unit=self.scale * self.scale if exact else 1.0,
            k=k,
        )


def error_of(width: int, in_float64: bool, exact: bool) -> float:
    """Relative error of a measured squared distance, and of the float64 one that decides."""
    of_decision = 16.0 * (width + 4) * 2.0**-53
    if exact:
        return of_decision
    roundoff = 2.0**-53 if in_float64 else FLOAT32
    return (kernels.CHUNK + 8) * roundoff * (1 + MARGIN) + 2 * of_decision


def scale_of(longest: float) -> float:
    """The power of two, so that scaling rounds nothing, that makes a squared length at most 1."""
    return float(2.0 ** -np.ceil(np.log2(longest) / 2)) if longest > 0 else 1.0


def cells_of(n_rows: int) -> int:
    """How many cells so many rows are cut into."""
    return max(1, int(np.sqrt(n_rows) / 2))


def precisions() -> list[torch.dtype]:
    """What this processor multiplies in one instruction, the finest first."""
    has = {
        torch.float32: True,
        torch.int16: product.HAS_INT16,
        torch.bfloat16: product.HAS_BFLOAT16,
        torch.int8: product.HAS_INT8,
    }
    return [dtype for dtype in PLAIN if has[dtype]]


def largest_integer(precision: torch.dtype, width: int) -> int:
    """That values are rounded to: of int16, such that no sum of so many products goes beyond int32; 0: no integers."""
    if precision == torch.int16:
        return min(2**15 - 1, isqrt((2**31 - 1) // max(1, width)))
    return 127 if precision == torch.int8 else 0


def prepare(rows: Array, centre: Array, scale: float) -> Screen:
    """Decide on a sample how a bank [M, D] is searched, and make it ready. `centre` and `scale`: see `Screen`."""
    n_bank, width = rows.shape
    plan = decide(rows, centre, scale)
    axes, n_cells = plan.axes, cells_of(n_bank) if plan.in_cells else 1
    points = np.concatenate(spread(lambda s: _project(rows[s], centre, scale, axes), n_bank)) if axes else rows
    middle, unit = (np.zeros(points.shape[1]), 1.0) if axes else (centre, scale)
    cells = _cut(points, middle, unit, n_cells, plan.precision)
    seen = f"{points.shape[1]} of {width} values" if axes else f"all {width} values"
    kind = str(plan.precision).removeprefix("torch.")
    return Screen(centre, scale, axes, cells, f"{seen}, {n_cells} cell{'s' * (n_cells > 1)}, {kind}")


@dataclass(frozen=True)
class Plan:
    """How a bank is searched: projected or not, cut into cells or not, and what is multiplied."""

    axes: Axes | None
    in_cells: bool
    precision: torch.dtype


def decide(rows: Array, centre: Array, scale: float) -> Plan:
    """By a sample of the bank's rows [M, D]; small banks are searched as they are."""
    return _Sample(rows, centre, scale).decide() if len(rows) >= SAMPLE else Plan(None, False, _of_cells())


def _of_cells() -> torch.dtype:
    """What is multiplied where most pairs are left out beforehand, so that a coarser product would save little."""
    usable = precisions()
    return next((dtype for dtype in (torch.bfloat16, torch.int16) if dtype in usable), torch.float32)


class _Sample:
    """Some rows [n, D] of the bank, float32, centred and scaled; the first few of them stand for queries."""

    def __init__(self, rows: Array, centre: Array, scale: float) -> None:
        n_bank, width = rows.shape
        n = max(ASKED, min(SAMPLE, n_bank, SAMPLE_BYTES // (4 * width)))
        self.which = np.random.default_rng(0).permutation(n_bank)[:n]
        placed = np.empty((len(self.which), width), np.float32)
        kernels.place(rows[self.which], centre, scale, placed)
        self.rows = torch.from_numpy(placed)
        self.n_bank = n_bank
        self.squares = self._squares(self.rows)
        # As many of the sample are that near as are among the K nearest of the bank.
        rank = min(max(1, round(K * len(placed) / n_bank)), self.squares.shape[1])
        self.kth = self.squares.kthvalue(rank, dim=1).values

    @staticmethod
    def _squares(rows: torch.Tensor) -> torch.Tensor:
        squares = torch.cdist(rows[:ASKED], rows).square_()
        squares.fill_diagonal_(torch.inf)
        return squares

    def decide(self) -> Plan:
        """What promises the least time: a projection or none, cells or one, and for plain tiles what is multiplied."""
        n, width = self.rows.shape
        widths = [m for m in WIDTHS if m <= min(width, n) // 2] if width >= NARROW else []
        directions = self._principal(widths[-1]) if widths else self.rows[:0].T
        best, least = None, width * SCREENED
        for m in widths:
            left = (self._squares(self.rows @ directions[:, :m]) <= self.kth[:, None]).double().mean().item()
            time = m * SCREENED + left * self._of_a_pair()
            if time < least:
                best, least = m, time
        if best is not None:
            return Plan(_contraction(directions[:, :best]), True, _of_cells())
        if self._share_of_rows() <= WORTH:
            return Plan(None, True, _of_cells())
        return Plan(None, False, min(precisions(), key=self._plain_time))

    def _of_a_pair(self) -> float:
        return MEASURED + self.rows.shape[1] * OF_A_VALUE

    def _plain_time(self, precision: torch.dtype) -> float:
        """Of a pair in plain tiles. The coarser the product, the cheaper it is, and the more pairs it leaves over.

        A query measures K of the first rows that it meets, and K / n of the n-th: K ln(M / K) of all M. Where rounding
        leaves r times as many over in the end, it does from the beginning, but there they are not as many: r^t with t
        from 0 to 1, on average (r - 1) / ln r.
        """
        width = self.rows.shape[1]
        if precision == torch.int8 and width > product.LONGEST_INT8:
            return inf
        lengths = torch.linalg.vector_norm(self.rows, dim=1)
        lost = torch.linalg.vector_norm(self.rows - _rounded(self.rows, precision), dim=1)
        error = lost[:ASKED, None] * lengths.max() + lengths[:ASKED, None] * lost
        nearest = self.squares <= self.kth[:, None]
        left = self.squares <= self.kth[:, None] + 2 * error
        more = float(left.sum() / nearest.sum())
        measured: float = K / self.n_bank * log(max(self.n_bank / K, e)) * ((more - 1) / log(more) if more > 1 else 1)
        return width * PLAIN[precision] + measured * self._of_a_pair()

    def _principal(self, n: int) -> torch.Tensor:
        """About the n directions of largest spread, orthonormal, float32 [D, n], the largest first.

        By subspace iteration: how good they are changes the speed, never the answer.
        """
        width = self.rows.shape[1]
        guess = torch.randn(width, min(n + 16, width), generator=torch.Generator().manual_seed(0))
        for _ in range(2):
            guess = torch.linalg.qr(self.rows.T @ (self.rows @ guess)).Q
        seen = self.rows @ guess
        spread = torch.linalg.eigh((seen.T @ seen).double()).eigenvectors.flip(1)
        directions: torch.Tensor = guess @ spread[:, :n].float()
        return directions

    def _share_of_rows(self) -> float:
        """Share of the sample's rows in cells of it that the triangle inequality does not leave out."""
        n_cells = cells_of(len(self.rows))
        centres = kmeans(self.rows, self.rows[:n_cells])
        distances = torch.cdist(self.rows, centres)
        radius, cell = distances.min(dim=1)
        reach = torch.zeros(n_cells).scatter_reduce_(0, cell, radius, "amax")
        near = distances[:ASKED] - reach <= self.kth.sqrt()[:, None]
        return (near * torch.bincount(cell, minlength=n_cells)).sum().item() / (len(near) * len(self.rows))


def _rounded(rows: torch.Tensor, precision: torch.dtype) -> torch.Tensor:
    """As `kernels.fill` rounds them, float32."""
    whole = largest_integer(precision, rows.shape[1])
    if not whole:
        return rows.to(precision).float()
    unit = rows.abs().amax(dim=1, keepdim=True).clamp_(min=kernels.SMALLEST) / whole
    return (rows / unit).round() * unit


def _contraction(matrix: torch.Tensor) -> Axes:
    """The bounds of a projection as it is computed: see docs/decisions/0004."""
    width, n = matrix.shape
    exact = matrix.double()
    grow = float((1 + torch.linalg.norm(exact.T @ exact - torch.eye(n))).sqrt()) * (1 + MARGIN)
    terms = min(width, DEPTH) + 4
    gamma = terms * FLOAT32 / (1 - terms * FLOAT32)
    return Axes(matrix.contiguous(), grow, grow * (3 * FLOAT32 + gamma * np.sqrt(n)) * (1 + MARGIN))


def _project(rows: Array, centre: Array, scale: float, axes: Axes | None, lengths: Array | None = None) -> Array:
    """The rows [n, D] as cells see them: themselves, or float32 [n, m]. lengths [n]: filled with the scaled lengths."""
    if axes is None:
        return rows
    n, width = rows.shape
    points = np.empty((n, axes.matrix.shape[1]), np.float32)
    step = max(64, min(TILE, SAMPLE_BYTES // (8 * width)))
    placed = np.empty((min(step, n), width), np.float32)
    for first in range(0, n, step):
        part = slice(first, min(first + step, n))
        tile = placed[: part.stop - first]
        kernels.place(rows[part], centre, scale, tile)
        vectors, total = torch.from_numpy(tile), torch.zeros(len(tile), points.shape[1], dtype=torch.float64)
        for start in range(0, width, DEPTH):
            total += vectors[:, start : start + DEPTH] @ axes.matrix[start : start + DEPTH]
        points[part] = total.numpy()
        if lengths is not None:
            longer = 1 + 2 * width * FLOAT32  # than float32 may sum it
            lengths[part] = torch.linalg.vector_norm(vectors, dim=1).double().numpy() * longer
    return points


def _cut(points: Array, middle: Array, scale: float, n_cells: int, precision: torch.dtype) -> Cells:
    """Sort points [M, m] into cells and round them into panels. middle float64 [m]: near their mean."""
    n_bank, width = points.shape
    centres = middle[None]
    if n_cells > 1:
        centres = centres_of(torch.from_numpy(points), torch.from_numpy(middle), scale, n_cells).numpy()
    cell, radius = np.empty(n_bank, np.int64), np.empty(n_bank)
    spread(lambda s: _assign(points[s], centres, scale, cell[s], radius[s]), n_bank)
    by_cell = np.lexsort((radius, cell))
    counts = np.bincount(cell, minlength=n_cells)
    panels = -(-counts // product.PANEL)
    first = np.concatenate([[0], np.cumsum(panels)])
    n_panels = int(first[-1])
    order = np.full(n_panels * product.PANEL, -1)
    begins = np.concatenate([[0], np.cumsum(counts)])[:-1]
    order[np.arange(n_bank) + np.repeat(first[:-1] * product.PANEL - begins, counts)] = by_cell
    (kind, together), whole = PACKED[precision], largest_integer(precision, width)
    values = np.empty((n_panels, -(-width // together), together * product.PANEL), kind)
    bias, units = np.empty((2, n_panels, product.PANEL), np.float32)
    (inner, smallest), (outer, residuals, lengths) = np.full((2, n_panels), np.inf), np.zeros((3, n_panels))
    # In one cell queries are about as long as rows; in others they are not.
    usual = float(np.sqrt(radius.mean())) if n_cells == 1 else 0.0
    cell_of = np.repeat(np.arange(n_cells), panels)
    spread(
        lambda s: kernels.fill(
            points,
            centres,
            scale,
            order,
            cell_of,
            s.start,
            s.stop,
            values,
            bias,
            usual,
            units,
            whole,
            inner,
            outer,
            residuals,
            smallest,
            lengths,
        ),
        n_panels,
    )
    apart, _ = _distances(centres, centres, scale)
    slip = 32.0 * (width + 8) * 2.0**-53
    radii, residuals, lengths = (_largest_of(cell_of, n_cells, of_panel) for of_panel in (outer, residuals, lengths))
    return Cells(
        order, first, centres, scale, radii, apart, inner, outer, values, bias, usual, units, whole, residuals,
        float(smallest.min()), lengths, slip,
    )  # fmt: skip


def _largest_of(cell_of: Array, n_cells: int, of_panel: Array) -> Array:
    """From a number for each panel to the largest of each cell; 0 where it has none."""
    largest = np.zeros(n_cells)
    np.maximum.at(largest, cell_of, of_panel)
    return largest


def centres_of(points: torch.Tensor, middle: torch.Tensor, scale: float, n_cells: int) -> torch.Tensor:
    """Centres of cells, float64 [C, m], from some of the points [M, m]. middle float64 [m]: near their mean."""
    chosen = np.random.default_rng(0).choice(len(points), min(len(points), OF_A_CELL * n_cells), replace=False)
    some = points[torch.from_numpy(chosen).to(points.device)]
    sample = ((some - middle) * scale).float()
    return kmeans(sample, sample[:n_cells]).double() / scale + middle


def kmeans(sample: torch.Tensor, centres: torch.Tensor, rounds: int = ROUNDS) -> torch.Tensor:
    """Centres [C, m] of points [n, m], better ones than those given; they decide the speed alone."""
    centres = centres.clone()
    for _ in range(rounds):
        nearest = (centres.square().sum(dim=1) - 2 * sample @ centres.T).argmin(dim=1)
        counts = torch.bincount(nearest, minlength=len(centres))
        sums = torch.zeros_like(centres).index_add_(0, nearest, sample)
        filled = counts > 0
        centres[filled] = sums[filled] / counts[filled, None]
    return centres


def _assign(points: Array, centres: Array, scale: float, cell: Array, radius: Array) -> None:
    """Fill in the nearest centre of each point, and the scaled distance from it."""
    if len(centres) == 1:
        cell[:] = 0
        kernels.square_lengths(points, centres[0], scale, radius)
        return
    for first in range(0, len(points), TILE):
        part = slice(first, first + TILE)
        distances, _ = _distances(centres, points[part], scale)
        cell[part] = distances.argmin(axis=0)
        radius[part] = distances.min(axis=0)


def distances(centres: torch.Tensor, points: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled distances float64 [C, n], and the points' squared lengths from the middle of the centres, [n]."""
    middle = centres.mean(dim=0)
    a, b = (centres - middle) * scale, (points - middle) * scale
    lengths = b.square().sum(dim=1)
    squares = torch.addmm(lengths[None], a, b.T, alpha=-2).add_(a.square().sum(dim=1)[:, None])
    return squares.clamp_min_(0).sqrt_(), lengths


def _distances(centres: Array, points: Array, scale: float) -> tuple[Array, Array]:
    """As `distances`; of wide points a few at a time, since they are made float64."""
    n, width = points.shape
    found, lengths = np.empty((len(centres), n)), np.empty(n)
    step = max(1, SAMPLE_BYTES // (16 * width))
    for first in range(0, n, step):
        part = slice(first, first + step)
        of_part, its_lengths = distances(torch.from_numpy(centres), torch.from_numpy(points[part]), scale)
        found[:, part], lengths[part] = of_part.numpy(), its_lengths.numpy()
    return found, lengths
