"""The paper's claims as tables, made from a run: each analysis gives tables of estimates with their intervals.

Every estimate is a row with `value`, `low`, `high` (of 95 %, over members, see `relations`; null for one member) and
`n`, the number of points or of members that it is from.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pyarrow as pa

from leadline.depth import depth_from_votes
from leadline.errors import LeadlineError
from leadline.knn.arrays import Array
from leadline.study.detection import detect
from leadline.study.ensembles import Ensemble, masked
from leadline.study.kinds import KINDS, probe_accuracy
from leadline.study.networks import Networks
from leadline.study.plane import Plane, plane_of
from leadline.study.relations import (
    Estimate,
    binned_means,
    mean_over_members,
    over_members,
    rank_correlation,
    rank_correlation_between,
    stability,
)
from leadline.study.rows import Row, by_probe, means, row_of, rows_of, tables_of

DRAWS = 200  # of members, for an interval
SPLITS = ("held out", "training")
KS = (10, 30, 100)
ASKED_AGAIN = 3  # members of an architecture that are searched by other numbers of neighbours
CONVERGED = 0.95  # share of a probe's last agreement or accuracy from which on it counts as converged
SHARES = ("accuracy", "consensus-consistency", "confidence", "mean label probability")


@dataclass(frozen=True)
class Material:
    """What analyses are made of: the ensembles of a run, those of checkpoints of trainings, and the networks."""

    ensembles: Sequence[Ensemble]
    checkpoints: Sequence[Ensemble]
    networks: Networks


def relations(material: Material) -> dict[str, pa.Table]:
    """Depth, in training and held out, against the other measures: means by depth, and rank correlations.

    Accuracy and consensus-consistency are of the members that hold a point out, two at least for the latter: one alone
    always agrees with itself; the others of those that the depth is
    of. Between architectures: is depth a property of the point?
    """
    by_depth: list[Row] = []
    correlations: list[Row] = []
    for ensemble in material.ensembles:
        for split in SPLITS:
            depth = ensemble.depths(split)
            for measure, values in _measures(ensemble, material.networks, split):
                row = {"architecture": ensemble.architecture, "split": split, "measure": measure}
                edges = np.arange(ensemble.n_probes + 2) - 0.5
                found = binned_means(depth, values, edges, draws=DRAWS)
                by_depth += [
                    {**row, "depth": bin_, **one}
                    for bin_, one in enumerate(rows_of(found, measure in SHARES))
                    if one["n"]
                ]
                correlations += [{**row, **one} for one in rows_of(rank_correlation(depth, values, draws=DRAWS))]
    between = [
        {"architecture": one.architecture, "other": other.architecture, "split": split, **row}
        for one, other in combinations(material.ensembles, 2)
        for split in SPLITS
        for row in rows_of(rank_correlation_between(one.depths(split), other.depths(split), draws=DRAWS))
    ]
    tables = {"relations_by_depth": by_depth, "rank_correlations": correlations, "between_architectures": between}
    return tables_of(tables)


def _measures(ensemble: Ensemble, networks: Networks, split: str) -> Iterator[tuple[str, Array]]:
    held_out, where = ensemble.held_out, ensemble.of(split)
    yield "accuracy", masked(ensemble.prediction == ensemble.labels, held_out)
    yield "consensus-consistency", masked(ensemble.prediction == ensemble.consensus, held_out & ensemble.has_peers)
    yield "confidence", masked(ensemble.confidence, where)
    yield "entropy", masked(ensemble.entropy, where)
    yield "output margin", masked(ensemble.margin, where)
    margins = np.stack([networks.answers(member).input_margin for member in ensemble.members])
    yield "adversarial input margin", masked(margins, where)
    for name, values in ensemble.learning.items():
        yield name.replace("_", " "), masked(values, where)


def difficulty(material: Material) -> dict[str, pa.Table]:
    """The plane of mean depths held out and in training, its corners, and how probes come to the points of each."""
    counts: list[Row] = []
    layers: list[Row] = []
    for ensemble in material.ensembles:
        plane = plane_of_ensemble(ensemble)
        kind, beyond = plane.kind, plane.beyond
        if beyond is None:
            continue
        row = {"architecture": ensemble.architecture}
        for number, name in enumerate(KINDS):
            of_kind = kind == number
            counts.append(
                {
                    **row, "kind": name, "n": int(of_kind.sum()), "held_out_beyond": beyond[0],
                    "training_beyond": beyond[1], "n_unplaced": int((kind < 0).sum()),
                    "accuracy_held_out": _share(ensemble, of_kind, ensemble.labels),
                    "corrupted_share": float(ensemble.corrupted[of_kind].mean()) if of_kind.any() else None,
                }
            )  # fmt: skip
        found = [
            probe_accuracy(ensemble.winners(member), ensemble.labels, inside, kind)
            for member, inside in zip(ensemble.members, ensemble.in_training, strict=True)
        ]
        for split in SPLITS:
            shares = np.stack([getattr(one, split.replace(" ", "_")) for one in found])
            estimate = mean_over_members(shares, draws=DRAWS)
            for number, name in enumerate(KINDS):
                of_kind_rows = rows_of(_at(estimate, number), is_share=True)
                layers += by_probe({**row, "kind": name, "split": split}, ensemble.probes, of_kind_rows)
    return tables_of({"kinds": counts, "kinds_by_layer": layers})


def plane_of_ensemble(ensemble: Ensemble) -> Plane:
    """The plane of mean depths, from those of the members."""
    return plane_of(*(means(ensemble.depth, ensemble.of(split), axis=0) for split in SPLITS))


def layers(material: Material) -> dict[str, pa.Table]:
    """Probe accuracy by layer against given and clean labels: where networks generalise, and where they memorise."""
    rows: list[Row] = []
    for ensemble in material.ensembles:
        references = {"given label": ensemble.labels}
        if ensemble.corrupted.any():
            references["clean label"] = ensemble.true_labels
        groups = {"label uncorrupted": ~ensemble.corrupted, "label corrupted": ensemble.corrupted}
        found: dict[tuple[str, ...], list[Array]] = {}
        for number, member in enumerate(ensemble.members):
            votes = ensemble.winners(member)
            for split in SPLITS:
                for group, chosen in groups.items():
                    here = chosen & ensemble.of(split)[number]
                    for against, labels in references.items() if here.any() else ():
                        right = np.where(votes[here] >= 0, votes[here] == labels[here, None], np.nan)
                        found.setdefault((split, group, against), []).append(right.mean(axis=0))
        for (split, group, against), shares in found.items():
            row = {"architecture": ensemble.architecture, "split": split, "points": group, "against": against}
            rows += by_probe(
                row, ensemble.probes, rows_of(mean_over_members(np.stack(shares), draws=DRAWS), is_share=True)
            )
    return tables_of({"probe_accuracy": rows})


def convergence(material: Material) -> dict[str, pa.Table]:
    """How probes and depths come to what they are, along training: from the entries that `at_steps` added.

    agreement: the share of points whose vote at a step is that at the last step. A probe has converged at the first
    step from which on its agreement is never below CONVERGED (0.95, ours); the last step always agrees with itself.
    """
    if not material.checkpoints:
        return {}
    by_step: list[Row] = []
    depths: list[Row] = []
    converged: list[Row] = []
    for final in material.ensembles:
        passed = [one for one in material.checkpoints if _of(one) == final.architecture]
        passed.sort(key=_step)
        if not passed:
            continue
        series = [*((_step(one), one) for one in passed), (_last_step(final, passed), final)]
        last = [final.winners(member) for member in final.members]
        if any((votes < 0).any() for votes in last):
            continue  # with until-decided not all votes are there
        agreements = []
        for step, one in series:
            row = {"architecture": final.architecture, "step": step}
            agree, accuracy = [], []
            for number, member in enumerate(one.members):
                votes = one.winners(member)
                agree.append((votes == last[number]).mean(axis=0))
                accuracy.append(_share_of_votes(votes, one.labels, one.held_out[number]))
            agreements.append(np.stack(agree))
            for what, values in (("agreement with the last step", agree), ("accuracy held out", accuracy)):
                estimate = rows_of(mean_over_members(np.stack(values), draws=DRAWS), is_share=True)
                by_step += by_probe({**row, "measure": what}, final.probes, estimate)
            for split in SPLITS:
                mean = mean_over_members(means(one.depth, one.of(split), axis=1), draws=DRAWS)
                depths += [{**row, "split": split, **found} for found in rows_of(mean)]
        reached = np.stack([_converged(series, np.stack(agreements)[:, member]) for member in range(len(last))])
        estimate = rows_of(mean_over_members(reached, draws=DRAWS))
        converged += by_probe({"architecture": final.architecture}, final.probes, estimate)
    return tables_of({"probes_by_step": by_step, "depth_by_step": depths, "step_of_convergence": converged})


def _of(ensemble: Ensemble) -> str | None:
    return ensemble.entry.checkpoint.of if ensemble.entry.checkpoint else None


def _step(ensemble: Ensemble) -> int:
    assert ensemble.entry.checkpoint is not None
    return ensemble.entry.checkpoint.step


def _last_step(final: Ensemble, passed: Sequence[Ensemble]) -> int:
    """Of a training; where weights were given nobody knows it, and it is after the last checkpoint."""
    return final.entry.training.steps if final.entry.training else _step(passed[-1]) + 1


def _converged(series: Sequence[tuple[int, Ensemble]], agreement: Array) -> Array:
    """The step from which on each probe's agreement, [steps, P], is never below CONVERGED; float64 [P]."""
    steps = np.array([step for step, _ in series], np.float64)
    below = agreement < CONVERGED
    first = np.where(below.any(axis=0), len(steps) - below[::-1].argmax(axis=0), 0)
    return np.asarray(steps[first])


