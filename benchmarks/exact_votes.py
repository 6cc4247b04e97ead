"""How long exact votes take, beside other exact searches and beside what the processor could do at most.

python benchmarks/exact_votes.py probes RUN        every probe of a stored member, all points as queries
python benchmarks/exact_votes.py gaussian          the worst case: noise without any structure
python benchmarks/exact_votes.py growth            how the time grows with the number of points
python benchmarks/exact_votes.py disk DIRECTORY    a bank of 1,000,000 rows under a memory budget (exact_disk.py)
python benchmarks/exact_votes.py modes CONFIG      whole runs, votes: all and votes: until-decided (exact_modes.py)
python benchmarks/exact_votes.py layers RUN        what can be left out, by layer and by bound (exact_layers.py)
python benchmarks/exact_votes.py screens RUN       what products in few bits leave to be measured (exact_screens.py)

The first three time whole calls: for Leadline all of survey, clustering, conversion, search, certificate and re-rank.
Competitors run in this process, in turns with Leadline; a ratio is the competitor's time divided by Leadline's, in the
same round, and the figure told is the median of rounds. Writes
benchmarks/results/exact_votes-COMMAND-NAME-PROCESSOR.json.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import exact_disk
import exact_layers
import exact_modes
import exact_screens
import faiss
import numpy as np
import torch
import typer
from inputs import DeepLayer
from record import stamp, write_result
from rich.console import Console
from rich.table import Table
from searches import Task, by_faiss, by_leadline, by_scikit_learn, by_torch, timed
from threadpoolctl import threadpool_limits

from leadline.knn import Cost, screen
from leadline.knn.arrays import Array
from leadline.layers import open_layers

PACKAGES = ("leadline", "torch", "numba", "numpy", "faiss-cpu", "scikit-learn")
WARM_UP = 1024  # queries of a first search that is not timed: loops are compiled, products are prepared

app = typer.Typer(
    help="Exact votes: time beside other exact searches and the processor's limit.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(exact_disk.disk)
app.command()(exact_modes.modes)
app.command()(exact_layers.layers)
app.command()(exact_screens.screens)

Rounds = Annotated[int, typer.Option(min=1, help="times that each search is run")]
Threads = Annotated[int, typer.Option(min=1)]
K = Annotated[int, typer.Option(min=1, help="neighbours that vote")]
CORES = os.cpu_count() or 1


def race(task: Task, rounds: int, limits: dict[str, float], faiss_queries: int | None = None) -> dict[str, Any]:
    """Leadline and faiss in turns; faiss on some of the queries where so many are too slow, its time scaled by them."""
    theirs = task.some(faiss_queries or len(task.queries))
    scale = len(task.queries) / len(theirs.queries)
    for search in (by_leadline, by_faiss):
        search(task.some(WARM_UP))
    leadline_s, faiss_s = [], []
    for _ in range(rounds):
        seconds, (found, cost, plan) = timed(by_leadline, task)
        leadline_s.append(seconds)
        seconds, other = timed(by_faiss, theirs)
        faiss_s.append(seconds * scale)
    winners = task.winners(found) if scale == 1 else task.winners(by_leadline(theirs)[0])
    return {
        "queries": len(task.queries),
        "bank": len(task.bank),
        "width": task.bank.shape[1],
        "leadline_s": statistics.median(leadline_s),
        "faiss_s": statistics.median(faiss_s),
        "faiss_queries": len(theirs.queries),
        "faiss_extrapolated": scale > 1,
        "ratio": statistics.median(b / a for a, b in zip(leadline_s, faiss_s, strict=True)),
        "leadline_rounds_s": leadline_s,
        "faiss_rounds_s": faiss_s,
        "winners_that_differ_from_faiss": int((winners != task.winners(other)).sum()),
        "plan": plan,
        **spent(task, cost, statistics.median(leadline_s), limits),
    }


def spent(task: Task, cost: Cost, seconds: float, limits: dict[str, float]) -> dict[str, Any]:
    """What a search did, in numbers and as shares: of all pairs, of their products, of what the processor can do."""
    pairs, n = len(task.queries) * len(task.bank), len(task.queries)
    limit = limits["bfloat16_flops_per_s"]
    return {
        "cost": asdict(cost),
        "share_of_pairs_screened": cost.pairs / pairs,
        "share_of_pairs_measured": cost.measured / pairs,
        "share_of_flops": cost.flops / task.flops,
        "flops_rate_of_limit": cost.flops / seconds / limit,
        "all_pairs_rate_of_limit": task.flops / seconds / limit,
        "certified_share": cost.certified / n,
        "reranked_share": cost.reranked / n,
        "fell_through_share": cost.fell_through / n,
    }


def once(name: str, search: Callable[[Task], Array], task: Task, n: int, row: dict[str, Any]) -> dict[str, Any]:
    """A slow competitor, once, on n of the queries; its time for all is extrapolated, Leadline's is measured."""
    some = task.some(n)
    search(task.some(64))
    seconds, other = timed(search, some)
    all_queries = seconds * len(task.queries) / len(some.queries)
    return {
        f"{name}_queries": len(some.queries),
        f"{name}_measured_s": seconds,
        f"{name}_extrapolated_s": all_queries,
        f"{name}_ratio": all_queries / row["leadline_s"],
        f"{name}_winners_that_differ": int((some.winners(by_leadline(some)[0]) != some.winners(other)).sum()),
    }


