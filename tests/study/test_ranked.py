"""An order in which ties stand for their mean, against the mean over all orders."""

from itertools import permutations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from leadline.study.arrays import ranked


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([-np.inf, 0.0, 1.5, np.inf])), min_size=1, max_size=5))
def test_ties_stand_for_the_mean_over_all_orders(pairs):
    values, scores = (np.array(column) for column in zip(*pairs, strict=True))
    orders = [order for order in permutations(range(len(pairs))) if list(scores[[*order]]) == sorted(scores)[::-1]]
    found = ranked(values, scores)
    np.testing.assert_allclose(found, np.mean([values[[*order]] for order in orders], axis=0))
