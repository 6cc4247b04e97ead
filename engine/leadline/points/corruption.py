"""Fixed random corruption of labels."""

import numpy as np
from numpy.typing import NDArray

from leadline.errors import LeadlineError
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
