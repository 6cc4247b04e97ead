"""What understanding depth is good for, each beside the plain ensemble on the untouched part of the points.

The untouched part is part test; where a run has none, the odd half of each member's held-out points. Nothing is chosen
by it: read-outs are chosen on the training part's held-out points by the labels that were given there, and points are
marked by what the ensemble says of the training part.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import yaml
from scipy.special import entr

from leadline.errors import LeadlineError
from leadline.knn.arrays import Array
from leadline.query import Run
from leadline.store.files import replacing
from leadline.study.analyses import DRAWS, Material, label_depths
from leadline.study.ensembles import Ensemble, read_ensembles
from leadline.study.rejection import early_read_out, read_outs, risk_coverage
from leadline.study.relations import mean_over_members, over_members
from leadline.study.rows import Row, means, row_of, rows_of, tables_of

COVERAGES = 100  # points of a curve


def accuracy(material: Material) -> dict[str, pa.Table]:
    """Early read-out, and rejection by depth, each beside the plain ensemble."""
    early: list[Row] = []
    rejections: list[Row] = []
    curves: list[Row] = []
    for ensemble in material.ensembles:
        early += _read_outs(ensemble)
        areas, curve = _rejection(ensemble, material)
        rejections += areas
        curves += curve
    return tables_of({"early_read_out": early, "rejection": rejections, "risk_coverage": curves})


def untouched(ensemble: Ensemble) -> Array:
    """bool [N], the points that only measure."""
    if ensemble.in_test.any():
        return np.asarray(ensemble.in_test)
    return np.asarray(np.arange(len(ensemble.labels)) % 2 == 1)


def _read_outs(ensemble: Ensemble) -> list[Row]:
    """Each member read at the layer that is best on its validation points, and the vote of members so read."""
    last, names, answers, plain, chosen = untouched(ensemble), [], [], [], []
    for number, member in enumerate(ensemble.members):
        held_out = ensemble.held_out[number]
        validation = held_out & ~last
        votes = ensemble.winners(member)
        if (votes[held_out] < 0).any() or not validation.any() or not (held_out & last).any():
            return []  # with until-decided not all votes are there; without validation points there is no choice
        said = ensemble.prediction[number]
        # Validation has the labels that were given; what only measures, the clean ones.
        labels = np.where(validation, ensemble.labels, ensemble.true_labels)[held_out]
        ways = early_read_out(votes[held_out], said[held_out], labels, validation[held_out])
        names.append(ways.names[ways.best])
        plain.append(float(ways.on_others[0]))
        chosen.append(float(ways.on_others[ways.best]))
        answers.append(read_outs(votes, said)[:, ways.best])
    row = {"architecture": ensemble.architecture}
    gain = np.subtract(chosen, plain)
    measured = ensemble.held_out & last
    of_ensembles = _majorities(ensemble, [ensemble.prediction, np.stack(answers)], ensemble.true_labels, measured)
    told = {
        "members, plain": rows_of(mean_over_members(np.array(plain), draws=DRAWS), is_share=True)[0],
        "members, early read-out": rows_of(mean_over_members(np.array(chosen), draws=DRAWS), is_share=True)[0],
        "members, gain": rows_of(mean_over_members(gain, draws=DRAWS))[0],
        "ensemble, plain": of_ensembles[0],
        "ensemble, early read-out": of_ensembles[1],
        "ensemble, gain": of_ensembles[2],
    }
    counted = ", ".join(f"{name} ({names.count(name)})" for name in dict.fromkeys(names))
    return [{**row, "what": what, **one, "chosen": counted} for what, one in told.items()]


def _majorities(ensemble: Ensemble, answers: Sequence[Array], labels: Array, where: Array) -> list[Row]:
    """Accuracy of the vote of members by each of two sets of answers [M, N], and what the second gains.

    where: bool [M, N], whether the member votes for the point; points without a vote are left out.
    """
    ids = np.flatnonzero(where.any(axis=0))
    counts = [_one_hot(some[:, ids], where[:, ids], len(ensemble.class_names)) for some in answers]

    def found(times: Array) -> Array:
        votes = [np.tensordot(times, one, 1) for one in counts]
        there = votes[0].any(axis=1)  # the members of a draw may all be trained on a point
        if not there.any():
            return np.full(3, np.nan)
        plain, other = ((one.argmax(axis=1) == labels[ids])[there].mean() for one in votes)
        return np.array([plain, other, other - plain])

    values = over_members(found, len(ensemble.members), draws=DRAWS)
    return [row_of(*one, len(ids)) for one in zip(*values, strict=True)]


def _one_hot(answers: Array, where: Array, n_classes: int) -> Array:
    """int8 [M, n, C], what members answer where they vote."""
    votes = np.zeros((*answers.shape, n_classes), np.int8)
    for member, (said, chosen) in enumerate(zip(answers, where, strict=True)):
        votes[member, np.flatnonzero(chosen), said[chosen]] = 1
    return votes


def _rejection(ensemble: Ensemble, material: Material) -> tuple[list[Row], list[Row]]:
    """Areas under the risk-coverage curve (AURC) of the ensemble's answers, by what they are ordered by; the curves."""
    ids = np.flatnonzero(untouched(ensemble) & ensemble.held_out.any(axis=0))
    if not len(ids):
        return [], []
    out = ensemble.held_out[:, ids].astype(np.float64)
    shares = np.stack([material.networks.answers(m).softmax[ids].astype(np.float64) for m in ensemble.members])
    depths, labels = ensemble.depth[:, ids].astype(np.float64), ensemble.true_labels[ids]
    names = ("softmax confidence", "ensemble entropy", "depth held out")

    def orders(times: Array) -> tuple[Array, list[Array]]:
        """Whether the ensemble of these members is right, and confidences in its answers."""
        weights = times[:, None] * out
        with np.errstate(invalid="ignore"):  # points that none of these members holds out are left out, as NaN
            mean = np.einsum("mn,mnc->nc", weights, shares) / weights.sum(axis=0)[:, None]
            depth = (weights * depths).sum(axis=0) / weights.sum(axis=0)
        return mean.argmax(axis=1) == labels, [mean.max(axis=1), -entr(mean).sum(axis=1), -depth]

    def found(times: Array) -> Array:
        right, confidences = orders(times)
        if np.isnan(confidences[0]).all():  # in a draw of members that hold none of these points out
            return np.full(5, np.nan)
        areas = [risk_coverage(confidence, right).area for confidence in confidences]
        return np.array([*areas, areas[2] - areas[0], areas[2] - areas[1]])

    values = over_members(found, len(ensemble.members), draws=DRAWS)
    told = (*names, "depth less confidence", "depth less entropy")
    row = {"architecture": ensemble.architecture}
    areas = [
        {**row, "ordered_by": name, **row_of(*one, len(ids))}
        for name, one in zip(told, zip(*values, strict=True), strict=True)
    ]
    right, confidences = orders(np.ones(len(ensemble.members), np.int64))
    curves = []
    for name, confidence in zip(names, confidences, strict=True):
        curve = risk_coverage(confidence, right)
        for place in np.unique(np.linspace(0, len(ids) - 1, COVERAGES).round().astype(int)):
            curves.append(
                {**row, "ordered_by": name, "coverage": float(curve.coverage[place]), "risk": float(curve.risk[place])}
            )
    return areas, curves


