"""The audit's measures: intervals against scipy and by simulation, shares against slow loops, and what `auto` takes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from leadline.knn.audit import audit_depths, draw, interval, recall_at_k
from leadline.knn.choice import Option, Trial, candidates, choose


@pytest.mark.parametrize("n", [1, 7, 100, 1000])
def test_the_interval_of_a_share_is_scipys_wilson(n):
    for right in sorted({0, 1, n // 3, n - 1, n}):
        found = interval(np.arange(n) < right)
        expected = binomtest(right, n).proportion_ci(0.95, method="wilson")
        assert found.value == right / n
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
        assert found.low <= found.value <= found.high


def misses(draws, largest, truth):
    """How often the truth lies below and above the interval of a sample: shares."""
    found = [interval(values, largest) for values in draws]
    return np.mean([truth < one.low for one in found]), np.mean([truth > one.high for one in found])


@pytest.mark.parametrize("share", [0.9, 0.97, 0.99, 0.997])
def test_intervals_of_shares_hold_the_truth(share):
    below, above = misses(np.random.default_rng(1).random((4000, 400)) < share, 1, share)
    # A target is promised by the low end; the other end is known to miss more often, near 1, than 2.5 %.
    assert below < 0.035
    assert below + above < 0.08


def test_intervals_of_mean_errors_hold_the_truth_also_where_errors_are_rare_and_large():
    random = np.random.default_rng(2)
    for chances in ([0.9, 0.06, 0.03, 0.01], [0.99, 0.004, 0.003, 0.003], [0.998, 0, 0, 0.002]):
        draws = random.choice(4, (3000, 300), p=chances)
        below, above = misses(draws, 3, np.dot(chances, range(4)))
        assert above < 0.03, chances  # an error bar must not be too short
        assert below + above < 0.06


def test_no_error_among_few_points_is_no_proof_of_none():
    error = interval(np.zeros(50), 5)
    assert error.value == error.low == 0 < 0.3 < error.high < 0.5


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_recall_is_that_of_a_slow_loop(data):
    n_bank, k, n = data.draw(st.integers(4, 12)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    rows = st.permutations(range(n_bank)).map(lambda order: order[:k])
    exact = np.array([data.draw(rows) for _ in range(n)])
    found = np.array([data.draw(rows) for _ in range(n)])
    found[np.array(data.draw(st.lists(st.booleans(), min_size=n * k, max_size=n * k))).reshape(n, k)] = -1
    slow = [len(set(a) & set(b)) / k for a, b in zip(found.tolist(), exact.tolist(), strict=True)]
    assert recall_at_k(found, exact).tolist() == pytest.approx(slow)


def test_depths_are_compared_point_by_point():
    random = np.random.default_rng(3)
    depths, exact = random.integers(0, 6, (2, 80)).astype(np.int16)
    agreement, error = audit_depths(depths, exact, 5)
    pairs = [(int(a), int(b)) for a, b in zip(depths, exact, strict=True)]
    assert agreement.value == pytest.approx(sum(a == b for a, b in pairs) / 80)
    assert error.value == pytest.approx(sum(abs(a - b) for a, b in pairs) / 80)
    assert 0 <= error.low < error.value < error.high <= 5


def test_samples_are_random_points_and_those_to_choose_by_are_others():
    audited, tried = draw(1000, 300, 7)
    assert len(set(audited) & set(tried)) == 0
    for sample in (audited, tried):
        assert len(set(sample)) == 300 and (np.diff(sample) > 0).all() and sample[0] >= 0 and sample[-1] < 1000
    assert audited.tolist() == draw(1000, 300, 7)[0].tolist() != draw(1000, 300, 8)[0].tolist()
    assert draw(20, 300, 0)[0].tolist() == list(range(20))


def option(seconds, *changed, method="index"):
    return Option(method, seconds, np.isin(np.arange(1000), changed))


NONE = np.zeros(1000, bool)


def test_the_switch_that_saves_most_is_taken_while_the_target_is_met():
    # The low end is 0.9943 with one changed point of 1000, 0.9912 with three, 0.9899 with four.
    trials = {
        0: Trial(10.0, [option(1.0, 1, 2, 3, 4, method="coarse"), option(4.0, 1, 2, method="fine")]),
        2: Trial(5.0, [option(1.0, 5)]),
        3: Trial(4.0, [option(1.0, 6)]),
        4: Trial(1.0, [option(1.5), option(1.2, method="quick")]),
    }
    chosen = choose(trials, 0.99, NONE)
    assert {probe: choice.method for probe, choice in chosen.items()} == {0: "fine", 2: "index", 3: "exact", 4: "exact"}
    assert "0.99" in chosen[3].why and "exact is cheaper" in chosen[4].why and "quick" in chosen[4].why
    # Points that layers with a given method have changed count too.
    spent = np.isin(np.arange(1000), [7, 8, 9])
    assert {choice.method for choice in choose(trials, 0.99, spent).values()} == {"exact"}
    # A point that is changed twice is one point.
    assert choose({0: Trial(9.0, [option(1.0, 7, 8, 9)])}, 0.99, spent)[0].method == "index"


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_whatever_is_chosen_keeps_the_target_and_saves_time(data):
    options = st.builds(
        lambda seconds, changed, name: option(seconds, *changed, method=name),
        st.floats(0.1, 10), st.sets(st.integers(0, 20), max_size=4), st.sampled_from("abc"),
    )  # fmt: skip
    trials = data.draw(
        st.dictionaries(
            st.integers(0, 5),
            st.builds(
                Trial, st.floats(0.1, 10), st.lists(options, min_size=1, max_size=3, unique_by=lambda o: o.method)
            ),
        )
    )
    chosen = choose(trials, 0.99, NONE)
    assert chosen.keys() == trials.keys()
    changed, saved = NONE, {}
    for probe, choice in chosen.items():
        for tried in trials[probe].options:
            if tried.method == choice.method:
                changed = changed | tried.changed
                saved[probe] = trials[probe].exact_seconds - tried.seconds
                assert saved[probe] > 0
    assert not saved or binomtest(int((~changed).sum()), 1000).proportion_ci(0.95, method="wilson").low >= 0.99
    # What was left exact cannot be switched as well.
    for probe in trials.keys() - saved.keys():
        for tried in trials[probe].options:
            if tried.seconds < trials[probe].exact_seconds:
                assert interval(~(changed | tried.changed)).low < 0.99


def test_candidates_look_into_more_and_more_of_the_cells():
    for n_bank in (50, 1617, 54_000, 1_281_167):
        texts = candidates(n_bank)
        probed = [int(text.rpartition("=")[2]) for text in texts]
        assert probed == sorted(set(probed)) and probed[0] >= 1
        assert all(text.startswith("ivf-flat:nlist=") for text in texts)
    assert candidates(54_000)[0] == "ivf-flat:nlist=1024,nprobe=8"
