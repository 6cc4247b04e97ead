"""Points: a source with preprocessing and corruption."""

import hashlib
import json
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from leadline.errors import LeadlineError
from leadline.points.corruption import corrupted, relabelled
from leadline.points.digits import open_digits
from leadline.points.image_folder import open_image_folder
from leadline.points.images import fit, resized_size, size_of
from leadline.points.npy import open_npy
from leadline.points.parquet import open_parquet
from leadline.points.source import Source
from leadline.points.torchvision_sets import open_torchvision

if TYPE_CHECKING:
    from leadline.config import PointsConfig


def open_points(config: "PointsConfig") -> "Points":
    """Open what a configuration describes; reads names, labels and the first input.

    Raises LeadlineError, in one line, for what is missing, damaged or does not fit together.
    """
    return Points(config, _open_source(config))


def _open_source(config: "PointsConfig") -> Source:
    # Decoding, and all else in this room, needs no pydantic: who opens a configuration has it.
    from leadline.config import Digits, ImageFolder, NpyPoints, ParquetPoints, TorchvisionPoints

    match config:
        case Digits():
            return open_digits()
        case TorchvisionPoints():
            return open_torchvision(config)
        case ImageFolder():
            return open_image_folder(config)
        case ParquetPoints():
            return open_parquet(config)
        case NpyPoints():
            return open_npy(config)


class Points:
    """Labelled inputs; point_id is the position 0 … N-1: the training part first, then the test part.

    labels int32 [N], as given to the members (corrupted, then relabelled, where that was asked for)
    clean_labels int32 [N], as the source has them, or None where neither was asked for
    keys list of N names at the source; parts uint8 [N], TRAIN or TEST; label_names, one for each class
    input_shape, of one input as `read` gives it: (C, H, W) for images, as the source has it for numbers

    A pickle holds the configuration alone: who unpickles it opens the source again.
    """

    def __init__(self, config: "PointsConfig", source: Source) -> None:
        self._config = config
        self._source = source
        self.keys = source.keys
        self.parts = source.parts
        self.label_names = source.label_names
        self.labels = source.labels
        self.clean_labels: NDArray[np.int32] | None = None
        if config.corrupt is not None:
            self.clean_labels = source.labels
            self.labels = corrupted(
                source.labels, source.parts, len(source.label_names), config.corrupt.share, config.corrupt.seed
            )
        if config.relabel is not None:
            self.clean_labels = source.labels
            self.labels = relabelled(self.labels, source.parts, len(source.label_names), config.relabel)
        _refuse_unfit_keys(config, source.inputs.full_scale)
        ((_, first),) = source.inputs.read(np.zeros(1, dtype=np.int64))
        self.input_shape = self._fitted(first, 0).shape
        if config.mean is not None and len(config.mean) != self.input_shape[0]:
            raise LeadlineError(
                f"points.mean: {len(config.mean)} values for images of {self.input_shape[0]} channels; "
                "give one for each channel, in mean and in std"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __reduce__(self) -> tuple[Any, ...]:
        return open_points, (self._config,)

    def read(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Inputs float32 [n, *input_shape] of the points `ids` int64 [n], in the order of `ids`.

        Images: resized, cropped, scaled to [0, 1], then (x - mean) / std, as far as configured. Numbers: as they are.
        Raises IndexError for an id that no point has; LeadlineError that names the file, row or key of an input that
        cannot be decoded, has another size than the first, or is not finite. Several threads may read at once.
        """
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and not (ids.min() >= 0 and ids.max() < len(self)):
            raise IndexError(f"ids of points are 0 to {len(self) - 1}")
        inputs = np.empty((len(ids), *self.input_shape), dtype=np.float32)
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is refused as such
            for position, value in self._source.inputs.read(ids):
                fitted = self._fitted(value, int(ids[position]))
                if fitted.shape != self.input_shape:
                    self._refuse_size(value, int(ids[position]))
                inputs[position] = fitted
        if self._source.inputs.full_scale is None:
            self._refuse_non_finite(inputs, ids)
        else:
            self._scale(inputs, self._source.inputs.full_scale)
        return inputs

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the contents at the source: inputs as stored, labels, parts, keys, label names.

        And the labels that were given instead of these. It does not depend on preprocessing, on corruption, on where
        the files lie, or on their dates. Reads every input once. Raises LeadlineError that names a file that cannot be
        read.
        """
        source = self._source
        digest = hashlib.sha256(json.dumps([len(self), source.label_names]).encode())
        digest.update(source.labels.astype("<i4").tobytes())
        digest.update(source.parts.tobytes())
        for key in source.keys:
            encoded = key.encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        for chunk in source.inputs.content():
            digest.update(chunk)
        if self._config.relabel is not None:
            digest.update(self.labels.astype("<i4").tobytes())
        return digest.hexdigest()

    def _fitted(self, value: Image.Image | NDArray[Any], point_id: int) -> NDArray[Any]:
        """Numbers as they are; an image as uint8 [C, H, W], resized and cropped."""
        if self._source.inputs.full_scale is None:
            return np.asarray(value)
        resize, crop = self._config.resize, self._config.crop
        width, height = size_of(value)
        if crop is not None and min(resized_size(width, height, resize)) < crop:
            raise LeadlineError(
                f"{self._source.inputs.where(point_id)}: {width} x {height} pixels are too few for points.crop {crop}; "
                f"set points.resize to at least {crop}"
            )
        return fit(value, resize, crop)

    def _refuse_size(self, value: Image.Image | NDArray[Any], point_id: int) -> NoReturn:
        width, height = size_of(value)
        raise LeadlineError(
            f"{self._source.inputs.where(point_id)}: {width} x {height} pixels, not of one size with the first image, "
            f"{self._source.inputs.where(0)}; set points.crop (and points.resize)"
        )

    def _scale(self, inputs: NDArray[np.float32], full_scale: int) -> None:
        """Bring pixel values [n, C, H, W] to [0, 1], then to (x - mean) / std, in place."""
        inputs /= np.float32(full_scale)
        if self._config.mean is not None:
            inputs -= np.asarray(self._config.mean, dtype=np.float32)[:, None, None]
            inputs /= np.asarray(self._config.std, dtype=np.float32)[:, None, None]

    def _refuse_non_finite(self, inputs: NDArray[np.float32], ids: NDArray[np.int64]) -> None:
        finite = np.isfinite(inputs).all(axis=tuple(range(1, inputs.ndim)))
        if not finite.all():
            point_id = int(ids[np.flatnonzero(~finite)[0]])
            raise LeadlineError(
                f"{self._source.inputs.where(point_id)}: point {point_id} ({self.keys[point_id]}) has an input that is "
                "not finite in float32; mend it or leave it out"
            )


def _refuse_unfit_keys(config: "PointsConfig", full_scale: int | None) -> None:
    if full_scale is None:
        for key in ("resize", "crop", "mean"):
            if getattr(config, key) is not None:
                raise LeadlineError(f"points.{key}: inputs are numbers, which are taken as they are; leave out {key}")
