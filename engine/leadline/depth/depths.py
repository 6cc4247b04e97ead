"""From votes to depths: PAPER's definition on arrays."""

from typing import Any

import numpy as np

from leadline.errors import LeadlineError

Array = np.ndarray[Any, np.dtype[Any]]


def depth_from_votes(winners: Any, predictions: Any) -> Array:
    """Prediction depth of each point (Baldock, Maennel, Neyshabur, NeurIPS 2021, section 2).

    winners: int [Q, P], the vote at each of P probes from the input to the softmax; predictions: int [Q], the
    network's own final class. Returns int16 [Q]: 1 + the last probe whose vote differs from the prediction, 0 where
    none does; so 0 … P. Depth P means that the softmax probe itself disagrees: `is_unsettled`. Votes before the last
    that differs change nothing, so they need not be known: -1 may stand for them.

    Raises LeadlineError for sizes that do not agree.
    """
    votes, final = np.asarray(winners), np.asarray(predictions)
    if votes.ndim != 2 or final.shape != votes.shape[:1]:
        raise LeadlineError(
            f"winners: shape {votes.shape} beside predictions {final.shape}; give [points, probes], [points]"
        )
    if votes.dtype.kind not in "iu" or final.dtype.kind not in "iu":
        raise LeadlineError(f"winners: {votes.dtype} beside predictions {final.dtype}; give integers, one a class")
    n_probes = votes.shape[1]
    if not 1 <= n_probes <= np.iinfo(np.int16).max:
        raise LeadlineError(f"winners: {n_probes} probes; allowed 1 to {np.iinfo(np.int16).max}")
    differs = votes != final[:, None]
    last = n_probes - differs[:, ::-1].argmax(axis=1)
    return np.where(differs.any(axis=1), last, 0).astype(np.int16)


def is_unsettled(depths: Array, n_probes: int) -> Array:
    """bool [Q]: the vote after the last probe still differs from the network's own class."""
    settled: Array = depths < n_probes
    return ~settled