def machine_limits(threads: int) -> dict[str, float]:
    """The fastest of 30 products of 2048 x 1024 and 1024 x 2048 values into a reused buffer, by type: FLOP/s."""
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    threadpool_limits(threads)  # numpy's and scikit-learn's
    limits = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = torch.randn(2048, 1024).to(dtype), torch.randn(2048, 1024).to(dtype)
        out = torch.empty(2048, 2048, dtype=dtype)
        seconds = []
        for _ in range(30):
            started = time.perf_counter()
            torch.mm(a, b.T, out=out)
            seconds.append(time.perf_counter() - started)
        limits[f"{str(dtype).removeprefix('torch.')}_flops_per_s"] = 2 * 2048 * 2048 * 1024 / min(seconds)
    return limits


COLUMNS: dict[str, tuple[str, str]] = {
    "leadline s": ("leadline_s", ".2f"),
    "faiss s": ("faiss_s", ".2f"),
    "ratio": ("ratio", ".2f"),
    "scikit-learn": ("scikit_learn_ratio", ".1f"),
    "cdist+topk": ("torch_ratio", ".1f"),
    "pairs": ("share_of_pairs_screened", ".4f"),
    "measured": ("share_of_pairs_measured", ".5f"),
    "flops": ("share_of_flops", ".4f"),
    "of limit": ("flops_rate_of_limit", ".3f"),
    "all pairs of limit": ("all_pairs_rate_of_limit", ".2f"),
    "certified": ("certified_share", ".3f"),
    "reranked": ("reranked_share", ".3f"),
    "differ": ("winners_that_differ_from_faiss", "d"),
}


def print_rows(title: str, names: Iterable[str], rows: list[dict[str, Any]], limits: dict[str, float]) -> None:
    """One line a row; columns that the rows do not have are left out."""
    columns = {head: column for head, column in COLUMNS.items() if column[0] in rows[0]}
    rates = ", ".join(f"{name.partition('_')[0]} {rate / 1e9:,.0f} GFLOP/s" for name, rate in limits.items())
    table = Table(title=f"{title}; limit of this machine's products: {rates}", title_justify="left")
    table.add_column("")
    for head in columns:
        table.add_column(head, justify="right")
    for name, row in zip(names, rows, strict=True):
        table.add_row(name, *(f"{row[key]:{form}}" for key, form in columns.values()))
    Console(width=170).print(table)


def tell(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """Say at once what is known: the table comes when all is done."""
    print(f"{name}: {row['leadline_s']:.2f} s, faiss {row['faiss_s']:.2f} s; {row['plan']}", flush=True)
    return row


@app.command()
def probes(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="directory of a run")],
    member: Annotated[str | None, typer.Option(help="by default the first")] = None,
    rounds: Rounds = 3,
    threads: Threads = CORES,
    k: K = 30,
    slow_queries: Annotated[int, typer.Option(min=64, help="queries of scikit-learn and torch")] = 2048,
) -> None:
    """Every probe of a stored member, all points as queries, each left out of its own neighbours."""
    limits = machine_limits(threads)
    given = open_layers(run, member)
    own = np.full(len(given.labels), -1)
    own[given.bank_ids] = np.arange(len(given.bank_ids))
    rows = []
    for layer, place in enumerate(given.names):
        with given.rows(layer) as values:
            everything = np.array(values)  # searches are timed on what lies in memory
        task = Task(everything[given.bank_ids], given.labels[given.bank_ids], everything, own, k)
        row = {"probe": place, **tell(place, race(task, rounds, limits))}
        row |= once("scikit_learn", by_scikit_learn, task, slow_queries, row)
        row |= once("torch", by_torch, task, slow_queries, row)
        rows.append(row)
    stage = {
        name: sum(row[f"{name}_s"] for row in rows) / sum(row["leadline_s"] for row in rows)
        for name in ("faiss", "scikit_learn_extrapolated", "torch_extrapolated")
    }
    print_rows(f"{given.title}, k = {k}", [f"{row['probe']} {row['width']}" for row in rows], rows, limits)
    print("all probes together, times Leadline:", {key: round(value, 2) for key, value in stage.items()})
    write_result(
        f"exact_votes-probes-{given.about['name']}",
        {
            **stamp(PACKAGES, threads),
            "run": given.about,
            "k": k,
            "rounds": rounds,
            "limits": limits,
            "probes": rows,
            "ratio_of_all_probes": stage,
        },
    )


