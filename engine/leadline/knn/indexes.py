"""Approximate neighbours: an index proposes candidates, exact distances decide among them."""

import hashlib
import json
import os
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from leadline.errors import LeadlineError, one_line
from leadline.knn.arrays import Array, Rows, copied
from leadline.knn.engines import GPU_METHODS, Engine, Placed, build_engine, package_of, read_engine
from leadline.knn.exact import (
    MEMORY,
    NOTHING,
    Bank,
    Cost,
    refuse_non_finite,
    refuse_other_width,
    refuse_too_few,
    survey,
)
from leadline.knn.methods import GPU_MOST, Method, parse_method, resolve
from leadline.knn.rank import nearest_of
from leadline.knn.screen import scale_of

SPARE = 32  # candidates beyond k: float32 may put neighbours of nearly equal distance in another order


class Index:
    """A bank's rows, and an index that proposes neighbours among them: searched as a `Bank` is, but not exactly.

    Made by `build_index` and `load_index`. method: its text with all parameters, which is also its plan, as a Bank has
    one; n_bank, width: of the rows; size_bytes: of the index when it is saved.
    """

    def __init__(self, method: Method, bank: Placed, engine: Engine, memory_budget: int) -> None:
        self._method, self._bank, self._engine, self._memory_budget = method, bank, engine, memory_budget
        self.method = self.plan = str(method)
        self.n_bank, self.width = bank.rows.shape

    @cached_property
    def size_bytes(self) -> int:
        return self._engine.size_bytes

    def search(self, queries: Rows, k: int, exclude: Array | None = None) -> tuple[Array, Cost]:
        """About the k nearest rows of each query: the nearest among those that the index proposes.

        queries [Q, D], real; exclude int64 [Q], the row that a query must not have, -1 for none. Returns rows int64
        [Q, k], ascending in each query, always k different ones, and the Cost.

        The index is asked for k + 33 candidates, PQ for rerank * k + 1, hnsw-sq8 for at least ef; of these the k
        nearest are taken by the exact float64 distance, ties by lower row. A query to which the index gives fewer than
        k rows is searched exactly. In the Cost, `measured` are the candidates, `reranked` the queries that they
        answered, `fell_through` those that were searched exactly, with what that took; what the index computes inside
        is not counted.

        Raises LeadlineError for values that are not finite, other widths, fewer than k rows to choose from, and more
        neighbours than a GPU's index gives.
        """
        refuse_other_width(self._bank.rows, queries)
        refuse_too_few(self.n_bank, k, exclude)
        if self._method.name in GPU_METHODS and self._candidates(k) > GPU_MOST:
            too_many = f"k={k}" + (" or rerank" if "rerank" in dict(self._method.parameters) else "")
            raise LeadlineError(f"k: {self._method.name} gives at most {GPU_MOST} candidates; lower {too_many}")
        n_queries = queries.shape[0]
        own = np.full(n_queries, -1) if exclude is None else exclude
        chosen, cost = np.empty((n_queries, k), np.int64), NOTHING
        for part in self._bank.slices(n_queries):
            asked = copied(queries, part)
            refuse_non_finite(asked, part.start, "query")
            chosen[part], spent = self._search(asked, k, own[part])
            cost += spent
        return np.sort(chosen, axis=1), replace(cost, full_flops=2 * n_queries * self.n_bank * self.width)

    def _search(self, queries: Array, k: int, own: Array) -> tuple[Array, Cost]:
        found = self._engine.search(self._bank.place(queries), self._candidates(k))
        candidates, counts = _tidy(found, own, self.n_bank)
        enough, short = np.flatnonzero(counts >= k), np.flatnonzero(counts < k)
        chosen = np.empty((len(queries), k), np.int64)
        chosen[enough] = nearest_of(self._bank.rows, queries[enough], candidates[enough], counts[enough], k)
        measured = int(counts[enough].sum())
        cost = Cost(0, measured, 3 * self.width * measured, 0, 0, 0, 0, len(enough), 0)
        if len(short):
            chosen[short], again = self._exact.search(queries[short], k, own[short])
            cost += replace(again, fell_through=len(short), certified=0, reranked=0)
        return chosen, cost

    def _candidates(self, k: int) -> int:
        """How many rows the index is asked for: one more than wanted, since the query's own may be among them."""
        wanted = k + SPARE
        if "rerank" in dict(self._method.parameters):
            wanted = self._method["rerank"] * k
        elif self._method.name == "hnsw-sq8":
            wanted = max(wanted, self._method["ef"] - 1)
        return min(wanted + 1, self.n_bank)

    @cached_property
    def _exact(self) -> Bank:
        return Bank(self._bank.rows, memory_budget=self._memory_budget)

    def save(self, path: str | Path) -> None:
        """Write the index to `path`, and its method, frame and check sum to `path`.json; an index there is replaced.

        Each file is written beside its place and renamed; the second says that the first is whole. Raises LeadlineError
        where they cannot be written.
        """
        path = Path(path)
        beside = path.with_name(f".{path.name}.{uuid4().hex}.part")
        try:
            self._engine.write(str(beside))
            about = {
                "method": self.method,
                "n_bank": self.n_bank,
                "width": self.width,
                "scale": self._bank.scale,
                "centre": self._bank.centre.tolist(),
            }
            text = json.dumps({**about, "sha256": _digest(beside, about)})
            _rename(beside, path)
            beside.write_text(text + "\n")
            _rename(beside, _about(path))
        except (OSError, RuntimeError) as error:
            raise LeadlineError(f"{path}: the index cannot be written ({one_line(error)})") from None
        finally:
            beside.unlink(missing_ok=True)


