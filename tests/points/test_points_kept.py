"""Batches that are kept: each pass gives what reading gives, and reads only what had no room."""

from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch

from leadline.config import Digits
from leadline.points import open_points
from leadline.points.ahead import read_ahead
from leadline.points.kept import KeptBatches

N, SIZE = 100, 30
OF_ONE = 4 * 64  # bytes of a point's input


@pytest.fixture
def counted(monkeypatch):
    """Points, their first inputs, and the ids that were read since, which grow."""
    points, read = open_points(Digits(source="digits")), []
    inputs, reading = points.read(np.arange(N)), points.read
    monkeypatch.setattr(points, "read", lambda ids: read.extend(ids.tolist()) or reading(ids))
    return points, inputs, read


@pytest.mark.parametrize(
    ("room", "n_kept"),
    [(0, 0), (SIZE * OF_ONE - 1, 0), (SIZE * OF_ONE, 30), (80 * OF_ONE, 60), (99 * OF_ONE, 90), (N * OF_ONE, N)],
)
@pytest.mark.parametrize("ahead", [True, False])
def test_every_pass_is_the_same_and_reads_what_had_no_room(counted, room, n_kept, ahead):
    points, expected, read = counted
    ids = np.split(np.arange(N), range(SIZE, N, SIZE))
    reads = partial(read_ahead, points, device="cpu", threads=2) if ahead else (
        lambda batches: ((some, torch.from_numpy(points.read(some))) for some in batches)
    )  # fmt: skip
    batches = KeptBatches(ids, reads, room)
    for passed in range(3):
        read.clear()
        found = list(batches)
        assert [some.tolist() for some, _ in found] == [some.tolist() for some in ids]
        np.testing.assert_array_equal(torch.cat([inputs for _, inputs in found]).numpy(), expected)
        assert sorted(read) == list(range(n_kept if passed else 0, N))


def test_a_pass_that_was_left_keeps_what_it_has_read(counted):
    points, expected, read = counted
    ids = np.split(np.arange(N), range(SIZE, N, SIZE))
    batches = KeptBatches(ids, lambda some: ((i, torch.from_numpy(points.read(i))) for i in some), N * OF_ONE)
    assert [some[0] for some, _ in islice(batches, 2)] == [0, SIZE]
    assert read == list(range(2 * SIZE))
    read.clear()
    np.testing.assert_array_equal(torch.cat([inputs for _, inputs in batches]).numpy(), expected)
    assert read == list(range(2 * SIZE, N))
