"""What a device decodes is what Pillow reads, to a level or two. (nvJPEG needs a GPU; elsewhere Pillow stands in.)"""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from leadline.config import ImageFolder, ParquetPoints
from leadline.points import device_jpeg, open_points
from leadline.points.ahead import read_ahead
from leadline.points.dataset import Points
from leadline.points.device_jpeg import decode_jpegs, fit_on_device
from leadline.points.images import fit, is_plain_jpeg

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="nvJPEG decodes on a GPU")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def image(width, height):
    """Smooth and rough parts."""
    random = np.random.default_rng(width)
    rough = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    small = Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray(np.where(np.arange(height)[:, None, None] < height // 2, smooth, rough))


def saved(one, **options):
    file = io.BytesIO()
    one.save(file, options.pop("format", "jpeg"), **options)
    return file.getvalue()


def with_letters(encoded):
    """The same JPEG with the components named R, G and B: they are then taken for these, and not for luminance."""
    at = encoded.index(b"\xff\xc0") + 10
    scan = encoded.index(b"\xff\xda") + 5
    changed = bytearray(encoded)
    for number, letter in enumerate(b"RGB"):
        changed[at + 3 * number] = changed[scan + 2 * number] = letter
    jfif = changed.index(b"JFIF") - 4
    del changed[jfif : jfif + 18]
    return bytes(changed)


PICTURE = image(100, 75)
FILES = {  # and whether they are plain
    "colours": (saved(PICTURE, quality=95), True),
    "progressive": (saved(PICTURE, progressive=True, subsampling=2), True),
    "grey": (saved(PICTURE.convert("L")), True),
    "upright": (saved(image(80, 120)), True),
    "padded": (saved(image(90, 70)) + b"\0\0", True),
    "four colours": (saved(PICTURE.convert("CMYK")), False),
    "letters": (with_letters(saved(PICTURE, subsampling=0)), False),
    "png": (saved(PICTURE, format="png"), False),
    "two frames": (saved(PICTURE, format="mpo", save_all=True, append_images=[image(100, 75)]), False),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("jpegs")
    (root / "any").mkdir()
    for name, (encoded, _) in FILES.items():
        (root / "any" / f"{name}.jpg").write_bytes(encoded)
    return ImageFolder(source="image-folder", train=root, resize=64, crop=56, mean=MEAN, std=STD, decoder="nvjpeg")


@pytest.fixture
def stand_in(monkeypatch):
    """Pillow in nvJPEG's place, on the CPU. It notes what it is given, and refuses what begins like no JPEG."""
    given = []

    def decode(encoded, device):
        given.append(list(encoded))
        if any(not is_plain_jpeg(one) or b"refuse me" in one for one in encoded):
            raise RuntimeError("Error while decoding JPEG images: Failed to parse jpeg stream: 3")
        pixels = [np.asarray(Image.open(io.BytesIO(one)).convert("RGB")).transpose(2, 0, 1) for one in encoded]
        return [torch.tensor(one) for one in pixels]

    monkeypatch.setattr(device_jpeg, "decode_jpegs", decode)
    monkeypatch.setattr(Points, "decodes_on", lambda self, device: True)
    return given


def levels_apart(inputs, expected):
    """Of 0 to 255, the largest."""
    std = torch.tensor(STD)[:, None, None]
    return ((inputs.cpu() - torch.from_numpy(expected)) * std * 255).abs().amax(dim=(1, 2, 3))


@pytest.mark.parametrize("name", FILES)
def test_plain_is_what_every_decoder_knows(name):
    encoded, is_plain = FILES[name]
    assert is_plain_jpeg(encoded) == is_plain
    assert not is_plain_jpeg(encoded.rstrip(b"\0")[:-300])
    assert not is_plain_jpeg(b"")


def test_read_on_the_device_as_pillow_reads(folder, stand_in):
    points = open_points(folder)
    ids = np.random.default_rng(0).permutation(len(points)).repeat(2)
    assert levels_apart(points.read_on(ids, "cpu"), points.read(ids)).max() < 1.01
    assert len(stand_in[0]) == 2 * sum(is_plain for _, is_plain in FILES.values())  # the others are Pillow's
    assert points.read_on(ids[:0], "cpu").shape == (0, 3, 56, 56)
    with pytest.raises(IndexError):
        points.read_on(np.array([len(points)]), "cpu")


@pytest.mark.parametrize("size", [2, 5])
def test_read_ahead_by_the_device(folder, stand_in, size):
    points = open_points(folder)
    batches = [np.arange(i, min(i + size, len(points))) for i in range(0, len(points), size)]
    read = list(read_ahead(points, batches, "cpu", threads=2))
    assert [ids.tolist() for ids, _ in read] == [ids.tolist() for ids in batches]
    assert torch.equal(torch.cat([inputs for _, inputs in read]), points.read_on(np.arange(len(points)), "cpu"))


def test_what_it_refuses_is_pillows(folder, stand_in, tmp_path):
    """Alone: the others of its batch stay with the device."""
    images = [saved(image(100, 75)), saved(image(100, 75), comment=b"refuse me"), saved(image(75, 100))]
    pq.write_table(pa.table({"image": images, "label": [0, 1, 0]}), tmp_path / "some.parquet")
    points = open_points(
        ParquetPoints(source="parquet", train=str(tmp_path), crop=50, mean=MEAN, std=STD, decoder="nvjpeg")
    )
    ids = np.array([2, 1, 0])
    assert levels_apart(points.read_on(ids, "cpu"), points.read(ids)).max() < 0.01
    assert [len(given) for given in stand_in] == [3, 1, 1, 1]  # together, and each alone


@pytest.mark.parametrize("damage", [lambda file: file[:-400], lambda file: file[:300] + b"refuse me" + file[-20:]])
def test_a_damaged_image_is_named(folder, stand_in, refused, tmp_path, damage):
    images = [saved(image(100, 75)), damage(saved(image(100, 75)))]
    pq.write_table(pa.table({"image": images, "label": [0, 1]}), tmp_path / "some.parquet")
    points = open_points(ParquetPoints(source="parquet", train=str(tmp_path), decoder="nvjpeg"))
    refused(lambda: points.read_on(np.array([0, 1]), "cpu"), tmp_path / "some.parquet", "row 1", "damaged image")


def test_sizes_are_refused_as_in_reading(folder, stand_in, refused):
    without = open_points(folder.model_copy(update={"resize": None, "crop": None}))
    large = open_points(folder.model_copy(update={"resize": None, "crop": 71}))
    for points, words in ((without, ("padded", "points.crop")), (large, ("padded", "points.resize"))):
        expected = refused(lambda points=points: points.read(np.arange(len(FILES))), *words)
        assert refused(lambda points=points: points.read_on(np.arange(len(FILES)), "cpu")) == expected


def test_a_torchvision_without_nvjpeg_is_told(folder, monkeypatch, refused):
    def decode(encoded, device):
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support")

    monkeypatch.setattr(device_jpeg, "decode_jpegs", decode)
    monkeypatch.setattr(Points, "decodes_on", lambda self, device: True)
    refused(lambda: open_points(folder).read_on(np.arange(2), "cpu"), "points.decoder", "not compiled with nvJPEG")


def test_what_is_no_fault_of_a_file_is_not_decoded_otherwise(folder, monkeypatch):
    """nvJPEG without memory decodes the small image that tells whether it can be used at all."""

    def decode(encoded, device):
        if len(encoded) > 1:
            raise RuntimeError("Error while decoding JPEG images: Failed to decode jpeg stream: 5")

    monkeypatch.setattr(device_jpeg, "decode_jpegs", decode)
    monkeypatch.setattr(Points, "decodes_on", lambda self, device: True)
    with pytest.raises(RuntimeError, match="stream: 5"):
        open_points(folder).read_on(np.arange(4), "cpu")


def test_without_a_gpu_pillow_decodes(folder):
    points = open_points(folder)
    assert np.array_equal(points.read_on(np.arange(3), "cpu").numpy(), points.read(np.arange(3)))


def test_numbers_have_no_decoder(refused, tmp_path):
    pq.write_table(pa.table({"image": [[1.0, 2.0], [3.0, 4.0]], "label": [0, 1]}), tmp_path / "some.parquet")
    refused(
        lambda: open_points(ParquetPoints(source="parquet", train=str(tmp_path), decoder="nvjpeg")), "points.decoder"
    )


@pytest.mark.parametrize(("resize", "crop"), [(64, 56), (64, 64), (200, 151), (None, 50)])
def test_sizes_as_pillow_makes_them(resize, crop):
    images = [image(*size) for size in ((100, 75), (75, 100), (101, 77), (64, 64))]
    on_device = [torch.from_numpy(np.asarray(one).copy()).permute(2, 0, 1) for one in images]
    fitted = torch.stack([fit_on_device(one, resize, crop) for one in on_device]).numpy()
    expected = np.stack([fit(one, resize, crop) for one in images]).astype(np.float32)
    assert fitted.shape == expected.shape == (4, 3, crop, crop) and fitted.dtype == np.float32
    assert np.abs(fitted - expected).max() <= (1 if resize else 0)
    assert (fitted != expected).mean() < 0.25
    assert np.array_equal(fitted, fitted.round()) and fitted.min() >= 0 and fitted.max() <= 255


@needs_cuda
def test_decoded_by_nvjpeg():
    pictures = [image(*size) for size in ((100, 75), (64, 200))]
    files = [saved(one, quality=95, subsampling=0) for one in pictures]
    expected = [np.asarray(Image.open(io.BytesIO(file))).transpose(2, 0, 1) for file in files]
    for decoded, pillows in zip(decode_jpegs(files, "cuda"), expected, strict=True):
        assert decoded.dtype == torch.uint8 and decoded.device.type == "cuda"
        assert np.abs(decoded.cpu().numpy().astype(int) - pillows).mean() < 1


@needs_cuda
def test_read_by_nvjpeg(folder):
    points = open_points(folder)
    ids = np.arange(len(points))
    inputs = points.read_on(ids, "cuda")
    assert inputs.device.type == "cuda" and inputs.dtype == torch.float32
    mean = (inputs.cpu() - torch.from_numpy(points.read(ids))).abs().mean(dim=(1, 2, 3)) * 0.25 * 255
    # Where colours are stored at half the resolution, nvJPEG repeats them and Pillow interpolates.
    assert mean.max() < 10 and mean[points.keys.index("any/letters.jpg")] < 1
    for of_batch, ahead in read_ahead(points, [ids[:4], ids[4:]], "cuda"):
        assert torch.equal(ahead, inputs[of_batch])
