"""Kinds of points, by how deep they are held out and in training, and how networks come to them, layer by layer.

That there are three kinds of difficult points is in the paper's words. Their names, and which corner of the plane each
has, are believed and not verified against the paper; the default thresholds are ours. So thresholds are parameters.
"""

from dataclasses import dataclass

import numpy as np

from leadline.errors import LeadlineError
from leadline.knn.arrays import Array
from leadline.study.arrays import refuse_other_shapes

# A kind's number is 2 x (deep held out) + (deep in training).
KINDS = ("easy", "looks like a different class", "ambiguous unless the label is given", "ambiguous")
UNPLACED = -1


def thresholds(held_out: Array, training: Array, quantile: float = 0.75) -> tuple[float, float]:
    """Mean depths that deep points are beyond, held out and in training: a quantile of each over the points.

    held_out, training: real [N], mean depths, NaN where no member holds the point out or was trained on it; a quantile
    is over the points that have a value in both. Where more points than `quantile` have depth 0, it is 0, and deep is
    whatever is not.
    Raises LeadlineError for shapes that do not agree, and where no point has both.
    """
    held_out, training = _plane(held_out, training)
    both = ~np.isnan(held_out + training)
    if not both.any():
        raise LeadlineError(f"depths: of {len(both)} points none has a mean both held out and in training")
    return float(np.quantile(held_out[both], quantile)), float(np.quantile(training[both], quantile))


def kinds(held_out: Array, training: Array, beyond: tuple[float, float] | None = None) -> Array:
    """The kind of each point, int8 [N]: its place in KINDS, or UNPLACED where a mean depth is NaN.

    held_out, training: real [N], mean depths; beyond: of each, the largest that is low, by default `thresholds`.

    | held out | in training | kind |
    |---|---|---|
    | low  | low  | easy |
    | low  | high | looks like a different class |
    | high | low  | ambiguous unless the label is given |
    | high | high | ambiguous |

    Raises LeadlineError as `thresholds` does.
    """
    held_out, training = _plane(held_out, training)
    of_held_out, of_training = thresholds(held_out, training) if beyond is None else beyond
    number = 2 * (held_out > of_held_out) + (training > of_training)
    return np.where(np.isnan(held_out + training), UNPLACED, number).astype(np.int8)


def count_kinds(kind: Array) -> dict[str, int]:
    """Points of each kind by name, and those that are unplaced; kind: int [N], of `kinds`."""
    counts = np.bincount(np.asarray(kind, np.int64) + 1, minlength=len(KINDS) + 1).tolist()
    return dict(zip(("unplaced", *KINDS), counts, strict=True))


@dataclass(frozen=True)
class ProbeAccuracy:
    """Of one member, by kind: shares of right votes, float64 [4, P]; and of how many points they are, int64 [4].

    NaN where a kind has no such point, or one whose vote was not computed.
    """

    training: Array
    held_out: Array
    n_training: Array
    n_held_out: Array


def probe_accuracy(winners: Array, reference: Array, in_training: Array, kind: Array) -> ProbeAccuracy:
    """How often each probe's vote is the reference class, by kind of point, in training and held out.

    winners: int [N, P], the votes in one member, -1 where one was not computed; reference: int [N], the class that is
    right: the label given, the clean one, the consensus or the network's own prediction; in_training: bool [N]; kind:
    int [N], of `kinds`. With intervals over members: `relations.mean_over_members` of these, stacked.

    Raises LeadlineError for shapes that do not agree.
    """
    votes, reference, kind = (np.asarray(array) for array in (winners, reference, kind))
    in_training = np.asarray(in_training, bool)
    if votes.ndim != 2:
        raise LeadlineError(f"winners: shape {votes.shape}; give [points, probes]")
    refuse_other_shapes((len(votes),), reference=reference, in_training=in_training, kind=kind)
    right = np.where(votes >= 0, votes == reference[:, None], np.nan)
    training, held_out = (
        [right[chosen & (kind == number)] for number in range(len(KINDS))] for chosen in (in_training, ~in_training)
    )
    with np.errstate(invalid="ignore"):
        return ProbeAccuracy(
            training=np.stack([rows.sum(axis=0) / len(rows) for rows in training]),
            held_out=np.stack([rows.sum(axis=0) / len(rows) for rows in held_out]),
            n_training=np.array([len(rows) for rows in training]),
            n_held_out=np.array([len(rows) for rows in held_out]),
        )


def _plane(held_out: Array, training: Array) -> tuple[Array, Array]:
    held_out, training = np.asarray(held_out, np.float64), np.asarray(training, np.float64)
    refuse_other_shapes((held_out.size,), held_out=held_out, training=training)
    return held_out, training
