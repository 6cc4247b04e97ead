"""The neighbours that members share: a member's own are among them, in order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from scipy.stats import binom

from leadline.cluster.common import common_bank, own_neighbours


def by_brute_force(inputs, ids, k, point, leave_one_out):
    """The k nearest of some points to one of them all, by (distance, point id)."""
    others = ids[ids != point] if leave_one_out else ids
    distances = cdist(inputs[[point]], inputs[others])[0]
    return others[np.lexsort((others, distances))][:k]


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_own_neighbours_are_those_of_a_search_of_ones_own(data):
    n = data.draw(st.integers(8, 40))
    # Few distinct places: equal points, and crowds at equal distances.
    inputs = np.array(data.draw(st.lists(st.tuples(*[st.integers(0, 2)] * 2), min_size=n, max_size=n)), float)
    k = data.draw(st.integers(1, 4))
    leave_one_out = data.draw(st.booleans())
    splits = [
        np.array(sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=k + 1))))
        for _ in range(data.draw(st.integers(1, 4)))
    ]
    common = common_bank(splits, n, k, leave_one_out)
    assert common.ids.tolist() == sorted(set().union(*map(set, splits)))
    assert k <= common.k <= len(common.ids) - leave_one_out
    shared = np.stack([by_brute_force(inputs, common.ids, common.k, point, leave_one_out) for point in range(n)])
    for ids in splits:
        inside = np.isin(np.arange(n), ids)
        neighbours, enough = own_neighbours(shared, inside, k)
        for point in range(n):
            expected = by_brute_force(inputs, ids, k, point, leave_one_out)
            assert enough[point] == (np.isin(shared[point], ids).sum() >= k)
            if enough[point]:
                assert neighbours[point].tolist() == expected.tolist()


@pytest.mark.parametrize("share", [0.4, 0.5, 0.7, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("k", [10, 30, 100])
def test_hardly_any_point_has_too_few_common_neighbours(share, k):
    every = np.arange(100_000)
    common = common_bank([every, every[: round(share * 100_000)]], 100_000, k, True)
    assert binom.cdf(k - 1, common.k, share) <= 1e-6 < binom.cdf(k - 1, common.k - 1, share)


def test_equal_splits_share_as_many_neighbours_as_vote():
    assert common_bank([np.arange(50)] * 3, 80, 7, True).k == 7


@pytest.mark.parametrize(
    ("splits", "pays"),
    [
        ([(0, 900)], False),
        ([(0, 900), (100, 1000)], True),
        ([(0, 500), (500, 1000)], False),
        ([(0, 1000), (0, 1000), (0, 50)], False),
    ],
)
def test_sharing_pays_where_banks_overlap_and_none_is_small(splits, pays):
    assert common_bank([np.arange(*split) for split in splits], 1000, 30, True).pays is pays
