"""The packages that hold indexes of approximate neighbours, behind one small interface.

What they share is told in docs/decisions/0006-indexes.md: rows come a slice at a time, training takes a seeded sample,
and the number of threads does not change a graph.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np

# Before faiss: a faiss of CUDA 12 that is imported before a torch of CUDA 13 crashes.
import torch

from leadline.errors import LeadlineError, one_line
from leadline.knn import kernels
from leadline.knn.arrays import Array, Rows, copied
from leadline.knn.methods import Method

SLICE = 64 << 20  # bytes of float64 rows that are read at once
PER_CENTRE = 64  # rows of a training sample for each centre that is learnt
ROUNDS = 10  # of k-means: candidates are ranked again, so centres need not be perfect
LEVELS = 256  # values that 8 bits tell apart
ASKED = 1024  # queries that hnswlib is asked at once: all fail if one does
GPU_METHODS = ("gpu-flat", "gpu-ivf-flat", "gpu-ivf-pq", "cagra")
GPU_BITS = 8  # of PQ on a GPU
GPU_SHARED = 48 << 10  # bytes of shared memory of a block, which must hold PQ's tables of distances: 2^8 for each of m
GPU_TEMPORARY = 1 << 30  # bytes that faiss keeps for tiles of distances: two of 512 MiB; left alone it keeps 1.5 GiB
FACTORY = {
    "flat": "Flat",
    "ivf-flat": "IVF{nlist},Flat",
    "ivf-pq": "IVF{nlist},PQ{m}x{bits}np",  # np: codes are not also ordered for a filter that is not used
    "hnsw": "HNSW{m},Flat",
    "hnsw-sq8": "HNSW{m},SQ8",
}


@dataclass(frozen=True)
class Placed:
    """Rows as the packages are given them: float32(scale * (row - centre)), the longest bank row at most 1 long.

    An offset that rows share, or very large or small values, would leave float32 little to tell neighbours apart by.
    """

    rows: Rows
    centre: Array
    scale: float

    @property
    def step(self) -> int:
        return max(1, SLICE // (8 * self.rows.shape[1]))

    def place(self, rows: Array) -> Array:
        """float32 [n, D] from rows [n, D]; a query too far away for float32 becomes infinite."""
        placed = np.empty(rows.shape, np.float32)
        kernels.place(rows, self.centre, self.scale, placed)
        return placed

    def slices(self, n: int) -> Iterator[slice]:
        """Slices of `step` rows that cover n."""
        for first in range(0, n, self.step):
            yield slice(first, min(first + self.step, n))

    def sample(self, n: int, seed: int) -> Array:
        """n rows drawn without repetition, or all, in their order."""
        n_bank, width = self.rows.shape
        n = min(n, n_bank)
        ids = np.sort(np.random.default_rng(seed).choice(n_bank, n, replace=False))
        drawn = np.empty((n, width), np.float32)
        for part in self.slices(n):
            drawn[part] = self.place(copied(self.rows, ids[part]))
        return drawn


class Engine(Protocol):
    """An index as its package holds it."""

    @property
    def size_bytes(self) -> int: ...

    def search(self, queries: Array, n: int) -> Array:
        """About the n nearest rows of placed queries float32 [Q, D]: int64 [Q, n], -1 where fewer are found."""
        ...

    def write(self, path: str) -> None: ...


def package_of(method: Method) -> Any:
    """The package that the method needs, imported. Raises LeadlineError where it, or the GPU, is missing."""
    name, extras = ("hnswlib", "hnswlib") if method.name == "hnswlib" else ("faiss", "cpu")
    if method.name in GPU_METHODS:
        extras = "cuda13" if method.name == "cagra" else "cuda12"
    install = f"pip install 'leadline[{extras}]'"
    try:
        package = importlib.import_module(name)
    except Exception as error:  # of whatever kind: the package's own code runs, and libraries are loaded
        raise LeadlineError(f"method: {method.name} needs {name} ({one_line(error)}); {install}") from None
    if method.name in GPU_METHODS:
        if not hasattr(package, "GpuIndexCagra" if method.name == "cagra" else "GpuIndexFlatL2"):
            raise LeadlineError(f"method: {method.name} is not in the faiss that is installed; {install} in its place")
        if package.get_num_gpus() == 0:
            raise LeadlineError(f"method: {method.name} needs a GPU, and faiss sees none; choose a method for the CPU")
    return package


def build_engine(method: Method, bank: Placed, threads: int | None, seed: int) -> Engine:
    """method: with all its parameters."""
    if method.name == "hnswlib":
        return _build_hnswlib(method, bank, threads, seed)
    return _build_faiss(method, bank, threads, seed)


def read_engine(method: Method, path: str, width: int, threads: int | None) -> Engine:
    """What `Engine.write` wrote."""
    package = package_of(method)
    if method.name == "hnswlib":
        index = package.Index(space="l2", dim=width)
        index.load_index(path)
        return HnswlibEngine(method, index, threads)
    index = package.read_index(path)
    if method.name in GPU_METHODS:
        options = package.GpuClonerOptions()
        options.use_cuvs = False
        options.useFloat16 = _needs_float16(method)
        index = package.index_cpu_to_gpu(_gpu_resources(package), _gpu(), index, options)
    return FaissEngine(package, method, index, threads)


class FaissEngine:
    def __init__(self, faiss: Any, method: Method, index: Any, threads: int | None) -> None:
        self._faiss, self._method, self._index, self._threads = faiss, method, index, threads

    @property
    def size_bytes(self) -> int:
        size = 0

        def count(written: bytes) -> None:
            nonlocal size
            size += len(written)

        self._faiss.write_index(self._on_cpu(), self._faiss.PyCallbackIOWriter(count))
        return size

    def search(self, queries: Array, n: int) -> Array:
        given = dict(self._method.parameters)
        parameters = None
        if "nprobe" in given:
            self._index.nprobe = given["nprobe"]
        elif "ef" in given:
            self._index.hnsw.efSearch = max(given["ef"], n)
        elif "itopk" in given:
            parameters = self._faiss.SearchParametersCagra(itopk_size=max(given["itopk"], n))
        with _faiss_threads(self._faiss, self._threads):
            _, found = self._index.search(queries, n, params=parameters)
        return np.asarray(found)

    def write(self, path: str) -> None:
        self._faiss.write_index(self._on_cpu(), path)

    def _on_cpu(self) -> Any:
        return self._faiss.index_gpu_to_cpu(self._index) if self._method.name in GPU_METHODS else self._index


def _build_faiss(method: Method, bank: Placed, threads: int | None, seed: int) -> FaissEngine:
    faiss = package_of(method)
    index = _empty_on_gpu(faiss, method, bank) if method.name in GPU_METHODS else _empty(faiss, method, bank, seed)
    with _faiss_threads(faiss, threads):
        if not index.is_trained:
            _train(method, index, bank, seed)
        for part in bank.slices(bank.rows.shape[0] - index.ntotal):  # CAGRA's training has added all rows
            index.add(bank.place(copied(bank.rows, part)))
    return FaissEngine(faiss, method, index, threads)


def _empty(faiss: Any, method: Method, bank: Placed, seed: int) -> Any:
    n_bank, width = bank.rows.shape
    given = dict(method.parameters)
    index = faiss.index_factory(width, FACTORY[method.name].format(**given))
    flat = index
    if "efc" in given:
        index.hnsw.efConstruction = given["efc"]
        index.hnsw.rng = faiss.RandomGenerator(seed)
        flat = faiss.downcast_index(index.storage)
    if "nlist" not in given:
        # Room for all rows at once: a vector that grows as slices come is moved, and there twice for a while.
        flat.codes.resize(n_bank * flat.code_size)
        flat.codes.resize(0)
    return index


def _empty_on_gpu(faiss: Any, method: Method, bank: Placed) -> Any:
    width, resources = bank.rows.shape[1], _gpu_resources(faiss)
    if method.name == "gpu-flat":
        return faiss.GpuIndexFlatL2(resources, width, _placed(faiss.GpuIndexFlatConfig()))
    if method.name == "gpu-ivf-flat":
        config = _placed(faiss.GpuIndexIVFFlatConfig())
        return faiss.GpuIndexIVFFlat(resources, width, method["nlist"], faiss.METRIC_L2, config)
    if method.name == "gpu-ivf-pq":
        config = _placed(faiss.GpuIndexIVFPQConfig())
        config.useFloat16LookupTables = _needs_float16(method)
        return faiss.GpuIndexIVFPQ(resources, width, method["nlist"], method["m"], GPU_BITS, faiss.METRIC_L2, config)
    config = faiss.GpuIndexCagraConfig()
    config.device = _gpu()
    config.graph_degree, config.intermediate_graph_degree = method["degree"], 2 * method["degree"]
    return faiss.GpuIndexCagra(resources, width, faiss.METRIC_L2, config)


@cache
def _gpu_resources(faiss: Any) -> Any:
    """faiss' streams and temporary memory on GPUs: one for all indexes of a process, since each keeps as much again."""
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(GPU_TEMPORARY)
    return resources


