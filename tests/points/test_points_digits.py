import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from leadline.config import Corruption, Digits
from leadline.errors import LeadlineError
from leadline.points import TEST, TRAIN, open_points
from leadline.points.corruption import corrupted


def test_digits_are_scikit_learns() -> None:
    points = open_points(Digits(source="digits"))
    theirs = load_digits()
    assert len(points) == 1797 and points.input_shape == (1, 8, 8)
    inputs = points.read(np.arange(1797))
    assert inputs.dtype == np.float32
    np.testing.assert_array_equal(inputs[:, 0], (theirs.images / 16).astype(np.float32))
    np.testing.assert_array_equal(points.labels, theirs.target)
    assert points.labels.dtype == np.int32 and points.parts.dtype == np.uint8
    assert points.clean_labels is None
    assert (points.parts == TRAIN).all()
    assert points.label_names == tuple("0123456789")
    assert points.keys[12] == "train/00012" and len(set(points.keys)) == 1797


def test_read_keeps_the_order_of_ids() -> None:
    points = open_points(Digits(source="digits"))
    everything = points.read(np.arange(len(points)))
    ids = np.array([1796, 0, 5, 5, 17])
    np.testing.assert_array_equal(points.read(ids), everything[ids])
    assert points.read(np.array([], dtype=np.int64)).shape == (0, 1, 8, 8)


@pytest.mark.parametrize("wrong", [-1, 1797])
def test_read_refuses_ids_that_no_point_has(wrong: int) -> None:
    with pytest.raises(IndexError, match="0 to 1796"):
        open_points(Digits(source="digits")).read(np.array([3, wrong]))


def test_a_pickle_is_small_and_opens_the_same_points() -> None:
    points = open_points(Digits(source="digits", corrupt=Corruption(share=0.4, seed=3)))
    stored = pickle.dumps(points)
    assert len(stored) < 1000
    again = pickle.loads(stored)
    np.testing.assert_array_equal(again.labels, points.labels)
    np.testing.assert_array_equal(again.read(np.arange(9)), points.read(np.arange(9)))


def test_fingerprint_is_of_contents_not_of_configuration() -> None:
    plain = open_points(Digits(source="digits")).fingerprint()
    assert len(plain) == 64 and int(plain, 16)
    changed = Digits(source="digits", corrupt=Corruption(share=0.4), resize=16, crop=12, mean=(0.5,), std=(0.5,))
    assert open_points(changed).fingerprint() == plain


def test_corruption_keeps_the_clean_labels() -> None:
    points = open_points(Digits(source="digits", corrupt=Corruption(share=0.4, seed=1)))
    assert points.clean_labels is not None
    np.testing.assert_array_equal(points.clean_labels, load_digits().target)
    assert (points.labels != points.clean_labels).sum() == round(0.4 * 1797)
    assert points.labels.dtype == points.clean_labels.dtype == np.int32


@given(
    st.integers(1, 200),
    st.integers(0, 50),
    st.integers(2, 12),
    st.floats(0.001, 1),
    st.integers(0, 2**32),
    st.randoms(use_true_random=False),
)
def test_corruption(n_train, n_test, classes, share, seed, random) -> None:
    labels = np.array([random.randrange(classes) for _ in range(n_train + n_test)], dtype=np.int32)
    parts = np.array([TRAIN] * n_train + [TEST] * n_test, dtype=np.uint8)
    before = labels.copy()
    result = corrupted(labels, parts, classes, share, seed)
    np.testing.assert_array_equal(labels, before)
    changed = result != labels
    assert changed.sum() == round(share * n_train)
    assert not changed[n_train:].any()
    assert result.min() >= 0 and result.max() < classes and result.dtype == np.int32
    np.testing.assert_array_equal(corrupted(labels, parts, classes, share, seed), result)
    # The choice of points does not look at the labels.
    others = corrupted((labels + 1) % classes, parts, classes, share, seed)
    np.testing.assert_array_equal(others != (labels + 1) % classes, changed)


def test_corruption_is_uniform_over_the_other_classes_and_differs_by_seed() -> None:
    labels, parts = np.full(12000, 2, dtype=np.int32), np.zeros(12000, dtype=np.uint8)
    result = corrupted(labels, parts, 5, 1.0, 0)
    counts = np.bincount(result, minlength=5)
    assert counts[2] == 0
    assert (np.abs(counts[[0, 1, 3, 4]] - 3000) < 5 * np.sqrt(12000 * 0.25 * 0.75)).all()
    chosen = [corrupted(labels, parts, 5, 0.1, seed) != labels for seed in (0, 1)]
    assert (chosen[0] != chosen[1]).any()
    assert 400 < chosen[0][:6000].sum() < 800  # not only the first or the last points


def test_corruption_needs_two_classes() -> None:
    with pytest.raises(LeadlineError, match=r"points\.corrupt"):
        corrupted(np.zeros(4, dtype=np.int32), np.zeros(4, dtype=np.uint8), 1, 0.5, 0)
