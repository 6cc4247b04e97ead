"""From neighbours to votes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
import torch

from leadline.errors import LeadlineError
from leadline.html import html_table
from leadline.knn.arrays import Array, Shards
from leadline.knn.exact import MEMORY, refuse_other_width
from leadline.knn.indexes import Index, build_index, usable_method
from leadline.knn.on_device import DeviceBank
from leadline.knn.on_devices import Devices, ExactBank, bank_on, devices_of
from leadline.knn.rank import by_distance

COUNTED = 64 << 20  # bytes of counts that are made together


@dataclass(frozen=True)
class Neighbours:
    """The k nearest bank rows of Q queries, nearest first (ties by lower row), and their Euclidean distances.

    rows int64 [Q, k], distances float64 [Q, k]; n_bank: rows of the bank.
    """

    rows: Array
    distances: Array
    n_bank: int

    def to_csr(self) -> Any:
        """A scipy.sparse.csr_array of distances, [Q, n_bank], as scikit-learn's `kneighbors_graph(mode="distance")`.

        scikit-learn (metric="precomputed") and cleanlab (knn_graph=) take it as it is.
        """
        from scipy.sparse import csr_matrix

        n_queries, k = self.rows.shape
        edges = np.arange(0, n_queries * k + 1, k)
        return csr_matrix((self.distances.ravel(), self.rows.ravel(), edges), shape=(n_queries, self.n_bank))


@dataclass(frozen=True)
class Votes:
    """The vote of each of Q queries: int32 [Q] each; runner_up is -1 where all k neighbours agree."""

    winner: Array
    winner_votes: Array
    runner_up: Array
    runner_up_votes: Array
    neighbours: Neighbours | None = None  # where they were asked for

    def __len__(self) -> int:
        return len(self.winner)

    def _repr_html_(self) -> str:
        fields = ("winner", "winner_votes", "runner_up", "runner_up_votes")
        return html_table({field: getattr(self, field) for field in fields})


def count_votes(neighbour_labels: Array | torch.Tensor) -> Votes:
    """One vote a neighbour; neighbour_labels: int [Q, k], counted where they lie.

    Ties go to the lower class, for winner and runner-up.
    """
    classes, codes = torch.unique(torch.as_tensor(neighbour_labels), return_inverse=True)
    n_queries, n_classes = len(neighbour_labels), len(classes)
    found = torch.zeros((4, n_queries), dtype=torch.int32, device=codes.device)
    lower_first = torch.arange(n_classes - 1, -1, -1, device=codes.device)
    step = max(1, COUNTED // (8 * max(1, n_classes)))
    for first in range(0, n_queries, step):
        part = slice(first, first + step)
        counts = torch.zeros((len(codes[part]), n_classes), dtype=torch.int64, device=codes.device)
        counts.scatter_add_(1, codes[part], torch.ones_like(codes[part]))
        # No two are equal, so that the order is the same on every device.
        two = (counts * n_classes + lower_first).topk(min(2, n_classes), dim=1).values
        votes, label = two // n_classes, classes[n_classes - 1 - two % n_classes]
        found[0, part], found[1, part] = label[:, 0], votes[:, 0]
        found[2, part], found[3, part] = torch.where(votes[:, -1] > 0, label[:, -1], -1), votes[:, -1]
        if n_classes == 1:
            found[2, part], found[3, part] = -1, 0
    return Votes(*found.cpu().numpy())


@overload
def knn_votes(
    bank: Any, labels: Any, queries: Any, *, k: int = 30, exclude: Any = None, method: str = "exact",
    device: Devices | None = None, return_neighbours: bool = False, winners_only: bool = False,
    memory_budget: int = MEMORY,
) -> Votes: ...  # fmt: skip


@overload
def knn_votes(
    bank: Any, labels: Any, queries: Any, *, k: Sequence[int], exclude: Any = None, method: str = "exact",
    device: Devices | None = None, return_neighbours: bool = False, winners_only: bool = False,
    memory_budget: int = MEMORY,
) -> dict[int, Votes]: ...  # fmt: skip


def knn_votes(
    bank: Any, labels: Any, queries: Any, *, k: int | Sequence[int] = 30, exclude: Any = None, method: str = "exact",
    device: Devices | None = None, return_neighbours: bool = False, winners_only: bool = False,
    memory_budget: int = MEMORY,
) -> Votes | dict[int, Votes]:  # fmt: skip
    """The vote of each query's k nearest bank rows, as float64 brute force over the given values would have it.

    bank [M, D], labels int [M] (not negative), queries [Q, D]: numpy arrays or torch tensors of real numbers, each row
    flattened. exclude int64 [Q]: the bank row that a query must not count, -1 for none. Euclidean distance, ties of
    distance by lower bank row, ties of vote by lower class, so the answer depends on neither device nor tiling nor
    threads. device: "cpu", "cuda" or "cuda:N", where the search runs; by default where `bank` lies, and what lies there
    is never copied to main memory. Of a list of GPUs each answers some of the queries, or, where the bank does not fit
    them, has some of the bank. k may be several numbers: the search is made once, for the largest, and the answer is a
    mapping of each k to its Votes. return_neighbours: the Votes carry the neighbours and their distances.
    winners_only: of one k the winners alone, which need not say which of two rows at nearly the same distance is the
    nearer: the counts and runners-up are then -1.

    bank and queries may also be memory maps, or lists of arrays or memory maps that are read as one. memory_budget:
    bytes that the search may take beside arrays that lie in memory already; a bank that does not fit is read from its
    files a tile at a time. On a GPU the search takes of its free memory what it needs, and banks that do not fit go
    through it a tile at a time.

    method: "exact", or how approximate neighbours are found, as NAME or NAME:KEY=NUMBER,KEY=NUMBER: flat, ivf-flat,
    ivf-pq, hnsw, hnsw-sq8 (faiss), hnswlib, and on a GPU gpu-flat, gpu-ivf-flat, gpu-ivf-pq, cagra (faiss), with the
    parameters and defaults of docs/decisions/0006-indexes.md. Each votes with k rows; only their choice is approximate.
    `device` and `winners_only` then change nothing in the search, what lies on a GPU is copied to main memory, and the
    index is there beside `memory_budget`.

    Raises LeadlineError for values that are not finite, labels out of range, sizes that do not agree, fewer than k bank
    rows to choose from, devices that are not here, and a method that is not known or whose package or GPU is missing.
    """
    chosen = usable_method(method)
    if device is None:
        device = bank.device if isinstance(bank, torch.Tensor) else "cpu"
    devices = devices_of(device)
    if chosen.name != "exact":
        devices = devices_of("cpu")  # indexes are made of arrays
    first = devices[0]
    rows, asked = _matrix(bank, "bank", devices), _matrix(queries, "queries", devices)
    refuse_other_width(rows, asked)
    given = _integers(labels, "labels", rows.shape[0], "bank row")
    if len(given) and not 0 <= given.min() <= given.max() < 2**31:
        bad = int(np.flatnonzero((given < 0) | (given >= 2**31))[0])
        raise LeadlineError(f"labels: row {bad} has label {given[bad]}, allowed 0 to {2**31 - 1}")
    out = None if exclude is None else _integers(exclude, "exclude", asked.shape[0], "query")
    if out is not None and len(out) and not -1 <= out.min() <= out.max() < rows.shape[0]:
        bad = int(np.flatnonzero((out < -1) | (out >= rows.shape[0]))[0])
        raise LeadlineError(f"exclude: query {bad} has {out[bad]}, allowed -1 to {rows.shape[0] - 1}")
    ks = [k] if isinstance(k, int) else list(k)
    if not ks or min(ks) < 1:
        raise LeadlineError(f"k: {k} neighbours cannot vote; give at least 1")
    ready: ExactBank | Index
    if chosen.name == "exact":
        ready = bank_on(rows, devices, memory_budget)
    else:
        ready = build_index(chosen, rows, memory_budget=memory_budget)
    if winners_only:
        if not isinstance(k, int) or return_neighbours:
            raise LeadlineError(
                "winners_only: gives neither neighbours nor the votes of several k; ask for one k alone"
            )
        codes = np.unique(given, return_inverse=True)[1]
        nearest, _ = ready.search(asked, k, out) if isinstance(ready, Index) else ready.search(asked, k, out, codes)
        winner = count_votes(given[nearest]).winner
        unknown = np.full_like(winner, -1)
        return Votes(winner, unknown, unknown, unknown)
    if isinstance(ready, DeviceBank) and not return_neighbours and isinstance(k, int):
        return count_votes(torch.from_numpy(given).to(first)[ready.nearest(asked, k, out)[0]])
    nearest, _ = ready.search(asked, max(ks), out)
    distances = None
    if return_neighbours or len(ks) > 1:
        ordered = by_distance(rows, asked, nearest) if isinstance(ready, Index) else ready.by_distance(asked, nearest)
        nearest, distances = ordered[0], np.sqrt(ordered[1])
    votes = {}
    for n in ks:
        counted = count_votes(given[nearest[:, :n]])
        if return_neighbours and distances is not None:
            counted = replace(counted, neighbours=Neighbours(nearest[:, :n], distances[:, :n], rows.shape[0]))
        votes[n] = counted
    return votes[k] if isinstance(k, int) else votes


def _matrix(values: Any, name: str, devices: Sequence[torch.device]) -> Any:
    """Rows [N, D]: a tensor where they lie on a GPU and are for one, else what is read in slices."""
    if isinstance(values, torch.Tensor) and values.is_cuda and devices[0].type == "cuda":
        if values.ndim < 2 or values.is_complex():
            raise LeadlineError(f"{name}: {values.dtype} of {values.ndim} dimensions; give real [points, values]")
        values = values.detach().flatten(1)
        values = values if values.device in devices else values.to(devices[0])
        if values.dtype not in (torch.float32, torch.float64):
            # As `_array` does, so that the values are the same.
            values = values.to(torch.float32 if values.itemsize <= 2 else torch.float64)
        return values.contiguous()
    if isinstance(values, (list, tuple)) and values and all(isinstance(value, np.ndarray) for value in values):
        shards = [_array(value, f"{name}[{i}]") for i, value in enumerate(values) if value.ndim > 1]
        if len(shards) == len(values):
            return Shards(shards)
    return _array(values, name)


def _array(values: Any, name: str) -> Array:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype in (torch.bfloat16, torch.float16) else values).numpy()
    array = values if isinstance(values, np.memmap) else np.asarray(values)
    if array.ndim < 2:
        raise LeadlineError(f"{name}: {array.ndim} dimensions; give [points, values]")
    if array.dtype.kind not in "biuf":
        raise LeadlineError(f"{name}: values of type {array.dtype}; give real numbers")
    array = array.reshape(len(array), -1)
    if array.dtype.kind != "f" or array.dtype.itemsize not in (4, 8):
        array = array.astype(np.float32 if array.dtype.itemsize <= 2 else np.float64)
    return array if isinstance(array, np.memmap) else np.ascontiguousarray(array)


def _integers(values: Any, name: str, n: int, of: str) -> Array:
    array = np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values)
    if array.dtype.kind not in "iu" or array.shape != (n,):
        raise LeadlineError(f"{name}: {array.dtype} of shape {array.shape}; give integers of shape ({n},), one a {of}")
    return array.astype(np.int64)
