"""Exact search where it is asked for: on the CPU, on a GPU, or on several GPUs at once."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from itertools import pairwise
from operator import add
from typing import TypeVar

import numpy as np
import torch

from leadline.errors import LeadlineError
from leadline.full_precision import full_precision
from leadline.knn.arrays import Array, Part, Rows
from leadline.knn.exact import MEMORY, Bank, Cost, refuse_other_width, refuse_too_few
from leadline.knn.on_device import DeviceBank, free_memory, holds
from leadline.knn.rank import merged

Devices = str | torch.device | Sequence[str | torch.device]
Result = TypeVar("Result")


def bank_on(rows: Rows | torch.Tensor, device: Devices = "cpu", memory_budget: int = MEMORY) -> "ExactBank":
    """Bank rows [M, D] made ready to be searched there; memory_budget: bytes of main memory, as of `exact.Bank`.

    Raises LeadlineError for values that are not finite, and as `devices_of` does.
    """
    devices = devices_of(device)
    if devices[0].type == "cpu":
        return Bank(rows.numpy() if isinstance(rows, torch.Tensor) else rows, memory_budget)
    return SharedBank(rows, devices) if len(devices) > 1 else DeviceBank(rows, devices[0])


def devices_of(device: Devices) -> list[torch.device]:
    """The devices of a search: the CPU, or GPUs. Raises LeadlineError for any other, and for GPUs that are not here."""
    given = [device] if isinstance(device, (str, torch.device)) else list(device)
    said = ", ".join(map(str, given)) or "none"
    allowed = "allowed: cpu, cuda, cuda:N, or a list of GPUs"
    try:
        devices = [torch.device(one) for one in given]
    except RuntimeError:
        raise LeadlineError(f"device: {said} is not known to torch; {allowed}") from None
    kinds = {one.type for one in devices}
    if kinds != {"cuda"} and not (kinds == {"cpu"} and len(devices) == 1):
        raise LeadlineError(f"device: {said} has no search; {allowed}")
    if kinds == {"cpu"}:
        return devices
    n = torch.cuda.device_count()
    if max(one.index or 0 for one in devices) >= n:
        raise LeadlineError(f"device: {said}: torch sees {n} GPUs here; `leadline doctor` tells more")
    current = torch.cuda.current_device()  # which is a thread's own
    devices = [torch.device("cuda", current if one.index is None else one.index) for one in devices]
    if len(set(devices)) < len(devices):
        raise LeadlineError(f"device: {said} names a GPU twice; name each once")
    return devices


class SharedBank:
    """Bank rows made ready on several devices for any number of searches; as `DeviceBank`.

    Where the bank fits each of them, each has all of it and answers a share of the queries; else each has a share of
    the bank, and what they find for a query is merged by (distance, row). memory: of each device, as of DeviceBank.

    Raises LeadlineError for values that are not finite.
    """

    def __init__(self, rows: Rows | torch.Tensor, devices: Sequence[torch.device], memory: int | None = None) -> None:
        n_bank = rows.shape[0]
        self._rows = rows
        self._is_whole = all(holds(rows, device, free_memory(device, memory)) for device in devices)
        n = len(devices) if self._is_whole else min(len(devices), n_bank)
        self._devices = devices[:n]
        self._edges = [n_bank * i // n for i in range(n + 1)]

        def make_ready(i: int) -> DeviceBank:
            first, stop = (0, n_bank) if self._is_whole else self._edges[i : i + 2]
            return DeviceBank(_part(rows, first, stop), devices[i], memory, first)

        with full_precision():  # for all threads: it is of the process
            self._banks = _at_once(make_ready, self._devices)
        each = "all" if self._is_whole else "a share of the"
        self.plan = f"{n} devices with {each} rows each, {self._banks[0].plan}"

    @property
    def size_bytes(self) -> int:
        """As of `DeviceBank`, of all devices."""
        return sum(bank.size_bytes for bank in self._banks)

    def search(
        self, queries: Rows | torch.Tensor, k: int, exclude: Array | None = None, winners_of: Array | None = None
    ) -> tuple[Array, Cost]:
        """As `exact.Bank.search`: int64 [Q, k], ascending in each query, and the Cost; `winners_of` saves nothing."""
        refuse_other_width(self._rows, queries)
        refuse_too_few(self._rows.shape[0], k, exclude)
        own = np.full(queries.shape[0], -1) if exclude is None else exclude
        with full_precision():
            rows, cost = (self._of_whole if self._is_whole else self._of_parts)(queries, k, own)
        return np.sort(rows, axis=1), cost

    def by_distance(self, queries: Rows | torch.Tensor, rows: Array) -> tuple[Array, Array]:
        """As `exact.Bank.by_distance`."""
        if self._is_whole:
            found = self._shared(queries, lambda bank, asked, some: bank.by_distance(asked, rows[some]))
            ordered, squares = (np.concatenate(each) for each in zip(*found, strict=True))
            return ordered, squares
        of_each = _at_once(lambda i: self._banks[i].squares(queries, rows - self._edges[i]), self._devices)
        return merged(rows, reduce(np.minimum, of_each), rows.shape[1])

    def _shared(
        self, queries: Rows | torch.Tensor, ask: Callable[[DeviceBank, Rows | torch.Tensor, slice], Result]
    ) -> list[Result]:
        """What each device answers for its share of the queries."""
        n, n_queries = len(self._banks), queries.shape[0]
        edges = [n_queries * i // n for i in range(n + 1)]
        shares = [slice(first, stop) for first, stop in pairwise(edges)]
        return _at_once(lambda i: ask(self._banks[i], _part(queries, *edges[i : i + 2]), shares[i]), self._devices)

    def _of_whole(self, queries: Rows | torch.Tensor, k: int, own: Array) -> tuple[Array, Cost]:
        def ask(bank: DeviceBank, asked: Rows | torch.Tensor, some: slice) -> tuple[Array, Cost]:
            rows, _, cost = bank.found(asked, k, own[some], number=some.start)
            return rows.cpu().numpy(), cost

        found = self._shared(queries, ask)
        return np.concatenate([rows for rows, _ in found]), reduce(add, [cost for _, cost in found])

    def _of_parts(self, queries: Rows | torch.Tensor, k: int, own: Array) -> tuple[Array, Cost]:
        def ask(i: int) -> tuple[Array, Array, Cost]:
            first, stop = self._edges[i], self._edges[i + 1]
            mine = np.where((own >= first) & (own < stop), own - first, -1)
            rows, squares, cost = self._banks[i].found(queries, min(k, stop - first), mine, measured=True)
            assert squares is not None
            return first + rows.cpu().numpy(), squares.cpu().numpy(), cost

        rows, squares, costs = zip(*_at_once(ask, self._devices), strict=True)
        return merged(np.concatenate(rows, axis=1), np.concatenate(squares, axis=1), k)[0], reduce(add, costs)


def _at_once(work: Callable[[int], Result], devices: Sequence[torch.device]) -> list[Result]:
    """One thread a device, which waits for that device alone; on the streams of the caller."""
    streams = [torch.cuda.current_stream(device) if device.type == "cuda" else None for device in devices]

    def on_stream(i: int) -> Result:
        with torch.cuda.stream(streams[i]):
            return work(i)

    with ThreadPoolExecutor(len(devices)) as pool:
        return list(pool.map(on_stream, range(len(devices))))


def _part(rows: Rows | torch.Tensor, first: int, stop: int) -> Rows | torch.Tensor:
    return rows[first:stop] if isinstance(rows, (torch.Tensor, np.ndarray)) else Part(rows, first, stop)


ExactBank = Bank | DeviceBank | SharedBank
