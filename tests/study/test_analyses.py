"""Analyses against loops over the stored tables, scipy's rank correlation and scikit-learn's average precision."""

import warnings
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from cleanlab.rank import get_self_confidence_for_each_label
from safetensors.torch import load_file
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score
from tiny import STUDIED

from leadline import LeadlineError
from leadline.config import load_config
from leadline.members.architectures import build
from leadline.members.splits import training_ids
from leadline.members.train import train
from leadline.points import open_points
from leadline.study.accuracy import accuracy
from leadline.study.analyses import ANALYSES, Material, material_of, plane_of_ensemble
from leadline.study.ensembles import LEARNING, OUTPUTS
from leadline.study.kinds import KINDS

SPLITS = {"held out": False, "training": True}


@pytest.fixture(scope="module")
def tables(material):
    """All that the analyses make of the run."""
    return {name: table for analysis in ANALYSES.values() for name, table in analysis(material).items()}


def values_of(table, **where):
    """The values of some rows, in their order."""
    rows = [row for row in table.to_pylist() if all(row[key] == value for key, value in where.items())]
    assert rows, where
    return [row["value"] for row in rows]


def means_of(members, say, inside):
    """Mean over the members that have each point in their split, or hold it out, of what `say` makes of a row.

    A member for which that is None says nothing.
    """
    found = []
    for rows in zip(*members, strict=True):
        said = [said for row in rows if row["in_training"] == inside and (said := say(row)) is not None]
        found.append(sum(said) / len(said) if said else np.nan)
    return np.array(found)


def depth_of(row):
    return row["depth"]


@pytest.fixture(scope="module")
def consensus(members):
    found = []
    for rows in zip(*members, strict=True):
        votes = [row["prediction"] for row in rows if not row["in_training"]]
        found.append(min(votes, key=lambda label: (-votes.count(label), label), default=-1))
    return found


@pytest.mark.parametrize(("split", "inside"), SPLITS.items())
def test_rank_correlations_are_scipys_of_means_by_a_loop(
    tables, members, consensus, material, studied_run, split, inside
):
    depth = means_of(members, depth_of, inside)
    expected = {
        "accuracy": means_of(members, lambda row: row["prediction"] == row["label"], False),
        "consensus-consistency": np.array(
            [
                mean if sum(not rows[point]["in_training"] for rows in members) > 1 else np.nan
                for point, mean in enumerate(
                    means_of(members, lambda row: row["prediction"] == consensus[row["point_id"]], False)
                )
            ]
        ),
        "confidence": means_of(members, lambda row: row["confidence"], inside),
        "entropy": means_of(members, lambda row: row["entropy"], inside),
        "output margin": means_of(members, lambda row: row["margin"], inside),
    }
    margins = [material.networks.answers(f"mlp-{seed}").input_margin.tolist() for seed in range(4)]
    with_margins = [
        [{**row, "input": margin} for row, margin in zip(rows, of_member, strict=True)]
        for rows, of_member in zip(members, margins, strict=True)
    ]
    expected["adversarial input margin"] = means_of(with_margins, lambda row: row["input"], inside)
    learned = [
        pq.ParquetFile(studied_run.directory.member_table("learning", f"mlp-{seed}")).read().to_pylist()
        for seed in range(4)
    ]
    for name in LEARNING:
        expected[name.replace("_", " ")] = means_of(learned, lambda row, name=name: row[name], inside)
    for measure, means in expected.items():
        known = ~np.isnan(depth + means)
        (row,) = [
            row for row in tables["rank_correlations"].to_pylist() if (row["measure"], row["split"]) == (measure, split)
        ]
        assert row["value"] == pytest.approx(spearmanr(depth[known], means[known]).statistic), measure
        assert row["n"] == known.sum()
        assert row["low"] <= row["value"] <= row["high"]
    told = [row["measure"] for row in tables["rank_correlations"].to_pylist() if row["split"] == split]
    assert told == list(expected)