def corruption(material: Material) -> dict[str, pa.Table]:
    """How well scores find the training points whose labels were corrupted; nothing where none were.

    Depth in training, which is against the network's own class, and so is low where a network has not learned a
    corrupted label; the same against the given label; 1 - self-confidence held out, p of the given label, as cleanlab
    ranks label issues (Northcutt, Jiang, Chuang, "Confident learning", JAIR 2021); and, where training was watched,
    -aum, forgetting events, el2n and -mean label probability in training. Means over members, so far as each says
    something of a point; points of part train that have all scores. A score that no point has is left out.
    """
    rows: list[Row] = []
    for ensemble in material.ensembles:
        if not ensemble.corrupted.any():
            continue
        scores = {name: s for name, s in _suspicions(ensemble, material.networks) if not np.isnan(s).all()}
        known = ~ensemble.in_test & np.logical_and.reduce([(~np.isnan(s)).any(axis=0) for s in scores.values()])
        if not ensemble.corrupted[known].any():
            continue
        for name, score in scores.items():
            score, wrong = score[:, known], ensemble.corrupted[known]
            filled, there = np.nan_to_num(score), (~np.isnan(score)).astype(np.float64)

            def found(times: Array, filled: Array = filled, there: Array = there, wrong: Array = wrong) -> Array:
                with np.errstate(invalid="ignore"):
                    means = times @ filled / (times @ there)
                if not wrong[~np.isnan(means)].any():  # in a draw of members that say nothing of these points
                    return np.full(2, np.nan)
                detection = detect(means, wrong)
                return np.array([detection.precision, detection.average_precision])

            values = over_members(found, len(score), draws=DRAWS)
            for place, measure in enumerate(("precision = recall", "average precision")):
                row = {"architecture": ensemble.architecture, "score": name, "measure": measure}
                value, low, high = (np.clip(one[place], 0, 1) for one in values)
                rows.append({**row, **row_of(value, low, high, len(wrong))})
    return tables_of({"corrupted_labels": rows})


