"""The table of how a member learned the points: what the checkpoints of its training say, one after another, stored."""

import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from leadline.knn.arrays import Array
from leadline.store.places import Place
from leadline.store.schemas import CHECKPOINTS, LEARNING
from leadline.store.tables import ROWS, nullable, write_table
from leadline.study.learning import TrainingDynamics

EL2N_SHARE = 0.1  # of a training's steps, whose checkpoints EL2N is the mean of
LISTED = 1 << 24  # values of lists that are in memory together


class LearningTable:
    """Of N points at T checkpoints of one training.

    labels: int [N], as the points are given; in_training: bool [N]; steps: ascending, of all the checkpoints.
    Memory is O(N) and not O(N T): predictions lie in a file that the system removes when this is gone.
    """

    def __init__(self, labels: Array, in_training: Array, steps: Sequence[int]) -> None:
        self._labels, self._in_training = np.asarray(labels), np.asarray(in_training)
        self._steps = np.array(steps, np.int64)
        self._dynamics = TrainingDynamics(self._labels, el2n_steps(steps))
        with tempfile.TemporaryFile() as file:
            self._predictions = np.memmap(file, np.int32, "w+", shape=(len(steps), len(self._labels)))

    def add(self, step: int, prediction: Array, **measures: Array) -> None:
        """Add a checkpoint, as `TrainingDynamics.add` takes it."""
        self._dynamics.add(step, prediction, **measures)
        self._predictions[np.searchsorted(self._steps, step)] = prediction

    def write(self, place: Place, stamps: dict[str, str], source: str, final_prediction: Array | None = None) -> None:
        """Write the table once all checkpoints are added.

        source: WATCHED or LOGGED. final_prediction: int [N], by default those of the last checkpoint.
        """
        final = self._predictions[-1] if final_prediction is None else final_prediction
        scores = self._dynamics.scores(final, int(self._steps[-1]))
        write_table(place, LEARNING, self._tables(scores), {**stamps, CHECKPOINTS: source})

    def _tables(self, scores: dict[str, Array]) -> Iterator[pa.Table]:
        n_steps, n_points = self._predictions.shape
        size = max(1, min(ROWS, LISTED // n_steps))
        for first in range(0, n_points, size):
            rows = slice(first, min(first + size, n_points))
            n = rows.stop - first
            columns = {
                "point_id": np.arange(first, rows.stop),
                "label": self._labels[rows],
                "in_training": self._in_training[rows],
                **{name: nullable(values[rows]) for name, values in scores.items()},
                "steps": _lists(np.tile(self._steps, n), n_steps),
                "predictions": _lists(self._predictions[:, rows].T.ravel(), n_steps),
            }
            yield pa.table([columns.get(name, pa.nulls(n)) for name in LEARNING.names], LEARNING.names)


def el2n_steps(steps: Sequence[int]) -> tuple[int, int]:
    """First and last step of the checkpoints that EL2N is the mean of: the first tenth, but one that was trained.

    steps: of all checkpoints, ascending. That it is a tenth is our choice.
    """
    last = max(int(EL2N_SHARE * steps[-1]), next((step for step in steps if step > 0), 0))
    return 1, last


def _lists(values: Array, size: int) -> pa.ListArray:
    """Lists of `size` values each."""
    return pa.ListArray.from_arrays(np.arange(0, len(values) + 1, size, dtype=np.int32), values)
