"""How much of a bank an exact search can leave out, by layer and by bound; nothing of the engine is used for it.

python benchmarks/exact_votes.py layers RUN

For held-out queries of a stored member, with the true k-th distance τ known: the mean share of bank rows that each
lower bound of the distance cannot exclude. That is what a bound can do at best: a search learns τ only on its way, and
works in tiles.
"""

import os
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from record import stamp, write_result
from rich.console import Console
from rich.table import Table

from leadline.knn.arrays import Array
from leadline.layers import open_layers

PACKAGES = ("leadline", "torch", "numpy")
CELLS = 256
K_MEANS_ROUNDS = 8
DIRECTIONS = (16, 32, 64, 128, 256)
SAMPLE = 16_384  # bank rows that directions are computed from
POWER_ROUNDS = 4  # of subspace iteration
CHUNK = 8192


def layers(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="directory of a run")],
    member: Annotated[str | None, typer.Option(help="by default the first")] = None,
    queries: Annotated[int, typer.Option(min=1, help="held-out points")] = 256,
    threads: Annotated[int, typer.Option(min=1)] = os.cpu_count() or 1,
    k: Annotated[int, typer.Option(min=1)] = 30,
) -> None:
    """By probe: rows left by the triangle inequality, by the ring test, by the first principal directions."""
    torch.set_num_threads(threads)
    given = open_layers(run, member)
    bank_ids = given.bank_ids
    held_out = np.setdiff1d(np.arange(len(given.labels)), bank_ids)
    chosen = np.sort(np.random.default_rng(0).choice(held_out, min(queries, len(held_out)), replace=False))
    rows = []
    for layer, (name, width) in enumerate(zip(given.names, given.widths, strict=True)):
        with given.rows(layer) as values:
            rows.append({"probe": name, "width": width, **shares(values[bank_ids], values[chosen], k)})
        print(f"{name} done", flush=True)
    title = f"{given.title}: shares of {len(bank_ids):,} bank rows, {len(chosen)} held-out queries, k = {k}"
    print_rows(title, rows)
    write_result(
        f"exact_votes-layers-{given.about['name']}",
        {
            **stamp(PACKAGES, threads),
            "run": given.about,
            "bank": len(bank_ids),
            "queries": len(chosen),
            "k": k,
            "cells": CELLS,
            "probes": rows,
        },
    )


def shares(bank: Array, queries: Array, k: int) -> dict[str, Any]:
    """Of one probe: bank float32 [M, D], queries float32 [Q, D]."""
    mean = torch.from_numpy(bank).double().mean(dim=0)
    rows, asked = torch.from_numpy(bank).double() - mean, torch.from_numpy(queries).double() - mean
    tau = distances(asked, rows).kthvalue(k, dim=1).values
    centres, cell = k_means(rows.float())
    to_centres, radii = distances(asked, centres), (rows - centres[cell]).norm(dim=1)
    reach = torch.zeros(CELLS, dtype=torch.float64).scatter_reduce_(0, cell, radii, "amax")
    visited = to_centres - reach <= tau[:, None]
    ring = (to_centres[:, cell] - radii).abs() <= tau[:, None]
    by_directions = []
    sample = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:SAMPLE]]
    basis = principal_directions(sample, min(max(DIRECTIONS), rows.shape[1]))
    for m in (m for m in DIRECTIONS if m < rows.shape[1]):
        by_directions.append(projected(rows, asked, basis[:, :m], centres, cell, tau))
    return {"cells": share(visited[:, cell]), "ring": share(ring), "directions": by_directions}


def share(left: torch.Tensor) -> float:
    return float(left.double().mean())


def distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """By differences: products would lose the small ones."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def k_means(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres float64 [CELLS, D] and each row's cell int64 [M]; float32 will do, a cell is any set of rows."""
    start = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:CELLS]
    centres = rows[start].clone()
    for _ in range(K_MEANS_ROUNDS):
        cell = nearest_centre(rows, centres)
        sums = torch.zeros_like(centres).index_add_(0, cell, rows)
        counts = torch.bincount(cell, minlength=CELLS)
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), centres)
    return centres.double(), nearest_centre(rows, centres)


def nearest_centre(rows: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    squares = centres.square().sum(dim=1)
    return torch.cat([(squares - 2 * some @ centres.T).argmin(dim=1) for some in rows.split(CHUNK)])


def principal_directions(sample: torch.Tensor, m: int) -> torch.Tensor:
    """Orthonormal float64 [D, m], most important first: randomized subspace iteration (Halko, Martinsson, Tropp)."""
    random = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(sample.shape[1], m, dtype=torch.float64, generator=random)).Q
    for _ in range(POWER_ROUNDS):
        basis = torch.linalg.qr(sample.T @ (sample @ basis)).Q
    return basis @ torch.linalg.svd(sample @ basis, full_matrices=False).Vh.T


def projected(
    rows: torch.Tensor, asked: torch.Tensor, basis: torch.Tensor, centres: torch.Tensor, cell: torch.Tensor,
    tau: torch.Tensor,
) -> dict[str, float]:  # fmt: skip
    """Rows [M, D] that the first m directions cannot exclude.

    plain: by the distance within them. with_rest: one coordinate more, the length of what lies outside of them, which
    differs by no more than that part of the distance. bfloat16: as plain, the coordinates centred on the row's cell and
    then rounded, the distance lowered by what rounding can have done.
    """
    a, b = asked @ basis, rows @ basis
    squares = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1) - 2 * a @ b.T
    difference = rest(asked, a)[:, None] - rest(rows, b)
    limit = tau.square()[:, None]
    return {
        "m": basis.shape[1],
        "plain": share(squares <= limit),
        "with_rest": share(squares + difference.square() <= limit),
        "bfloat16": left_by_bfloat16(a, b, centres @ basis, cell, limit),
    }


def rest(rows: torch.Tensor, coordinates: torch.Tensor) -> torch.Tensor:
    """Length of the part of each row outside of the directions."""
    return (rows.square().sum(dim=1) - coordinates.square().sum(dim=1)).clamp(min=0).sqrt()


def left_by_bfloat16(
    a: torch.Tensor, b: torch.Tensor, centres: torch.Tensor, cell: torch.Tensor, limit: torch.Tensor
) -> float:
    """Cauchy-Schwarz on what rounding took away; the rounding of the product itself is left out of account."""
    left = 0
    for c in range(len(centres)):
        x, y = a - centres[c], b[cell == c] - centres[c]
        x_rounded, y_rounded = x.bfloat16().double(), y.bfloat16().double()
        lost = x.norm(dim=1)[:, None] * (y - y_rounded).norm(dim=1)
        lost += (x - x_rounded).norm(dim=1)[:, None] * y_rounded.norm(dim=1)
        squares = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1) - 2 * x_rounded @ y_rounded.T
        left += int((squares - 2 * lost <= limit).sum())
    return left / len(a) / len(b)


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """A column for each number of directions: plain / with the rest's length / in bfloat16."""
    table = Table("probe", title=f"{title}\nm = …: plain / with the rest's length / bfloat16", title_justify="left")
    for head in ("D", "cells", "ring", *(f"m = {m}" for m in DIRECTIONS)):
        table.add_column(head, justify="right")
    for row in rows:
        told = [f"{one['plain']:.4f} / {one['with_rest']:.4f} / {one['bfloat16']:.4f}" for one in row["directions"]]
        table.add_row(row["probe"], str(row["width"]), f"{row['cells']:.3f}", f"{row['ring']:.4f}", *told)
    Console(width=190).print(table)
