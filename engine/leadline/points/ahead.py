"""Points read ahead of their use: decoded by threads and copied to the device while it computes."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leadline.points.device_jpeg import Opened

if TYPE_CHECKING:
    from leadline.points import Points

Arriving = tuple[Tensor, Any]  # inputs, and the event that they are there, None where nothing is to be waited for
_PIECE = 16  # points that a thread reads at once: small beside a batch, so that the threads end it together


def read_ahead(
    points: "Points", batches: Iterable[NDArray[np.int64]], device: torch.device | str, threads: int = 1
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Batches of points in their order: the ids as given, and the inputs float32 [n, *input_shape] on the device.

    While a batch is used, `threads` threads read the next one; for a CUDA device the next two, into pinned memory, and
    a stream of its own copies them, so that neither reading nor copying holds up what runs on the current stream.
    The inputs are those of `points.read_on`, and the same whatever the number of threads. A source of Parquet reads a
    batch quickest where its ids lie close together.
    Raises LeadlineError of `points.read_on` where the batch's turn has come.
    """
    device = torch.device(device)
    copies = _stream_of_copies(device) if device.type == "cuda" else None

    def fill(host: NDArray[np.float32], first: int, ids: NDArray[np.int64]) -> None:
        host[first : first + len(ids)] = points.read(ids)

    def deliver(host: Tensor, pieces: list[Future[None]]) -> Arriving:
        for piece in pieces:
            piece.result()
        if copies is None:
            return host, None
        with torch.cuda.stream(copies):
            return host.to(device, non_blocking=True), copies.record_event()

    def decode(ids: NDArray[np.int64], pieces: list[Future[list[Opened]]]) -> Arriving:
        images = [image for piece in pieces for image in piece.result()]
        with torch.cuda.stream(copies):
            return points.decoded(images, ids, device), copies.record_event() if copies else None

    with ThreadPoolExecutor(threads) as readers, ThreadPoolExecutor(1) as porter:

        def start(ids: NDArray[np.int64]) -> Future[Arriving]:
            if points.decodes_on(device):
                opening = [readers.submit(points.opened, ids[i : i + _PIECE]) for i in range(0, len(ids), _PIECE)]
                return porter.submit(decode, ids, opening)
            host = torch.empty((len(ids), *points.input_shape), dtype=torch.float32, pin_memory=copies is not None)
            pieces = [
                readers.submit(fill, host.numpy(), first, ids[first : first + _PIECE])
                for first in range(0, len(ids), _PIECE)
            ]
            return porter.submit(deliver, host, pieces)

        ahead = 1 if copies is None else 2
        waiting: deque[tuple[NDArray[np.int64], Future[Arriving]]] = deque()
        for ids in batches:
            waiting.append((ids, start(ids)))
            if len(waiting) > ahead:
                yield _arrived(*waiting.popleft())
        while waiting:
            yield _arrived(*waiting.popleft())


@cache
def _stream_of_copies(device: torch.device) -> Any:
    """One for each device: what torch keeps of freed memory is kept for a stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _arrived(ids: NDArray[np.int64], coming: Future[Arriving]) -> tuple[NDArray[np.int64], Tensor]:
    inputs, copied = coming.result()
    if copied is not None:
        current = torch.cuda.current_stream(inputs.device)
        current.wait_event(copied)
        inputs.record_stream(current)  # its memory is the other stream's
    return ids, inputs
