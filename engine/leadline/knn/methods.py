"""The text that chooses how neighbours are searched: a name, and whole numbers where it takes any."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from leadline.errors import LeadlineError

LISTS = (1, 1 << 20)
LINKS = (2, 512)
BEAM = (1, 1 << 16)
GPU_MOST = 2048  # neighbours, and lists that are probed, in one search of faiss on a GPU
GPU_PIECES = (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96)  # m of PQ that faiss has there, all of 8 bits
IN_LIST = 39  # rows that a list of an inverted file should have at least, by faiss' own advice

# What each method takes, in the order in which it is written, and the least and largest value.
GRAPH = {"m": LINKS, "ef": BEAM, "efc": BEAM}
METHODS: dict[str, dict[str, tuple[int, int]]] = {
    "exact": {},
    "flat": {},
    "ivf-flat": {"nlist": LISTS, "nprobe": LISTS},
    "ivf-pq": {"nlist": LISTS, "nprobe": LISTS, "m": (1, 1 << 16), "bits": (1, 8), "rerank": (1, 1000)},
    "hnsw": GRAPH,
    "hnsw-sq8": GRAPH,
    "hnswlib": GRAPH,
    "gpu-flat": {},
    "gpu-ivf-flat": {"nlist": LISTS, "nprobe": (1, GPU_MOST)},
    "gpu-ivf-pq": {"nlist": LISTS, "nprobe": (1, GPU_MOST), "m": (1, GPU_PIECES[-1]), "rerank": (1, 1000)},
    "cagra": {"degree": (1, 512), "itopk": (1, GPU_MOST)},
}


@dataclass(frozen=True)
class Method:
    """How neighbours are searched; parameters are those that are given, in the order of METHODS. str() writes it."""

    name: str
    parameters: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        given = ",".join(f"{key}={value}" for key, value in self.parameters)
        return f"{self.name}:{given}" if given else self.name

    def __getitem__(self, key: str) -> int:
        return dict(self.parameters)[key]


def parse_method(text: str) -> Method:
    """Read NAME or NAME:KEY=NUMBER,KEY=NUMBER; parse_method(str(method)) is the method again.

    Raises LeadlineError for what is not known, not a number, given twice or out of range.
    """
    name, colon, rest = text.partition(":")
    if name not in METHODS:
        raise LeadlineError(f"method: {text!r} is not known; allowed: {', '.join(METHODS)}")
    allowed = METHODS[name]
    given: dict[str, int] = {}
    for part in rest.split(",") if colon else ():
        key, _, number = part.partition("=")
        if key not in allowed or key in given:
            what = f"{', '.join(allowed)}, each once, as KEY=NUMBER" if allowed else "none"
            raise LeadlineError(f"method: {part!r} is no parameter for {text!r}; allowed: {what}")
        least, most = allowed[key]
        if not re.fullmatch("[0-9]{1,9}", number) or not least <= int(number) <= most:
            raise LeadlineError(f"method: {part!r} is out of range in {text!r}; allowed: {key}={least} to {most}")
        given[key] = int(number)
    return Method(name, tuple((key, given[key]) for key in allowed if key in given))


def resolve(method: Method, n_bank: int, width: int) -> Method:
    """The method with every parameter as an index of a bank [n_bank, width] has it.

    Not given: nlist is 4 √n_bank, at least IN_LIST rows a list; nprobe is nlist / 32, at least 16; PQ's m is at most 64
    and a quarter of the width, of 8 bits, and rerank 4; graphs have m = 16, ef = 128, efc = 200; CAGRA's degree and
    itopk are 64 and 128.

    Given or not, what the bank cannot have is lowered to what it can: as many lists as rows, as many probes as lists, a
    divisor of the width for PQ's m (on a GPU one that is in GPU_PIECES), codes of no more bits than the bank has rows
    for, fewer links than rows.
    """
    given = dict(method.parameters)
    if "nlist" in METHODS[method.name]:
        lists = min(given.get("nlist", min(int(4 * n_bank**0.5), n_bank // IN_LIST)), n_bank)
        given["nlist"] = max(1, lists)
        most = min(given["nlist"], METHODS[method.name]["nprobe"][1])
        given["nprobe"] = min(given.get("nprobe", max(16, given["nlist"] // 32)), most)
    if method.name in ("ivf-pq", "gpu-ivf-pq"):
        allowed = GPU_PIECES if method.name == "gpu-ivf-pq" else range(1, width + 1)
        given["m"] = _divisor(width, given.get("m", min(64, width // 4)), allowed)
        given.setdefault("rerank", 4)
    if method.name == "ivf-pq":
        given["bits"] = max(1, min(given.get("bits", 8), n_bank.bit_length() - 1))
    if METHODS[method.name] is GRAPH:
        given = {"m": 16, "ef": 128, "efc": 200} | given
    if method.name == "cagra":
        given = {"degree": 64, "itopk": 128} | given
        given["degree"] = max(1, min(given["degree"], n_bank - 1))
    return Method(method.name, tuple((key, given[key]) for key in METHODS[method.name]))


def _divisor(width: int, most: int, allowed: Sequence[int]) -> int:
    """The largest divisor of the width among `allowed`, ascending, that is not above `most`, at least 1."""
    return next((m for m in reversed(allowed) if m <= most and width % m == 0), 1)