def marks(ensemble: Ensemble) -> Array | None:
    """bool [N], training points whose labels depth doubts: those that are deepest against them in training.

    That is the mean over members of the depth that the given label has in the network's place (`label_depths`). So
    many as the ensemble's answers to held-out points of part train are other than the given labels (the sum over
    points of the share of such members, rounded): an estimate that needs no clean label, of corrupted labels and of
    the network's own mistakes together. Ours. None where not all votes were computed.
    """
    inside, depths = ensemble.in_training, label_depths(ensemble)
    if depths is None:
        return None
    training = means(depths, inside, axis=0)
    train = ~ensemble.in_test & ~np.isnan(training)
    wrong = (ensemble.prediction != ensemble.labels) & ensemble.held_out & ~ensemble.in_test
    out = ensemble.held_out & ~ensemble.in_test
    count = round(float(wrong.sum() / max(out.sum(), 1)) * train.sum())
    order = np.flatnonzero(train)
    order = order[np.argsort(-training[order], kind="stable")]
    chosen = np.zeros(len(ensemble.labels), bool)
    chosen[order[:count]] = True
    return chosen


def write_again(ensemble: Ensemble, folder: Path) -> list[Path]:
    """Configurations that train again without the points that depth marks, and with the class that members held out
    give them; with the ids and labels that they need. Returns their files: drop.yaml and relabel.yaml; none where
    nothing can be marked, and for networks that the run did not train.

    Members and seeds stay those of the run, and all points of a member's split but the marked ones.
    """
    marked = marks(ensemble)
    if marked is None or not marked.any() or ensemble.entry.training is None:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    for number, member in enumerate(ensemble.members):
        _save(folder / f"keep-{member.rpartition('-')[2]}.npy", np.flatnonzero(ensemble.in_training[number] & ~marked))
    # All labels of part train, since the run's own may have come from such a file, which this one replaces.
    relabel = np.where(marked & (ensemble.consensus >= 0), ensemble.consensus, ensemble.labels)
    _save(folder / "relabel.npy", np.where(ensemble.in_test, -1, relabel))
    labels_file = str(folder.absolute() / "relabel.npy")
    config = dict(ensemble.run.manifest["configuration"])
    entry = ensemble.entry.model_dump(mode="json", exclude={"at_steps", "checkpoint"})
    # Accuracies are all that is compared: input and softmax alone, and nobody looks on while they learn.
    entry["probes"] = []
    entry["training"]["learning"] = None
    braces = str(folder.absolute()).replace("{", "{{").replace("}", "}}")
    split = {"kind": "file", "path": f"{braces}/keep-{{seed}}.npy"}
    ways = {
        "drop": {**config, "members": [{**entry, "split": split}]},
        "relabel": {**config, "members": [entry], "points": {**config["points"], "relabel": labels_file}},
    }
    written = []
    for name, tree in ways.items():
        place = folder / f"{name}.yaml"
        with replacing(place) as beside:
            beside.write_text(yaml.safe_dump({**tree, "name": f"{config['name']}-{name}"}, sort_keys=False))
        written.append(place)
    return written


