"""JPEGs decoded and brought to size on the device.

Decoders differ: nvJPEG's pixels are a level or two off those of Pillow (another inverse transform, another
interpolation of the colours), and so the embeddings, and a few votes, are others as well. Decoding here is therefore a
choice that is made by name and recorded with what came of it, never one that a machine makes for being able to.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from leadline.points.images import resized_size
from leadline.torchvision_import import import_torchvision


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


def fit_images(images: Sequence[Tensor], resize: int | None, crop: int) -> Tensor:
    """Pixel values float32 [n, C, crop, crop], whole numbers from 0 to 255, on the images' device.

    images: uint8 [C, H, W] each. The same steps as `images.fit`: the shorter side brought to `resize`, bilinear with
    antialias, then a square from the middle, no larger than the shorter side. A value may be one level off, since
    Pillow rounds between its two passes.
    """
    return torch.stack([_fitted(image, resize, crop) for image in images]).round_()


def _fitted(image: Tensor, resize: int | None, crop: int) -> Tensor:
    values = image.to(torch.float32)
    if resize is not None:
        width, height = resized_size(image.shape[2], image.shape[1], resize)
        values = F.interpolate(values[None], (height, width), mode="bilinear", antialias=True)[0]
    top, left = round((values.shape[1] - crop) / 2), round((values.shape[2] - crop) / 2)
    return values[:, top : top + crop, left : left + crop]
