"""What the members of one architecture say of each point together."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class MemberDepths:
    """One member's answers for N points, arrays [N] as in the table of depths.

    depth_error: how far its depths may be from exact ones at full width, in the mean; 0 where its votes are such.
    """

    in_training: Array
    prediction: Array
    confidence: Array
    margin: Array
    entropy: Array
    depth: Array
    unsettled: Array
    depth_error: float = 0.0


class _Moments:
    """Counts, sums and squares of one quantity over members, by point. Sums of depths, small integers, are exact."""

    def __init__(self, n_points: int) -> None:
        self.count = np.zeros(n_points, np.int32)
        self.total = np.zeros(n_points)
        self.squares = np.zeros(n_points)

    def add(self, values: Array, where: Array) -> None:
        chosen = np.where(where, values.astype(np.float64), 0.0)
        self.count += where
        self.total += chosen
        self.squares += chosen * chosen

    def mean(self) -> Array:
        with np.errstate(invalid="ignore"):
            return np.asarray(self.total / self.count)

    def std(self) -> Array:
        """The sample's standard deviation, n - 1 below; NaN for fewer than two members."""
        with np.errstate(invalid="ignore", divide="ignore"):
            spread = self.squares - self.total * self.total / self.count
            return np.asarray(np.sqrt(np.maximum(spread, 0) / np.where(self.count > 1, self.count - 1, np.nan)))


def combine(members: Iterable[MemberDepths], labels: Array, n_classes: int) -> dict[str, Array]:
    """Ensemble columns of N points from the members of one architecture, read one after another.

    labels int [N]; n_classes: classes are 0 … n_classes - 1 in labels and predictions. Returns arrays [N]:
    n_training, n_held_out int32; mean_depth_training, std_depth_training, mean_depth_held_out, std_depth_held_out
    float64 (NaN where no member, or for std fewer than two, is there); n_unsettled_training, n_unsettled_held_out
    int32; consensus_class int32, the class that most members give the point held out (ties to the lower; -1: none);
    consensus_consistency float64, the share of them that give it; held_out_accuracy float64, the share of them that
    give its label; mean_confidence_held_out, mean_margin_held_out, mean_entropy_held_out float64, means over the
    members that hold it out of each network's own value (not the entropy of the mean softmax); depth_error_training,
    depth_error_held_out float64, error bars of the mean depths: the mean of depth_error over the same members, which
    the error of the mean is not above, since errors of different sign only cancel. Definitions: PAPER.
    """
    n_points = len(labels)
    training, held_out = _Moments(n_points), _Moments(n_points)
    error_training, error_held_out = _Moments(n_points), _Moments(n_points)
    unsettled_training = np.zeros(n_points, np.int32)
    unsettled_held_out = np.zeros(n_points, np.int32)
    votes = np.zeros((n_points, n_classes), np.int32)
    outputs = {name: _Moments(n_points) for name in ("confidence", "margin", "entropy")}
    every = np.arange(n_points)
    for member in members:
        inside, outside = member.in_training, ~member.in_training
        training.add(member.depth, inside)
        held_out.add(member.depth, outside)
        error_training.add(np.full(n_points, member.depth_error), inside)
        error_held_out.add(np.full(n_points, member.depth_error), outside)
        unsettled_training += member.unsettled & inside
        unsettled_held_out += member.unsettled & outside
        votes[every, member.prediction] += outside
        for name, moments in outputs.items():
            moments.add(getattr(member, name), outside)
    consensus = votes.argmax(axis=1)
    with np.errstate(invalid="ignore"):
        shares = votes / held_out.count[:, None]
    return {
        "n_training": training.count,
        "n_held_out": held_out.count,
        "mean_depth_training": training.mean(),
        "std_depth_training": training.std(),
        "mean_depth_held_out": held_out.mean(),
        "std_depth_held_out": held_out.std(),
        "n_unsettled_training": unsettled_training,
        "n_unsettled_held_out": unsettled_held_out,
        "consensus_class": np.where(held_out.count > 0, consensus, -1).astype(np.int32),
        "consensus_consistency": shares[every, consensus],
        "held_out_accuracy": shares[every, labels],
        "mean_confidence_held_out": outputs["confidence"].mean(),
        "mean_margin_held_out": outputs["margin"].mean(),
        "mean_entropy_held_out": outputs["entropy"].mean(),
        "depth_error_training": error_training.mean(),
        "depth_error_held_out": error_held_out.mean(),
    }
