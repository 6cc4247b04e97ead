from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from leadline.config import NpyPoints
from leadline.points import TEST, TRAIN, open_points
from leadline.points.arrays import ArrayInputs
from leadline.points.dataset import Points

RANDOM = np.random.default_rng(5)


def _save(folder: Path, **arrays) -> NpyPoints:
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=True)
    parts = folder / "parts.npy" if "parts" in arrays else None
    return NpyPoints(source="npy", inputs=folder / "inputs.npy", labels=folder / "labels.npy", parts=parts)


def _open(folder: Path, **arrays) -> Points:
    return open_points(_save(folder, **arrays))


@pytest.mark.parametrize("dtype", ["float32", "float64", ">f4", "float16", "int64", "uint8"])
def test_numbers_are_taken_as_they_are(tmp_path: Path, dtype: str) -> None:
    inputs = (RANDOM.standard_normal((20, 7)) * 50).astype(np.int8 if "int" in dtype else np.float64).astype(dtype)
    points = _open(tmp_path, inputs=inputs, labels=np.arange(20) % 3)
    assert points.input_shape == (7,) and points.label_names == ("0", "1", "2")
    np.testing.assert_array_equal(points.read(np.arange(20)), inputs.astype(np.float32))


def test_float_images_are_taken_as_they_are(tmp_path: Path) -> None:
    inputs = RANDOM.standard_normal((4, 3, 5, 6)).astype(np.float32)
    points = _open(tmp_path, inputs=inputs, labels=np.zeros(4, dtype=np.uint16))
    assert points.input_shape == (3, 5, 6)
    assert points.read(np.array([], dtype=np.int64)).shape == (0, 3, 5, 6)
    np.testing.assert_array_equal(points.read(np.array([2, 0])), inputs[[2, 0]])


def test_bytes_of_rank_4_are_images(tmp_path: Path) -> None:
    inputs = RANDOM.integers(0, 256, (6, 2, 5, 4), dtype=np.uint8)
    points = _open(tmp_path, inputs=inputs, labels=np.arange(6))
    assert points.input_shape == (2, 5, 4)
    np.testing.assert_array_equal(points.read(np.arange(6)), inputs.astype(np.float32) / np.float32(255))


def test_bytes_of_rank_3_are_grey_images(tmp_path: Path) -> None:
    inputs = RANDOM.integers(0, 256, (6, 5, 4), dtype=np.uint8)
    points = _open(tmp_path, inputs=np.asfortranarray(inputs), labels=np.arange(6))
    assert points.input_shape == (1, 5, 4)
    np.testing.assert_array_equal(points.read(np.arange(6))[:, 0], inputs.astype(np.float32) / np.float32(255))


def test_images_are_resized_and_cropped_and_normalised(tmp_path: Path) -> None:
    inputs = RANDOM.integers(0, 256, (3, 3, 20, 31), dtype=np.uint8)
    config = _save(tmp_path, inputs=inputs, labels=np.arange(3))
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    points = open_points(config.model_copy(update={"resize": 10, "crop": 8, "mean": mean, "std": std}))
    assert points.input_shape == (3, 8, 8)
    image = Image.fromarray(inputs[1].transpose(1, 2, 0)).resize((15, 10), Image.Resampling.BILINEAR)
    expected = np.asarray(image)[1:9, 4:12].transpose(2, 0, 1) / 255.0  # (15 - 8) / 2 = 3.5, rounded to even
    expected = (expected - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]
    np.testing.assert_allclose(points.read(np.array([1]))[0], expected, rtol=0, atol=1e-6)


def test_the_training_part_comes_first_and_keys_hold_rows(tmp_path: Path) -> None:
    inputs = np.arange(10, dtype=np.float32).reshape(5, 2)
    parts = np.array([1, 0, 1, 0, 0])
    points = _open(tmp_path, inputs=inputs, labels=np.array([4, 3, 2, 1, 0]), parts=parts)
    assert points.keys == ["train/00001", "train/00003", "train/00004", "test/00000", "test/00002"]
    assert points.parts.tolist() == [TRAIN] * 3 + [TEST] * 2
    assert points.labels.tolist() == [3, 1, 0, 4, 2]
    np.testing.assert_array_equal(points.read(np.arange(5)), inputs[[1, 3, 4, 0, 2]])
    _, *content = ArrayInputs("x", inputs, full_scale=None, rows=np.array([1, 3, 4, 0, 2])).content()
    assert b"".join(content) == inputs[[1, 3, 4, 0, 2]].tobytes()


