"""How points are learned: what one training says of each point at its checkpoints, and the measures made of it."""

from dataclasses import dataclass

import numpy as np
from scipy.special import softmax

from leadline.errors import LeadlineError
from leadline.knn.arrays import Array
from leadline.study.arrays import refuse_other_shapes


@dataclass(frozen=True)
class LabelOutputs:
    """What logits say of N points beside their labels: prediction int32 [N] (ties to the lower class), and float32 [N]

    label_probability, the softmax value of the label; margin, z_y - max over j ≠ y of z_j, negative where the
    prediction is another; el2n, ‖softmax - onehot(y)‖₂, not squared, from 0 to √2.
    """

    prediction: Array
    label_probability: Array
    margin: Array
    el2n: Array


def label_outputs(logits: Array, labels: Array) -> LabelOutputs:
    """LabelOutputs of logits, real [N, C], C >= 2, and labels, int [N] from 0 to C - 1; computed in float64.

    Raises LeadlineError for shapes that do not agree and labels that are no class.
    """
    values, labels = np.asarray(logits, np.float64), np.asarray(labels)
    if values.ndim != 2 or values.shape[1] < 2:
        raise LeadlineError(f"logits: shape {values.shape}; give [points, classes], two classes at least")
    refuse_other_shapes((len(values),), labels=labels)
    if len(labels) and not 0 <= labels.min() <= labels.max() < values.shape[1]:
        raise LeadlineError(
            f"labels: {labels.min()} to {labels.max()}; the logits are of classes 0 to {values.shape[1] - 1}"
        )
    every = np.arange(len(values))
    share = softmax(values, axis=1)
    away = share.copy()
    away[every, labels] -= 1
    others = values.copy()
    others[every, labels] = -np.inf
    return LabelOutputs(
        prediction=values.argmax(axis=1).astype(np.int32),
        label_probability=share[every, labels].astype(np.float32),
        margin=(values[every, labels] - others.max(axis=1)).astype(np.float32),
        el2n=np.linalg.norm(away, axis=1).astype(np.float32),
    )


