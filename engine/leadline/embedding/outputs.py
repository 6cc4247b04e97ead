"""What a network's logits say of a point, beside its depth."""

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Outputs:
    """Of Q points: prediction int32 [Q] (ties to the lower class), and float32 [Q] each

    confidence, the largest softmax value; margin, the largest minus the second largest logit; entropy of the softmax,
    in nats.
    """

    prediction: Array
    confidence: Array
    margin: Array
    entropy: Array


def summarise_logits(logits: Array) -> Outputs:
    """Prediction, confidence, output margin and entropy (definitions in PAPER) of logits float32 [Q, C], in float64."""
    values = np.asarray(logits, np.float64)
    shifted = values - values.max(axis=1, keepdims=True)
    exponentials = np.exp(shifted)
    total = exponentials.sum(axis=1, keepdims=True)
    share = exponentials / total
    two_largest = np.partition(values, -2, axis=1)[:, -2:]
    # log p is shifted - log(total): finite even where p underflows to 0.
    entropy = -(share * (shifted - np.log(total))).sum(axis=1)
    return Outputs(
        prediction=values.argmax(axis=1).astype(np.int32),
        confidence=share.max(axis=1).astype(np.float32),
        margin=(two_largest[:, 1] - two_largest[:, 0]).astype(np.float32),
        entropy=entropy.astype(np.float32),
    )
