"""Depths, output summaries and ensemble columns against loops, scipy and pandas."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import entropy

import leadline
from leadline import LeadlineError
from leadline.depth import MemberDepths, combine, is_unsettled
from leadline.embedding.outputs import summarise_logits


def slow_depth(votes, prediction):
    depth = 0
    for probe, vote in enumerate(votes):
        if vote != prediction:
            depth = probe + 1
    return depth


@given(arrays(np.int32, st.tuples(st.integers(0, 20), st.integers(1, 9)), elements=st.integers(0, 2)), st.data())
def test_depth_is_one_after_the_last_disagreement(winners, data):
    predictions = data.draw(arrays(np.int64, len(winners), elements=st.integers(0, 2)))
    depths = leadline.depth_from_votes(winners, predictions)
    assert depths.dtype == np.int16
    assert depths.tolist() == [slow_depth(*pair) for pair in zip(winners, predictions, strict=True)]
    last_disagrees = winners[:, -1] != predictions
    np.testing.assert_array_equal(is_unsettled(depths, winners.shape[1]), last_disagrees)


def test_depth_of_the_quoted_cases():
    winners = [[1, 1, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0], [0, 0, 0]]
    assert leadline.depth_from_votes(winners, [1] * 5).tolist() == [0, 1, 2, 3, 3]


@pytest.mark.parametrize(
    ("winners", "predictions"),
    [([1, 2], [1, 2]), ([[1, 2]], [1, 2]), ([[1.0, 2.0]], [1]), (np.zeros((3, 0), int), [0, 0, 0])],
)
def test_depth_refuses_what_does_not_fit(winners, predictions):
    with pytest.raises(LeadlineError, match="winners"):
        leadline.depth_from_votes(winners, predictions)


def test_outputs_against_scipy():
    logits = np.random.default_rng(0).normal(0, 5, (200, 7)).astype(np.float32)
    logits[0] = [1000, -1000, 0, 0, 0, 0, 0]  # a softmax that underflows
    logits[1] = 2.0  # all alike
    outputs = summarise_logits(logits)
    wide = logits.astype(np.float64)
    softmax = np.exp(wide - wide.max(axis=1, keepdims=True))
    softmax /= softmax.sum(axis=1, keepdims=True)
    ranked = np.sort(wide, axis=1)
    np.testing.assert_array_equal(outputs.prediction, logits.argmax(axis=1))
    np.testing.assert_allclose(outputs.confidence, softmax.max(axis=1), rtol=1e-6)
    np.testing.assert_allclose(outputs.margin, ranked[:, -1] - ranked[:, -2], rtol=1e-6)
    np.testing.assert_allclose(outputs.entropy, entropy(softmax, axis=1), rtol=1e-5, atol=1e-7)
    assert outputs.prediction[1] == 0


def test_ensemble_columns_equal_pandas():
    random = np.random.default_rng(1)
    n_points, n_classes, n_members, n_probes = 50, 4, 6, 5
    labels = random.integers(0, n_classes, n_points)
    members = []
    for _ in range(n_members):
        depth = random.integers(0, n_probes + 1, n_points).astype(np.int16)
        members.append(
            MemberDepths(
                in_training=random.random(n_points) < 0.6,
                prediction=random.integers(0, n_classes, n_points).astype(np.int32),
                confidence=random.random(n_points, np.float32),
                margin=random.random(n_points, np.float32),
                entropy=random.random(n_points, np.float32),
                depth=depth,
                unsettled=depth == n_probes,
            )
        )
    members[0].in_training[:3] = True
    for member in members:
        member.in_training[0] = True  # never held out
        member.in_training[1] = False  # never trained on
    columns = combine(members, labels, n_classes)
    table = pd.concat([pd.DataFrame(vars(m)).assign(point=range(n_points), label=labels) for m in members])
    for point, rows in table.groupby("point"):
        trained, out = rows[rows.in_training], rows[~rows.in_training]
        for name, side in (("training", trained), ("held_out", out)):
            assert columns[f"n_{name}"][point] == len(side)
            assert columns[f"n_unsettled_{name}"][point] == side.unsettled.sum()
            np.testing.assert_allclose(columns[f"mean_depth_{name}"][point], side.depth.mean())
            np.testing.assert_allclose(columns[f"std_depth_{name}"][point], side.depth.std(), atol=1e-12)
        for name in ("confidence", "margin", "entropy"):
            np.testing.assert_allclose(columns[f"mean_{name}_held_out"][point], out[name].mean(), rtol=1e-6)
        np.testing.assert_allclose(columns["held_out_accuracy"][point], (out.prediction == out.label).mean())
        if len(out):
            assert columns["consensus_class"][point] == out.prediction.mode()[0]
            share = (out.prediction == out.prediction.mode()[0]).mean()
            np.testing.assert_allclose(columns["consensus_consistency"][point], share)
        else:
            assert columns["consensus_class"][point] == -1
