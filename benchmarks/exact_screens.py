"""How many rows products in few bits leave to be measured, by layer and by type; of the search only k-means is used.

python benchmarks/exact_votes.py screens RUN

As the search on a GPU does it (docs/decisions/0014): rows and queries about the centres of their cells, rounded once
each, rows in tiles of 256 by cell and length; what rounding can have done to a product, by Cauchy-Schwarz, moves every
estimate both ways; what cannot be told from the k nearest is left. fp8 and int8 have a scale of their own for each row,
the best that there is. What the hardware's sums add to the error is left out of account: int8's are exact, those of fp8
on a Hopper GPU have fewer bits than float32's.
"""

import os
from math import isqrt
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from exact_layers import distances
from record import stamp, write_result
from rich.console import Console
from rich.table import Table

from leadline.knn.arrays import Array
from leadline.knn.screen import kmeans
from leadline.layers import open_layers

PACKAGES = ("leadline", "torch", "numpy")
TYPES = ("float16", "bfloat16", "int8", "fp8")
TILE = 256
OF_A_CELL = 2048
WORTH = 0.8  # of the squared length, left by cells, above which there is one
UNIT = 2.0**12  # for float16, whose range ends early


def screens(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="directory of a run")],
    member: Annotated[str | None, typer.Option(help="by default the first")] = None,
    bank: Annotated[int, typer.Option(min=1, help="training points")] = 8192,
    queries: Annotated[int, typer.Option(min=1, help="held-out points")] = 128,
    threads: Annotated[int, typer.Option(min=1)] = os.cpu_count() or 1,
    k: Annotated[int, typer.Option(min=1)] = 30,
) -> None:
    """By probe and type: rows a query that are left, the mean and the 99th percentile."""
    torch.set_num_threads(threads)
    given, random = open_layers(run, member), np.random.default_rng(0)
    held_out = np.setdiff1d(np.arange(len(given.labels)), given.bank_ids)
    ids, asked = (
        np.sort(random.choice(all_, n, replace=False)) for all_, n in ((given.bank_ids, bank), (held_out, queries))
    )
    rows = []
    for layer, (name, width) in enumerate(zip(given.names, given.widths, strict=True)):
        with given.rows(layer) as values:
            rows.append({"probe": name, "width": width, **left(values[ids], values[asked], k)})
        print(rows[-1], flush=True)
    for width in (128, 512, 2048):
        noise = random.standard_normal((bank + queries, width), np.float32)
        rows.append({"probe": "Gaussian", "width": width, **left(noise[:bank], noise[bank:], k)})
        print(rows[-1], flush=True)
    print_rows(f"{given.title}: rows left of {bank:,}, {queries} held-out queries, k = {k}", rows)
    about = {**stamp(PACKAGES, threads), "run": given.about, "bank": bank, "queries": queries, "k": k, "probes": rows}
    write_result(f"exact_votes-screens-{given.about['name']}", about)


def left(bank: Array, queries: Array, k: int) -> dict[str, Any]:
    """Of one probe: bank float32 [M, D], queries float32 [Q, D]."""
    mean = torch.from_numpy(bank).double().mean(dim=0)
    rows, asked = torch.from_numpy(bank).double() - mean, torch.from_numpy(queries).double() - mean
    scale = rows.norm(dim=1).amax()
    rows, asked = rows / scale, asked / scale
    centres = cells(rows)
    cell, of_query = torch.cdist(rows, centres).argmin(dim=1), torch.cdist(asked, centres).argmin(dim=1)
    about = rows - centres[cell]
    order = np.lexsort((about.norm(dim=1), cell))
    rows, about, asked_about = rows[order], about[order], asked - centres[of_query]
    true = distances(asked, rows).square()
    found: dict[str, Any] = {"cells": len(centres)}
    for kind in TYPES:
        counts = undecided(true, about, asked_about, kind, k).double()
        found[kind] = {"mean": float(counts.mean()), "p99": float(counts.quantile(0.99))}
    return found


def cells(rows: torch.Tensor) -> torch.Tensor:
    """Centres, float64 [C, D]."""
    n = max(1, min(isqrt(len(rows)) // 2, len(rows) // OF_A_CELL))
    some = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: 128 * n]].float()
    centres = kmeans(some, some[:n]).double()
    worth = torch.cdist(rows, centres).amin(dim=1).square().mean() <= WORTH * rows.square().sum(dim=1).mean()
    return centres if n > 1 and worth else torch.zeros_like(rows[:1])


def undecided(true: torch.Tensor, rows: torch.Tensor, queries: torch.Tensor, kind: str, k: int) -> torch.Tensor:
    """How many rows of each query cannot be told from its k nearest. true float64 [Q, M]: squared distances."""
    x, q = rounded(rows, kind), rounded(queries, kind)
    lost, length = by_tile((rows - x).norm(dim=1)), by_tile(x.norm(dim=1))
    error = 2 * ((queries - q).norm(dim=1)[:, None] * length + queries.norm(dim=1)[:, None] * lost)
    estimate = true + 2 * (queries @ rows.T - q @ x.T)
    limit = (estimate + error).kthvalue(k, dim=1).values
    return (estimate - error <= limit[:, None]).sum(dim=1)


def by_tile(values: torch.Tensor) -> torch.Tensor:
    """The largest of each tile, at every row of it."""
    return torch.cat([tile.amax().expand(len(tile)) for tile in values.split(TILE)])


def rounded(rows: torch.Tensor, kind: str) -> torch.Tensor:
    """float64."""
    if kind == "float16":
        return (rows * UNIT).half().double() / UNIT
    if kind == "bfloat16":
        return rows.bfloat16().double()
    largest = {"int8": 127, "fp8": torch.finfo(torch.float8_e4m3fn).max}[kind]
    unit = largest / rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
    scaled = rows * unit
    return (scaled.round() if kind == "int8" else scaled.to(torch.float8_e4m3fn).double()) / unit


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table("probe", title=f"{title}\nmean / 99th percentile", title_justify="left")
    for head in ("D", "cells", *TYPES):
        table.add_column(head, justify="right")
    for row in rows:
        told = [f"{row[kind]['mean']:.0f} / {row[kind]['p99']:.0f}" for kind in TYPES]
        table.add_row(row["probe"], str(row["width"]), str(row["cells"]), *told)
    Console(width=140).print(table)
