"""Exact search on a GPU: tiles of queries against tiles of bank rows in float16, and float64 for what is open.

All is done on the device; rows and queries that lie there never leave it. What differs from the search on a CPU, and
the proofs, are in docs/decisions/0014. Without Triton, and for what its kernels do not take, all is done in float64.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import inf, isqrt

import numpy as np
import torch

from leadline.full_precision import full_precision
from leadline.knn.arrays import Array, Rows, copied
from leadline.knn.exact import (
    LARGEST,
    MEMORY,
    NOTHING,
    SCALES,
    SURVEYED,
    Cost,
    refuse_non_finite,
    refuse_other_width,
    refuse_too_few,
)
from leadline.knn.screen import NARROW, ROUNDS, error_of, kmeans, scale_of

try:
    from leadline.knn import fused
except ImportError:
    fused = None  # type: ignore[assignment]

BYTES = 1 << 30  # of what is made of many rows at once
SMALL = 2048  # rows of a bank below which all is done in float64
OF_A_CELL = 2048  # rows, on average
SAMPLED = 128  # rows of a cell that k-means looks at
WORTH = 0.8  # share of the rows' squared length that cells leave, above which one cell does as well
FIRST_ROUNDS = 2  # of k-means, after which a share of HOPELESS says that cells will never be worth it
HOPELESS = 0.9
SEEN_FIRST = 4096  # rows that give a query its first limit
GROWTH = 4  # from one look at the limits to the next, in rows seen
MOST_ROWS = (64, 256, 1024)  # candidates of queries that are ranked alike; those of more are searched in float64
BUFFER = 4 << 30  # bytes of what comes out of products, at most
PINNED = 1 << 28  # bytes of rows on their way to a GPU
BYTES_OF_A_PAIR = 64  # of a query and a row whose distance is measured: both numbers, the distance, and their sorting
LONGEST_K = 100  # neighbours that the lists have room for
FAR = 1e20  # squared length of a query whose products may overflow: it is searched in float64
SLACK = 2.0**-48  # of float64 arithmetic on rows at most 1 long
SCREENS = {"float16": torch.float16, "int8": torch.int8}
UP = 1 + 2.0**-20  # makes a float32 no less than the float64 that it is made of
KEPT = 0.8  # share of the device's free memory that a search takes


class DeviceBank:
    """Bank rows made ready on a device for any number of searches; as `exact.Bank`.

    rows [M, D], real: a tensor on the device, which stays where it is, or anything that is read in slices. memory:
    bytes of the device that a search may take, by default most of what is free. A bank that does not fit is read a
    tile at a time, by each search, through pinned memory, the next while one is searched. number: of the first row, as
    errors tell it. screen: what rows are rounded to before they are multiplied, "float16", or "int8", which multiplies
    at twice the rate and leaves more rows to be measured (0014).

    Raises LeadlineError for values that are not finite.
    """

    def __init__(
        self, rows: Rows | torch.Tensor, device: str | torch.device, memory: int | None = None, number: int = 0,
        screen: str = "float16",
    ) -> None:  # fmt: skip
        self._device = torch.empty(0, device=device).device  # "cuda" is not equal to "cuda:0", where its tensors lie
        self._rows, self._memory = rows, free_memory(self._device) if memory is None else memory
        n_bank, width = rows.shape
        self._number, self._screen = number, SCREENS[screen]
        fits = holds(rows, self._device, self._memory)
        self._step = n_bank if fits else _rows_of_a_tile(n_bank, width, self._memory)
        with _launching_on(self._device):
            self._whole = Tile(_on(rows, slice(0, n_bank), self._device), 0, self._screen, number) if fits else None
        self.plan = self._whole.plan if self._whole else f"{-(-n_bank // self._step)} tiles of {self._step} rows"

    @property
    def size_bytes(self) -> int:
        """Bytes that are held between searches; 0 where each search makes its tiles ready anew."""
        return self._whole.size_bytes if self._whole else 0

    def search(
        self, queries: Rows | torch.Tensor, k: int, exclude: Array | None = None, winners_of: Array | None = None
    ) -> tuple[Array, Cost]:
        """As `exact.Bank.search`: int64 [Q, k], ascending in each query, and the Cost; `winners_of` saves nothing."""
        rows, cost = self.nearest(queries, k, exclude)
        return rows.sort(dim=1).values.cpu().numpy(), cost

    def by_distance(self, queries: Rows | torch.Tensor, rows: Array) -> tuple[Array, Array]:
        """As `exact.Bank.by_distance`."""
        found = torch.from_numpy(rows).to(self._device)
        ordered, squares = _in_order(found, self._squares(queries, found))
        return ordered.cpu().numpy(), squares.cpu().numpy()

    def squares(self, queries: Rows | torch.Tensor, rows: Array) -> Array:
        """Squared distances of rows int64 [Q, n] from the queries, float64; of numbers that no row has: infinity."""
        return self._squares(queries, torch.from_numpy(rows).to(self._device)).cpu().numpy()

    def nearest(self, queries: Rows | torch.Tensor, k: int, exclude: Array | None = None) -> tuple[torch.Tensor, Cost]:
        """The k nearest rows of each query, int64 [Q, k] on the device, in no order; else as `search`."""
        refuse_other_width(self._rows, queries)
        refuse_too_few(self._rows.shape[0], k, exclude)
        own = np.full(queries.shape[0], -1) if exclude is None else exclude
        rows, _, cost = self.found(queries, k, own)
        return rows, cost

    def found(
        self, queries: Rows | torch.Tensor, k: int, own: Array, measured: bool = False, number: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor | None, Cost]:
        """The k nearest rows of each query, int64 [Q, k] on the device, where asked for their squared distances,
        float64 [Q, k], and the cost.

        own int64 [Q]: the row that a query must not have, -1 for none; where k rows are not left without it, there is
        one infinitely far away. k: at most the rows that there are. number: of the first query, as errors tell it.
        """
        n_bank, n_queries = self._rows.shape[0], queries.shape[0]
        out = torch.from_numpy(own).to(self._device)
        rows = torch.empty((n_queries, k), dtype=torch.int64, device=self._device)
        squares = None
        if measured or self._whole is None:
            squares = torch.full(rows.shape, inf, dtype=torch.float64, device=self._device)
        cost = NOTHING + Cost(0, 0, 0, 2 * n_queries * n_bank * self._rows.shape[1], 0, 0, 0, 0, 0)
        parts = list[slice]()
        with full_precision(), _launching_on(self._device):
            for tile in self._tiles():
                parts = parts or list(self._parts(queries))  # by the memory that a tile leaves
                if len(parts) == 1:
                    queries = _on(queries, parts[0], self._device)  # once for all tiles
                for part in parts:
                    asked = _on(queries, part, self._device)
                    if tile.first == 0:
                        _refuse_non_finite(asked, number + part.start, "query")
                    mine = out[part] - tile.first
                    mine[(mine < 0) | (mine >= len(tile.rows))] = -1
                    found, spent = tile.nearest(asked, min(k, len(tile.rows)), mine)
                    cost += spent
                    if squares is None:
                        rows[part] = found
                        continue
                    every = torch.arange(len(asked), device=self._device).repeat_interleave(found.shape[1])
                    exact = tile.squares(asked, every, found.flatten()).view_as(found)
                    exact[found == mine[:, None]] = inf
                    # Beside what tiles before have found.
                    rows[part], squares[part] = _merged((rows[part], found + tile.first), (squares[part], exact), k)
        return rows, squares, cost

    def _squares(self, queries: Rows | torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        squares = torch.full(found.shape, inf, dtype=torch.float64, device=self._device)
        with _launching_on(self._device):
            for tile in self._tiles(prepared=False):
                inside = (found >= tile.first) & (found < tile.first + len(tile.rows))
                for part in self._parts(queries):
                    which, place = inside[part].nonzero(as_tuple=True)
                    asked = _on(queries, part, self._device)
                    squares[part][which, place] = tile.squares(asked, which, found[part][which, place] - tile.first)
        return squares

    def _tiles(self, prepared: bool = True) -> Iterator["Tile"]:
        """The bank's tiles, the next of which is brought to the device while one is searched."""
        if self._whole:
            yield self._whole
            return
        starts = range(0, self._rows.shape[0], self._step)
        stream = None
        if self._device.type == "cuda":
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            if isinstance(self._rows, torch.Tensor) and self._rows.is_cuda:
                stream.wait_stream(torch.cuda.current_stream(self._rows.device))

        def bring(first: int) -> torch.Tensor:
            with torch.cuda.stream(stream):
                return _on(self._rows, slice(first, first + self._step), self._device)

        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(bring, 0)
            for first in starts:
                rows = coming.result()
                if stream:
                    torch.cuda.current_stream(self._device).wait_stream(stream)
                    rows.record_stream(torch.cuda.current_stream(self._device))
                if first + self._step < self._rows.shape[0]:
                    coming = ahead.submit(bring, first + self._step)
                yield Tile(rows, first, self._screen, self._number, prepared)

    def _parts(self, queries: Rows | torch.Tensor) -> Iterator[slice]:
        """Queries that go through a tile together."""
        n, width = queries.shape
        lists = 12 * fused.CAPACITY if fused else 0
        of_a_value = queries.dtype.itemsize if isinstance(queries, (torch.Tensor, np.ndarray)) else 8
        of_one = (of_a_value + 2) * width + 8 * _n_cells(self._step) + lists + 256
        step = max(1024, free_memory(self._device, self._memory) // of_one)
        step = max(1, -(-n // max(1, -(-n // step))))
        for first in range(0, n, step):
            yield slice(first, min(first + step, n))


class Tile:
    """Bank rows [M, D] on a device, the place of the first of them in the bank, and what their search is made ready
    with. number: as of DeviceBank."""

    def __init__(
        self,
        rows: torch.Tensor,
        first: int,
        screen: torch.dtype = torch.float16,
        number: int = 0,
        prepared: bool = True,
    ) -> None:
        self.rows, self.first = rows.contiguous(), first
        self._made: fused.RowTiles | None = None
        self.plan = "float64"
        if not prepared:
            return
        self._centre, longest = _survey(self.rows, number + first)
        self._scale = scale_of(longest)
        width = self.rows.shape[1]
        self._narrow = width < NARROW
        self._rounded = torch.float16 if fused and width > fused.WIDEST else screen
        if _has_kernels(self.rows) and len(rows) >= SMALL and 1 / SCALES < self._scale < SCALES:
            shape = fused.shape_of(rows.device, width)
            if shape is not None:
                with full_precision():
                    self._centres = self._find_centres()
                    self._make(shape)

    @property
    def size_bytes(self) -> int:
        made = self._made
        return sum(value.nbytes for value in vars(made).values() if isinstance(value, torch.Tensor)) if made else 0

    def nearest(self, queries: torch.Tensor, k: int, own: torch.Tensor) -> tuple[torch.Tensor, Cost]:
        """The k nearest rows of queries [Q, D], int64 [Q, k]; own int64 [Q]: the row not to have, -1 for none."""
        # The kernel for narrow rows takes values as they are, in float32.
        finer = self._narrow and queries.dtype == torch.float64
        if self._made is None or finer or k > LONGEST_K or not len(queries):
            return self._in_float64(queries, k, own), _settled(0, 0, len(queries))
        q, order, (n_sure, n_rows), n_pairs = self._screened(queries, k, own)
        lost = (order >= 0) & ((q.counts < 0) | (n_rows > MOST_ROWS[-1]))
        which = ((order >= 0) & ~lost).nonzero()[:, 0]
        chosen = torch.empty((len(queries), k), dtype=torch.int64, device=queries.device)
        measured = self._settle(queries, q, order, which, n_sure, n_rows, chosen)
        again = order[lost]
        if len(again):
            chosen[again] = self._in_float64(queries[again], k, own[again])
        certified = int((n_rows[which] == k).sum())
        return chosen, self._cost(q, n_pairs, len(queries), certified, measured, len(again))

    def squares(self, queries: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """Squared distances of queries[i] and rows[j] as `distance.squared_distance` has them, float64 [n]."""
        starts, sizes, last, tail = _leaves(queries.shape[1])
        leaves = torch.tensor([starts, sizes], dtype=torch.int32, device=queries.device)
        tree = (leaves[0], leaves[1], last, tail)
        kernels = _has_kernels(self.rows)
        found = torch.empty(len(i), dtype=torch.float64, device=queries.device)
        step = max(1, BYTES // (len(starts) if kernels else 24 * queries.shape[1] + 1024))
        for first in range(0, len(i), step):
            part = slice(first, first + step)
            if kernels:
                sums = fused.measure(queries, self.rows, i[part], j[part], *tree)
            else:
                sums = _measured(queries[i[part]], self.rows[j[part]], *tree)
            while sums.shape[1] > 1:
                sums = sums[:, 0::2] + sums[:, 1::2]
            found[part] = sums[:, 0]
        return found

    # Making ready

    def _find_centres(self) -> torch.Tensor:
        """Centres of cells, float64 [C, D], in the frame; one where more would hardly be nearer to their rows."""
        n_cells = _n_cells(len(self.rows))
        middle = torch.zeros((1, self.rows.shape[1]), dtype=torch.float64, device=self.rows.device)
        if n_cells == 1:
            return middle
        chosen = np.random.default_rng(0).integers(len(self.rows), size=SAMPLED * n_cells)
        sample = self._placed(self.rows[torch.from_numpy(chosen).to(self.rows.device)]).float()
        centres, of_all = sample[:n_cells], sample.square().sum(dim=1).mean()
        for rounds, worth in ((FIRST_ROUNDS, HOPELESS), (ROUNDS - FIRST_ROUNDS, WORTH)):
            centres = kmeans(sample, centres, rounds)
            left = torch.cdist(sample[: 16 * n_cells], centres).amin(dim=1).square().mean()
            if left > worth * of_all:
                return middle
        return centres.double()

    def _make(self, shape: "fused.Shape") -> None:
        """Sort the rows into tiles and round them."""
        size = shape.rows
        made = self._tiled(self.rows, size)
        self._order, n_places, n_cells = made.order, len(made.order), len(self._centres)
        self._place = torch.empty(len(self.rows), dtype=torch.int64, device=self.rows.device)
        none = made.order < 0
        self._place[made.order[~none]] = (~none).nonzero()[:, 0]
        apart = _distances(self._centres)
        bias = torch.zeros((1 if self._narrow else n_cells, n_places), device=self.rows.device)
        if not self._narrow:
            cell_of = made.cell.repeat_interleave(size)
            # From the centre of a query's cell: half of what a row's squared distance falls short of its own cell's.
            step = max(1, BYTES // (32 * n_cells))
            for first in range(0, n_places, step):
                part = slice(first, first + step)
                bias[:, part] = (0.5 * (apart[:, cell_of[part]].square() - made.far[part].T)).float()
            bias[cell_of, torch.arange(n_places, device=bias.device)] = (-0.5 * made.squares).float()
        bias[:, none] = -inf
        nearest = apart[:, made.cell].argsort(dim=1, stable=True)
        lengths, lost = made.squares.sqrt(), made.lost.sqrt()
        by_tile = (len(made.cell), size)
        self._made = fused.RowTiles(
            values=made.values,
            steps=made.steps,
            bias=bias,
            cell=made.cell.int(),
            longest=_up((lengths + lost).view(by_tile).amax(dim=1)),
            lost=_up(lost.view(by_tile).amax(dim=1)),
            inner=(lengths.masked_fill(none, inf).view(by_tile).amin(dim=1) / UP - SLACK).float(),
            outer=_up(lengths.view(by_tile).amax(dim=1)),
            apart=apart.float(),
            nearest=nearest.int(),
            nearest_cell=made.cell[nearest].int(),
            shape=shape,
        )
        kind = str(made.values.dtype).removeprefix("torch.")
        cells = f"{n_cells} cell{'s' * (n_cells > 1)} in tiles of {size}"
        self.plan = f"all {self.rows.shape[1]} values, {cells}, {kind}, on the GPU"

    def _tiled(self, rows: torch.Tensor, size: int) -> "_Tiled":
        """Rows or queries [n, D] in tiles of one cell each, as the kernels take them."""
        n, n_cells, device = len(rows), len(self._centres), rows.device
        if n_cells == 1:
            n_tiles = -(-n // size)
            order = torch.full((n_tiles * size,), -1, device=device)
            order[:n] = torch.arange(n, device=device)
            cell = torch.zeros(n_tiles, dtype=torch.int64, device=device)
        else:
            seen, its_cell, radius = self._seen(rows)
            order, cell = _grouped(its_cell, radius, n_cells, size)
        at = order.clamp(min=0)
        if self._narrow:
            values = (rows[at].float() * self._scale).masked_fill_((order < 0)[:, None], 0)
            placed = self._placed(rows[at]) - self._centres[cell.repeat_interleave(size)]
            squares = placed.square_().sum(dim=1).masked_fill_(order < 0, 0)
            lost = steps = torch.zeros_like(squares)
        else:
            cells = cell.int().repeat_interleave(size)
            values, steps, squares, lost = fused.round_rows(
                rows, order, cells, self._centre, self._scale, self._centres, self._rounded
            )
        return _Tiled(order, cell, values, steps, squares, lost, squares.float()[:, None] if n_cells == 1 else seen[at])

    def _placed(self, rows: torch.Tensor) -> torch.Tensor:
        """In the frame, float64."""
        return torch.sub(rows, self._centre).mul_(self._scale)

    def _seen(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Squared distances from the centres, float32 [n, C]; the nearest, int64 [n]; its distance, float64 [n]."""
        n, n_cells = len(rows), len(self._centres)
        far = torch.empty((n, n_cells), device=rows.device)
        cell = torch.empty(n, dtype=torch.int64, device=rows.device)
        radius = torch.empty(n, dtype=torch.float64, device=rows.device)
        of_centres = self._centres.square().sum(dim=1)
        step = max(1, BYTES // (8 * max(rows.shape[1], 2 * n_cells)))
        for first in range(0, n, step):
            part = slice(first, first + step)
            placed = self._placed(rows[part])
            squares = torch.linalg.vector_norm(placed, dim=1).square_()
            found = torch.addmm(of_centres[None], placed, self._centres.T, alpha=-2).add_(squares[:, None])
            radius[part], cell[part] = found.clamp_(min=0).min(dim=1)
            far[part] = found
        return far, cell, radius.sqrt_()

    # Searching

    def _screened(
        self, queries: torch.Tensor, k: int, own: torch.Tensor
    ) -> tuple["fused.QueryTiles", torch.Tensor, torch.Tensor, int]:
        """Queries in tiles with their candidates; the query at each place, int64 [P], -1 for none; int32 [2, P]:
        candidates that are surely among the k nearest, which come first, and rows of all candidates; and how many pairs
        of tiles were multiplied."""
        made = self._made
        assert made is not None
        width, device = queries.shape[1], queries.device
        tiled = self._tiled(queries, fused.QUERIES)
        order, n = tiled.order, len(tiled.order)
        of_centres = torch.linalg.vector_norm(self._centres, dim=1)
        lengths = tiled.squares.sqrt() + of_centres[tiled.cell.repeat_interleave(fused.QUERIES)]
        gone = (order < 0) | (lengths.square() > FAR)
        q = fused.QueryTiles(
            values=tiled.values,
            steps=tiled.steps,
            cell=tiled.cell.int(),
            length=_up(tiled.squares.sqrt()),
            lost=_up(tiled.lost.sqrt()),
            slip=_up(32 * (width + 8) * 2.0**-53 * (1 + lengths.square())),
            far=tiled.far.T.contiguous(),
            own=torch.where(own >= 0, self._place[own.clamp(min=0)], -1)[order.clamp(min=0)].int(),
            limit=torch.where(gone, -1.0, inf).float(),
            counts=torch.where(gone, fused.GONE, 0).int(),
            estimates=torch.empty((n, fused.CAPACITY), device=device),
            candidates=torch.empty((n, fused.CAPACITY), dtype=torch.int32, device=device),
            masks=torch.empty((n, fused.CAPACITY), dtype=torch.int32, device=device),
        )
        n_tiles = len(made.cell)
        size = made.shape.rows
        seen = min(n_tiles, max(-(-SEEN_FIRST // size), n_tiles // 256, -(-4 * k * fused.RUN // size)))
        edges = [0]
        while edges[-1] < n_tiles:
            edges.append(min(n_tiles, max(GROWTH * seen, GROWTH * edges[-1])))
        ends = torch.zeros((2, n), dtype=torch.int32, device=device)
        longest = max(stop - first for first, stop in pairwise(edges)) * (size // fused.RUN)
        buffer = min(BUFFER, free_memory(device) // 8)
        step, n_pairs = max(1, buffer // (6 * longest * fused.QUERIES)), 0
        for start in range(0, len(q.cell), step):
            part = q.part(start, start + step)
            fused.bound(part, made, seen, k + 1, width)  # one may be the query's own
            n_pairs += len(part.cell) * seen
            for first, stop in pairwise(edges):
                n_pairs += fused.screen(part, made, first, stop - first, width, prune=PRUNED)
                places = slice(start * fused.QUERIES, (start + step) * fused.QUERIES)
                fused.refine(part, made, k, width, ends[:, places] if stop == n_tiles else None)
        return q, order, ends, n_pairs

    def _settle(
        self, queries: torch.Tensor, q: "fused.QueryTiles", order: torch.Tensor, which: torch.Tensor,
        n_sure: torch.Tensor, n_rows: torch.Tensor, chosen: torch.Tensor,
    ) -> int:  # fmt: skip
        """Choose for the queries at some places: what is sure, and the nearest others. Returns how many it measured."""
        assert self._made is not None
        measured = 0
        for least, most in pairwise((0, *MOST_ROWS)):
            some = which[(n_rows[which] > least) & (n_rows[which] <= most)]
            if not len(some):
                continue
            n_open = (n_rows - n_sure)[some].long()
            for part in _runs_of(n_open, BYTES // BYTES_OF_A_PAIR):
                asked, n = some[part], n_open[part]
                i, rows = fused.expand(q, self._made, self._order, asked, order, n_sure, n, chosen, most)
                if len(i):
                    fused.choose(asked, order, n_sure, n, rows, self.squares(queries, i, rows), chosen, most)
                measured += len(i)
        return measured

    def _in_float64(self, queries: torch.Tensor, k: int, own: torch.Tensor) -> torch.Tensor:
        """The same with all distances in float64, those near the k-th as they decide."""
        n_bank, width = self.rows.shape
        chosen = torch.empty((len(queries), k), dtype=torch.int64, device=queries.device)
        step = max(1, BYTES // (32 * n_bank))
        for first in range(0, len(queries), step):
            asked = queries[first : first + step]
            squares, error = self._all_squares(asked)
            every = torch.arange(len(asked), device=queries.device)
            mine = own[first : first + step]
            squares[every[mine >= 0], mine[mine >= 0]] = inf
            relative = 1 + 2 * error_of(width, True, True)
            limit = (squares.kthvalue(k, dim=1).values + 2 * error) * relative**2
            i, j = (squares <= limit[:, None]).nonzero(as_tuple=True)
            exact = self.squares(asked, i, j)
            exact[j == mine[i]] = inf
            ranked, rank = _ranked(i, j, exact)
            chosen[first : first + step] = j[ranked[rank < k]].view(-1, k)
        return chosen

    def _all_squares(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared distances float64 [Q, M], and [Q] what they may be off by beside a small share of themselves."""
        n_bank, width = self.rows.shape
        squares = torch.zeros((len(queries), n_bank), dtype=torch.float64, device=queries.device)
        if self._narrow:
            for d in range(width):
                squares += (queries[:, d, None].double() - self.rows[None, :, d].double()).square_()
            return squares, torch.zeros(len(queries), dtype=torch.float64, device=queries.device)
        asked = queries.double() - self._centre
        lengths = asked.square().sum(dim=1)
        longest = torch.zeros((), dtype=torch.float64, device=queries.device)
        step = max(1, BYTES // (8 * width))
        for first in range(0, n_bank, step):
            rows = self.rows[first : first + step].double() - self._centre
            of_rows = rows.square().sum(dim=1)
            longest = torch.maximum(longest, of_rows.amax())
            squares[:, first : first + step] = torch.addmm(of_rows[None], asked, rows.T, alpha=-2).add_(
                lengths[:, None]
            )
        return squares, 32 * (width + 8) * 2.0**-53 * (lengths + longest)

    def _cost(self, q: "fused.QueryTiles", tiles: int, n: int, certified: int, measured: int, lost: int) -> Cost:
        assert self._made is not None
        n_cells, width = len(self._centres), self.rows.shape[1]
        pairs = tiles * fused.QUERIES * self._made.shape.rows
        all_lost = lost * len(self.rows)
        flops = 2 * width * (pairs + all_lost + n * n_cells) + 3 * width * measured
        return Cost(
            pairs + all_lost, measured, flops, 0, tiles, len(q.cell) * len(self._made.cell), certified,
            n - certified - lost, lost,
        )  # fmt: skip


@dataclass(frozen=True)
class _Tiled:
    """Rows in tiles: int64 the row at each place [P], -1 for none; each tile's cell; values and steps as of
    `fused.RowTiles`; squared lengths about the cells, and of what rounding took, float64 [P]; squared distances from
    all centres, float32 [P, C]."""

    order: torch.Tensor
    cell: torch.Tensor
    values: torch.Tensor
    steps: torch.Tensor
    squares: torch.Tensor
    lost: torch.Tensor
    far: torch.Tensor


PRUNED = True  # whether tiles that no query needs are left out; benchmarks ask what they save


def _settled(certified: int, reranked: int, fell_through: int) -> Cost:
    return Cost(0, 0, 0, 0, 0, 0, certified, reranked, fell_through)


def _has_kernels(rows: torch.Tensor) -> bool:
    """Whether Triton works where the rows lie; narrow rows in float64 are not for its kernels."""
    if fused is None or not (rows.is_cuda or fused.interpreted()):
        return False
    return rows.shape[1] >= NARROW or rows.dtype != torch.float64


def _n_cells(n_bank: int) -> int:
    """How many cells so many rows are cut into at most."""
    return max(1, min(isqrt(n_bank) // 2, n_bank // OF_A_CELL))


def holds(rows: Rows | torch.Tensor, device: torch.device, memory: int) -> bool:
    """Whether a bank is made ready there once and kept, with room for queries and lists."""
    n_bank, width = rows.shape
    lies_there = isinstance(rows, torch.Tensor) and rows.device == device
    return n_bank * ((4 if lies_there else 12) * width + 8 * _n_cells(n_bank)) <= memory


def _rows_of_a_tile(n_bank: int, width: int, memory: int) -> int:
    """As many rows as fit so many bytes: beside a tile's rows the next tile's, both rounded, queries as much again, and
    what they are from the centres of all cells, of one tile after another."""
    n_tiles = max(1, n_bank * 24 * width // max(1, memory))
    while True:
        step = -(-n_bank // n_tiles)
        if step == 1 or step * (24 * width + 12 * _n_cells(step)) <= memory:
            return step
        n_tiles += 1 + n_tiles // 16


def _runs_of(numbers: torch.Tensor, most: int) -> list[slice]:
    """Slices of int64 [n], the sum of each of which is at most `most` or hardly more."""
    totals = numbers.cumsum(0)
    full = torch.arange(1, int(totals[-1]) // most + 1, device=numbers.device) * most
    cuts = sorted({0, *(torch.searchsorted(totals, full) + 1).tolist(), len(numbers)})
    return [slice(first, stop) for first, stop in pairwise(cuts)]


def _launching_on(device: torch.device) -> AbstractContextManager[None]:
    """Triton launches on the current device, wherever the tensors lie."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def free_memory(device: torch.device, most: int | None = None) -> int:
    """Bytes of the device that there are for a search, by a process that may have only a share of it."""
    if device.type != "cuda":
        return MEMORY if most is None else most
    free_now, total = torch.cuda.mem_get_info(device)
    share = int(torch.cuda.get_per_process_memory_fraction(device.index) * total)
    there = min(free_now + torch.cuda.memory_reserved(device), share) - torch.cuda.memory_allocated(device)
    free = int(KEPT * max(0, there))
    return free if most is None else min(free, most)


def _on(rows: Rows | torch.Tensor, part: slice, device: torch.device) -> torch.Tensor:
    """Some rows on the device, in their own precision, without gaps between them.

    To a GPU they go through pinned memory in pieces: torch keeps that for good, and what it takes is a power of two.
    """
    if isinstance(rows, torch.Tensor):
        return rows[part].to(device).contiguous()
    first, stop, _ = part.indices(rows.shape[0])
    if device.type != "cuda":
        return torch.from_numpy(copied(rows, slice(first, stop)))
    start = torch.from_numpy(copied(rows, slice(first, first + 1)))
    there = torch.empty((stop - first, *rows.shape[1:]), dtype=start.dtype, device=device)
    step = max(1, PINNED // max(1, start.nbytes))
    for at in range(first, stop, step):
        piece = torch.from_numpy(copied(rows, slice(at, min(at + step, stop)))).pin_memory()
        there[at - first : at - first + len(piece)].copy_(piece, non_blocking=True)
    return there


def _refuse_non_finite(rows: torch.Tensor, first: int, what: str) -> None:
    """As `exact.refuse_non_finite`, looked for on the device."""
    largest = LARGEST if rows.dtype == torch.float64 else inf
    step = max(1, BYTES // (8 * rows.shape[1]))
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        if not (part.abs() < largest).all():
            refuse_non_finite(part.cpu().numpy(), first + start, what)


def _survey(rows: torch.Tensor, first: int) -> tuple[torch.Tensor, float]:
    """About the mean of the rows, float64 [D], and about the largest squared distance from it.

    Raises LeadlineError for values that are not finite.
    """
    centre = rows[:: len(rows) // SURVEYED + 1].double().mean(dim=0)
    near = centre.to(rows.dtype)  # a length is about right, and float32 differences halve what is moved
    step = max(1, BYTES // (8 * rows.shape[1]))
    lengths = [
        torch.linalg.vector_norm(rows[start : start + step] - near, dim=1, dtype=torch.float64).amax()
        for start in range(0, len(rows), step)
    ]
    longest = float(torch.stack(lengths).amax())
    if not longest < LARGEST:
        _refuse_non_finite(rows, first, "bank row")
    return centre, longest**2


def _distances(centres: torch.Tensor) -> torch.Tensor:
    """Of all pairs, float64 [C, C]; 0 from a centre to itself."""
    squares = centres.square().sum(dim=1)
    apart = torch.addmm(squares[None], centres, centres.T, alpha=-2).add_(squares[:, None]).clamp_(min=0).sqrt_()
    return apart.fill_diagonal_(0)


def _grouped(cell: torch.Tensor, radius: torch.Tensor, n_cells: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Things [n] by cell and radius in tiles of one cell each: the thing at each place, int64, -1 for none; and the
    tiles' cells."""
    by_radius = radius.argsort()
    by_cell = by_radius[cell[by_radius].argsort(stable=True)]
    counts = torch.bincount(cell, minlength=n_cells)
    tiles = (counts + size - 1) // size
    of = cell[by_cell]
    rank = torch.arange(len(cell), device=cell.device) - (counts.cumsum(0) - counts)[of]
    tile_cell = torch.arange(n_cells, device=cell.device).repeat_interleave(tiles)
    order = torch.full((len(tile_cell) * size,), -1, device=cell.device)
    order[(tiles.cumsum(0) - tiles)[of] * size + rank] = by_cell
    return order, tile_cell


def _up(lengths: torch.Tensor) -> torch.Tensor:
    """No less, float32."""
    return (lengths * UP + SLACK).float()


def _ranked(i: torch.Tensor, rows: torch.Tensor, squares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An order of pairs by (query i, distance, row), and the rank of each, so ordered, among its query's."""
    order = rows.argsort(stable=True)
    order = order[squares[order].argsort(stable=True)]
    order = order[i[order].argsort(stable=True)]
    counts = torch.bincount(i)
    return order, torch.arange(len(i), device=i.device) - (counts.cumsum(0) - counts)[i[order]]


def _in_order(rows: torch.Tensor, squares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each query's rows [Q, n] in the order of (distance, row), and their squared distances."""
    rows, order = rows.sort(dim=1)
    squares, by_distance = squares.gather(1, order).sort(dim=1, stable=True)
    return rows.gather(1, by_distance), squares


def _merged(
    rows: tuple[torch.Tensor, torch.Tensor], squares: tuple[torch.Tensor, torch.Tensor], k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    ordered, sorted_ = _in_order(torch.cat(rows, dim=1), torch.cat(squares, dim=1))
    return ordered[:, :k], sorted_[:, :k]


@lru_cache(8)
def _leaves(width: int) -> tuple[list[int], list[int], int, int]:
    """The leaves of numpy's pairwise sum of so many squares in a full binary tree: start and size, in whole lanes.

    Where the tree is not full, leaves of no size stand in. Also which leaf is the last, and where the values begin that
    fill no lanes of it.
    """
    found: list[tuple[int, int, int, int]] = []

    def cut(start: int, n: int, path: int, depth: int) -> None:
        if n <= 128:
            found.append((path, depth, start, n))
            return
        half = n // 2
        half -= half % 8
        cut(start, half, 2 * path, depth + 1)
        cut(start + half, n - half, 2 * path + 1, depth + 1)

    cut(0, width, 0, 0)
    deepest = max(depth for _, depth, _, _ in found)
    starts, sizes = [0] * 2**deepest, [0] * 2**deepest
    for path, depth, start, n in found:
        place = path << (deepest - depth)
        starts[place], sizes[place] = start, n - n % 8
    return starts, sizes, place, start + n - n % 8


def _measured(
    queries: torch.Tensor, rows: torch.Tensor, starts: torch.Tensor, sizes: torch.Tensor, last: int, tail: int
) -> torch.Tensor:
    """As `fused.measure`, of pairs that are gathered, a leaf a branch."""
    squares = torch.sub(queries.double(), rows).square_()
    rest = squares[:, tail:]
    squares = torch.nn.functional.pad(squares, (0, 1))
    within = torch.arange(128, device=rows.device)
    at = torch.where(within < sizes[:, None], starts[:, None] + within, rows.shape[1])
    steps = squares[:, at.flatten()].view(len(rows), len(starts), 16, 8)
    lanes = steps[:, :, 0]
    for step in range(1, 16):
        lanes = lanes + steps[:, :, step]
    pairs = lanes[..., 0::2] + lanes[..., 1::2]
    sums = (pairs[..., 0] + pairs[..., 1]) + (pairs[..., 2] + pairs[..., 3])
    for d in range(rest.shape[1]):
        sums[:, last] += rest[:, d]
    return sums