def _save(path: Path, values: Array) -> None:
    with replacing(path) as beside, beside.open("wb") as file:
        np.save(file, values)


def again(material: Material, others: Sequence[Run]) -> dict[str, pa.Table]:
    """Accuracy on the untouched part of runs that were trained again, beside the run's; by member and as ensembles.

    Members are paired by their seeds; each is measured on the untouched points that it holds out in both runs.

    Raises LeadlineError for a run that has no architecture with the same seeds and points, of which some are untouched
    and held out in both.
    """
    rows: list[Row] = []
    for run in others:
        found = [
            {"architecture": ensemble.architecture, "run": run.manifest["name"], **one}
            for other in read_ensembles(run)
            for ensemble in material.ensembles
            if _is_again(other, ensemble)
            for one in _compared(ensemble, other)
        ]
        if not found:
            raise LeadlineError(
                f"{run.directory.root}: no architecture of the run that is studied was trained again here, with its "
                "seeds and its points, some untouched and held out in both; give runs of the configurations that the "
                "study writes"
            )
        rows += found
    return tables_of({"trained_again": rows})


def _is_again(other: Ensemble, ensemble: Ensemble) -> bool:
    return (
        other.architecture == ensemble.architecture
        and (other.entry.seed, other.entry.count) == (ensemble.entry.seed, ensemble.entry.count)
        and np.array_equal(other.true_labels, ensemble.true_labels)
    )


def _compared(ensemble: Ensemble, other: Ensemble) -> list[Row]:
    clean = ensemble.true_labels
    where = untouched(ensemble) & ensemble.held_out & other.held_out
    if not where.any(axis=1).all():
        return []
    plain, trained = (means(one.prediction == clean, where, axis=1) for one in (ensemble, other))
    of_members = {
        "members, plain": plain, "members, trained again": trained, "members, gain": trained - plain,
    }  # fmt: skip
    both = _majorities(ensemble, [ensemble.prediction, other.prediction], clean, where)
    told = {name: rows_of(mean_over_members(values, draws=DRAWS))[0] for name, values in of_members.items()}
    told |= dict(zip(("ensemble, plain", "ensemble, trained again", "ensemble, gain"), both, strict=True))
    return [{"what": what, **one} for what, one in told.items()]
