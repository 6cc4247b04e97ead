"""What the analyses share: arrays that fit together, and an order that ties do not disturb."""

import numpy as np

from leadline.errors import LeadlineError
from leadline.knn.arrays import Array


def refuse_other_shapes(shape: tuple[int, ...], **arrays: Array) -> None:
    """Raises LeadlineError that names the first array whose shape is not this one."""
    for name, array in arrays.items():
        if array.shape != shape:
            raise LeadlineError(f"{name}: shape {array.shape}; {shape} is needed, as of what is given beside it")


def ranked(values: Array, scores: Array) -> Array:
    """Values from the highest score to the lowest, float64 [N]; those of equal scores are replaced by their mean.

    values, scores: real [N], scores without NaN. Any sum over the first n is then what a random order of the tied
    would give in expectation, and does not depend on the order of arrival.
    """
    _, level = np.unique(-np.asarray(scores, np.float64), return_inverse=True)
    means = np.bincount(level, values) / np.bincount(level)
    return np.asarray(means[np.sort(level)])
