"""Approximate neighbours beside exact ones: time, memory, and what becomes of neighbours, votes and depths.

Nothing here knows of Ray: `cluster.bench` measures the layers of the same comparison on many machines.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from leadline import machine
from leadline.depth import depth_from_votes
from leadline.errors import LeadlineError
from leadline.knn import MEMORY, ExactBank, Index, bank_on, build_index, count_votes, parse_method, usable_method
from leadline.knn.arrays import Array, Rows, Shards, copied
from leadline.knn.audit import draw, interval, recall_at_k
from leadline.knn.choice import candidates
from leadline.knn.engines import GPU_METHODS
from leadline.knn.exact import refuse_too_few
from leadline.layers import Layers, open_layers

PACKAGES = ("leadline", "torch", "numpy", "numba", "faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs", "hnswlib")
EXACT = "exact"
WARM_UP = 1024  # queries, and rows of an index, of a first search that is not timed
SEED = 0  # of the sample of queries
QUALITIES = ("recall", "vote_agreement", "depth_agreement")


@dataclass(frozen=True)
class Question:
    """One layer: bank rows [M, D], queries [Q, D], and for each the bank row it must not have (None: for no query)."""

    bank: Rows
    queries: Rows
    own: Array | None
    k: int


@dataclass(frozen=True)
class Answer:
    """What one method answered: neighbours int64 [Q, k], ascending in each query; and what it took."""

    neighbours: Array
    figures: dict[str, Any]


def answer(method: str, question: Question, device: str) -> Answer:
    """Make a method ready and search by it once, both timed, after a smaller search that compiles and fills caches.

    device: where exact search runs. Figures: `plan` is how it was searched, with every parameter; seconds to warm up,
    to build, to search; `index_bytes` beside the rows; `fell_through`, of an index the queries that were searched
    exactly, because it proposed too few rows for them.
    """
    started = time.perf_counter()
    # What exact search compiles depends on what it decides for this very bank.
    some = question.bank if method == EXACT else question.bank[: max(WARM_UP, question.k)]
    _ready(method, some, device).search(question.queries[:WARM_UP], question.k)
    warm = time.perf_counter()
    search = _ready(method, question.bank, device)
    built = time.perf_counter()
    neighbours, cost = search.search(question.queries, question.k, question.own)
    done = time.perf_counter()
    figures = {
        "plan": search.plan,
        "warm_up_seconds": warm - started,
        "build_seconds": built - warm,
        "search_seconds": done - built,
        "index_bytes": search.size_bytes,
        "fell_through": cost.fell_through if method != EXACT else 0,
    }
    return Answer(neighbours, figures)


def _ready(method: str, rows: Rows, device: str) -> ExactBank | Index:
    return bank_on(rows, device) if method == EXACT else build_index(method, rows)


@dataclass(frozen=True)
class Comparison:
    """What is compared with what; small, so that it can be sent to an actor.

    methods: their texts, exact first; left_out: usual methods that cannot be used here, and why; queries: how many
    points are asked, drawn at random, None for all; k: neighbours; device: of exact search, and of a member's network.
    """

    path: Path
    member: str | None
    methods: tuple[str, ...]
    left_out: dict[str, str]
    queries: int | None
    k: int
    device: str
    threads: int

    def query_ids(self, layers: Layers) -> Array:
        """The points that are asked, int64 [Q], ascending."""
        n = len(layers.labels)
        return draw(n, n if self.queries is None else self.queries, SEED)[0]


@dataclass(frozen=True)
class Measured:
    """One layer: its record; of each method and query, winner int32 [m, Q] and share of exact neighbours float32."""

    record: dict[str, Any]
    winners: Array
    recall: Array


def prepare(
    path: Path, member: str | None, methods: Sequence[str], queries: int | None, k: int | None, device: str | None,
    threads: int,
) -> Comparison:  # fmt: skip
    """Check everything that can be refused before anything is measured.

    methods: texts for `parse_method`; none stands for the usual ones that can be used here. device: by default a GPU
    where torch sees one. Raises LeadlineError for a method that is not known or cannot be used, for fewer than k rows
    in the bank, and what `open_layers` raises.
    """
    layers = open_layers(path, member)
    k = k or layers.k
    refuse_too_few(len(layers.bank_ids), k, layers.own)
    chosen, left_out = list(methods), dict[str, str]()
    for text in methods:
        usable_method(text)
    if not methods:
        chosen, left_out = usual_methods(len(layers.bank_ids))
    texts = dict.fromkeys([EXACT, *(str(parse_method(text)) for text in chosen)])
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Comparison(path, member, tuple(texts), left_out, queries, k, device, threads)


def usual_methods(n_bank: int) -> tuple[list[str], dict[str, str]]:
    """What is worth a comparison for a bank of so many rows: methods that can be used here, and why others cannot."""
    usual = ["flat", *candidates(n_bank), "ivf-pq", "hnsw", "hnsw-sq8", "hnswlib", *GPU_METHODS]
    usable, left_out = [EXACT], dict[str, str]()
    for text in usual:
        try:
            usable_method(text)
        except LeadlineError as error:
            left_out[text] = str(error)
        else:
            usable.append(text)
    return usable, left_out


def bench_knn(comparison: Comparison, tell: Callable[[str], None]) -> dict[str, Any]:
    """Compare methods layer by layer on this machine: the record that `join` gives. tell: is told of each layer."""
    layers = open_layers(comparison.path, comparison.member, comparison.device)
    measured = []
    for layer, name in enumerate(layers.names):
        started = time.perf_counter()
        measured.append(measure(comparison, layers, layer))
        tell(f"{name}: {len(comparison.methods)} methods in {time.perf_counter() - started:.1f} s")
    return join(comparison, layers, measured)


def measure(comparison: Comparison, layers: Layers, layer: int) -> Measured:
    """Build and search every method on one layer, one after another, and hold them against exact search.

    Bank and queries are read into memory where each takes at most MEMORY bytes, before any clock runs; else every
    method reads them from the file. Seconds of search are also told for all points, at the speed at which a sample was
    answered.
    """
    ids = comparison.query_ids(layers)
    labels = layers.labels[layers.bank_ids]
    own = layers.own
    record: dict[str, Any] = {"layer": layers.names[layer], "width": layers.widths[layer]}
    rows, winners, recalls = [], [], []
    with _threads(comparison.threads), layers.rows(layer) as values:
        question = Question(
            _in_memory(Shards([values], layers.bank_ids)),
            _in_memory(Shards([values], ids)),
            own[ids] if own is not None else None,
            comparison.k,
        )
        for method in comparison.methods:
            given = answer(method, question, comparison.device)
            if method == EXACT:
                exact = given.neighbours  # it is the first
            winners.append(count_votes(labels[given.neighbours]).winner)
            recalls.append(recall_at_k(given.neighbours, exact).astype(np.float32))
            all_points = given.figures["search_seconds"] * len(layers.labels) / len(ids)
            seconds = given.figures["build_seconds"] + all_points
            rows.append({"method": method, **given.figures, "seconds": seconds})
    for row, winner, recall in zip(rows, winners, recalls, strict=True):
        # Exact search is compared with itself: that has no sampling error.
        told = partial(_told, is_sample=len(ids) < len(layers.labels) and row["method"] != EXACT)
        row |= told("recall", recall) | told("vote_agreement", winner == winners[0])
    _mark_pareto(rows)
    return Measured({**record, "methods": rows}, np.stack(winners), np.stack(recalls))


def join(comparison: Comparison, layers: Layers, measured: Sequence[Measured]) -> dict[str, Any]:
    """The record of a comparison: what was compared, every layer, and each method used at all layers together."""
    ids = comparison.query_ids(layers)
    is_sample = len(ids) < len(layers.labels)
    depths = None
    if layers.predictions is not None:
        said = layers.predictions[ids]
        depths = [
            depth_from_votes(np.stack([one.winners[i] for one in measured], axis=1), said)
            for i in range(len(comparison.methods))
        ]
    totals = []
    for i, method in enumerate(comparison.methods):
        rows = [one.record["methods"][i] for one in measured]
        summed = ("build_seconds", "search_seconds", "seconds", "index_bytes", "fell_through")
        row: dict[str, Any] = {"method": method, **{key: sum(each[key] for each in rows) for key in summed}}
        told = partial(_told, is_sample=is_sample and method != EXACT)
        # A query's mean over the layers lies between 0 and 1, as a share does.
        row |= told("recall", np.stack([one.recall[i] for one in measured]).mean(axis=0, dtype=np.float64))
        row |= told("vote_agreement", np.stack([one.winners[i] == one.winners[0] for one in measured]).mean(axis=0))
        if depths is not None:
            error = np.abs(depths[i] - depths[0])
            row |= told("depth_agreement", error == 0) | told("depth_error", error, largest=len(measured))
        totals.append(row)
    _mark_pareto(totals)
    return {
        **machine.stamp("leadline", PACKAGES, comparison.threads, comparison.device),
        "device": comparison.device,
        "source": layers.about,
        "title": layers.title,
        "points": len(layers.labels),
        "bank": len(layers.bank_ids),
        "queries": len(ids),
        "is_sample": is_sample,
        "seed": SEED,
        "k": comparison.k,
        "leave_one_out": layers.leave_one_out,
        "left_out": comparison.left_out,
        "layers": [one.record for one in measured],
        "methods": totals,
    }


def pareto(seconds: Sequence[float], values: Sequence[float]) -> list[bool]:
    """Whether no other is as fast and as good, and better in one of the two; values: more is better."""
    pairs = list(zip(seconds, values, strict=True))
    return [
        not any(s <= second and v >= value and (s, v) != (second, value) for s, v in pairs) for second, value in pairs
    ]


def _mark_pareto(rows: list[dict[str, Any]]) -> None:
    """Tell each row whether it lies on the front of time and each measure that it has."""
    measures = [name for name in QUALITIES if name in rows[0]]
    marks = {name: pareto([row["seconds"] for row in rows], [row[name] for row in rows]) for name in measures}
    for i, row in enumerate(rows):
        row["pareto"] = {name: marks[name][i] for name in measures}


def _told(name: str, values: Array, *, is_sample: bool, largest: float = 1.0) -> dict[str, float]:
    """A mean, with the ends of its interval where it is of a sample: of all points it has no sampling error."""
    found = interval(values, largest)
    return found.columns(name) if is_sample else {name: found.value}


def _in_memory(rows: Rows) -> Rows:
    n, width = rows.shape
    return copied(rows, slice(0, n)) if n * width * rows[:1].itemsize <= MEMORY else rows


@contextmanager
def _threads(n: int) -> Iterator[None]:
    """torch, and with it every method, computes with so many threads; then as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