@app.command()
def gaussian(
    rounds: Rounds = 3,
    threads: Threads = CORES,
    k: K = 30,
    widths: Annotated[list[int], typer.Option("--width", min=1)] = [128, 512, 2048],  # noqa: B006
    bank: Annotated[int, typer.Option(min=64, help="rows")] = 54_000,
    queries: Annotated[int, typer.Option(min=64)] = 4096,
    float32: Annotated[
        bool, typer.Option("--float32", help="as a processor without instructions for bfloat16 and products of int8")
    ] = False,
) -> None:
    """Gaussian noise: no clusters and no directions that matter, so nothing can be left out beforehand."""
    limits = machine_limits(threads)
    if float32:
        screen.precisions = lambda: [torch.float32, torch.int16]
    rows = []
    for width in widths:
        random = np.random.default_rng(0)
        task = Task(
            random.standard_normal((bank, width), np.float32),
            random.integers(0, 10, bank),
            random.standard_normal((queries, width), np.float32),
            np.full(queries, -1),
            k,
        )
        rows.append(tell(f"D = {width}", race(task, rounds, limits)))
    name = "float32" if float32 else "default"
    print_rows(f"Gaussian noise, {bank:,} x {queries:,}", [f"D = {width}" for width in widths], rows, limits)
    write_result(
        f"exact_votes-gaussian-{name}",
        {**stamp(PACKAGES, threads), "k": k, "rounds": rounds, "limits": limits, "widths": rows},
    )


@app.command()
def growth(
    rounds: Rounds = 2,
    threads: Threads = CORES,
    k: K = 30,
    points: Annotated[list[int], typer.Option("--points", min=64)] = [10_000, 30_000, 100_000, 300_000],  # noqa: B006
    latent: Annotated[int, typer.Option(min=1, help="intrinsic dimensions")] = 8,
    width: Annotated[int, typer.Option(min=1)] = 512,
    faiss_points: Annotated[int, typer.Option(help="beyond so many, faiss has some of the queries only")] = 100_000,
    faiss_queries: Annotated[int, typer.Option(min=64, help="how many it has then")] = 20_000,
) -> None:
    """All points as queries, each left out of its own neighbours, for more and more points of one distribution."""
    limits = machine_limits(threads)
    layer = DeepLayer(latent, width)
    rows = []
    for n in points:
        values, labels = layer.draw(n, seed=0)
        task = Task(values, labels, values, np.arange(n), k)
        rows.append(tell(f"{n:,} points", race(task, rounds, limits, None if n <= faiss_points else faiss_queries)))
    whole = [row for row in rows if not row["faiss_extrapolated"]]
    exponents = {
        "leadline": exponent(rows, "leadline_s"),
        "faiss": exponent(rows, "faiss_s"),
        "faiss_measured_in_full": exponent(whole, "faiss_s") if len(whole) > 1 else None,
    }
    print_rows(f"{latent} intrinsic dimensions of {width}", [f"{n:,}" for n in points], rows, limits)
    print("time grows as N to the power of:", {key: value and round(value, 3) for key, value in exponents.items()})
    if len(whole) < len(rows):
        print(f"faiss beyond {faiss_points:,} points: {faiss_queries:,} queries, extrapolated by their number")
    write_result(
        f"exact_votes-growth-latent{latent}",
        {
            **stamp(PACKAGES, threads),
            "generator": " ".join((DeepLayer.__doc__ or "").split()),
            "latent": latent,
            "k": k,
            "rounds": rounds,
            "limits": limits,
            "sizes": rows,
            "exponents": exponents,
        },
    )


def exponent(rows: list[dict[str, Any]], key: str) -> float:
    """The slope of log time over log number of points, by least squares."""
    return float(np.polyfit(np.log([row["bank"] for row in rows]), np.log([row[key] for row in rows]), 1)[0])


if __name__ == "__main__":
    app()