def test_confidence_by_depth_is_that_of_a_loop(tables, members):
    for split, inside in SPLITS.items():
        depth, confidence = means_of(members, depth_of, inside), means_of(members, lambda r: r["confidence"], inside)
        rows = [
            row
            for row in tables["relations_by_depth"].to_pylist()
            if (row["measure"], row["split"]) == ("confidence", split)
        ]
        bins = {}
        for deep, sure in zip(depth, confidence, strict=True):
            if not np.isnan(deep):
                bins.setdefault(int(np.floor(deep + 0.5)), []).append(sure)
        assert len(bins) > 2
        assert [row["depth"] for row in rows] == sorted(bins)
        for row in rows:
            assert row["n"] == len(bins[row["depth"]])
            assert row["value"] == pytest.approx(np.mean(bins[row["depth"]]))


def test_depth_in_one_architecture_against_another(material, ensemble, members):
    reversed_ = replace(ensemble, architecture="other", depth=ensemble.depth[::-1], in_training=ensemble.in_training)
    table = ANALYSES["relations"](Material([ensemble, reversed_], [], material.networks))["between_architectures"]
    for split, inside in SPLITS.items():
        other = [
            [{**row, "depth": depths["depth"]} for row, depths in zip(rows, others, strict=True)]
            for rows, others in zip(members, members[::-1], strict=True)
        ]
        one, two = means_of(members, depth_of, inside), means_of(other, depth_of, inside)
        known = ~np.isnan(one + two)
        expected = spearmanr(one[known], two[known]).statistic
        assert values_of(table, architecture="mlp", other="other", split=split) == [pytest.approx(expected)]


@pytest.fixture(scope="module")
def kind(members):
    """The kind of each point, -1 for none, and the two thresholds, by a loop."""
    held_out, training = means_of(members, depth_of, False), means_of(members, depth_of, True)
    both = ~np.isnan(held_out + training)
    beyond = np.quantile(held_out[both], 0.75), np.quantile(training[both], 0.75)
    found = [
        -1 if np.isnan(out + inside) else 2 * int(out > beyond[0]) + int(inside > beyond[1])
        for out, inside in zip(held_out, training, strict=True)
    ]
    return found, beyond


def test_kinds_are_those_of_a_loop(tables, members, clean, kind):
    found, beyond = kind
    rows = tables["kinds"].to_pylist()
    assert [row["kind"] for row in rows] == list(KINDS)
    assert sum(row["n"] for row in rows) + rows[0]["n_unplaced"] == 1797
    for number, row in enumerate(rows):
        ids = [point for point, k in enumerate(found) if k == number]
        right = [
            rows[point]["prediction"] == rows[point]["label"]
            for rows in members
            for point in ids
            if not rows[point]["in_training"]
        ]
        assert row["n"] == len(ids) and row["n_unplaced"] == found.count(-1)
        assert (row["held_out_beyond"], row["training_beyond"]) == pytest.approx(beyond)
        assert row["accuracy_held_out"] == (pytest.approx(np.mean(right)) if right else None)
        corrupted = [members[0][point]["label"] != clean[point] for point in ids]
        assert row["corrupted_share"] == (pytest.approx(np.mean(corrupted)) if ids else None)


def test_kinds_by_layer_are_those_of_a_loop(tables, members, kind):
    for number, name in enumerate(KINDS):
        for split, inside in SPLITS.items():
            by_member = []
            for rows in members:
                here = [row for row in rows if row["in_training"] == inside and kind[0][row["point_id"]] == number]
                right = [[vote == row["label"] for vote in row["winner"]] for row in here]
                by_member += [np.mean(right, axis=0)] if right else []
            found = values_of(tables["kinds_by_layer"], kind=name, split=split)
            assert found == (pytest.approx(np.mean(by_member, axis=0).tolist()) if by_member else [None] * 4)


def test_typical_points_are_farthest_into_their_corner(ensemble, members, kind):
    held_out, training = means_of(members, depth_of, False), means_of(members, depth_of, True)
    plane = plane_of_ensemble(ensemble)
    assert plane.kind.tolist() == kind[0]
    far = {
        0: -held_out - training, 1: -held_out + training, 2: held_out - training, 3: held_out + training,
    }  # fmt: skip
    for number, ids in enumerate(plane.typical(12)):
        all_of_them = [point for point in range(1797) if kind[0][point] == number]
        assert ids.tolist() == sorted(all_of_them, key=lambda point: (-far[number][point], point))[:12]


