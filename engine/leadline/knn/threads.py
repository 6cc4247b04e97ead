"""Queries spread over threads, each of which does its products alone.

torch's own threads wait for each other after every product, spinning on the processors that the compiled loops between
products need. So each thread has its share of the queries, from the first product to the last loop.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

import torch

Result = TypeVar("Result")


def spread(work: Callable[[slice], Result], n: int) -> list[Result]:
    """Do the work of n > 0 queries, cut into as many slices as torch has threads; results in the queries' order."""
    threads = min(torch.get_num_threads(), n)
    if threads == 1:
        return [work(slice(0, n))]
    edges = [n * i // threads for i in range(threads + 1)]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(work, [slice(first, stop) for first, stop in pairwise(edges)]))
    finally:
        torch.set_num_threads(before)
