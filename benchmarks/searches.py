"""Exact searches that are held against each other, behind one interface: a task to its neighbours."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors

from leadline.knn import Bank, Cost, count_votes
from leadline.knn.arrays import Array


@dataclass(frozen=True)
class Task:
    """A bank [M, D], its labels [M], queries [Q, D], the bank row that each must not have (-1: none), and k."""

    bank: Array
    labels: Array
    queries: Array
    own: Array
    k: int

    def some(self, n: int) -> "Task":
        """The same with n of the queries, evenly spread."""
        if n >= len(self.queries):
            return self
        chosen = np.linspace(0, len(self.queries) - 1, n).astype(np.int64)
        return Task(self.bank, self.labels, self.queries[chosen], self.own[chosen], self.k)

    def winners(self, neighbours: Array) -> Array:
        return count_votes(self.labels[neighbours]).winner

    @property
    def flops(self) -> int:
        """Of the products of all pairs."""
        return 2 * len(self.queries) * self.bank.shape[0] * self.bank.shape[1]


def by_leadline(task: Task) -> tuple[Array, Cost, str]:
    bank = Bank(task.bank)
    neighbours, cost = bank.search(task.queries, task.k, task.own)
    return neighbours, cost, bank.plan


def by_faiss(task: Task) -> Array:
    _, found = faiss.knn(task.queries, task.bank, task.k + 1)
    return without_own(found, task)


def by_scikit_learn(task: Task) -> Array:
    search = NearestNeighbors(n_neighbors=task.k + 1, algorithm="brute").fit(task.bank)
    return without_own(search.kneighbors(task.queries, return_distance=False), task)


def by_torch(task: Task) -> Array:
    """torch.cdist and topk; 512 queries at once, so that the distances are not all in memory together."""
    bank, queries = torch.from_numpy(task.bank), torch.from_numpy(task.queries)
    found = [torch.cdist(some, bank).topk(task.k + 1, largest=False).indices for some in queries.split(512)]
    return without_own(torch.cat(found).numpy(), task)


def without_own(found: Array, task: Task) -> Array:
    """From k + 1 neighbours to k: without the query's own row, or where it is not there without the last."""
    is_own = found == task.own[:, None]
    is_own[~is_own.any(axis=1), task.k] = True
    return found[~is_own].reshape(len(found), task.k)


def timed(search: Callable[[Task], Any], task: Task) -> tuple[float, Any]:
    started = time.perf_counter()
    result = search(task)
    return time.perf_counter() - started, result