class TrainingDynamics:
    """Measures of N points over the checkpoints of one training, which are added one after another.

    labels: int [N], those that the network is trained on. el2n_steps: first and last step of the checkpoints that el2n
    is the mean of; (500, 500) is the checkpoint at step 500 alone.

    A checkpoint's step is the number of steps of the optimiser before it: 0 is the initialisation. What it says
    counts for the iteration learned, and for el2n where el2n_steps include 0, but for nothing else: a network that
    was never trained has nothing to forget. Everything kept is O(N), whatever the number of checkpoints.
    """

    def __init__(self, labels: Array, el2n_steps: tuple[int, int]) -> None:
        self.labels = np.asarray(labels)
        self.el2n_steps = el2n_steps
        n_points = len(self.labels)
        # Replaced as a whole, so that a checkpoint that is refused changes nothing.
        self._state: dict[str, Array] = {
            "steps": np.zeros(0, np.int64),  # of the checkpoints so far
            "prediction": np.full(n_points, -1, np.int32),  # at the last of them
            "since": np.zeros(n_points, np.int64),  # the step from which on it has been that
            "n_right": np.zeros(n_points, np.int32),
            "n_forgotten": np.zeros(n_points, np.int32),
            "label_probability_squares": np.zeros(n_points),  # of deviations from the mean
            # And of what the first checkpoint gives: the mean of label_probability, the sums of margin and el2n.
        }

    def add(
        self, step: int, prediction: Array, *, label_probability: Array | None = None, margin: Array | None = None,
        el2n: Array | None = None,
    ) -> None:  # fmt: skip
        """Add a checkpoint: int [N] predictions and, where they are known, real [N] as in LabelOutputs.

        What is given at the first checkpoint is given at all. Raises LeadlineError where it is not, for a step that is
        not after the last one, and for arrays that are not [N].
        """
        measures = {"label_probability": label_probability, "margin": margin, "el2n": el2n}
        given = {name: np.asarray(values, np.float64) for name, values in measures.items() if values is not None}
        prediction = np.asarray(prediction)
        refuse_other_shapes(self.labels.shape, prediction=prediction, **given)
        state, steps = self._state, self._state["steps"]
        if not len(steps):
            state = {**state, **dict.fromkeys(given, np.zeros(len(self.labels)))}
        if step < 0 or (len(steps) and step <= steps[-1]):
            raise LeadlineError(f"step: {step} after {steps[-1:].tolist()}; add checkpoints in the order of training")
        if given.keys() != state.keys() & measures.keys():
            raise LeadlineError(
                f"step {step}: given are {', '.join(given) or 'predictions alone'}; give what the first checkpoint gave"
            )
        first, last = self.el2n_steps
        if "el2n" in given and first <= step <= last:
            state = {**state, "el2n": state["el2n"] + given["el2n"]}
        if step > 0:
            state = {**state, **_after_initialisation(state, self.labels, prediction, given)}
        self._state = {
            **state,
            "steps": np.append(steps, np.int64(step)),
            "prediction": prediction.astype(np.int32),
            "since": np.where(prediction == state["prediction"], state["since"], step),
        }

    def scores(self, final_prediction: Array, final_step: int) -> dict[str, Array]:
        """The measures of each point, arrays [N], once the network is trained.

        final_prediction: int [N], the classes that the converged network gives; final_step: its step, at or after the
        last checkpoint.

        iteration_learned int64, in steps (in the paper's words): of the checkpoint from which on all predictions are
        the final one, 0 where the first checkpoint is the initialisation and all agree. What happens between
        checkpoints is not seen, so a point was learned at this step at the latest, and after the checkpoint before it.
        Where even the last checkpoint disagrees, the converged network is the first that agrees: final_step.

        The others are as the publications named here have them, believed and not verified against these.
        forgetting_events int32: checkpoints where it is wrong and was right at the one before (Toneva and others, "An
        empirical study of example forgetting during deep neural network learning", ICLR 2019, count them between a
        point's turns in the batches); 0 also where never_learned bool: it is right at no checkpoint. Toneva and others
        rank these beyond all others.
        Where the measure was given, float64:
        aum, the mean of the margin (Pleiss and others, "Identifying mislabeled data using the area under the margin
        ranking", NeurIPS 2020), and mean_label_probability and std_label_probability, the data map's confidence and
        variability, with n below (Swayamdipta and others, "Dataset cartography", EMNLP 2020): both over the
        checkpoints after the initialisation, which were one an epoch in these papers; NaN where there are none.
        el2n: the mean over the checkpoints in el2n_steps, of this network alone (Paul, Ganguli, Dziugaite, "Deep
        learning on a data diet", NeurIPS 2021, take the mean over networks); NaN where there are none.

        Raises LeadlineError for predictions that are not [N], and a final step before the last checkpoint's.
        """
        state, final = self._state, np.asarray(final_prediction)
        refuse_other_shapes(self.labels.shape, final_prediction=final)
        steps = state["steps"]
        if len(steps) and final_step < steps[-1]:
            raise LeadlineError(f"final_step: {final_step}; give {steps[-1]}, the last checkpoint's, or a later one")
        learned = np.where(state["prediction"] == final, state["since"], final_step)
        scores = {
            "iteration_learned": learned.astype(np.int64),
            "forgetting_events": state["n_forgotten"].astype(np.int32),
            "never_learned": state["n_right"] == 0,
        }
        n_trained = np.count_nonzero(steps)
        first, last = self.el2n_steps
        n_early = np.count_nonzero((first <= steps) & (steps <= last))
        with np.errstate(invalid="ignore"):
            if "margin" in state:
                scores["aum"] = state["margin"] / n_trained
            if "label_probability" in state:
                variance = state["label_probability_squares"] / n_trained
                scores["mean_label_probability"] = np.where(n_trained, state["label_probability"], np.nan)
                scores["std_label_probability"] = np.sqrt(variance)
            if "el2n" in state:
                scores["el2n"] = state["el2n"] / n_early
        return scores


def _after_initialisation(
    state: dict[str, Array], labels: Array, prediction: Array, given: dict[str, Array]
) -> dict[str, Array]:
    """What one more checkpoint changes in a state, but for the prediction and el2n."""
    right = prediction == labels
    # Right at the checkpoint before, unless that was the initialisation: then nothing has been right yet.
    was_right = (state["n_right"] > 0) & (state["prediction"] == labels)
    changed = {"n_right": state["n_right"] + right, "n_forgotten": state["n_forgotten"] + (was_right & ~right)}
    if "margin" in given:
        changed["margin"] = state["margin"] + given["margin"]
    if "label_probability" in given:
        # Welford's update: the sum of squares less the square of the sum would lose a small spread.
        value, mean = given["label_probability"], state["label_probability"]
        moved = mean + (value - mean) / (np.count_nonzero(state["steps"]) + 1)
        changed["label_probability"] = moved
        changed["label_probability_squares"] = state["label_probability_squares"] + (value - mean) * (value - moved)
    return changed