def usable_method(text: str) -> Method:
    """`parse_method`, and LeadlineError too where the package or the GPU that the method needs is missing."""
    method = parse_method(text)
    if method.name != "exact":
        package_of(method)
    return method


def build_index(
    method: str | Method, rows: Rows, *, threads: int | None = None, seed: int = 0, memory_budget: int = MEMORY
) -> Index:
    """Make an index of bank rows [M, D], real, which are read in slices and must stay where they are.

    method: a text for `parse_method`, or what it gives; what it leaves open is chosen by the bank's size (`resolve` in
    knn/methods.py). threads: of training and search, by default as many as torch has; hnswlib builds with one.
    seed: of samples, clusterings and graphs. On the CPU the same rows, method, threads and seed give the same answers.
    memory_budget: bytes for the exact search of what the index does not answer, and for the rows, which are read into
    memory where they take at most half of it; the index itself, of about the rows in float32 (less with ivf-pq and
    hnsw-sq8), is in memory whole.

    Raises LeadlineError for a method that is not known, is "exact" or cannot be used here, no rows, and values that are
    not finite.
    """
    given = usable_method(str(method))
    if given.name == "exact":
        raise LeadlineError("method: exact needs no index; search a leadline.knn.Bank")
    n_bank, width = rows.shape
    if n_bank == 0:
        raise LeadlineError("bank: 0 rows; give at least one")
    rows = _at_hand(rows, memory_budget)
    frame = Placed(rows, np.zeros(width), 1.0)
    centre, longest = survey(rows, frame.step)
    frame, full = Placed(rows, centre, scale_of(longest)), resolve(given, n_bank, width)
    return Index(full, frame, build_engine(full, frame, threads, seed), memory_budget)


def load_index(path: str | Path, rows: Rows, *, threads: int | None = None, memory_budget: int = MEMORY) -> Index:
    """The index that `Index.save` wrote, for the bank rows that it was built of; threads, memory_budget: as there.

    Raises LeadlineError where the files are missing, damaged, of a bank of another size, or cannot be used here.
    """
    path = Path(path)
    try:
        about: dict[str, Any] = json.loads(_about(path).read_text())
        whole = about.pop("sha256") == _digest(path, about)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LeadlineError(f"{path}: no index can be read ({one_line(error)}); build it again") from None
    if not whole:
        raise LeadlineError(f"{path}: damaged, its check sum differs; build the index again")
    if (about["n_bank"], about["width"]) != tuple(rows.shape):
        raise LeadlineError(
            f"{path}: of {about['n_bank']} rows of {about['width']} values, the bank has {rows.shape[0]} of "
            f"{rows.shape[1]}; build the index again"
        )
    method = usable_method(about["method"])
    try:
        engine = read_engine(method, str(path), about["width"], threads)
    except RuntimeError as error:
        raise LeadlineError(f"{path}: not for the package installed ({one_line(error)}); build it again") from None
    frame = Placed(_at_hand(rows, memory_budget), np.array(about["centre"]), about["scale"])
    return Index(method, frame, engine, memory_budget)


def _at_hand(rows: Rows, memory_budget: int) -> Rows:
    """The rows in memory where they take at most half the budget: to gather candidates from files is slow."""
    n_bank, width = rows.shape
    return copied(rows, slice(0, n_bank)) if 8 * n_bank * width <= memory_budget else rows


def _tidy(found: Array, own: Array, n_bank: int) -> tuple[Array, Array]:
    """The different rows that were found for each query, without its own, from the left, and how many they are."""
    rows = np.sort(found, axis=1)
    rows[:, 1:][rows[:, 1:] == rows[:, :-1]] = -1
    rows[(rows == own[:, None]) | (rows >= n_bank)] = -1
    rows = np.ascontiguousarray(np.sort(rows, axis=1)[:, ::-1])
    return rows, (rows >= 0).sum(axis=1)


def _about(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _digest(path: Path, about: dict[str, Any]) -> str:
    """SHA-256 of the index's file and of what is told about it."""
    with path.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256")
    digest.update(json.dumps(about).encode())
    return digest.hexdigest()


def _rename(beside: Path, path: Path) -> None:
    """With its contents on disk before its name."""
    with beside.open("rb+") as written:
        os.fsync(written.fileno())
    beside.replace(path)
