"""scikit-learn's handwritten digits."""

import numpy as np

from leadline.points.arrays import ArrayInputs
from leadline.points.source import TRAIN, Source, numbered_keys, two_parts


def open_digits() -> Source:
    """1,797 grey images of 8 x 8 pixels with values 0 … 16, all of them in part train."""
    from sklearn.datasets import load_digits  # here, since only this source needs scikit-learn

    digits = load_digits()
    count = len(digits.target)
    return Source(
        inputs=ArrayInputs("digits", digits.images[:, None].astype(np.uint8), full_scale=16),
        labels=digits.target.astype(np.int32),
        parts=two_parts(count, 0),
        keys=numbered_keys(TRAIN, np.arange(count)),
        label_names=tuple(str(name) for name in digits.target_names),
    )
