"""Kinds of points against the table in words, and probe accuracies against loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leadline import LeadlineError
from leadline.study.kinds import KINDS, count_kinds, kinds, probe_accuracy, thresholds


def test_the_four_corners():
    held_out = np.array([0, 0, 5, 5, 2, np.nan, 1])
    training = np.array([0, 5, 0, 5, 3, 1, np.nan])
    found = kinds(held_out, training, (2, 3))  # what lies on a threshold is not beyond it
    names = [KINDS[kind] if kind >= 0 else None for kind in found]
    assert names == [
        "easy", "looks like a different class", "ambiguous unless the label is given", "ambiguous", "easy", None, None,
    ]  # fmt: skip
    assert found.dtype == np.int8
    assert count_kinds(found) == {
        "unplaced": 2, "easy": 2, "looks like a different class": 1, "ambiguous unless the label is given": 1,
        "ambiguous": 1,
    }  # fmt: skip


def test_thresholds_are_quantiles_of_the_points_that_have_both():
    random = np.random.default_rng(0)
    held_out, training = random.random((2, 401))
    held_out[400], training[400] = 100, np.nan
    for quantile in (0.5, 0.75, 0.9):
        first, second = thresholds(held_out, training, quantile)
        assert np.mean(held_out[:400] <= first) == pytest.approx(quantile)
        assert np.mean(training[:400] <= second) == pytest.approx(quantile)
    np.testing.assert_array_equal(kinds(held_out, training), kinds(held_out, training, thresholds(held_out, training)))
    with pytest.raises(LeadlineError, match="depths"):
        kinds(np.array([1, np.nan]), np.array([np.nan, 1]))
    with pytest.raises(LeadlineError, match="training"):
        kinds(np.zeros(3), np.zeros(2), (0, 0))


def test_where_most_depths_are_0_deep_is_what_is_not():
    held_out = np.array([0, 0, 0, 0, 0, 0, 0.1, 0, 0, 0])
    assert kinds(held_out, np.zeros(10)).tolist() == [0] * 6 + [2] + [0] * 3


@given(st.integers(1, 30), st.integers(1, 5), st.integers(0, 2**32))
def test_probe_accuracy_is_that_of_a_slow_loop(n, n_probes, seed):
    random = np.random.default_rng(seed)
    winners, reference = random.integers(0, 3, (n, n_probes)), random.integers(0, 3, n)
    in_training, kind = random.random(n) < 0.5, random.integers(-1, len(KINDS), n)
    winners[random.random(winners.shape) < 0.02] = -1
    found = probe_accuracy(winners, reference, in_training, kind)
    for side, inside in (("training", True), ("held_out", False)):
        for number in range(len(KINDS)):
            rows = [i for i in range(n) if kind[i] == number and in_training[i] == inside]
            assert getattr(found, f"n_{side}")[number] == len(rows)
            for probe in range(n_probes):
                said = [winners[i, probe] for i in rows]
                accuracy = getattr(found, side)[number, probe]
                if not rows or -1 in said:
                    assert np.isnan(accuracy)
                else:
                    right = sum(vote == reference[i] for vote, i in zip(said, rows, strict=True))
                    assert accuracy == pytest.approx(right / len(rows))


def test_votes_that_do_not_fit_are_refused():
    with pytest.raises(LeadlineError, match="winners"):
        probe_accuracy(np.zeros(3, int), np.zeros(3, int), np.ones(3, bool), np.zeros(3, int))
    with pytest.raises(LeadlineError, match="kind"):
        probe_accuracy(np.zeros((3, 2), int), np.zeros(3, int), np.ones(3, bool), np.zeros(2, int))