def _gpu() -> int:
    """The GPU that torch works on. A torch for the CPU alone has none, and faiss may."""
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def _placed(config: Any) -> Any:
    """On that GPU, by faiss' own code: so both of its wheels for GPUs make the same index, with the same limits."""
    config.device, config.use_cuvs = _gpu(), False
    return config


def _needs_float16(method: Method) -> bool:
    """Whether PQ's tables of distances fit shared memory in float16 alone; of other methods it would halve the rows."""
    return method.name == "gpu-ivf-pq" and 4 * 2**GPU_BITS * method["m"] > GPU_SHARED


def _train(method: Method, index: Any, bank: Placed, seed: int) -> None:
    """Learn centres, codes or ranges of values from PER_CENTRE rows for each that there are; CAGRA takes all rows."""
    given = dict(method.parameters)
    bits = GPU_BITS if method.name == "gpu-ivf-pq" else given.get("bits", 0)
    codes = 2**bits
    centres = max(given.get("nlist", LEVELS), codes)
    sample = bank.sample(bank.rows.shape[0] if method.name == "cagra" else PER_CENTRE * centres, seed)
    clusterings = [index.cp] if "nlist" in given else []
    if bits:
        clusterings.append(index.pq.cp)
    for clustering in clusterings:
        clustering.seed, clustering.niter = seed, ROUNDS
        clustering.min_points_per_centroid = 1  # no warning: a bank may be small
    # A bank of one row has fewer rows than codes of one bit: it is given twice. On a GPU codes always have 8 bits.
    index.train(sample if len(sample) >= codes else np.resize(sample, (codes, sample.shape[1])))


