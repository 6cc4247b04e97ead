"""Pictures of points: small images of inputs, whatever their scale."""

import io
from base64 import b64encode
from math import isqrt

import numpy as np
from PIL import Image

from leadline.config import TorchvisionPoints, load_config
from leadline.errors import LeadlineError
from leadline.knn.arrays import Array
from leadline.points import Points, open_points
from leadline.query import Run

SIDE = 96  # pixels of the longer side of a small picture, at most
BARS, TALL = 128, 64  # pixels of a picture of numbers; more numbers than bars share them


def points_of(run: Run, download: bool = True) -> Points:
    """The points of a run, opened again to be looked at; without a download they must be at hand.

    Their labels are held against the run's; contents are not, since hashing them takes as long as reading all.
    Raises LeadlineError where they are no longer to be had, or are others.
    """
    config = load_config(run.manifest["configuration"]).points
    if isinstance(config, TorchvisionPoints) and not download:
        config = config.model_copy(update={"download": False})
    points = open_points(config)
    labels = run.points.to_table(columns=["label"])["label"].to_numpy()
    if not np.array_equal(points.labels, labels):
        raise LeadlineError(f"{run.directory.root}: its data have changed since it was made; restore them")
    return points


def picture(values: Array) -> Image.Image | None:
    """An image of one input, from its least to its greatest value; None where it is none.

    values: real [C, H, W], of which other than 1 or 3 channels show the first; or [n], where n is a square, as one.
    """
    if values.ndim == 1 and values.size > 1 and isqrt(values.size) ** 2 == values.size:
        values = values.reshape(1, isqrt(values.size), -1)
    if values.ndim != 3:
        return None
    low, high = float(values.min()), float(values.max())
    pixels = ((values - low) * (255 / max(high - low, 1e-12))).astype(np.uint8).transpose(1, 2, 0)
    if pixels.shape[2] == 3:
        return Image.fromarray(pixels)
    return Image.fromarray(pixels[:, :, 0]).convert("RGB")


def bars(values: Array) -> Image.Image:
    """A picture of numbers of any shape: bars from first to last, as high as they lie between their extremes."""
    numbers = np.asarray(values, np.float64).ravel()
    shown = min(len(numbers), BARS)
    of_bar = np.arange(len(numbers)) * shown // len(numbers)
    means = np.bincount(of_bar, numbers) / np.bincount(of_bar)
    heights = np.rint((means - means.min()) * ((TALL - 1) / max(np.ptp(means), 1e-12)))
    drawn = np.arange(TALL)[::-1, None] <= heights
    return Image.fromarray((drawn.repeat(BARS // shown, axis=1) * 255).astype(np.uint8)).convert("RGB")


def small_picture(values: Array) -> bytes | None:
    """The picture as PNG, its longer side at most SIDE pixels."""
    if (image := picture(values)) is None:
        return None
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return file.getvalue()


def data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{b64encode(png).decode()}"
