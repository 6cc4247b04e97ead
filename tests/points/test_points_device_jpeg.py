"""Images brought to size by torch are those that Pillow brings to size. (nvJPEG itself needs a GPU.)"""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from leadline.points.device_jpeg import decode_jpegs, fit_images
from leadline.points.images import fit


def image(width, height):
    """Smooth and rough parts."""
    random = np.random.default_rng(width)
    rough = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    small = Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray(np.where(np.arange(height)[:, None, None] < height // 2, smooth, rough))


@pytest.mark.parametrize(("resize", "crop"), [(64, 56), (64, 64), (200, 151), (None, 50)])
def test_sizes_as_pillow_makes_them(resize, crop):
    images = [image(*size) for size in ((100, 75), (75, 100), (101, 77), (64, 64))]
    on_device = [torch.from_numpy(np.asarray(one).copy()).permute(2, 0, 1) for one in images]
    fitted = fit_images(on_device, resize, crop).numpy()
    expected = np.stack([fit(one, resize, crop) for one in images]).astype(np.float32)
    assert fitted.shape == expected.shape == (4, 3, crop, crop) and fitted.dtype == np.float32
    assert np.abs(fitted - expected).max() <= (1 if resize else 0)
    assert (fitted != expected).mean() < 0.25
    assert np.array_equal(fitted, fitted.round()) and fitted.min() >= 0 and fitted.max() <= 255


@pytest.mark.skipif(not torch.cuda.is_available(), reason="nvJPEG decodes on a GPU")
def test_decoded_on_the_device():
    files, expected = [], []
    for size in ((100, 75), (64, 200)):
        file = io.BytesIO()
        image(*size).save(file, "jpeg", quality=95, subsampling=0)
        files.append(file.getvalue())
        expected.append(np.asarray(Image.open(file)).transpose(2, 0, 1))
    for decoded, pillows in zip(decode_jpegs(files, "cuda"), expected, strict=True):
        assert decoded.dtype == torch.uint8 and decoded.device.type == "cuda"
        assert np.abs(decoded.cpu().numpy().astype(int) - pillows).mean() < 1
