"""Labels that a user gives in the place of the source's, and what is refused of them."""

import pickle

import numpy as np
import pytest
from sklearn.datasets import load_digits

from leadline.config import Corruption, Digits, NpyPoints
from leadline.points import open_points

CLEAN = load_digits().target


@pytest.fixture
def relabel(tmp_path):
    """Write values as a file of labels; gives its path."""

    def write(values, name="relabel.npy"):
        np.save(tmp_path / name, values)
        return tmp_path / name

    return write


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64])
def test_labels_are_replaced_where_the_file_has_one(relabel, dtype):
    given = np.full(1797, -1, dtype)
    given[[0, 7, 1796]] = [9, CLEAN[7], 0]
    points = open_points(Digits(source="digits", relabel=relabel(given)))
    expected = [9 if i == 0 else 0 if i == 1796 else label for i, label in enumerate(CLEAN)]
    assert points.labels.tolist() == expected and points.labels.dtype == np.int32
    assert points.clean_labels.tolist() == CLEAN.tolist()
    assert pickle.loads(pickle.dumps(points)).labels.tolist() == expected


def test_without_a_sign_all_labels_are_replaced(relabel):
    given = ((CLEAN + 3) % 10).astype(np.uint8)
    assert open_points(Digits(source="digits", relabel=relabel(given))).labels.tolist() == given.tolist()


def test_labels_that_were_corrupted_before_are_replaced(relabel):
    given = np.full(1797, -1)
    given[:900] = CLEAN[:900]
    corrupt = Corruption(share=0.4, seed=1)
    before = open_points(Digits(source="digits", corrupt=corrupt)).labels
    points = open_points(Digits(source="digits", corrupt=corrupt, relabel=relabel(given)))
    assert points.labels.tolist() == [*CLEAN[:900], *before[900:]]
    assert points.clean_labels.tolist() == CLEAN.tolist()


def test_the_fingerprint_is_of_the_labels_given_not_of_their_file(relabel):
    one, other = np.full(1797, -1), np.full(1797, -1)
    one[5], other[5] = (CLEAN[5] + 1) % 10, (CLEAN[5] + 2) % 10
    paths = [relabel(one, "one.npy"), relabel(other, "other.npy"), relabel(one, "again.npy")]
    plain, first, second, again = (
        open_points(Digits(source="digits", relabel=path)).fingerprint() for path in (None, *paths)
    )
    assert len({plain, first, second}) == 3 and first == again


@pytest.fixture
def with_test_part(tmp_path):
    """Points of which each other one, as stored, is of part test; called with a file of labels."""
    np.save(tmp_path / "x.npy", np.arange(20, dtype=np.float32).reshape(10, 2))
    np.save(tmp_path / "y.npy", np.arange(10) % 3)
    np.save(tmp_path / "parts.npy", np.arange(10) % 2)
    return lambda path: open_points(
        NpyPoints(
            source="npy", inputs=tmp_path / "x.npy", labels=tmp_path / "y.npy", parts=tmp_path / "parts.npy",
            relabel=path,
        )
    )  # fmt: skip


def test_labels_are_by_the_ids_of_points_and_of_part_train_alone(relabel, with_test_part, refused):
    given = np.array([2, -1, 0, 0, -1, -1, -1, -1, -1, -1])
    points = with_test_part(relabel(given))
    stored = [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]  # the training part comes first
    assert points.read(np.arange(10))[:, 0].tolist() == [2 * place for place in stored]
    expected = [label if label >= 0 else place % 3 for label, place in zip(given, stored, strict=True)]
    assert points.labels.tolist() == expected
    given[5] = stored[5] % 3  # its own, and yet of part test
    refused(lambda: with_test_part(relabel(given)), "points.relabel", "point 5 gets 1", "training part")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.full(1796, -1), ["integers of shape (1797,)"]),
        (np.full((1797, 1), -1), ["integers of shape (1797,)"]),
        (np.full(1797, -1.0), ["integers of shape (1797,)"]),
        (np.zeros(1797, bool), ["integers of shape (1797,)"]),
        (np.array([-1] * 1796 + [10]), ["point 1796 gets 10", "0 to 9"]),
        (np.array([-1] * 3 + [-2] + [-1] * 1793), ["point 3 gets -2", "0 to 9"]),
        (np.array([None] * 1797), ["not a .npy file of numbers"]),
    ],
)
def test_labels_that_do_not_do_are_refused(relabel, refused, values, words):
    path = relabel(values)
    refused(lambda: open_points(Digits(source="digits", relabel=path)), "points.relabel", path, *words)


def test_files_that_are_none_are_refused(tmp_path, relabel, refused):
    def wrong(path, *words):
        refused(lambda: open_points(Digits(source="digits", relabel=path)), "points.relabel", path, *words)

    wrong(tmp_path / "nowhere.npy", "No such file", ".npy")
    wrong(tmp_path, "directory", ".npy")
    (tmp_path / "text.npy").write_text("1, 2, 3")
    (tmp_path / "empty.npy").write_bytes(b"")
    for name in ("text.npy", "empty.npy"):
        wrong(tmp_path / name, "not a .npy file of numbers")
    whole = relabel(np.full(1797, -1))
    whole.write_bytes(whole.read_bytes()[:-100])
    wrong(whole, "not a .npy file of numbers")
    np.savez(tmp_path / "several.npz", np.full(1797, -1))
    wrong(tmp_path / "several.npz", "integers of shape (1797,)")
