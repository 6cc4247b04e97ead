"""Points: a source with preprocessing and corruption."""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leadline.errors import LeadlineError
from leadline.points.corruption import corrupted, relabelled
from leadline.points.device_jpeg import Opened, decode_opened, fit_on_device, opened
from leadline.points.digits import open_digits
from leadline.points.image_folder import open_image_folder
from leadline.points.images import fit, resized_size, size_of
from leadline.points.npy import open_npy
from leadline.points.parquet import open_parquet
from leadline.points.source import EncodedInputs, Source
from leadline.points.torchvision_sets import open_torchvision

if TYPE_CHECKING:
    from leadline.config import PointsConfig


_AT_ONCE = 256  # images whose pixels, before they are brought to size, are on the device together


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
        self._encoded = source.inputs if isinstance(source.inputs, EncodedInputs) else None
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
        Pillow decodes, whatever the configured decoder: see `read_on`.
        Raises IndexError for an id that no point has; LeadlineError that names the file, row or key of an input that
        cannot be decoded, has another size than the first, or is not finite. Several threads may read at once.
        """
        ids = self._checked(ids)
        inputs = np.empty((len(ids), *self.input_shape), dtype=np.float32)
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is refused as such
            for position, value in self._source.inputs.read(ids):
                fitted = self._fitted(value, int(ids[position]))
                self._check_shape(fitted, value, int(ids[position]))
                inputs[position] = fitted
        if self._source.inputs.full_scale is None:
            self._refuse_non_finite(inputs, ids)
        else:
            self._scale(inputs, self._source.inputs.full_scale, partial(np.asarray, dtype=np.float32))
        return inputs

    def read_on(self, ids: NDArray[np.int64], device: torch.device | str) -> Tensor:
        """Inputs float32 [n, *input_shape] on a device, those of `read`, and what it raises.

        Where the configured decoder is nvjpeg and the device a CUDA device, plain JPEGs are decoded there, to
        pixels that are some levels off. Raises LeadlineError too where nvJPEG cannot be used.
        """
        device = torch.device(device)
        if not self.decodes_on(device):
            return torch.from_numpy(self.read(ids)).to(device)
        return self.decoded(self.opened(ids), ids, device)

    def decodes_on(self, device: torch.device) -> bool:
        """Whether a device decodes the inputs that `read_on` gives: then it is `decoded` of what was `opened`."""
        return device.type == "cuda" and getattr(self._config, "decoder", "pillow") == "nvjpeg"

    def opened(self, ids: NDArray[np.int64]) -> list[Opened]:
        """What of reading points the host does where a device decodes them. Raises as `read` does."""
        assert self._encoded is not None
        ids = self._checked(ids)
        found: list[Opened] = [b""] * len(ids)
        for position, encoded in self._encoded.encoded(ids):
            found[position] = opened(encoded, self._encoded.where(int(ids[position])))
        return found

    def decoded(self, images: Sequence[Opened], ids: NDArray[np.int64], device: torch.device) -> Tensor:
        """What of it the device does; images, ids: what was opened, and of which points. Raises as `read_on` does."""
        inputs = torch.empty((len(ids), *self.input_shape), dtype=torch.float32, device=device)
        for first in range(0, len(ids), _AT_ONCE):
            some = ids[first : first + _AT_ONCE].tolist()
            where = [self._source.inputs.where(point_id) for point_id in some]
            pixels = decode_opened(images[first : first + _AT_ONCE], device, where)
            for place, image, point_id in zip(inputs[first:], pixels, some, strict=False):
                fitted = self._fitted(image, point_id, fit_on_device)
                self._check_shape(fitted, image, point_id)
                place.copy_(fitted)
        self._scale(inputs, EncodedInputs.full_scale, partial(torch.tensor, dtype=torch.float32, device=device))
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

    def _checked(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and not (ids.min() >= 0 and ids.max() < len(self)):
            raise IndexError(f"ids of points are 0 to {len(self) - 1}")
        return ids

    def _fitted(self, value: Any, point_id: int, fit: Callable[..., Any] = fit) -> Any:
        """Numbers as they are; an image as [C, H, W], resized and cropped by `fit` or `fit_on_device`."""
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

    def _check_shape(self, fitted: Any, value: Any, point_id: int) -> None:
        """Of what became of an input: that of the first one."""
        if fitted.shape == self.input_shape:
            return
        width, height = size_of(value)
        raise LeadlineError(
            f"{self._source.inputs.where(point_id)}: {width} x {height} pixels, not of one size with the first image, "
            f"{self._source.inputs.where(0)}; set points.crop (and points.resize)"
        )

    def _scale(self, inputs: Any, full_scale: int, array: Callable[[Any], Any]) -> None:
        """Bring pixel values [n, C, H, W] to [0, 1], then to (x - mean) / std, in place.

        array: makes an array of float32 of numbers, of the kind and where the inputs are.
        """
        inputs /= array(full_scale)
        if self._config.mean is not None:
            inputs -= array(self._config.mean)[:, None, None]
            inputs /= array(self._config.std)[:, None, None]

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
        for key in ("resize", "crop", "mean", "decoder"):
            if getattr(config, key, None) not in (None, "pillow"):
                raise LeadlineError(f"points.{key}: inputs are numbers, which are taken as they are; leave out {key}")