def _suspicions(ensemble: Ensemble, networks: Networks) -> Iterator[tuple[str, Array]]:
    """High where a label is suspect; float64 [M, N]."""
    inside, held_out = ensemble.in_training, ensemble.held_out
    every = np.arange(len(ensemble.labels))
    confidence = [networks.answers(member).softmax[every, ensemble.labels] for member in ensemble.members]
    if (depths := label_depths(ensemble)) is not None:
        yield "depth in training, against the given label", masked(depths, inside)
    yield "depth in training", masked(ensemble.depth, inside)
    yield "1 - self-confidence (cleanlab)", masked(1 - np.stack(confidence), held_out)
    of_training = {"aum": -1, "forgetting_events": 1, "el2n": 1, "mean_label_probability": -1}
    for name, sign in of_training.items() if ensemble.learning else ():
        yield f"{'- ' if sign < 0 else ''}{name.replace('_', ' ')}", masked(sign * ensemble.learning[name], inside)


def label_depths(ensemble: Ensemble) -> Array | None:
    """Depth against the given label in the place of the network's own class, int16 [M, N]: P where it never settles.

    An option beside the paper's definition. None where not all votes were computed: those that decide the network's
    own class need not decide this.
    """
    depths = []
    for member in ensemble.members:
        votes = ensemble.winners(member)
        if (votes < 0).any():
            return None
        depths.append(depth_from_votes(votes, ensemble.labels))
    return np.stack(depths)


