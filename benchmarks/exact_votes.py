"""Exact votes against faiss's exact search: every probe of a run's member, all points as queries, leave-one-out.

leadline run fashion-mnist-cpu --out RUN; python benchmarks/exact_votes.py RUN [--rounds 3] [--threads 2]

Both searches run in this process, alternating; the whole call is timed (for Leadline: survey, clustering, rounding,
search, certificate, re-rank). Writes benchmarks/results/exact_votes-NAME.json.
"""

import argparse
import json
import os
import statistics
import time
from importlib import metadata
from pathlib import Path

import faiss
import numpy as np
import torch

import leadline
from leadline.cluster.driver import processor
from leadline.config import load_config
from leadline.embedding import embed_batch
from leadline.knn import Bank, count_votes
from leadline.members.architectures import build
from leadline.members.probes import Probe
from leadline.members.weights import load_weights
from leadline.points import open_points


def embeddings(run: leadline.Run, member: str) -> tuple[list[Probe], list[np.ndarray], np.ndarray, np.ndarray]:
    """Probes, embeddings [N, width] of each, labels [N] and training ids of a stored member."""
    record = json.loads(run.directory.record("train", member).read_text())
    probes = [Probe(**probe) for probe in record["probes"]]
    config = load_config(run.manifest["configuration"])
    points = open_points(config.points)
    entry = next(entry for entry in config.members if member.startswith(f"{entry.label}-"))
    model = build(entry.architecture, entry.parameters, points.input_shape, len(points.label_names), 0)
    load_weights(model, run.directory.weights(member))
    batches = [
        embed_batch(
            model, probes, torch.from_numpy(points.read(np.arange(first, min(first + 256, len(points))))), first, member
        )
        for first in range(0, len(points), 256)
    ]
    inside = run.sql(f"SELECT in_training FROM depths WHERE member = '{member}' ORDER BY point_id")[
        "in_training"
    ].to_numpy()
    values = [np.concatenate([batch.embeddings[i] for batch in batches]) for i in range(len(probes))]
    return probes, values, points.labels, np.flatnonzero(inside)


def by_leadline(values: np.ndarray, bank_ids: np.ndarray, own: np.ndarray, k: int) -> tuple[np.ndarray, object]:
    return Bank(values[bank_ids]).search(values, k, own)


def by_faiss(values: np.ndarray, bank_ids: np.ndarray, own: np.ndarray, k: int) -> np.ndarray:
    """k + 1 neighbours, without the point itself."""
    _, found = faiss.knn(values, values[bank_ids], k + 1)
    is_own = found == own[:, None]
    is_own[~is_own.any(axis=1), k] = True
    return found[~is_own].reshape(len(values), k)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--member")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--k", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    faiss.omp_set_num_threads(arguments.threads)
    run = leadline.open(arguments.run)
    member = arguments.member or run.sql("SELECT min(member) FROM members")[0][0].as_py()
    probes, embedded, labels, bank_ids = embeddings(run, member)
    n = len(labels)
    own = np.where(np.isin(np.arange(n), bank_ids), np.searchsorted(bank_ids, np.arange(n)), -1)
    by_leadline(embedded[-1][:5000], np.arange(5000), np.full(5000, -1), 5)  # compiles, or reads what was compiled
    by_leadline(embedded[1][:5000], np.arange(5000), np.full(5000, -1), 5)
    rows = []
    for probe, values in zip(probes, embedded, strict=True):
        ours, theirs = [], []
        for _ in range(arguments.rounds):
            started = time.perf_counter()
            found, cost = by_leadline(values, bank_ids, own, arguments.k)
            ours.append(time.perf_counter() - started)
            started = time.perf_counter()
            other = by_faiss(values, bank_ids, own, arguments.k)
            theirs.append(time.perf_counter() - started)
        votes, others = (count_votes(labels[bank_ids][rows_]) for rows_ in (found, other))
        rows.append(
            {
                "probe": probe.name,
                "width": probe.width,
                "leadline_s": statistics.median(ours),
                "faiss_s": statistics.median(theirs),
                "ratios": [b / a for a, b in zip(ours, theirs, strict=True)],
                "ratio": statistics.median(b / a for a, b in zip(ours, theirs, strict=True)),
                "share_of_pairs": cost.pairs / n / len(bank_ids),
                "certified": cost.certified / n,
                "reranked": cost.reranked / n,
                "fell_through": cost.fell_through / n,
                "winners_that_differ_from_faiss": int((votes.winner != others.winner).sum()),
            }
        )
        print(
            {key: round(value, 4) if isinstance(value, float) else value for key, value in rows[-1].items()}, flush=True
        )
    total = sum(row["faiss_s"] for row in rows) / sum(row["leadline_s"] for row in rows)
    print(f"all probes together: {total:.2f} times faiss")
    result = {
        "command": f"python benchmarks/exact_votes.py RUN --rounds {arguments.rounds} --threads {arguments.threads}",
        "run": {"name": run.manifest["name"], "fingerprint": run.manifest["fingerprint"], "member": member},
        "points": n,
        "bank": len(bank_ids),
        "k": arguments.k,
        "hardware": f"{processor()}, {os.cpu_count()} cores, {arguments.threads} threads",
        "versions": {name: metadata.version(name) for name in ("leadline", "torch", "numba", "numpy", "faiss-cpu")},
        "probes": rows,
        "ratio_of_all_probes": total,
    }
    path = Path(__file__).parent / "results" / f"exact_votes-{run.manifest['name']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
