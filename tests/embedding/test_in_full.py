"""Embeddings that are made again: the bits that a run without reductions stores, from no more batches than needed."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.datasets import load_digits

from leadline.embedding import EmbeddedRows, embed_batch
from leadline.knn import Bank
from leadline.members.architectures import build
from leadline.members.probes import place_probes

BATCH, N = 64, 500  # the last batch is not whole


@pytest.fixture(scope="module")
def images():
    return torch.tensor(load_digits().data[:N].reshape(-1, 1, 8, 8) / 16, dtype=torch.float32)


@pytest.fixture(scope="module")
def network(images):
    model = build("resnet18", {"width": 4, "depth": [1, 1, 1, 1]}, (1, 8, 8), 10, 0)
    return model, place_probes(model, None, images[:1])


def stored_in(precision, images, network):
    """What a run without reductions stores at each probe."""
    batches = [
        embed_batch(*network, images[first : first + BATCH], first, "m", precision=precision).embeddings
        for first in range(0, N, BATCH)
    ]
    return [np.concatenate(parts) for parts in zip(*batches, strict=True)]


@pytest.fixture(scope="module")
def stored(images, network):
    return stored_in("float32", images, network)


@pytest.fixture(scope="module")
def rounded(images, network):
    return stored_in("bfloat16", images, network)


def rows_of(network, images, probe, ids, precision="float32"):
    """Rows, and the list of what was read to make them, which grows."""
    read = []

    def inputs(wanted):
        read.append(wanted.tolist())
        return images[torch.from_numpy(wanted)]

    model, probes = network
    return EmbeddedRows(model, probes[probe], inputs, ids, N, BATCH, precision), read


@pytest.mark.parametrize("probe", range(7))
def test_rows_are_what_a_run_without_reductions_stores(images, network, stored, probe):
    ids = np.flatnonzero(np.arange(N) % 7)  # a split: all batches have points that are not in it
    rows, _ = rows_of(network, images, probe, ids)
    expected = stored[probe][ids]
    assert rows.shape == expected.shape
    places = np.random.default_rng(0).permutation(len(ids))[:90]
    for index in (slice(0, len(ids)), slice(70, 71), slice(100, 10**6), slice(0, 0), places, places[:1]):
        found = rows[index]
        assert found.dtype == np.float32 and np.array_equal(found, expected[index])


@pytest.mark.parametrize("probe", range(7))
def test_rows_in_bfloat16_are_what_such_a_run_stores(images, network, stored, rounded, probe):
    ids = np.flatnonzero(np.arange(N) % 7)
    rows, _ = rows_of(network, images, probe, ids, "bfloat16")
    assert np.array_equal(rows[:], rounded[probe][ids])
    assert np.array_equal(stored[probe], rounded[probe]) == (probe == 0)


def test_only_the_batches_that_hold_wanted_points_are_read(images, network):
    rows, read = rows_of(network, images, 2, np.arange(N)[::-1][::3][::-1])
    _ = rows[np.array([0, 166, 1])]
    assert read == [list(range(64)), list(range(448, 500))]
    # The input is read itself, and no other point's.
    rows, read = rows_of(network, images, 0, np.arange(0, N, 5))
    _ = rows[np.array([99, 3, 4])]
    assert read == [[15, 20], [495]]


# A bank that fits is made once, in eight batches. Otherwise twice, to be surveyed and to be searched: in three tiles,
# whose edges lie in two batches.
@pytest.mark.parametrize(("memory_budget", "batches"), [(1 << 30, 8), (1, 2 * (8 + 2))])
def test_a_search_in_full_is_brute_force_over_what_would_be_stored(images, network, stored, memory_budget, batches):
    rows, read = rows_of(network, images, 1, np.arange(N))
    asked = np.arange(0, N, 11)
    queries, _ = rows_of(network, images, 1, asked)
    found, cost = Bank(rows, memory_budget).search(queries, 10, asked)
    distances = cdist(stored[1][asked].astype(float), stored[1].astype(float))
    distances[np.arange(len(asked)), asked] = np.inf
    expected = np.argsort(distances, axis=1, kind="stable")[:, :10]
    assert np.array_equal(found, np.sort(expected, axis=1))
    assert cost.reranked == cost.fell_through == 0  # else a few rows would be made again
    assert len(read) == batches
