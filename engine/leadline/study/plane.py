"""The plane of mean depths, held out and in training, of one architecture, as the ensemble table has it."""

from dataclasses import dataclass

import numpy as np

from leadline.knn.arrays import Array
from leadline.query import Run, quoted
from leadline.study.kinds import KINDS, UNPLACED, kinds, thresholds


@dataclass(frozen=True)
class Plane:
    """Of N points, in the order of point_id: mean depths, float64 [N], NaN where no member says it; and their kinds.

    kind: int8 [N] (see `kinds`); beyond: the thresholds, held out and in training, None where no point has both means.
    """

    held_out: Array
    training: Array
    kind: Array
    beyond: tuple[float, float] | None

    def typical(self, n: int) -> list[Array]:
        """Ids of up to n points of each kind that are farthest into their corner, int64 each.

        By the sum of both mean depths, a low one counting as what it lacks to the largest; ties by lower id. Ours.
        """
        found = []
        for number in range(len(KINDS)):
            far = (self.held_out if number >= 2 else -self.held_out) + (self.training if number % 2 else -self.training)
            ids = np.flatnonzero(self.kind == number)
            found.append(ids[np.argsort(-far[ids], kind="stable")][:n])
        return found


def plane_of(held_out: Array, training: Array) -> Plane:
    """The plane of mean depths, real [N], by the default thresholds."""
    if np.isnan(held_out + training).all():
        return Plane(held_out, training, np.full(len(held_out), UNPLACED, np.int8), None)
    beyond = thresholds(held_out, training)
    return Plane(held_out, training, kinds(held_out, training, beyond), beyond)


def read_plane(run: Run, architecture: str) -> Plane:
    """The plane of an architecture of a finished run."""
    found = run.sql(f"""
        SELECT mean_depth_held_out, mean_depth_training FROM ensemble
        WHERE architecture = {quoted(architecture)} ORDER BY point_id
    """)
    held_out, training = (np.asarray(column.to_numpy(), np.float64) for column in found.columns)
    return plane_of(held_out, training)