def members(material: Material) -> dict[str, pa.Table]:
    """How many members are enough: rank correlation of mean depths over m members with those over m others."""
    rows: list[Row] = []
    for ensemble in material.ensembles:
        most = len(ensemble.members) // 2
        sizes = [m for m in (1, 2, 3, 5, 8, 12, 20, 30, 50, 80, 125) if m <= most]
        for split in SPLITS if sizes else ():
            found = stability(ensemble.depths(split), sizes, draws=50)
            row = {"architecture": ensemble.architecture, "split": split}
            rows += [{**row, "members": m, **one} for m, one in zip(sizes, rows_of(found), strict=True)]
    return tables_of({"how_many_members": rows})


def neighbours(material: Material) -> dict[str, pa.Table]:
    """Depths and probe accuracies by other numbers of neighbours, from one search of the first members' layers."""
    by_layer: list[Row] = []
    depths: list[Row] = []
    for ensemble in material.ensembles:
        asked = list(range(min(ASKED_AGAIN, len(ensemble.members))))
        smallest = int(ensemble.in_training[asked].sum(axis=1).min()) - 1
        ks = sorted({*(k for k in KS if k <= smallest)})
        if not ks:
            continue
        found = [material.networks.depth_winners(ensemble.members[number], ks) for number in asked]
        for split in SPLITS:
            where = ensemble.of(split)[asked]
            for k in ks:
                row = {"architecture": ensemble.architecture, "split": split, "k": k}
                right = np.stack(
                    [_share_of_votes(votes[k], ensemble.labels, here) for votes, here in zip(found, where, strict=True)]
                )
                by_layer += by_probe(
                    row, ensemble.probes, rows_of(mean_over_members(right, draws=DRAWS), is_share=True)
                )
                depth = _depths(found, k, ensemble, asked)
                mean = mean_over_members(means(depth, where, axis=1), draws=DRAWS)
                usual = masked(ensemble.depth[asked], where)
                same = rank_correlation(masked(depth, where), usual, draws=DRAWS)
                for measure, estimate in (("mean depth", mean), ("rank correlation with the run's", same)):
                    depths += [{**row, "measure": measure, **one} for one in rows_of(estimate)]
    return tables_of({"probe_accuracy_by_k": by_layer, "depth_by_k": depths})


def _depths(found: Sequence[Mapping[int, Array]], k: int, ensemble: Ensemble, asked: Sequence[int]) -> Array:
    pairs = zip(found, asked, strict=True)
    return np.stack([depth_from_votes(votes[k], ensemble.prediction[number]) for votes, number in pairs])


def _share_of_votes(votes: Array, labels: Array, where: Array) -> Array:
    """How often each probe's vote, int [N, P], is the label, of points where: bool [N]; float64 [P], or NaN."""
    with np.errstate(invalid="ignore"):
        return np.asarray((votes[where] == labels[where, None]).sum(axis=0) / where.sum())


def _share(ensemble: Ensemble, chosen: Array, labels: Array) -> float | None:
    where = ensemble.held_out & chosen
    return float((ensemble.prediction == labels)[where].mean()) if where.any() else None


def _at(estimate: Estimate, place: int) -> Estimate:
    """One row of an estimate's arrays."""
    return Estimate(*(getattr(estimate, name)[place] for name in ("value", "low", "high", "n_points", "n_left_out")))


ANALYSES: dict[str, Callable[[Material], dict[str, pa.Table]]] = {
    "relations": relations, "kinds": difficulty, "layers": layers, "convergence": convergence,
    "corruption": corruption, "members": members, "neighbours": neighbours,
}  # fmt: skip


def material_of(ensembles: Sequence[Ensemble], networks: Networks) -> Material:
    """Raises LeadlineError where a run has nothing but checkpoints."""
    final = [one for one in ensembles if one.entry.checkpoint is None]
    if not final:
        raise LeadlineError("members: all are checkpoints; give the networks at the end of their training too")
    return Material(final, [one for one in ensembles if one.entry.checkpoint is not None], networks)
