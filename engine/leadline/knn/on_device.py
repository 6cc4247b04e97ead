"""The search of `screen` and `kernels` in plain torch, for devices that have no compiled loops: CUDA.

The same bounds leave rows out in the same order, a cell at a time and for many queries together; what a GPU changes in
the proofs is in docs/decisions/0004. Two things are left out, since they would cut products into small pieces: rows in
a cell are not sorted into rings, and a limit is not lowered before a whole tile has been seen.
"""

from dataclasses import dataclass

import numpy as np
import torch

from leadline.knn.arrays import Array
from leadline.knn.kernels import CHUNK, FAR, FLOAT32, MARGIN, NEAREST, UNDERFLOW
from leadline.knn.screen import DEPTH, Axes, cells_of, centres_of, decide, distances

QUERIES, ROWS = 2048, 16_384  # of one tile
BYTES = 128 << 20  # of what is made of many rows at once
ROUNDOFF = 2 * FLOAT32  # of a sum in float32: tensor cores may cut off where others round


@dataclass(frozen=True)
class DeviceScreen:
    """M bank rows on a device: `bank` [M, D] as they were given, and what the screen sees of them, sorted by cell.

    centre float64 [D], scale, axes: as of `screen.Screen`. order int64 [M]: the row at each place; first: each cell's
    first place, and the end. centres float64 [C, m], unit: from their coordinates to scaled ones; radii, apart,
    residuals, lengths, slip: as of `kernels.Cells`. values bfloat16 [M, m]: about the centre of the cell; bias float32
    [M].
    """

    bank: torch.Tensor
    centre: torch.Tensor
    scale: float
    axes: Axes | None
    order: torch.Tensor
    first: list[int]
    centres: torch.Tensor
    unit: float
    radii: torch.Tensor
    apart: torch.Tensor
    residuals: torch.Tensor
    lengths: torch.Tensor
    slip: float
    values: torch.Tensor
    bias: torch.Tensor
    plan: str

    def search(
        self, bank: Array, number: int, queries: Array, own: Array, k: int, error: float, exact: bool, kept: Array,
        rows: Array,
    ) -> Array:  # fmt: skip
        """As `screen.Screen.search`; `bank` is on the device already."""
        device = self.bank.device
        asked = torch.from_numpy(queries).to(device)
        points, slips = asked, torch.zeros(len(asked), dtype=torch.float64, device=device)
        if self.axes:
            points, far = _project(asked, self.centre, self.scale, self.axes)
            slips = self.axes.slip * (1 + far)
        search = _Search(
            self, asked, points, torch.from_numpy(own).to(device), slips, k, error, exact, number,
            torch.from_numpy(kept).to(device), torch.from_numpy(rows).to(device), np.zeros(3, np.int64),
        )  # fmt: skip
        search.all_cells()
        kept[:], rows[:] = search.kept.cpu().numpy(), search.rows.cpu().numpy()
        return search.done

    def thresholds(self, c: int, alphas: torch.Tensor, losts: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
        """As `kernels._threshold`, float32 [n], with a float32 sum that may cut off."""
        longest, residual, width = self.lengths[c], self.residuals[c], self.centres.shape[1]
        lengths = alphas.sqrt()
        of_rounding = losts * longest + lengths * residual
        gamma = 2 * (width + 8) * ROUNDOFF * (1 + MARGIN)
        of_sum = gamma * ((lengths + losts) * longest + 0.5 * longest.square())
        error = (of_rounding + of_sum) * (1 + MARGIN) + (width + 8) * 2.0**-50 * (alphas + limits.square()) + UNDERFLOW
        threshold = 0.5 * (alphas - limits.square()) - error
        threshold = (threshold - 4 * FLOAT32 * threshold.abs() - UNDERFLOW).float()
        return threshold.masked_fill_((limits == torch.inf) | (alphas > FAR), -torch.inf)


def prepare(rows: Array, centre: Array, scale: float, device: torch.device) -> DeviceScreen:
    """Decide on a sample how a bank [M, D] is searched, and make it ready. `centre` and `scale`: see `Screen`."""
    n_bank, width = rows.shape
    plan = decide(rows, centre, scale)
    bank, middle = torch.from_numpy(rows).to(device), torch.from_numpy(centre).to(device)
    axes = plan.axes and Axes(plan.axes.matrix.to(device), plan.axes.grow, plan.axes.slip)
    points, origin, unit = bank, middle, scale
    if axes:
        points, _ = _project(bank, middle, scale, axes)
        origin, unit = torch.zeros(points.shape[1], dtype=torch.float64, device=device), 1.0
    n_cells = cells_of(n_bank) if plan.in_cells else 1
    centres = centres_of(points, origin, unit, n_cells) if n_cells > 1 else origin[None]
    at_once = max(1, BYTES // (8 * max(points.shape[1], n_cells)))
    nearest = [distances(centres, some, unit)[0].argmin(dim=0) for some in torch.split(points, at_once)]
    cell, order = torch.cat(nearest).sort(stable=True)
    values = torch.empty(points.shape, dtype=torch.bfloat16, device=device)
    squares, lost = torch.empty((2, n_bank), dtype=torch.float64, device=device)
    for start in range(0, n_bank, at_once):
        part = slice(start, start + at_once)
        values[part], squares[part], lost[part] = _rounded(points[order[part]], centres[cell[part]], unit)
    lengths = squares.sqrt()
    seen = f"{points.shape[1]} of {width} values" if axes else f"all {width} values"
    return DeviceScreen(
        bank=bank,
        centre=middle,
        scale=scale,
        axes=axes,
        order=order,
        first=[0, *torch.bincount(cell, minlength=n_cells).cumsum(0).tolist()],
        centres=centres,
        unit=unit,
        radii=_largest(lengths, cell, n_cells) * (1 + MARGIN),
        apart=distances(centres, centres, unit)[0],
        residuals=_largest(lost, cell, n_cells),
        lengths=_largest(lengths + lost, cell, n_cells),
        slip=32.0 * (points.shape[1] + 8) * 2.0**-53,
        values=values,
        bias=(-0.5 * squares * (1 - 4 * FLOAT32)).float(),
        plan=f"{seen}, {n_cells} cell{'s' * (n_cells > 1)}, bfloat16, in torch",
    )


def products(queries: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Of bfloat16 [n, m] and [r, m], added up in float32: [n, r]."""
    if queries.is_cuda:
        return torch.mm(queries, rows.T, out_dtype=torch.float32)
    return queries.float() @ rows.T.float()


def reached(
    queries: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor, thresholds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tile step: where bias[j] + <queries[i], rows[j]> >= thresholds[i], as int64 i, ascending, and j.

    queries [n, m], rows [r, m]: bfloat16; bias [r], thresholds [n]: float32. A sum that is not a number reaches every
    threshold. A kernel that never writes the products may take its place.
    """
    i, j = (~(products(queries, rows).add_(bias) < thresholds[:, None])).nonzero(as_tuple=True)
    return i, j


@dataclass
class _Search:
    """Queries [Q, D] at work in a bank. points [Q, m]: as the cells see them; own, slips, k, error, exact: as of
    `kernels.Question`; number: of the bank's first row; kept float64 [Q, S], rows int64 [Q, S]: the lists; done: see
    `Screen.search`.
    """

    screen: DeviceScreen
    queries: torch.Tensor
    points: torch.Tensor
    own: torch.Tensor
    slips: torch.Tensor
    k: int
    error: float
    exact: bool
    number: int
    kept: torch.Tensor
    rows: torch.Tensor
    done: Array

    def all_cells(self) -> None:
        """Each query visits its nearest cells, and then the others that may matter to it."""
        s, n_cells = self.screen, len(self.screen.centres)
        at_once = max(1, BYTES // (8 * max(self.points.shape[1], n_cells)))
        parts = [distances(s.centres, some, s.unit) for some in torch.split(self.points, at_once)]
        to_centres, lengths = torch.cat([part[0] for part in parts], dim=1), torch.cat([part[1] for part in parts])
        near = to_centres.topk(min(NEAREST, n_cells), dim=0, largest=False).indices
        to_own = to_centres.gather(0, near[:1])[0]
        for phase in range(len(near) + 1):
            for c in range(n_cells):
                wanted = near[phase] == c if phase < len(near) else (near != c).all(dim=0)
                if phase > 0:
                    wanted &= self._matters(c, to_centres[c], to_own, s.apart[near[0], c], lengths)
                which = wanted.nonzero()[:, 0]
                self.done[2] += len(which)
                for some in torch.split(which, QUERIES):
                    self._visit(c, some)

    def _matters(
        self, c: int, to_centre: torch.Tensor, to_own: torch.Tensor, apart: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """Whether a row of a cell may be within the limit of each query: as `kernels._matters`, bool [Q]."""
        limits = self._limits(self.kept[:, self.k - 1], self.slips)
        of_query = self.screen.slip * (1 + lengths)
        ball = to_centre - self.screen.radii[c] - of_query.sqrt() > limits
        beyond = to_centre.square() - to_own.square() - 2 * (of_query + 2 * self.screen.slip)
        plane = beyond > 2 * (apart + (2 * self.screen.slip) ** 0.5) * limits
        return torch.logical_not(ball | plane)

    def _limits(self, kth: torch.Tensor, slips: torch.Tensor) -> torch.Tensor:
        """No point of the k nearest rows is farther from the query's point; kth: the k-th measured distances."""
        unit, grow = self.screen.scale**2 if self.exact else 1.0, self.screen.axes.grow if self.screen.axes else 1.0
        return (kth * unit * (1 + self.error) + UNDERFLOW).sqrt() * grow * (1 + 1e-9) + slips

    def _visit(self, c: int, which: torch.Tensor) -> None:
        """Take the rows of one cell into the lists of some queries."""
        s = self.screen
        packed, alphas, losts = _rounded(self.points[which], s.centres[c], s.unit)
        for start in range(s.first[c], s.first[c + 1], ROWS):
            part = slice(start, min(start + ROWS, s.first[c + 1]))
            kth = self.kept[which, self.k - 1]
            unknown = (kth == torch.inf).nonzero()[:, 0]
            if len(unknown):
                kth[unknown] = self._guessed(packed[unknown], which[unknown], part)
            thresholds = s.thresholds(c, alphas, losts, self._limits(kth, self.slips[which]))
            i, j = reached(packed, s.values[part], s.bias[part], thresholds)
            self.done[0] += len(which) * (part.stop - part.start)
            rows = s.order[part][j]
            other = rows != self.own[which[i]]
            i, rows = i[other], rows[other]
            self.done[1] += len(i)
            self._take(which, i, rows, self._measured(which[i], rows))

    def _guessed(self, packed: torch.Tensor, which: torch.Tensor, part: slice) -> torch.Tensor:
        """A measured distance that k rows do not exceed, float64 [n]: of those whose products are largest."""
        n = self.k + 1  # one may be the query's own
        if part.stop - part.start < n:
            return torch.full((len(which),), torch.inf, dtype=torch.float64, device=packed.device)
        scores = products(packed, self.screen.values[part]).add_(self.screen.bias[part])
        # Where a product overflowed there is no order, but any k rows will do.
        rows = self.screen.order[part][scores.nan_to_num_(torch.inf).topk(n, dim=1).indices]
        squares = self._measured(which.repeat_interleave(n), rows.flatten()).view(-1, n)
        squares[rows == self.own[which, None]] = torch.inf
        self.done[0] += len(which) * (part.stop - part.start)
        self.done[1] += rows.numel()
        return squares.kthvalue(self.k, dim=1).values

    def _measured(self, which: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Squared distances float64 [n] of queries and bank rows, as `kernels` measures them."""
        width = self.queries.shape[1]
        squares = torch.empty(len(which), dtype=torch.float64, device=which.device)
        at_once = max(1, BYTES // (24 * width))
        for start in range(0, len(which), at_once):
            part = slice(start, start + at_once)
            a, b = self.queries[which[part]], self.screen.bank[rows[part]]
            if self.exact:
                squares[part] = _pairwise((a.double() - b.double()).square_())
            else:
                difference = (a - b).mul_(self.screen.scale).square_()
                squares[part] = sum(some.sum(dim=1).double() for some in torch.split(difference, CHUNK, dim=1))
        return squares

    def _take(self, which: torch.Tensor, i: torch.Tensor, rows: torch.Tensor, squares: torch.Tensor) -> None:
        """Put rows that are finitely far from queries which[i] into their lists, i ascending."""
        finite = squares < torch.inf
        i, rows, squares = i[finite], rows[finite], squares[finite]
        if not len(i):
            return
        counts = torch.bincount(i, minlength=len(which))
        place = torch.arange(len(i), device=i.device) - (counts.cumsum(0) - counts)[i]
        most, size = int(counts.max()), self.kept.shape[1]
        kept = torch.full((len(which), most + size), torch.inf, dtype=torch.float64, device=i.device)
        numbers = torch.full(kept.shape, torch.iinfo(torch.int64).max, device=i.device)
        kept[:, :size], numbers[:, :size] = self.kept[which], self.rows[which]
        kept[i, size + place], numbers[i, size + place] = squares, rows + self.number
        # In the order of (distance, row): a stable sort leaves equal distances in the order of their rows.
        numbers, order = numbers.sort(dim=1)
        kept, order = kept.gather(1, order).sort(dim=1, stable=True)
        self.kept[which], self.rows[which] = kept[:, :size], numbers.gather(1, order)[:, :size]


def _project(rows: torch.Tensor, centre: torch.Tensor, scale: float, axes: Axes) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [n, D] as cells see them, float32 [n, m], and no less than their scaled lengths, float64 [n]."""
    n, width = rows.shape
    points = torch.empty((n, axes.matrix.shape[1]), device=rows.device)
    lengths = torch.empty(n, dtype=torch.float64, device=rows.device)
    at_once = max(1, BYTES // (16 * width))
    for start in range(0, n, at_once):
        part = slice(start, start + at_once)
        placed = (rows[part].double() - centre).mul_(scale)
        lengths[part] = torch.linalg.vector_norm(placed, dim=1) * (1 + MARGIN)
        pieces = zip(torch.split(placed.float(), DEPTH, dim=1), torch.split(axes.matrix, DEPTH), strict=True)
        points[part] = torch.stack([(values @ matrix).double() for values, matrix in pieces]).sum(dim=0)
    return points, lengths


def _rounded(
    points: torch.Tensor, centres: torch.Tensor, unit: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """unit * (points - centres) in bfloat16 [n, m]; its squared length before that, and no less than what was lost."""
    exact = (points.double() - centres).mul_(unit)
    rounded = exact.float().bfloat16()
    squares = exact.square().sum(dim=1)
    lost = torch.linalg.vector_norm(exact.sub_(rounded), dim=1)
    return rounded, squares, (lost + FLOAT32 * squares.sqrt()) * (1 + MARGIN)


def _largest(values: torch.Tensor, cell: torch.Tensor, n_cells: int) -> torch.Tensor:
    """The largest of each cell, float64 [C]; 0 where it has none."""
    return torch.zeros(n_cells, dtype=torch.float64, device=values.device).scatter_reduce_(0, cell, values, "amax")


def _pairwise(squares: torch.Tensor) -> torch.Tensor:
    """Sums of rows float64 [n, D] in numpy's pairwise order: the bits of `distance.squared_distance`, [n]."""
    width = squares.shape[1]
    if width > 128:
        half = width // 2
        half -= half % 8
        return _pairwise(squares[:, :half]) + _pairwise(squares[:, half:])
    whole = width - width % 8 if width >= 8 else 0
    total = torch.zeros(len(squares), dtype=torch.float64, device=squares.device)
    if whole:
        lanes = squares[:, :8].clone()
        for start in range(8, whole, 8):
            lanes += squares[:, start : start + 8]
        pairs = lanes[:, 0::2] + lanes[:, 1::2]
        total = (pairs[:, 0] + pairs[:, 1]) + (pairs[:, 2] + pairs[:, 3])
    for i in range(whole, width):
        total = total + squares[:, i]
    return total
