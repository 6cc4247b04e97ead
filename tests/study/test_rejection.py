"""Risk and coverage against the mean over all orders; read-outs against loops over votes."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from leadline import LeadlineError
from leadline.study.rejection import early_read_out, risk_coverage, votes_from


@given(st.lists(st.tuples(st.sampled_from([-np.inf, 0.0, 1.0, 2.5, np.nan]), st.booleans()), min_size=1, max_size=5))
def test_risk_is_the_mean_over_the_orders_of_ties(points):
    confidence, right = (np.array(column) for column in zip(*points, strict=True))
    known = [i for i in range(len(points)) if not np.isnan(confidence[i])]
    if not known:
        with pytest.raises(LeadlineError, match="confidence"):
            risk_coverage(confidence, right)
        return
    best_first = sorted(confidence[known])[::-1]
    orders = [order for order in permutations(known) if list(confidence[[*order]]) == best_first]
    risks = np.array([[np.mean(~right[[*order]][:n]) for n in range(1, len(known) + 1)] for order in orders])
    found = risk_coverage(confidence, right)
    np.testing.assert_allclose(found.risk, risks.mean(axis=0))
    np.testing.assert_allclose(found.coverage, [n / len(known) for n in range(1, len(known) + 1)])
    assert found.area == pytest.approx(risks.mean())
    assert found.n_left_out == len(points) - len(known)


@given(st.integers(2, 40), st.integers(0, 2**32))
def test_no_confidence_is_better_than_knowing_what_is_right(n, seed):
    random = np.random.default_rng(seed)
    right, confidence = random.random(n) < 0.7, random.integers(0, 5, n)
    best, worst = risk_coverage(right, right).area, risk_coverage(~right, right).area
    assert best - 1e-12 <= risk_coverage(confidence, right).area <= worst + 1e-12
    assert risk_coverage(confidence, right).risk[-1] == pytest.approx(np.mean(~right))
    np.testing.assert_allclose(risk_coverage(np.zeros(n), right).risk, np.mean(~right))  # knows nothing


def slow_vote(votes):
    """Most voices; among equals the class that comes last."""
    most = max(votes.count(vote) for vote in votes)
    return [vote for vote in votes if votes.count(vote) == most][-1]


@given(arrays(np.int32, st.tuples(st.integers(0, 10), st.integers(1, 7)), elements=st.integers(0, 3)))
def test_votes_over_probes_are_those_of_a_slow_loop(winners):
    before = winners.copy()
    found = votes_from(winners)
    assert found.tolist() == [[slow_vote(row[p:]) for p in range(len(row))] for row in winners.tolist()]
    np.testing.assert_array_equal(winners, before)


def test_the_read_out_is_chosen_on_the_validation_part_alone():
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 60)
    predictions = (labels + (random.random(60) < 0.3)) % 4
    winners = (labels[:, None] + (random.random((60, 4)) < [0.6, 0.02, 0.4, 0.5])) % 4
    validation = np.arange(60) % 2 == 0
    winners[~validation] = 3 - labels[~validation, None]  # what holds on the others must not be seen
    found = early_read_out(winners, predictions, labels, validation)
    assert found.names == (
        "network", "probe 0", "probe 1", "probe 2", "probe 3", "probes 0 to 3", "probes 1 to 3", "probes 2 to 3",
    )  # fmt: skip
    assert found.names[found.best] == "probe 1"
    for side, chosen in ((found.on_validation, validation), (found.on_others, ~validation)):
        rows = winners[chosen].tolist()
        answers = [predictions[chosen], *winners[chosen].T, *([slow_vote(row[p:]) for row in rows] for p in range(3))]
        np.testing.assert_allclose(side, [np.mean(answer == labels[chosen]) for answer in answers])


def test_among_equals_the_network_stays():
    labels = np.arange(6) % 3
    found = early_read_out(np.stack([labels, labels], axis=1), labels, labels, np.arange(6) < 3)
    assert found.names[found.best] == "network"


def test_read_outs_refuse_what_does_not_fit():
    votes, labels, some = np.zeros((4, 2), int), np.zeros(4, int), np.arange(4) < 2
    for winners, chosen, match in (
        (votes[:, 0], some, "winners"),
        (votes - 1, some, "not computed"),
        (votes, ~np.zeros(4, bool), "validation"),
        (votes, np.zeros(4, bool), "validation"),
        (votes[:3], some, "predictions"),
    ):
        with pytest.raises(LeadlineError, match=match):
            early_read_out(winners, labels, labels, chosen)
