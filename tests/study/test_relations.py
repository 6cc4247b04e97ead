"""Means, correlations and their intervals against loops, theory and simulated ensembles."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from leadline import LeadlineError
from leadline.study.relations import (
    binned_means,
    mean_over_members,
    rank_correlation,
    rank_correlation_between,
    stability,
)

SOME = 20  # draws, where only the value matters


def slow_means(measure):
    """A point's mean over the members that say something of it; None where there are none."""
    columns = [[value for value in column if not math.isnan(value)] for column in np.transpose(measure).tolist()]
    return [sum(column) / len(column) if column else None for column in columns]


def slow_spearman(pairs):
    """Pearson's correlation of mean ranks, both by counting."""

    def ranks(values):
        return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]

    one, other = (ranks(column) for column in zip(*pairs, strict=True))
    middle = (len(pairs) + 1) / 2
    dot = sum((a - middle) * (b - middle) for a, b in zip(one, other, strict=True))
    return dot / math.sqrt(sum((a - middle) ** 2 for a in one) * sum((b - middle) ** 2 for b in other))


@st.composite
def measures(draw, n_measures=2):
    """Measures [members, N] of small whole numbers, so that ties are common, and NaN."""
    shape = draw(st.integers(1, 4)), draw(st.integers(4, 12))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    found = []
    for _ in range(n_measures):
        values = random.integers(0, 4, shape).astype(float)
        values[random.random(shape) < draw(st.sampled_from([0, 0.3, 0.6]))] = np.nan
        found.append(values)
    return found


@settings(deadline=None, max_examples=50)
@given(measures())
def test_rank_correlation_is_that_of_a_slow_loop(pair):
    found = rank_correlation(*pair, draws=SOME)
    both = [p for p in zip(*(slow_means(measure) for measure in pair), strict=True) if None not in p]
    assert found.n_points == len(both)
    assert found.n_points + found.n_left_out == pair[0].shape[1]
    if len(both) < 2 or any(len(set(column)) == 1 for column in zip(*both, strict=True)):
        assert np.isnan(found.value)
    else:
        assert found.value == pytest.approx(slow_spearman(both), abs=1e-9)
        assert not (found.low > found.value or found.high < found.value)
    between = rank_correlation_between(*pair, draws=SOME)
    np.testing.assert_array_equal(between.value, found.value)  # who is drawn with whom changes the interval alone
    assert (between.n_points, between.n_left_out) == (found.n_points, found.n_left_out)


@settings(deadline=None, max_examples=50)
@given(measures(), st.lists(st.sampled_from([0, 0.5, 1, 1.5, 2, 3]), min_size=2, max_size=5, unique=True))
def test_binned_means_are_those_of_a_slow_loop(pair, edges):
    edges = sorted(edges)
    found = binned_means(*pair, edges, draws=SOME)
    bins = [[] for _ in edges[1:]]
    for depth, value in zip(*(slow_means(measure) for measure in pair), strict=True):
        for i, (low, high) in enumerate(pairwise(edges)):
            last = i == len(edges) - 2
            if None not in (depth, value) and (low <= depth < high or (last and depth == high)):
                bins[i].append(value)
    assert found.n_points.tolist() == [len(values) for values in bins]
    assert found.n_left_out == pair[0].shape[1] - sum(map(len, bins))
    for value, values in zip(found.value, bins, strict=True):
        assert value == pytest.approx(sum(values) / len(values)) if values else np.isnan(value)


def test_infinite_values_have_ranks():
    one = np.array([[1.0, 2.0, 3.0, np.inf], [1.0, 2.0, 3.0, 4.0]])
    found = rank_correlation(one, one, draws=SOME)
    assert found.value == 1 and found.low == pytest.approx(1) and found.high == 1


def test_one_member_has_no_interval():
    values = np.arange(12.0).reshape(1, 12)
    for found in (rank_correlation(values, values), binned_means(values, values, [0, 6, 12])):
        assert np.isfinite(found.value).all() and np.isnan(found.low).all() and np.isnan(found.high).all()
    two = np.vstack([values, values])
    assert np.isnan(rank_correlation_between(two, values).low)
    assert np.isfinite(rank_correlation_between(two, two, draws=SOME).low)


def test_a_seed_tells_the_draws():
    random = np.random.default_rng(0)
    one, other = random.normal(size=(2, 5, 40))
    first, again, another = (rank_correlation(one, other, draws=50, seed=seed) for seed in (1, 1, 2))
    assert first.low == again.low != another.low


