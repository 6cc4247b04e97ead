import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from leadline.config import ImageFolder
from leadline.points import TEST, TRAIN, open_points
from leadline.torchvision_import import import_torchvision


def _picture(width: int, height: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def _save(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture
def folder(tmp_path: Path) -> ImageFolder:
    """Three training classes and one more in the test part; sizes differ."""
    _save(tmp_path / "train/cat/z.png", _picture(24, 18, 1))
    _save(tmp_path / "train/cat/deep/er/a.JPEG", _picture(20, 33, 2))
    _save(tmp_path / "train/ant/one.webp", _picture(19, 19, 3))
    _save(tmp_path / "train/bee/two.bmp", _picture(40, 20, 4))
    _save(tmp_path / "test/cat/x.jpg", _picture(31, 26, 5))
    _save(tmp_path / "test/aardvark/y.png", _picture(22, 28, 6))
    (tmp_path / "train/cat/notes.txt").write_text("no image")
    (tmp_path / "train/cat/.hidden.png").write_text("no image")
    (tmp_path / "train/.hidden").mkdir()
    return ImageFolder(source="image-folder", train=tmp_path / "train", test=tmp_path / "test", resize=16, crop=15)


KEYS = ["ant/one.webp", "bee/two.bmp", "cat/deep/er/a.JPEG", "cat/z.png", "aardvark/y.png", "cat/x.jpg"]


def test_order_names_and_labels(folder: ImageFolder) -> None:
    points = open_points(folder)
    assert points.keys == KEYS
    assert points.parts.tolist() == [TRAIN] * 4 + [TEST] * 2
    assert points.label_names == ("aardvark", "ant", "bee", "cat")
    assert points.labels.tolist() == [1, 2, 3, 3, 0, 3]
    assert points.input_shape == (3, 15, 15)


def test_images_are_prepared_as_torchvision_prepares_them(folder: ImageFolder) -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    points = open_points(folder.model_copy(update={"mean": mean, "std": std}))
    transforms = import_torchvision().transforms
    prepare = transforms.Compose(
        [
            transforms.Resize(16),
            transforms.CenterCrop(15),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
    ids = np.array([5, 0, 3, 2, 4, 1])
    read = points.read(ids)
    assert read.dtype == np.float32
    for position, point_id in enumerate(ids):
        root = folder.train if point_id < 4 else folder.test
        with Image.open(root / KEYS[point_id]) as image:
            np.testing.assert_array_equal(read[position], prepare(image.convert("RGB")).numpy())


def test_every_kind_of_image_becomes_rgb(tmp_path: Path) -> None:
    picture = _picture(12, 10, 7)
    modes = {"grey": "L", "palette": "P", "alpha": "RGBA", "bilevel": "1", "greyalpha": "LA"}
    for name, mode in modes.items():
        _save(tmp_path / f"train/all/{name}.png", picture.convert(mode))
    points = open_points(ImageFolder(source="image-folder", train=tmp_path / "train"))
    assert points.input_shape == (3, 10, 12)
    read = points.read(np.arange(len(points)))
    for key, pixels in zip(points.keys, read, strict=True):
        converted = picture.convert(modes[Path(key).stem]).convert("RGB")
        np.testing.assert_array_equal(pixels.transpose(1, 2, 0), np.asarray(converted, dtype=np.float32) / 255)


def test_only_images_that_are_asked_for_are_read(folder: ImageFolder, refused) -> None:
    (folder.train / "cat/z.png").write_bytes(b"damaged")
    points = open_points(folder)
    points.read(np.array([0, 1, 2, 4, 5]))
    refused(lambda: points.read(np.array([0, 3])), folder.train / "cat/z.png")


def test_fingerprint_depends_on_contents_alone(folder: ImageFolder, tmp_path: Path) -> None:
    first = open_points(folder).fingerprint()
    # Elsewhere, made in another order, with other dates.
    moved = folder.model_copy(update={"train": tmp_path / "moved/here", "test": tmp_path / "there"})
    for old, new in ((folder.train, moved.train), (folder.test, moved.test)):
        for path in sorted(old.rglob("*"), reverse=True):
            if path.is_file():
                (new / path.relative_to(old)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, new / path.relative_to(old))
                os.utime(new / path.relative_to(old), (1e9, 1e9))
    assert open_points(moved).fingerprint() == first
    changed = moved.test / "cat/x.jpg"
    data = bytearray(changed.read_bytes())
    data[-3] ^= 1
    changed.write_bytes(data)
    other = open_points(moved).fingerprint()
    assert other != first
    data[-3] ^= 1
    changed.write_bytes(data)
    assert open_points(moved).fingerprint() == first
    (moved.train / "cat/z.png").rename(moved.train / "cat/y.png")
    assert open_points(moved).fingerprint() not in (first, other)


def test_fingerprint_of_many_files_is_in_order(tmp_path: Path) -> None:
    """More files than are hashed at once: swapping the contents of two changes the fingerprint."""
    (tmp_path / "a").mkdir()
    for number in np.random.default_rng(8).permutation(1100).tolist():
        (tmp_path / f"a/{number:04d}.ppm").write_bytes(b"P6 1 1 255\n" + bytes([number % 256, number // 256, 0]))
    config = ImageFolder(source="image-folder", train=tmp_path)
    assert open_points(config).keys == [f"a/{number:04d}.ppm" for number in range(1100)]
    first = open_points(config).fingerprint()
    one, other = tmp_path / "a/0003.ppm", tmp_path / "a/1099.ppm"
    contents = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(contents)
    assert open_points(config).fingerprint() != first


@pytest.mark.parametrize("share", [0.0, 0.5, 0.98])
@pytest.mark.parametrize("name", ["cat/z.png", "cat/deep/er/a.JPEG", "bee/two.bmp", "ant/one.webp"])
def test_a_truncated_image_is_named(folder: ImageFolder, refused, name: str, share: float) -> None:
    path = folder.train / name
    contents = path.read_bytes()
    path.write_bytes(contents[: int(share * len(contents))])
    refused(lambda: open_points(folder).read(np.arange(4)), path)


def test_a_vanished_image_is_named(folder: ImageFolder, refused) -> None:
    points = open_points(folder)
    (folder.train / "cat/z.png").unlink()
    refused(lambda: points.read(np.arange(4)), folder.train / "cat/z.png", "No such file")
    refused(points.fingerprint, folder.train / "cat/z.png", "No such file")


def test_deep_pixels_are_refused_not_clipped(folder: ImageFolder, refused) -> None:
    path = folder.train / "cat/z.png"
    Image.fromarray(np.full((20, 20), 3000, dtype=np.uint16)).save(path)
    refused(lambda: open_points(folder).read(np.array([3])), path, "8 bits")


def test_sizes_that_differ_need_crop(folder: ImageFolder, refused) -> None:
    config = folder.model_copy(update={"resize": None, "crop": None})
    points = open_points(config)
    points.read(np.array([0]))
    refused(lambda: points.read(np.array([0, 1])), folder.train / "bee/two.bmp", "40 x 20", "points.crop", "resize")


def test_crop_that_is_too_large_names_the_file(folder: ImageFolder, refused) -> None:
    config = folder.model_copy(update={"resize": None, "crop": 19})
    points = open_points(config)
    refused(lambda: points.read(np.arange(4)), folder.train / "cat/z.png", "24 x 18", "points.resize")


def test_folders_that_will_not_do(folder: ImageFolder, tmp_path: Path, refused) -> None:
    def opened(**changes) -> None:
        open_points(folder.model_copy(update=changes))

    refused(lambda: opened(train=tmp_path / "nowhere"), "points.train", tmp_path / "nowhere")
    refused(lambda: opened(test=tmp_path / "train/cat/z.png"), "points.test", tmp_path / "train/cat/z.png")
    refused(lambda: opened(test=folder.train / "cat"), "points.test", folder.train / "cat")
    refused(lambda: opened(test=folder.train), "points.test", folder.train)
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat/a.png").touch()
    refused(lambda: opened(train=tmp_path / "flat"), tmp_path / "flat", "one folder for each class")
    (folder.train / "empty").mkdir()
    (folder.train / "empty/notes.txt").touch()
    refused(lambda: opened(), "points.train", folder.train / "empty", "no images")


@pytest.mark.parametrize("name", [b"two\nlines.png", b"\xff.png"])
def test_names_that_no_table_can_hold(folder: ImageFolder, refused, name: bytes) -> None:
    path = os.fsencode(folder.train / "cat") + b"/" + name
    with open(path, "wb"):  # noqa: PTH123
        pass
    refused(lambda: open_points(folder), folder.train, "rename").encode()