def test_probe_accuracy_is_that_of_a_loop(tables, members, clean):
    table = tables["probe_accuracy"]
    for split, inside in SPLITS.items():
        for group, wrong in (("label corrupted", True), ("label uncorrupted", False)):
            for against in ("given label", "clean label"):
                by_member = []
                for rows in members:
                    right = []
                    for row in rows:
                        truth = clean[row["point_id"]]
                        if row["in_training"] == inside and (row["label"] != truth) == wrong:
                            label = row["label"] if against == "given label" else truth
                            right.append([vote == label for vote in row["winner"]])
                    by_member.append(np.mean(right, axis=0))
                found = values_of(table, split=split, points=group, against=against)
                assert found == pytest.approx(np.mean(by_member, axis=0).tolist())
    assert table["probe"].to_pylist()[:4] == [0, 1, 2, 3]
    # Held out a network knows no corrupted label: its votes are the clean ones.
    given, true = (
        values_of(table, split="held out", points="label corrupted", against=f"{label} label", probe=3)[0]
        for label in ("given", "clean")
    )
    assert true > 0.5 > given


def test_convergence_is_that_of_a_loop(tables, stored):
    steps = {"mlp-at-0": 0, "mlp-at-20": 20, "mlp": 300}
    agreement = {}
    for name, step in steps.items():
        accuracy_of, depths = [], {False: [], True: []}
        for seed in range(4):
            rows, last = stored[f"{name}-{seed}"], stored[f"mlp-{seed}"]
            agree = [
                [a == b for a, b in zip(row["winner"], final["winner"], strict=True)]
                for row, final in zip(rows, last, strict=True)
            ]
            agreement[step, seed] = np.mean(agree, axis=0)
            right = [[vote == row["label"] for vote in row["winner"]] for row in rows if not row["in_training"]]
            accuracy_of.append(np.mean(right, axis=0))
            for inside in (False, True):
                depths[inside].append(np.mean([row["depth"] for row in rows if row["in_training"] == inside]))
        measured = {
            "agreement with the last step": np.mean([agreement[step, seed] for seed in range(4)], axis=0),
            "accuracy held out": np.mean(accuracy_of, axis=0),
        }
        for measure, expected in measured.items():
            assert values_of(tables["probes_by_step"], step=step, measure=measure) == pytest.approx(expected.tolist())
        for split, inside in SPLITS.items():
            found = values_of(tables["depth_by_step"], step=step, split=split)
            assert found == [pytest.approx(np.mean(depths[inside]))]
    reached = []
    for seed in range(4):
        first = []
        for probe in range(4):
            at = 300
            for step in (20, 0):
                if agreement[step, seed][probe] < 0.95:
                    break
                at = step
            first.append(at)
        reached.append(first)
    assert values_of(tables["step_of_convergence"]) == pytest.approx(np.mean(reached, axis=0).tolist())
    assert values_of(tables["step_of_convergence"], probe=0) == [0]  # the input does not change
    assert values_of(tables["step_of_convergence"], probe=3)[0] > 20


def test_a_checkpoint_is_the_network_that_the_training_passes(one_thread, studied_run):
    config = load_config(STUDIED)
    points, entry = open_points(config.points), config.members[0]
    network = build("mlp", entry.parameters, points.input_shape, 10, 2)
    passed = {}

    def keep(step):
        passed[step] = {name: tensor.clone() for name, tensor in network.state_dict().items()}

    train(network, points, training_ids(entry.split, points.parts, 2), entry.training, 2, "cpu", (0, 20, 300), keep)
    for step, name in {0: "mlp-at-0", 20: "mlp-at-20", 300: "mlp"}.items():
        stored = load_file(studied_run.directory.weights(f"{name}-2"))
        assert set(stored) == set(passed[step])
        for key, tensor in stored.items():
            assert torch.equal(tensor, passed[step][key]), (name, key)


def depth_against(winner, label):
    """The first layer from which on all votes are the label, as many as there are layers where the last is not."""
    depth = len(winner)
    while depth and winner[depth - 1] == label:
        depth -= 1
    return depth


