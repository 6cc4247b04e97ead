"""Labels other than the source's: fixed random corruption, and labels that a user gives instead."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from leadline.errors import LeadlineError
from leadline.points.arrays import load_npy
from leadline.points.source import TRAIN


def corrupted(
    labels: NDArray[np.int32], parts: NDArray[np.uint8], classes: int, share: float, seed: int
) -> NDArray[np.int32]:
    """Labels int32 [N] of which round(share · training points) of the training part are wrong, the rest as given.

    Which points, and how far each is moved along the ring of classes, depends on `seed`, the number of training points
    and the number of classes alone; the new label is uniform over the other classes. Raises LeadlineError where there
    are fewer than two classes.
    """
    if classes < 2:
        raise LeadlineError(f"points.corrupt: {classes} class has no other label to take; leave out corrupt")
    training = np.flatnonzero(parts == TRAIN)
    count = round(share * len(training))
    generator = np.random.default_rng(seed)
    chosen = training[generator.choice(len(training), size=count, replace=False)]
    steps = generator.integers(1, classes, size=count)
    result = labels.copy()
    result[chosen] = (labels[chosen] + steps) % classes
    return result


def relabelled(labels: NDArray[np.int32], parts: NDArray[np.uint8], classes: int, path: Path) -> NDArray[np.int32]:
    """Labels int32 [N] of which those of the training part are replaced where the file has another label than -1.

    path: .npy, int [N]. Raises LeadlineError for a file that is damaged or of another number of points, a class that is
    not there, and a label for a point that is not in the training part.
    """
    given = load_npy("points.relabel:", path)
    if not isinstance(given, np.ndarray) or given.shape != labels.shape or given.dtype.kind not in "iu":
        raise LeadlineError(f"points.relabel: {path}: give integers of shape {labels.shape}, -1 where a label stays")
    changed = given != -1
    bad = np.flatnonzero(changed & ((given < -1) | (given >= classes) | (parts != TRAIN)))
    if len(bad):
        raise LeadlineError(
            f"points.relabel: {path}: point {bad[0]} gets {given[bad[0]]}; allowed are 0 to {classes - 1} in the "
            "training part, and -1 everywhere"
        )
    return np.where(changed, given, labels).astype(np.int32)
