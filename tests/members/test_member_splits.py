"""Splits: sizes, order, what differs between seeds, and every file of ids that is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leadline.config import FileSplit, PartSplit, RandomSplit
from leadline.errors import LeadlineError
from leadline.members.splits import training_ids

pytestmark = pytest.mark.usefixtures("one_thread")

PARTS = np.array([0, 1, 0, 0, 1, 0], dtype=np.uint8)


@given(
    parts=st.lists(st.sampled_from([0, 1]), min_size=1, max_size=200),
    share=st.floats(0, 1, exclude_min=True),
    seed=st.integers(0, 2**32),
)
def test_random_split(parts, share, seed):
    train = {i for i, part in enumerate(parts) if part == 0}
    expected = round(share * len(train))
    split, parts = RandomSplit(share=share), np.array(parts, dtype=np.uint8)
    if expected == 0:
        with pytest.raises(LeadlineError, match="no points"):
            training_ids(split, parts, seed)
        return
    ids = training_ids(split, parts, seed)
    assert ids.dtype == np.int64
    assert len(ids) == expected == len(set(ids.tolist()))
    assert set(ids.tolist()) <= train
    assert (np.diff(ids) > 0).all()
    np.testing.assert_array_equal(ids, training_ids(split, parts, seed))


def test_random_splits_of_an_ensemble():
    parts = np.repeat(np.array([0, 1], dtype=np.uint8), [1000, 100])
    splits = [training_ids(RandomSplit(), parts, seed) for seed in range(250)]
    assert {len(ids) for ids in splits} == {900}
    held_out = 250 - np.bincount(np.concatenate(splits), minlength=1100)
    # Held out by about 25 of 250 members, the standard deviation is 4.7; the test part by all of them.
    assert abs(held_out[:1000].mean() - 25) < 1e-9 and 4 < held_out[:1000].std() < 5.5
    assert (held_out[1000:] == 250).all()


def test_part_split():
    assert training_ids(PartSplit(kind="part"), PARTS, 3).tolist() == [0, 2, 3, 5]
    with pytest.raises(LeadlineError, match="0 in part train"):
        training_ids(PartSplit(kind="part"), np.ones(4, dtype=np.uint8), 3)


def save(path, ids):
    np.save(path, ids)
    return FileSplit(kind="file", path=str(path))


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.uint64, ">i4"])
def test_file_split(tmp_path, dtype):
    split = save(tmp_path / "ids.npy", np.array([4, 0, 3], dtype=dtype))
    ids = training_ids(split, PARTS, 0)  # 4 is of part test
    assert ids.tolist() == [0, 3, 4] and ids.dtype == np.int64


def test_file_split_by_seed(tmp_path):
    for seed in (3, 4):
        np.save(tmp_path / f"ids-{seed:03}.npy", np.array([seed]))
    split = FileSplit(kind="file", path=str(tmp_path / "ids-{seed:03}.npy"))
    assert [training_ids(split, PARTS, seed).tolist() for seed in (3, 4)] == [[3], [4]]
    with pytest.raises(LeadlineError, match=r"ids-005\.npy: No such file"):
        training_ids(split, PARTS, 5)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (np.array([0, 6, 7]), "id 6 at place 1.*0 to 5"),
        (np.array([0, -1]), "id -1"),
        (np.array([1, 2**64 - 1], dtype=np.uint64), "id 18446744073709551615"),
        (np.array([3, 1, 3, 1]), "id 1 is there twice"),
        (np.array([], dtype=np.int64), "no ids"),
        (np.array([[0, 1]]), r"int64 \[1, 2\]"),
        (np.array(3), r"int64 \[\]"),
        (np.array([0.0, 1.0]), "float64"),
        (np.array([True, False]), "bool"),
        (np.array(["0"]), "<U1"),
        (np.array([{0: 1}], dtype=object), "not a .npy file of numbers"),
    ],
)
def test_ids_that_are_refused(tmp_path, ids, words):
    split = save(tmp_path / "ids.npy", ids)
    with pytest.raises(LeadlineError, match=rf"ids\.npy: .*{words}") as caught:
        training_ids(split, PARTS, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"0\n1\n", b"PK\x03\x04broken"])
def test_files_that_are_refused(tmp_path, content):
    (tmp_path / "ids.npy").write_bytes(content)
    with pytest.raises(LeadlineError, match=r"ids\.npy") as caught:
        training_ids(FileSplit(kind="file", path=str(tmp_path / "ids.npy")), PARTS, 0)
    assert "\n" not in str(caught.value)


def test_truncated_and_packed_files(tmp_path):
    whole = tmp_path / "ids.npy"
    np.save(whole, np.arange(5))
    whole.write_bytes(whole.read_bytes()[:-3])
    np.savez(tmp_path / "ids.npz", np.arange(5))
    for path in (whole, tmp_path / "ids.npz", tmp_path):
        with pytest.raises(LeadlineError, match=path.name):
            training_ids(FileSplit(kind="file", path=str(path)), PARTS, 0)


@pytest.mark.parametrize("path", ["{sead}.npy", "{0}.npy", "{seed", "{seed.x}.npy", "{seed!z}"])
def test_braces_that_cannot_be_filled_in(path):
    with pytest.raises(LeadlineError, match=r"only \{seed\}"):
        training_ids(FileSplit(kind="file", path=path), PARTS, 0)
