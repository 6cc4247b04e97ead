"""Finding corrupted labels, against loops over all cuts and orders."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leadline import LeadlineError
from leadline.study.detection import detect, precision_at

SCORES = st.sampled_from([-np.inf, 0.0, 1.0, 2.5, np.inf])
POINTS = st.lists(st.tuples(SCORES, st.booleans()), min_size=1, max_size=5)


@given(POINTS, st.data())
def test_precision_and_recall_are_means_over_the_orders_of_ties(points, data):
    scores, corrupted = (np.array(column) for column in zip(*points, strict=True))
    n = data.draw(st.integers(1, len(points)))
    orders = [order for order in permutations(range(len(points))) if list(scores[[*order]]) == sorted(scores)[::-1]]
    found = np.mean([sum(corrupted[i] for i in order[:n]) for order in orders])
    precision, recall = precision_at(scores, corrupted, n)
    assert precision == pytest.approx(found / n)
    assert recall == pytest.approx(found / corrupted.sum()) if corrupted.any() else np.isnan(recall)


@given(POINTS)
def test_average_precision_is_that_of_a_slow_loop(points):
    scores, corrupted = (np.array(column) for column in zip(*points, strict=True))
    if not corrupted.any():
        with pytest.raises(LeadlineError, match="nothing to find"):
            detect(scores, corrupted)
        return
    # Of each corrupted point, the precision where all points of its score and above are flagged.
    precisions = [corrupted[scores >= score].mean() for score, wrong in points if wrong]
    found = detect(scores, corrupted)
    assert found.average_precision == pytest.approx(np.mean(precisions))
    assert found.precision == pytest.approx(precision_at(scores, corrupted, int(corrupted.sum()))[1])
    shuffled = np.random.default_rng(0).permutation(len(points))
    assert detect(scores[shuffled], corrupted[shuffled]) == found


def test_points_without_a_score_are_left_out_and_counted():
    scores, corrupted = np.array([3, np.nan, 2, 1, np.nan]), np.array([True, True, False, True, False])
    found = detect(scores, corrupted)
    assert (found.n_points, found.n_corrupted, found.n_left_out) == (3, 2, 2)
    assert found.precision == 0.5
    assert found.average_precision == pytest.approx((1 + 2 / 3) / 2)


def test_a_perfect_score_finds_all_and_a_constant_one_what_chance_finds():
    corrupted = np.arange(100) < 30
    perfect, constant = detect(corrupted.astype(int), corrupted), detect(np.zeros(100), corrupted)
    assert perfect.precision == perfect.average_precision == 1
    assert (constant.precision, constant.average_precision) == pytest.approx((0.3, 0.3))


def test_what_does_not_fit_is_refused():
    with pytest.raises(LeadlineError, match="corrupted"):
        detect(np.zeros(3), np.ones(2, bool))
    for n in (0, 4):
        with pytest.raises(LeadlineError, match="n_flagged"):
            precision_at(np.zeros(3), np.ones(3, bool), n)
