"""Sharded rows are the concatenation."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from leadline.knn.arrays import Shards


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.data())
def test_rows_of_shards_are_rows_of_their_concatenation(tmp_path_factory, sizes, data):
    folder = tmp_path_factory.mktemp("shards")
    whole = np.random.default_rng(0).standard_normal((sum(sizes), 3)).astype(np.float32)
    paths, first = [], 0
    for i, size in enumerate(sizes):
        paths.append(folder / f"{i}.npy")
        np.save(paths[-1], whole[first : first + size])
        first += size
    chosen = np.array(sorted(data.draw(st.sets(st.integers(0, len(whole) - 1), min_size=1))))
    shards = [np.load(path, mmap_mode="r") for path in paths]
    rows = Shards(shards, chosen)
    assert rows.shape == (len(chosen), 3)
    start, stop = sorted([data.draw(st.integers(0, len(chosen))), data.draw(st.integers(0, len(chosen)))])
    np.testing.assert_array_equal(rows[start:stop], whole[chosen][start:stop])
    some = np.array(sorted(data.draw(st.sets(st.integers(0, len(chosen) - 1)))), dtype=int)
    np.testing.assert_array_equal(rows[some], whole[chosen][some])
    np.testing.assert_array_equal(Shards(shards)[:], whole)
    any_order = np.array(data.draw(st.lists(st.integers(0, len(whole) - 1))), dtype=int)
    np.testing.assert_array_equal(Shards(shards)[any_order], whole[any_order])
