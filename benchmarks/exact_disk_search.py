"""One search with a bank on disk, in a process that does nothing else: exact_disk.py runs it.

python benchmarks/exact_disk_search.py DIRECTORY K BUDGET THREADS     writes votes.npy, prints JSON
"""

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch

import leadline


def main() -> None:
    directory, k, budget, threads = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(threads)
    before = high_water()
    started = time.perf_counter()
    votes = leadline.knn_votes(
        [np.load(path, mmap_mode="r") for path in sorted(directory.glob("bank-*.npy"))],
        np.load(directory / "labels.npy"),
        np.load(directory / "queries.npy"),
        k=k,
        memory_budget=budget,
    )
    seconds = time.perf_counter() - started
    memory = {
        "resident_before_the_search": before,
        "peak_VmHWM": high_water(),
        "peak_ru_maxrss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
    }
    columns = [votes.winner, votes.winner_votes, votes.runner_up, votes.runner_up_votes]
    np.save(directory / "votes.npy", np.stack(columns, axis=1))
    print(json.dumps({"seconds": seconds, "memory": memory}))


def high_water() -> int:
    """The greatest resident size of this process so far, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main()
