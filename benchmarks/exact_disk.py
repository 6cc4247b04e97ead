"""Votes with a bank that lies on disk and a budget of memory that is smaller than it.

python benchmarks/exact_votes.py disk DIRECTORY     writes the bank there (2 GB) where it is not yet

The search is a process of its own (exact_disk_search.py), so that its peak of memory is no one else's.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from inputs import DeepLayer
from record import stamp, write_result
from scipy.spatial.distance import cdist

from leadline.knn.arrays import Array

PACKAGES = ("leadline", "torch", "numba", "numpy", "scipy")
SHARD = 100_000  # rows of a file
CHUNK = 20_000  # rows that are made, or measured by brute force, at once
LATENT = 8


def disk(
    directory: Annotated[Path, typer.Argument(help="where the bank lies, or is written")],
    rows: Annotated[int, typer.Option(min=64)] = 1_000_000,
    width: Annotated[int, typer.Option(min=1)] = 512,
    queries: Annotated[int, typer.Option(min=1)] = 2048,
    budget_mib: Annotated[int, typer.Option(min=1, help="memory budget of the search")] = 1024,
    checked: Annotated[int, typer.Option(min=1, help="queries held against float64 brute force")] = 64,
    threads: Annotated[int, typer.Option(min=1)] = os.cpu_count() or 1,
    k: Annotated[int, typer.Option(min=1)] = 30,
) -> None:
    """Votes from a bank on disk under a memory budget: time, peak of memory, and rightness on a sample."""
    described = {"rows": rows, "width": width, "queries": queries, "latent": LATENT}
    write_bank(directory, described)
    searched = search(directory, k, budget_mib << 20, threads)
    votes = np.load(directory / "votes.npy")
    sample = np.linspace(0, queries - 1, min(checked, queries)).astype(np.int64)
    wrong = int((votes[sample] != brute_force(directory, sample, k)).any(axis=1).sum())
    result = {
        **stamp(PACKAGES, threads),
        "bank": {**described, "bytes": rows * width * 4, "files": -(-rows // SHARD)},
        "k": k,
        "memory_budget": budget_mib << 20,
        "search": searched,
        "checked": len(sample),
        "wrong": wrong,
    }
    print(f"bank {rows:,} x {width} float32, {rows * width * 4 / 2**20:,.0f} MiB on disk; budget {budget_mib:,} MiB")
    print(f"{queries:,} queries: {searched['seconds']:.1f} s, bank opened, made ready and searched")
    for name, size in searched["memory"].items():
        print(f"  {name.replace('_', ' ')}: {size / 2**20:,.0f} MiB")
    print(f"votes that differ from float64 brute force: {wrong} of {len(sample)} queries")
    write_result(f"exact_votes-disk-{rows}x{width}", result)


def write_bank(directory: Path, described: dict[str, int]) -> None:
    """Rows in shards, labels, queries; the description is written last, so that a bank without one is written again.

    Labels are drawn at random, whatever the class of the row: so k votes go to many classes, and one wrong neighbour
    shows in the counts.
    """
    record = directory / "bank.json"
    if record.is_file():
        before = json.loads(record.read_text())
        if before != described:
            sys.exit(f"{directory}: holds another bank, {before}; give another directory")
        return
    directory.mkdir(parents=True, exist_ok=True)
    layer = DeepLayer(described["latent"], described["width"])
    for shard, first in enumerate(range(0, described["rows"], SHARD)):
        n = min(SHARD, described["rows"] - first)
        path = directory / f"bank-{shard:04d}.npy"
        file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(n, described["width"]))
        for start in range(0, n, CHUNK):
            stop = min(start + CHUNK, n)
            file[start:stop], _ = layer.draw(stop - start, seed=first + start)
        file.flush()
    np.save(directory / "labels.npy", np.random.default_rng(0).integers(0, 10, described["rows"]))
    # No part of the bank is drawn with this seed.
    np.save(directory / "queries.npy", layer.draw(described["queries"], seed=described["rows"])[0])
    record.write_text(json.dumps(described))


def search(directory: Path, k: int, budget: int, threads: int) -> dict[str, Any]:
    """Run the search in a fresh process; its own report, and the peaks of memory that were seen from outside.

    Pages of mapped files count as resident, although the system takes them back when it needs room: so the peak of what
    the process holds itself (RssAnon, looked at every 20 ms) is told apart.
    """
    script = Path(__file__).with_name("exact_disk_search.py")
    command = [sys.executable, str(script), str(directory), str(k), str(budget), str(threads)]
    own = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        while running.poll() is None:
            own = max(own, resident(running.pid, "RssAnon"))
            time.sleep(0.02)
        report = running.stdout.read() if running.stdout else ""
    if running.returncode:
        sys.exit(f"{script.name} ended with exit code {running.returncode}")
    told: dict[str, Any] = json.loads(report)
    told["memory"]["peak_RssAnon"] = own
    return told


def resident(process: int, field: str) -> int:
    """Bytes, from /proc; 0 for a process that has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith(f"{field}:")), 0)


def brute_force(directory: Path, sample: Array, k: int) -> Array:
    """Votes int64 [n, 4] of some queries, by float64 differences over the whole bank, CHUNK rows at a time."""
    queries = np.load(directory / "queries.npy", mmap_mode="r")[sample].astype(np.float64)
    distances, rows, first = np.full((len(sample), 0), np.inf), np.full((len(sample), 0), -1), 0
    for path in sorted(directory.glob("bank-*.npy")):
        shard = np.load(path, mmap_mode="r")
        for start in range(0, len(shard), CHUNK):
            chunk = shard[start : start + CHUNK].astype(np.float64)
            numbers = np.broadcast_to(np.arange(first + start, first + start + len(chunk)), (len(sample), len(chunk)))
            distances = np.concatenate([distances, cdist(queries, chunk, "sqeuclidean")], axis=1)
            rows = np.concatenate([rows, numbers], axis=1)
            # Rows ascend, so that a stable sort leaves equal distances in the order of rows.
            order = distances.argsort(axis=1, kind="stable")[:, :k]
            distances, rows = np.take_along_axis(distances, order, 1), np.take_along_axis(rows, order, 1)
        first += len(shard)
    return np.array([count(votes) for votes in np.load(directory / "labels.npy")[rows]])


def count(labels: Array) -> tuple[int, int, int, int]:
    """Winner, its votes, runner-up (-1: none), its votes; ties to the lower class."""
    counts = np.bincount(labels, minlength=2)
    winner = int(counts.argmax())
    votes = int(counts[winner])
    counts[winner] = 0
    runner_up = int(counts.argmax())
    return winner, votes, runner_up if counts[runner_up] else -1, int(counts[runner_up])