def test_fingerprint(tmp_path: Path) -> None:
    inputs, labels = RANDOM.standard_normal((50, 3)), np.arange(50) % 4
    for name in ("a", "b", "input", "label", "part"):
        (tmp_path / name).mkdir()
    first = _open(tmp_path / "a", inputs=inputs, labels=labels).fingerprint()
    assert _open(tmp_path / "b", inputs=inputs, labels=labels).fingerprint() == first
    changed = inputs.copy()
    changed[49, 2] = np.nextafter(changed[49, 2], 9)
    others = labels.copy()
    others[7] = 3 - others[7]
    assert _open(tmp_path / "input", inputs=changed, labels=labels).fingerprint() != first
    assert _open(tmp_path / "label", inputs=inputs, labels=others).fingerprint() != first
    parts = np.arange(50) >= 49
    assert _open(tmp_path / "part", inputs=inputs, labels=labels, parts=parts.astype(int)).fingerprint() != first


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"inputs": np.zeros(5)}, ["inputs.npy", "(5,)"]),
        ({"inputs": np.zeros((5, 0))}, ["inputs.npy", "(5, 0)"]),
        ({"inputs": np.zeros((0, 5))}, ["inputs.npy"]),
        ({"inputs": np.zeros((5, 2), dtype=complex)}, ["inputs.npy", "complex"]),
        ({"inputs": np.array([[None]] * 5)}, ["inputs.npy", "object"]),
        ({"inputs": np.zeros((5, 1, 1, 2, 2), dtype=np.uint8)}, ["inputs.npy", "[N, C, H, W]"]),
        ({"labels": np.zeros(5)}, ["labels.npy", "float64"]),
        ({"labels": np.zeros((5, 1), dtype=int)}, ["labels.npy", "(5, 1)"]),
        ({"labels": np.zeros(6, dtype=int)}, ["labels.npy", "6 values", "5 inputs", "inputs.npy"]),
        ({"labels": np.array([0, 1, -1, 2, -5])}, ["labels.npy row 2", "-1"]),
        ({"labels": np.array([0, 1, 2, 2**40, 0])}, ["labels.npy row 3", str(2**40)]),
        ({"parts": np.array([0, 1, 0, 1, 2])}, ["parts.npy row 4", "2"]),
        ({"parts": np.ones(5, dtype=int)}, ["parts.npy", "train"]),
        ({"parts": np.zeros(4, dtype=int)}, ["parts.npy", "4 values"]),
    ],
)
def test_bad_arrays(tmp_path: Path, refused, bad, words) -> None:
    good = {"inputs": np.zeros((5, 2)), "labels": np.arange(5)}
    refused(lambda: _open(tmp_path, **{**good, **bad}), *words)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_values_that_are_not_finite_are_found_when_read(tmp_path: Path, refused, value: float) -> None:
    inputs = np.zeros((5, 2))
    inputs[1, 1] = value
    points = _open(tmp_path, inputs=inputs, labels=np.arange(5), parts=np.array([1, 0, 0, 0, 0]))
    points.read(np.array([1, 2, 3, 4]))
    refused(lambda: points.read(np.array([4, 0])), "inputs.npy row 1", "point 0", "train/00001", "finite")


@pytest.mark.parametrize("contents", [b"", b"no array", b"\x93NUMPY\x01\x00", None])
def test_a_damaged_or_missing_file_is_named(tmp_path: Path, refused, contents: bytes | None) -> None:
    config = _save(tmp_path, inputs=np.zeros((5, 2)), labels=np.arange(5))
    if contents is None:
        config.inputs.unlink()
    else:
        config.inputs.write_bytes(contents)
    refused(lambda: open_points(config), config.inputs)


def test_a_truncated_file_is_named(tmp_path: Path, refused) -> None:
    config = _save(tmp_path, inputs=np.zeros((500, 20)), labels=np.arange(500))
    config.inputs.write_bytes(config.inputs.read_bytes()[:-1])
    refused(lambda: open_points(config), config.inputs)


@pytest.mark.parametrize(
    "keys", [{"resize": 4}, {"crop": 4}, {"mean": (0.0, 0.0), "std": (1.0, 1.0)}], ids=["resize", "crop", "mean"]
)
def test_image_keys_are_refused_for_numbers(tmp_path: Path, refused, keys) -> None:
    config = _save(tmp_path, inputs=np.zeros((5, 2)), labels=np.arange(5))
    refused(lambda: open_points(config.model_copy(update=keys)), f"points.{next(iter(keys))}", "numbers")


def test_mean_must_have_a_value_for_each_channel(tmp_path: Path, refused) -> None:
    config = _save(tmp_path, inputs=np.zeros((5, 3, 4, 4), dtype=np.uint8), labels=np.arange(5))
    refused(lambda: open_points(config.model_copy(update={"mean": (0.5,), "std": (0.5,)})), "points.mean", "3 channels")


def test_crop_may_not_be_larger_than_the_image(tmp_path: Path, refused) -> None:
    config = _save(tmp_path, inputs=np.zeros((5, 3, 4, 6), dtype=np.uint8), labels=np.arange(5))
    refused(lambda: open_points(config.model_copy(update={"crop": 5})), "inputs.npy row 0", "6 x 4", "points.resize")
