"""Arrays in .npy files, mapped into memory."""

import tokenize
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from leadline.errors import LeadlineError, one_line
from leadline.points.arrays import ArrayInputs
from leadline.points.source import (
    MAX_CLASSES,
    TEST,
    TRAIN,
    Source,
    checked_labels,
    numbered_keys,
    numbered_names,
    two_parts,
)

if TYPE_CHECKING:
    from leadline.config import NpyPoints


def open_npy(config: "NpyPoints") -> Source:
    """Inputs, labels and, where given, parts from .npy files with one row for each point.

    inputs: images uint8 [N, C, H, W], or grey [N, H, W], of 0 … 255; or numbers: real [N, …], uint8 only as [N, D].
    labels: integers ≥ 0 [N]. parts: integers [N], 0 train, 1 test; by default all train. Keys hold the row of the
    files: train/00012. Raises LeadlineError that names the file where shapes, types, lengths or values do not do.
    """
    labels_path, inputs_path = config.labels.expanduser(), config.inputs.expanduser()
    inputs, full_scale = _inputs(inputs_path)
    labels = checked_labels(
        _integers(labels_path, len(inputs), inputs_path), MAX_CLASSES, lambda row: f"{labels_path} row {row}"
    )
    parts = np.zeros(len(inputs), dtype=np.uint8)
    if config.parts is not None:
        parts = _parts(config.parts.expanduser(), len(inputs), inputs_path)
    train, test = np.flatnonzero(parts == TRAIN), np.flatnonzero(parts == TEST)
    rows = np.concatenate([train, test])
    return Source(
        inputs=ArrayInputs(str(inputs_path), inputs, full_scale=full_scale, rows=rows),
        labels=labels[rows],
        parts=two_parts(len(train), len(test)),
        keys=numbered_keys(TRAIN, train) + numbered_keys(TEST, test),
        label_names=numbered_names(labels),
    )


def _mapped(path: Path) -> NDArray[Any]:
    try:
        return np.lib.format.open_memmap(path, mode="r")  # no pickles: it refuses arrays of Python objects
    except (OSError, ValueError, OverflowError, tokenize.TokenError) as error:
        raise LeadlineError(f"{path}: cannot be read as an .npy file ({one_line(error)}); replace the file") from None


def _inputs(path: Path) -> tuple[NDArray[Any], int | None]:
    """The array, images as [N, C, H, W], and the value of full brightness for images."""
    values = _mapped(path)
    if values.dtype.kind not in "iuf":
        raise LeadlineError(f"{path}: inputs are {values.dtype}; give integers or floats")
    if values.ndim < 2 or 0 in values.shape:
        raise LeadlineError(f"{path}: inputs of shape {values.shape}; give [N, D] or [N, C, H, W], none of them 0")
    if values.dtype != np.uint8 or values.ndim == 2:
        return values, None
    if values.ndim > 4:
        raise LeadlineError(f"{path}: uint8 inputs of shape {values.shape}; images are [N, C, H, W] or [N, H, W]")
    return values if values.ndim == 4 else values[:, None], 255


def _integers(path: Path, count: int, inputs_path: Path) -> NDArray[np.integer[Any]]:
    values = _mapped(path)
    if values.dtype.kind not in "iu" or values.ndim != 1:
        raise LeadlineError(f"{path}: {values.dtype} of shape {values.shape}; give integers of shape ({count},)")
    if len(values) != count:
        raise LeadlineError(
            f"{path}: {len(values)} values for {count} inputs in {inputs_path}; give one for each input, in their order"
        )
    return values


def _parts(path: Path, count: int, inputs_path: Path) -> NDArray[np.uint8]:
    values = _integers(path, count, inputs_path)
    wrong = np.flatnonzero((values != TRAIN) & (values != TEST))
    if wrong.size:
        raise LeadlineError(f"{path} row {wrong[0]}: part {values[wrong[0]]}, not 0 (train) or 1 (test); mend it")
    if not (values == TRAIN).any():
        raise LeadlineError(f"{path}: no point is in part 0 (train); mark the training points with 0")
    return values.astype(np.uint8)