def precision_at_as_many(scores, wrong):
    """Of the highest scores, as many as are wrong, the share that is; of those that tie at the cut, their mean."""
    n = sum(wrong)
    cut = sorted(scores)[-n]
    above = [w for score, w in zip(scores, wrong, strict=True) if score > cut]
    tied = [w for score, w in zip(scores, wrong, strict=True) if score == cut]
    return (sum(above) + (n - len(above)) * np.mean(tied)) / n


def test_corrupted_labels_are_found_as_by_loops_scikit_learn_and_cleanlab(
    tables, members, clean, material, studied_run
):
    softmax = [material.networks.answers(f"mlp-{seed}").softmax for seed in range(4)]
    given = np.array([row["label"] for row in members[0]])
    quality = [get_self_confidence_for_each_label(given, shares).tolist() for shares in softmax]
    learned = [
        pq.ParquetFile(studied_run.directory.member_table("learning", f"mlp-{seed}")).read().to_pylist()
        for seed in range(4)
    ]
    every = [
        [{**row, **told, "self-confidence": one} for row, told, one in zip(*of_member, strict=True)]
        for of_member in zip(members, learned, quality, strict=True)
    ]
    scores = {
        "depth in training": means_of(every, depth_of, True),
        "depth in training, against the given label": means_of(
            every, lambda row: depth_against(row["winner"], row["label"]), True
        ),
        "1 - self-confidence (cleanlab)": means_of(every, lambda row: 1 - row["self-confidence"], False),
        "- aum": means_of(every, lambda row: -row["aum"], True),
        "forgetting events": means_of(every, lambda row: row["forgetting_events"], True),
        "el2n": means_of(every, lambda row: row["el2n"], True),
        "- mean label probability": means_of(every, lambda row: -row["mean_label_probability"], True),
    }
    known = [point for point in range(1797) if not any(np.isnan(score[point]) for score in scores.values())]
    assert 900 < len(known) < 1797
    wrong = [members[0][point]["label"] != clean[point] for point in known]
    rows = tables["corrupted_labels"].to_pylist()
    assert len(rows) == 2 * len(scores) and {row["n"] for row in rows} == {len(known)}
    for name, score in scores.items():
        found = {row["measure"]: row["value"] for row in rows if row["score"] == name}
        score = score[known].round(12)  # a mean in another order ties as well
        assert found["average precision"] == pytest.approx(average_precision_score(wrong, score)), name
        assert found["precision = recall"] == pytest.approx(precision_at_as_many(score, wrong)), name


def test_a_measure_that_says_nothing_hides_no_other(material, ensemble):
    """A log of predictions alone, imported, has no el2n and no aum."""
    silent = {name: np.full((4, 1797), np.nan) if name in ("aum", "el2n") else values
              for name, values in ensemble.learning.items()}  # fmt: skip
    table = ANALYSES["corruption"](Material([replace(ensemble, learning=silent)], [], material.networks))
    whole = ANALYSES["corruption"](Material([ensemble], [], material.networks))["corrupted_labels"]
    left = [row for row in whole.to_pylist() if row["score"] not in ("- aum", "el2n")]
    assert table["corrupted_labels"].to_pylist() == left


def test_how_many_members(tables, members):
    rows = tables["how_many_members"].to_pylist()
    assert [(row["split"], row["members"]) for row in rows] == [
        (split, m) for split in ("held out", "training") for m in (1, 2)
    ]
    pairs = {
        1: [((a,), (b,)) for a in range(4) for b in range(a)],
        2: [((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2))],
    }
    for row in rows:
        inside, found = SPLITS[row["split"]], []
        for halves in pairs[row["members"]]:
            one, two = (means_of([members[i] for i in half], depth_of, inside) for half in halves)
            known = ~np.isnan(one + two)
            found.append(spearmanr(one[known], two[known]).statistic)
        # Each draw is one of these.
        assert min(found) - 1e-12 <= row["low"] <= row["value"] <= row["high"] <= max(found) + 1e-12


