"""Stand-in."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from leadline.errors import LeadlineError
from leadline.knn.arrays import Array, Rows, copied
from leadline.knn.exact import Cost

DEFAULTS = {"exact": {}, "flat": {}, "ivf-flat": {"nlist": 1024, "nprobe": 32}}


@dataclass(frozen=True)
class Method:
    name: str
    parameters: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        given = ",".join(f"{key}={value}" for key, value in self.parameters)
        return f"{self.name}:{given}" if given else self.name


def parse_method(text: str) -> Method:
    name, _, rest = text.partition(":")
    if name not in DEFAULTS:
        raise LeadlineError(f"method: {text!r} is not known; allowed: {', '.join(DEFAULTS)}")
    parameters: dict[str, int] = dict(DEFAULTS[name])
    for item in rest.split(",") if rest else []:
        key, _, value = item.partition("=")
        if key not in parameters or not value.isdigit():
            raise LeadlineError(f"method: {item!r} of {text!r} is not known")
        parameters[key] = int(value)
    return Method(name, tuple(parameters.items()))


class Index:
    def __init__(self, method: str, index: Any) -> None:
        self.method = method
        self._index = index
        self.n_bank, self.width = index.ntotal, index.d

    @property
    def size_bytes(self) -> int:
        import faiss

        return len(faiss.serialize_index(self._index))

    def search(self, queries: Rows, k: int, exclude: Array | None = None) -> tuple[Array, Cost]:
        asked = copied(queries, slice(0, queries.shape[0])).astype(np.float32)
        own = np.full(len(asked), -2) if exclude is None else np.where(exclude < 0, -2, exclude)
        _, found = self._index.search(asked, k + 1)
        found = np.where(found == own[:, None], -1, found)
        order = np.argsort(found < 0, axis=1, kind="stable")[:, :k]
        rows = np.take_along_axis(found, order, axis=1)
        big = np.iinfo(np.int64).max
        rows = np.sort(np.where(rows < 0, big, rows), axis=1)
        n = len(asked) * self.n_bank
        return np.where(rows == big, -1, rows), Cost(n, 0, 2 * n * self.width, 2 * n * self.width, 0, 0, 0, 0, 0)

    def save(self, path: Path) -> None:
        import faiss

        faiss.write_index(self._index, str(path))


def build_index(method: str | Method, rows: Rows, *, threads: int | None = None, seed: int = 0) -> Index:
    import faiss

    if threads:
        faiss.omp_set_num_threads(threads)
    parsed = method if isinstance(method, Method) else parse_method(method)
    bank = copied(rows, slice(0, rows.shape[0])).astype(np.float32)
    index: Any = faiss.IndexFlatL2(bank.shape[1])
    if parsed.name == "ivf-flat":
        settings = dict(parsed.parameters)
        index = faiss.index_factory(bank.shape[1], f"IVF{settings['nlist']},Flat")
        index.cp.seed = seed
        index.cp.min_points_per_centroid = 1
        index.nprobe = settings["nprobe"]
        index.train(bank)
    index.add(bank)
    return Index(str(parsed), index)


def load_index(path: Path, rows: Rows) -> Index:
    import faiss

    index: Any = faiss.read_index(str(path))
    kind = "ivf-flat" if isinstance(index, faiss.IndexIVFFlat) else "flat"
    text = f"ivf-flat:nlist={index.nlist},nprobe={index.nprobe}" if kind == "ivf-flat" else "flat"
    return Index(text, index)