@pytest.mark.parametrize("n_members", [3, 8, 40])
def test_the_interval_of_a_mean_is_students(n_members):
    values = np.random.default_rng(n_members).normal(5, 2, (n_members, 3, 2))
    values[0, 2, 1] = np.nan
    found = mean_over_members(values, draws=4000)
    known = values[:, :2]
    expected = stats.ttest_1samp(known, 0).confidence_interval(0.95)
    np.testing.assert_allclose(found.value[:2], known.mean(axis=0))
    np.testing.assert_allclose(found.high[:2] - found.low[:2], expected.high - expected.low, rtol=0.06)
    np.testing.assert_allclose((found.high + found.low) / 2, found.value)
    assert found.n_points.tolist() == [[n_members] * 2, [n_members] * 2, [n_members, n_members - 1]]
    assert found.n_left_out.sum() == 1
    assert found.value[2, 1] == pytest.approx(np.nanmean(values[:, 2, 1]))


def ensembles(random, n_ensembles, n_members, truth, noise=1.0):
    """Measures [members, N] of ensembles of the same points: a truth, scaled by each member, and noise."""
    for _ in range(n_ensembles):
        whole = random.normal(0, 0.5, (n_members, 1))
        yield truth * (1 + whole) + random.normal(0, noise, (n_members, len(truth)))


def in_a_bin(depth, measure, draws):
    return binned_means(depth, measure, [-0.5, 0.5], draws=draws)


@pytest.mark.parametrize(
    ("statistic", "n_members"),
    [(rank_correlation, 4), (rank_correlation, 16), (rank_correlation_between, 4), (in_a_bin, 4)],
)
def test_intervals_hold_what_other_ensembles_give_in_the_mean(statistic, n_members):
    random = np.random.default_rng(5)
    depth, other = random.multivariate_normal([0, 0], [[1, 0.7], [0.7, 1]], 100).T
    pairs = zip(ensembles(random, 60, n_members, depth), ensembles(random, 60, n_members, other), strict=True)
    found = [statistic(*pair, draws=30) for pair in pairs]
    truth = np.mean([estimate.value for estimate in found])
    held = np.mean([estimate.low <= truth <= estimate.high for estimate in found])
    assert held > 0.9
    # Nor are they far wider than Student's interval would be, were the spread over ensembles known.
    widths = np.mean([estimate.high - estimate.low for estimate in found])
    spread = np.std([estimate.value for estimate in found])
    assert widths < 2 * 1.6 * stats.t.ppf(0.975, n_members - 1) * spread


def test_halves_are_disjoint():
    values = np.random.default_rng(1).normal(size=(4, 30))
    ways = [((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2))]
    possible = [stats.spearmanr(values[[*a]].mean(axis=0), values[[*b]].mean(axis=0)).statistic for a, b in ways]
    found = stability(values, [1, 2], draws=300)
    assert found.low[1] == pytest.approx(min(possible)) and found.high[1] == pytest.approx(max(possible))
    assert found.value[1] == pytest.approx(np.mean(possible), abs=0.03)
    pair = values[:2]
    assert stability(pair, [1], draws=5).value[0] == pytest.approx(stats.spearmanr(*pair).statistic)


def test_stability_rises_with_members_as_theory_has_it():
    random = np.random.default_rng(2)
    truth = random.normal(size=3000)
    sizes = np.array([1, 3, 10])
    found = stability(truth + random.normal(size=(20, 3000)), sizes, draws=40)
    # Spearman and Brown: of variances 1 and 1 / m; ranks of normal values correlate by 6/π arcsin(r / 2).
    reliability = sizes / (sizes + 1)
    np.testing.assert_allclose(found.value, 6 / np.pi * np.arcsin(reliability / 2), atol=0.02)
    assert (found.low < found.value).all() and (found.value < found.high).all()
    assert found.n_points.tolist() == [3000] * 3 and found.n_left_out.tolist() == [0] * 3


def test_stability_counts_the_points_that_both_halves_know():
    random = np.random.default_rng(3)
    values = random.normal(size=(10, 2000))
    values[random.random(values.shape) < 0.9] = np.nan
    found = stability(values, [2, 5], draws=40)
    share = (1 - 0.9 ** np.array([2, 5])) ** 2
    np.testing.assert_allclose(found.n_points, 2000 * share, rtol=0.15)
    assert (found.n_points + found.n_left_out == 2000).all()
    alone = stability(values, [5], draws=40)
    assert alone.value[0] == found.value[1]
    with pytest.raises(LeadlineError, match="sizes"):
        stability(values, [6])


@pytest.mark.parametrize("call", [rank_correlation, rank_correlation_between])
def test_measures_that_do_not_fit_are_refused(call):
    with pytest.raises(LeadlineError, match="other"):
        call(np.zeros((3, 5)), np.zeros((3, 4)))
    with pytest.raises(LeadlineError, match="one"):
        call(np.zeros(5), np.zeros(5))
    with pytest.raises(LeadlineError, match="edges"):
        binned_means(np.zeros((3, 5)), np.zeros((3, 5)), [0, 2, 2])