def test_other_numbers_of_neighbours(tables, members):
    assert {row["k"] for row in tables["depth_by_k"].to_pylist()} == {10, 30, 100}
    asked = members[:3]
    for split, inside in SPLITS.items():
        own = {"split": split, "k": 30}
        right = [
            np.mean([[v == row["label"] for v in row["winner"]] for row in rows if row["in_training"] == inside], 0)
            for rows in asked
        ]
        assert values_of(tables["probe_accuracy_by_k"], **own) == pytest.approx(np.mean(right, axis=0).tolist())
        depths = [np.mean([row["depth"] for row in rows if row["in_training"] == inside]) for rows in asked]
        assert values_of(tables["depth_by_k"], **own, measure="mean depth") == [pytest.approx(np.mean(depths))]
        same = "rank correlation with the run's"
        assert values_of(tables["depth_by_k"], **own, measure=same) == [pytest.approx(1)]
        assert 0 < values_of(tables["depth_by_k"], split=split, k=100, measure=same)[0] < 1


def test_votes_that_were_not_computed_are_not_taken_for_wrong(undecided, tables, material):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = {name: ANALYSES[name](undecided) for name in ("kinds", "layers", "convergence", "corruption")}
    assert found["convergence"] == {}
    scores = {row["score"] for row in found["corruption"]["corrupted_labels"].to_pylist()}
    assert scores == {row["score"] for row in tables["corrupted_labels"].to_pylist()} - {
        "depth in training, against the given label"
    }
    # One network has no share at that probe, and all others are as before.
    for row, usual in zip(
        found["layers"]["probe_accuracy"].to_pylist(), tables["probe_accuracy"].to_pylist(), strict=True
    ):
        if row["probe"]:
            assert row == usual
        else:
            assert row["n"] in (3, 4) and row["value"] == pytest.approx(usual["value"], abs=0.1)
    rest = replace_members(material.ensembles[0], slice(1, None))
    (told,) = ANALYSES["layers"](Material([rest], [], material.networks)).values()
    where = {"split": "training", "points": "label uncorrupted", "against": "given label", "probe": 0}
    assert values_of(found["layers"]["probe_accuracy"], **where) == values_of(told, **where)


def replace_members(ensemble, kept):
    """An ensemble of some of the members, a slice."""
    return replace(
        ensemble,
        members=ensemble.members[kept],
        learning={name: values[kept] for name, values in ensemble.learning.items()},
        **{name: getattr(ensemble, name)[kept] for name in ("in_training", *OUTPUTS)},
    )


@pytest.mark.parametrize("poor", ["plain", "one member", "nothing held out"])
def test_what_a_run_has_not_got_gives_no_table_and_no_warning(tiny_material, material, ensemble, poor):
    one, networks = tiny_material.ensembles[0], tiny_material.networks
    if poor == "one member":
        one, networks = replace_members(ensemble, slice(1)), material.networks
    elif poor == "nothing held out":
        one, networks = replace(ensemble, in_training=np.ones_like(ensemble.in_training)), material.networks
    every = {**ANALYSES, "accuracy": accuracy}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = {name: set(analysis(Material([one], [], networks))) for name, analysis in every.items()}
    assert found["convergence"] == set()
    assert found["layers"] == {"probe_accuracy"} and found["neighbours"] == {"probe_accuracy_by_k", "depth_by_k"}
    assert found["relations"] == {"relations_by_depth", "rank_correlations"}
    assert found["corruption"] == ({"corrupted_labels"} if poor == "nothing held out" else set())
    assert (found["members"] == set()) == (poor == "one member")
    assert (found["kinds"] == set()) == (poor in ("one member", "nothing held out"))
    rejected = {"early_read_out", "rejection", "risk_coverage"}
    assert found["accuracy"] == (set() if poor == "nothing held out" else rejected)


def test_no_detection_where_no_corrupted_point_has_all_scores(ensemble, material):
    inside = replace(ensemble, in_training=ensemble.in_training | ensemble.corrupted)
    assert ANALYSES["corruption"](Material([inside], [], material.networks)) == {}


def test_a_run_of_checkpoints_alone_is_refused(material):
    with pytest.raises(LeadlineError, match="all are checkpoints"):
        material_of(material.checkpoints, material.networks)
