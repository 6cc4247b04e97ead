"""Measures of training dynamics against loops over whole histories, in float64."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leadline import LeadlineError
from leadline.study.learning import TrainingDynamics, label_outputs


def test_label_outputs_against_a_loop():
    random = np.random.default_rng(0)
    logits = random.normal(0, 4, (100, 5)).astype(np.float32)
    labels = random.integers(0, 5, 100)
    logits[0], labels[0] = [800, -800, 0, 0, 0], 1  # a softmax that underflows
    logits[1] = 3.0  # all alike
    found = label_outputs(logits, labels)
    for i, (row, label) in enumerate(zip(logits.astype(float).tolist(), labels.tolist(), strict=True)):
        powers = [math.exp(z - max(row)) for z in row]
        share = [power / sum(powers) for power in powers]
        assert found.prediction[i] == row.index(max(row))
        assert found.label_probability[i] == pytest.approx(share[label], rel=1e-6)
        assert found.margin[i] == pytest.approx(row[label] - max(row[:label] + row[label + 1 :]), rel=1e-6)
        away = sum((p - (j == label)) ** 2 for j, p in enumerate(share))
        assert found.el2n[i] == pytest.approx(math.sqrt(away), rel=1e-6, abs=1e-7)
    assert found.el2n[0] == pytest.approx(math.sqrt(2))
    assert found.prediction.dtype == np.int32
    assert {found.label_probability.dtype, found.margin.dtype, found.el2n.dtype} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("logits", "labels"), [(np.zeros((2, 1)), [0, 0]), (np.zeros(2), [0, 0]), (np.zeros((2, 3)), [0, 3]),
                           (np.zeros((2, 3)), [0, -1]), (np.zeros((2, 3)), [0])],
)  # fmt: skip
def test_label_outputs_refuse_what_does_not_fit(logits, labels):
    with pytest.raises(LeadlineError, match=r"logits|labels"):
        label_outputs(logits, labels)


@st.composite
def trainings(draw):
    """Steps [T], predictions [T, N] and final [N], labels [N], of two classes, so that runs and flips are common."""
    n, t = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    steps = sorted(draw(st.sets(st.integers(0, 20), min_size=t, max_size=t)))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    final_step = steps[-1] + draw(st.integers(0, 3))
    return steps, random.integers(0, 2, (t, n)), random.integers(0, 2, n), final_step, random.integers(0, 2, n)


def added(steps, predictions, labels, el2n_steps=(0, 0), **measures):
    dynamics = TrainingDynamics(labels, el2n_steps)
    for i, step in enumerate(steps):
        dynamics.add(step, predictions[i], **{name: values[i] for name, values in measures.items()})
    return dynamics


@given(trainings())
def test_iteration_learned_and_forgetting_are_those_of_slow_loops(training):
    steps, predictions, final, final_step, labels = training
    scores = added(steps, predictions, labels).scores(final, final_step)
    for point in range(len(labels)):
        # The definition, read from the end: all predictions from this checkpoint on are the final one.
        learned = final_step
        for step, said in reversed(list(zip(steps, predictions[:, point], strict=True))):
            if said != final[point]:
                break
            learned = step
        assert scores["iteration_learned"][point] == learned
        right = [said == labels[point] for step, said in zip(steps, predictions[:, point], strict=True) if step > 0]
        flips = sum(before and not after for before, after in pairwise(right))
        assert scores["forgetting_events"][point] == flips
        assert scores["never_learned"][point] == (not any(right))
    assert scores["iteration_learned"].dtype == np.int64
    assert scores["forgetting_events"].dtype == np.int32
    assert scores.keys() == {"iteration_learned", "forgetting_events", "never_learned"}


def test_the_quoted_cases_of_iteration_learned():
    steps = [0, 10, 20, 30]
    predictions = np.array([[1, 1, 1, 1], [0, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0]]).T
    scores = added(steps, predictions, np.ones(6, int)).scores(np.ones(6, int), 40)
    assert scores["iteration_learned"].tolist() == [0, 10, 20, 30, 40, 40]
    assert scores["forgetting_events"].tolist() == [0, 0, 0, 1, 1, 0]  # right at initialisation only: nothing to forget
    assert scores["never_learned"].tolist() == [False] * 5 + [True]


def test_the_reference_is_the_final_prediction_and_not_the_label():
    scores = added([0, 5], np.array([[2], [2]]), np.array([1])).scores(np.array([2]), 5)
    assert scores["iteration_learned"] == 0 and scores["never_learned"]


def history(seed=0, n=50, t=9):
    random = np.random.default_rng(seed)
    measures = {
        "label_probability": random.random((t, n)).astype(np.float32),
        "margin": random.normal(0, 3, (t, n)).astype(np.float32),
        "el2n": random.random((t, n)).astype(np.float32),
    }
    return np.arange(0, 10 * t, 10), random.integers(0, 3, (t, n)), random.integers(0, 3, n), measures


def test_means_over_checkpoints_are_numpys():
    steps, predictions, labels, measures = history()
    # A spread far smaller than the mean, which a difference of squares in float32 would lose.
    measures["label_probability"][:, 0] = 0.75 + 1e-6 * np.arange(len(steps))
    scores = added(steps, predictions, labels, (10, 30), **measures).scores(labels, steps[-1])
    wide = {name: values.astype(np.float64) for name, values in measures.items()}
    trained = slice(1, None)  # not the initialisation
    np.testing.assert_allclose(scores["aum"], wide["margin"][trained].mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(
        scores["mean_label_probability"], wide["label_probability"][trained].mean(axis=0), rtol=1e-12
    )
    np.testing.assert_allclose(
        scores["std_label_probability"], wide["label_probability"][trained].std(axis=0), rtol=1e-8
    )
    np.testing.assert_allclose(scores["el2n"], wide["el2n"][1:4].mean(axis=0), rtol=1e-12)


@pytest.mark.parametrize(("el2n_steps", "rows"), [((20, 20), [2]), ((0, 15), [0, 1]), ((1, 1000), slice(1, None))])
def test_el2n_is_of_the_checkpoints_that_are_named(el2n_steps, rows):
    steps, predictions, labels, measures = history()
    found = added(steps, predictions, labels, el2n_steps, el2n=measures["el2n"]).scores(labels, steps[-1])
    np.testing.assert_allclose(found["el2n"], measures["el2n"][rows].astype(float).mean(axis=0), rtol=1e-12)
    assert "aum" not in found and "mean_label_probability" not in found


def test_what_no_checkpoint_tells_is_nan():
    steps, predictions, labels, measures = history(t=1)
    found = added(steps, predictions, labels, (5, 7), **measures).scores(labels, 100)
    for name in ("aum", "mean_label_probability", "std_label_probability", "el2n"):
        assert np.isnan(found[name]).all()
    assert found["never_learned"].all() and not found["forgetting_events"].any()


def test_checkpoints_that_do_not_fit_are_refused_and_change_nothing():
    steps, predictions, labels, measures = history()
    dynamics = added(steps[:3], predictions, labels, margin=measures["margin"])
    before = dynamics.scores(labels, 20)
    with pytest.raises(LeadlineError, match="step"):
        dynamics.add(20, predictions[3], margin=measures["margin"][3])
    with pytest.raises(LeadlineError, match="predictions alone"):
        dynamics.add(30, predictions[3])
    with pytest.raises(LeadlineError, match="el2n"):
        dynamics.add(30, predictions[3], margin=measures["margin"][3], el2n=measures["el2n"][3])
    with pytest.raises(LeadlineError, match="margin"):
        dynamics.add(30, predictions[3], margin=measures["margin"][3][:-1])
    with pytest.raises(LeadlineError, match="final_step"):
        dynamics.scores(labels, 19)
    for name, values in dynamics.scores(labels, 20).items():
        np.testing.assert_array_equal(values, before[name])
