"""JPEGs decoded and brought to size on a GPU, where a configuration says `decoder: nvjpeg`.

Decoders differ: nvJPEG's pixels are a level or two off those of Pillow (another inverse transform), and several levels
where colours are stored at half the resolution, as in most JPEGs (as torchvision calls it, it repeats them; Pillow
interpolates). So the embeddings, and some votes, are others as well. Decoding here is therefore a choice that is made
by name and recorded with what came of it, never one that a machine makes for being able to.
"""

import io
import re
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from leadline.errors import LeadlineError, one_line
from leadline.points.images import decode, is_plain_jpeg, resized_size
from leadline.torchvision_import import import_torchvision

Opened = bytes | NDArray[np.uint8]


def opened(encoded: bytes, where: str) -> Opened:
    """What `decode_opened` takes: a plain JPEG as it is, and of any other image its RGB pixels uint8 [3, H, W].

    Which of the two depends on the file alone. Raises LeadlineError as `decode` does, for what Pillow decodes.
    """
    return encoded if is_plain_jpeg(encoded) else _by_pillow(encoded, where)


def decode_opened(images: Sequence[Opened], device: torch.device, where: Sequence[str]) -> list[Tensor]:
    """RGB pixels uint8 [3, H, W] of each on a CUDA device, of JPEGs by nvJPEG; by Pillow of one that it cannot decode.

    where: of each, for messages. Raises LeadlineError for what neither can decode, and where nvJPEG cannot be used.
    """
    jpegs = {i: image for i, image in enumerate(images) if isinstance(image, bytes)}
    try:
        pixels = dict(zip(jpegs, decode_jpegs(list(jpegs.values()), device) if jpegs else (), strict=True))
    except RuntimeError as error:
        if not _is_of_the_file(error):
            fault = fault_of_nvjpeg(device)
            if fault is None:
                raise
            mend = "leave decoder out, or install a torchvision that has it"
            raise LeadlineError(f"points.decoder: nvJPEG cannot be used here ({fault}); {mend}") from None
        pixels = {i: _decode_alone(encoded, device, where[i]) for i, encoded in jpegs.items()}
    return [pixels[i] if i in pixels else torch.tensor(image).to(device) for i, image in enumerate(images)]


def _decode_alone(encoded: bytes, device: torch.device, where: str) -> Tensor:
    try:
        return decode_jpegs([encoded], device)[0]
    except RuntimeError as error:
        if not _is_of_the_file(error):
            raise
        return torch.tensor(_by_pillow(encoded, where)).to(device)


def _is_of_the_file(error: RuntimeError) -> bool:
    """Whether nvJPEG said of a file that it is damaged or of no kind that it knows (statuses 3 and 4), and not that it
    has no memory, say."""
    return re.search(r"jpeg stream: [34]\b", str(error)) is not None


def _by_pillow(encoded: bytes, where: str) -> NDArray[np.uint8]:
    return np.asarray(decode(encoded, where)).transpose(2, 0, 1)


def decode_jpegs(encoded: Sequence[bytes], device: torch.device | str) -> list[Tensor]:
    """RGB pixels of JPEGs, uint8 [3, H, W] each on a CUDA device, decoded there by nvJPEG as torchvision calls it.

    Raises RuntimeError where one of them is no JPEG or of a kind that nvJPEG does not decode (four colours, say), or
    where torchvision is without nvJPEG. It waits for the current stream.
    """
    import_torchvision()
    from torchvision.io import ImageReadMode, decode_jpeg

    device = torch.device(device)
    # torchvision writes from a stream of its own into memory that the current stream may not be done with.
    torch.cuda.current_stream(device).synchronize()
    files = [torch.frombuffer(bytearray(one), dtype=torch.uint8) for one in encoded]
    decoded: list[Tensor] = decode_jpeg(files, mode=ImageReadMode.RGB, device=device)
    return decoded


def fault_of_nvjpeg(device: torch.device | str) -> str | None:
    """Why nvJPEG cannot be used on a CUDA device, in one line; None where it decodes."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    try:
        decode_jpegs([file.getvalue()], device)
    except RuntimeError as error:
        return one_line(error)
    return None


def fit_on_device(image: Tensor, resize: int | None, crop: int | None) -> Tensor:
    """Pixel values float32 [C, h, w], whole numbers from 0 to 255, on the image's device.

    image: uint8 [C, H, W]. The same steps as `images.fit`: the shorter side brought to `resize`, bilinear with
    antialias, then a square of `crop` from the middle, no larger than the shorter side. A value may be one level off,
    since Pillow rounds between its two passes.
    """
    values = image.to(torch.float32)
    if resize is not None:
        width, height = resized_size(image.shape[2], image.shape[1], resize)
        values = F.interpolate(values[None], (height, width), mode="bilinear", antialias=True)[0].round_()
    if crop is None:
        return values
    top, left = round((values.shape[1] - crop) / 2), round((values.shape[2] - crop) / 2)
    return values[:, top : top + crop, left : left + crop]