@contextmanager
def _faiss_threads(faiss: Any, threads: int | None) -> Iterator[None]:
    """faiss computes with so many threads, by default with as many as torch; then as before."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads or torch.get_num_threads())
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


class HnswlibEngine:
    def __init__(self, method: Method, index: Any, threads: int | None) -> None:
        self._method, self._index, self._threads = method, index, threads

    @property
    def size_bytes(self) -> int:
        return int(self._index.index_file_size())

    def search(self, queries: Array, n: int) -> Array:
        self._index.set_ef(max(self._method["ef"], n))
        found = np.empty((len(queries), n), np.int64)
        for first in range(0, len(queries), ASKED):
            part = slice(first, first + ASKED)
            found[part] = self._ask(queries[part], n)
        return found

    def write(self, path: str) -> None:
        self._index.save_index(path)

    def _ask(self, queries: Array, n: int) -> Array:
        """hnswlib answers no query where one of them reaches fewer than n rows: halves part that one from the rest."""
        threads = self._threads or torch.get_num_threads()
        try:
            found, _ = self._index.knn_query(queries, n, num_threads=threads)
        except RuntimeError:
            if len(queries) == 1:
                return np.full((1, n), -1)
            half = len(queries) // 2
            return np.concatenate([self._ask(queries[:half], n), self._ask(queries[half:], n)])
        return np.asarray(found.astype(np.int64))


def _build_hnswlib(method: Method, bank: Placed, threads: int | None, seed: int) -> HnswlibEngine:
    n_bank, width = bank.rows.shape
    index = package_of(method).Index(space="l2", dim=width)
    index.init_index(n_bank, M=method["m"], ef_construction=method["efc"], random_seed=seed)
    for part in bank.slices(n_bank):
        # One thread: the graph depends on the order of insertion.
        index.add_items(bank.place(copied(bank.rows, part)), np.arange(part.start, part.stop), num_threads=1)
    return HnswlibEngine(method, index, threads)
