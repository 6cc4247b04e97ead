"""Images: decoding, resizing, cropping."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from leadline.errors import LeadlineError, one_line

# Pillow's decoders let the errors of what they are made of through when the bytes are damaged.
_DAMAGE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def decode(encoded: bytes, where: str) -> Image.Image:
    """The first frame of an encoded image as RGB, 8 bits a channel; transparency and EXIF orientation are left out.

    Raises LeadlineError that begins with `where` for what Pillow cannot decode whole, and for one channel of more
    than 8 bits, which Pillow would clip.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            mode = image.mode
            rgb = image.convert("RGB")
    except UnidentifiedImageError:
        raise LeadlineError(f"{where}: no image that Pillow can read; replace the image or leave it out") from None
    except _DAMAGE as error:
        raise LeadlineError(f"{where}: damaged image ({one_line(error)}); replace the image or leave it out") from None
    if mode == "F" or mode.startswith("I"):
        raise LeadlineError(f"{where}: pixels have more than 8 bits (Pillow's mode {mode}); convert it to 8")
    return rgb


def is_plain_jpeg(encoded: bytes) -> bool:
    """Whether it is a whole JPEG, grey or of luminance and chrominance: of the kinds that every decoder knows."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            if not isinstance(image, JpegImageFile) or image.format != "JPEG" or image.mode not in ("L", "RGB"):
                return False
            # Red, green and blue may be stored as they are: the marker of Adobe says so, or the components' names.
            is_rgb = image.info.get("adobe_transform", 1) != 1 or bytes(layer[0] for layer in image.layer) == b"RGB"
    except (UnidentifiedImageError, *_DAMAGE):
        return False
    return not is_rgb and encoded.rstrip(b"\0").endswith(b"\xff\xd9")


def size_of(image: Any) -> tuple[int, int]:
    """Width and height in pixels of Pillow's image, or of an array or tensor [C, H, W]."""
    return image.size if isinstance(image, Image.Image) else (image.shape[2], image.shape[1])


def fit(image: Image.Image | NDArray[np.uint8], resize: int | None, crop: int | None) -> NDArray[np.uint8]:
    """Pixels uint8 [C, H, W]: first the shorter side brought to `resize`, then a square of `crop` from the middle.

    Bilinear with antialias; sizes and offsets are rounded as torchvision's Resize and CenterCrop round them. `crop`
    may not be more than the shorter side.
    """
    if resize is not None:
        image = _resized(image, resize)
    pixels = np.asarray(image).transpose(2, 0, 1) if isinstance(image, Image.Image) else image
    if crop is None:
        return pixels
    top, left = round((pixels.shape[1] - crop) / 2), round((pixels.shape[2] - crop) / 2)
    return pixels[:, top : top + crop, left : left + crop]


def resized_size(width: int, height: int, resize: int | None) -> tuple[int, int]:
    """Width and height in pixels after the shorter side has been brought to `resize`."""
    if resize is None:
        return width, height
    longer = int(resize * max(width, height) / min(width, height))
    return (resize, longer) if width <= height else (longer, resize)


def _resized(image: Image.Image | NDArray[np.uint8], resize: int) -> Image.Image | NDArray[np.uint8]:
    size = resized_size(*size_of(image), resize)
    if isinstance(image, Image.Image):
        return image.resize(size, Image.Resampling.BILINEAR)
    channels = [Image.fromarray(channel).resize(size, Image.Resampling.BILINEAR) for channel in image]
    return np.stack([np.asarray(channel) for channel in channels])
