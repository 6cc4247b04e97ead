"""What depth is good for: read-outs, rejection, marks and trainings again, against loops over points and members."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import yaml

import leadline
from leadline import LeadlineError
from leadline.config import load_config
from leadline.members.splits import training_ids
from leadline.points import open_points
from leadline.study.accuracy import accuracy, again, marks, write_again
from leadline.study.analyses import Material
from leadline.study.ensembles import read_ensembles


@pytest.fixture(scope="module")
def tables(material):
    return accuracy(material)


def rows_by(table, key):
    return {row[key]: row for row in table.to_pylist()}


def is_untouched(point):
    """Digits have no part test: the odd half is not looked at."""
    return point % 2 == 1


def majority(votes):
    """The class of most votes, the lowest of equals."""
    return min(votes, key=lambda label: (-votes.count(label), label))


def answers_of(row):
    """What a member says of a point, by each way of reading it."""
    votes = row["winner"]
    ways = {"network": row["prediction"]}
    ways |= {f"probe {p}": vote for p, vote in enumerate(votes)}
    for p in range(len(votes) - 1):
        later = votes[p:]
        most = max(later.count(vote) for vote in later)
        ways[f"probes {p} to {len(votes) - 1}"] = [vote for vote in later if later.count(vote) == most][-1]
    return ways


@pytest.fixture(scope="module")
def read(members):
    """The way that is right most often, by the given labels, on each member's held-out points of the even half."""
    chosen = []
    for rows in members:
        right = Counter(dict.fromkeys(answers_of(rows[0]), 0))
        for row in rows:
            if not row["in_training"] and not is_untouched(row["point_id"]):
                right.update(way for way, answer in answers_of(row).items() if answer == row["label"])
        chosen.append(max(right, key=right.get))  # the first of equals
    return chosen


def test_early_read_out_is_that_of_a_loop(tables, members, clean, read):
    found = rows_by(tables["early_read_out"], "what")
    counted = ", ".join(f"{way} ({read.count(way)})" for way in dict.fromkeys(read))
    assert {row["chosen"] for row in found.values()} == {counted}
    plain, early, votes = [], [], {}
    for rows, way in zip(members, read, strict=True):
        right = []
        for row in rows:
            point = row["point_id"]
            if not row["in_training"] and is_untouched(point):
                said = row["prediction"], answers_of(row)[way]
                right.append([answer == clean[point] for answer in said])
                votes.setdefault(point, []).append(said)
        plain.append(np.mean(right, axis=0)[0])
        early.append(np.mean(right, axis=0)[1])
    together = np.mean(
        [[majority(list(said)) == clean[point] for said in zip(*of, strict=True)] for point, of in votes.items()], 0
    )
    expected = {
        "members, plain": np.mean(plain),
        "members, early read-out": np.mean(early),
        "members, gain": np.mean(early) - np.mean(plain),
        "ensemble, plain": together[0],
        "ensemble, early read-out": together[1],
        "ensemble, gain": together[1] - together[0],
    }
    assert {what: row["value"] for what, row in found.items()} == pytest.approx(expected)
    assert found["members, gain"]["n"] == 4 and found["ensemble, gain"]["n"] == len(votes)


def test_nothing_is_chosen_by_the_untouched_part(tables, material, ensemble):
    def read_outs(half):
        """With other labels, given and clean, for half of the points."""
        other = (np.arange(1797) % 2 == half).astype(np.int32) * 3
        labels, true = ((values + other) % 10 for values in (ensemble.labels, ensemble.clean_labels))
        changed = replace(ensemble, labels=labels, clean_labels=true)
        return rows_by(accuracy(Material([changed], [], material.networks))["early_read_out"], "what")

    usual, on_untouched, on_validation = rows_by(tables["early_read_out"], "what"), read_outs(1), read_outs(0)
    for what, row in usual.items():
        assert on_untouched[what]["chosen"] == row["chosen"]
        assert on_validation[what]["chosen"] != row["chosen"]
    assert on_untouched["members, plain"]["value"] < 0.2 < usual["members, plain"]["value"]
    assert on_validation["members, plain"]["value"] == usual["members, plain"]["value"]


def test_part_test_is_the_untouched_part_where_there_is_one(material, ensemble, members, clean):
    in_test = np.arange(1797) >= 1500
    with_test = replace(ensemble, in_test=in_test, in_training=ensemble.in_training & ~in_test)
    found = rows_by(accuracy(Material([with_test], [], material.networks))["early_read_out"], "what")
    right = [[row["prediction"] == clean[row["point_id"]] for row in rows[1500:]] for rows in members]
    assert found["members, plain"]["value"] == pytest.approx(np.mean(right))
    assert found["ensemble, plain"]["n"] == 297


def risks(points):
    """Share of wrong answers among the first n, for every n; points: (confidence, wrong), ties in expectation."""
    points = sorted(points, key=lambda point: -point[0])
    mean_of = {}
    for confidence, wrong in points:
        mean_of.setdefault(confidence, []).append(wrong)
    found, total = [], 0.0
    for n, (confidence, _) in enumerate(points, 1):
        total += np.mean(mean_of[confidence])
        found.append(total / n)
    return found


def test_rejection_is_that_of_a_loop(tables, members, clean, material):
    shares = [material.networks.answers(f"mlp-{seed}").softmax.astype(float) for seed in range(4)]
    by = {"softmax confidence": [], "ensemble entropy": [], "depth held out": []}
    for point in range(1797):
        out = [seed for seed in range(4) if not members[seed][point]["in_training"]]
        if out and is_untouched(point):
            mean = sum(shares[seed][point] for seed in out) / len(out)
            wrong = float(np.argmax(mean) != clean[point])
            by["softmax confidence"].append((mean.max(), wrong))
            by["ensemble entropy"].append((sum(p * np.log(p) for p in mean if p > 0), wrong))
            by["depth held out"].append((-np.mean([members[seed][point]["depth"] for seed in out]), wrong))
    found = {name: risks(points) for name, points in by.items()}
    areas = {name: np.mean(curve) for name, curve in found.items()}
    areas["depth less confidence"] = areas["depth held out"] - areas["softmax confidence"]
    areas["depth less entropy"] = areas["depth held out"] - areas["ensemble entropy"]
    rows = rows_by(tables["rejection"], "ordered_by")
    assert {name: row["value"] for name, row in rows.items()} == pytest.approx(areas)
    assert {row["n"] for row in rows.values()} == {len(by["depth held out"])}
    for name, curve in found.items():
        told = [row for row in tables["risk_coverage"].to_pylist() if row["ordered_by"] == name]
        assert len(told) == 100 and told[-1]["coverage"] == 1
        for row in told:
            assert row["risk"] == pytest.approx(curve[round(row["coverage"] * len(curve)) - 1])


def depth_against(winner, label):
    """The first layer from which on all votes are the label, as many as there are layers where the last is not."""
    depth = len(winner)
    while depth and winner[depth - 1] == label:
        depth -= 1
    return depth


def marked_by_a_loop(members, in_test):
    wrong, out, depths = 0, 0, {}
    for point, rows in enumerate(zip(*members, strict=True)):
        if point in in_test:
            continue
        for row in rows:
            if row["in_training"]:
                depths.setdefault(point, []).append(depth_against(row["winner"], row["label"]))
            else:
                out, wrong = out + 1, wrong + (row["prediction"] != row["label"])
    doubtful = sorted(depths, key=lambda point: (-np.mean(depths[point]), point))
    return sorted(doubtful[: round(wrong / out * len(depths))])


def test_marks_are_those_of_a_loop(ensemble, members):
    marked = np.flatnonzero(marks(ensemble)).tolist()
    assert marked == marked_by_a_loop(members, set())
    assert ensemble.corrupted[marked].mean() > 2 * ensemble.corrupted.mean()


def test_no_clean_label_and_no_test_point_is_marked_by(ensemble, members):
    marked = marks(ensemble)
    np.testing.assert_array_equal(marks(replace(ensemble, clean_labels=ensemble.clean_labels[::-1])), marked)
    in_test = np.arange(1797) >= 1500
    with_test = replace(ensemble, in_test=in_test, in_training=ensemble.in_training & ~in_test)
    marked = marks(with_test)
    assert np.flatnonzero(marked).tolist() == marked_by_a_loop(members, set(range(1500, 1797)))
    assert marked.any() and not marked[in_test].any()
    other = np.where(in_test, (with_test.labels + 1) % 10, with_test.labels)
    np.testing.assert_array_equal(marks(replace(with_test, labels=other)), marked)


@pytest.fixture(scope="module")
def configurations(ensemble, tmp_path_factory):
    """Written into a folder whose name has braces, which a path of a split fills in."""
    return write_again(ensemble, tmp_path_factory.mktemp("again") / "of {mine}")


def test_the_configurations_that_train_again(configurations, ensemble, members, studied_run):
    drop, relabel = (load_config(place) for place in configurations)
    assert [place.name for place in configurations] == ["drop.yaml", "relabel.yaml"]
    assert [drop.name, relabel.name] == ["studied-drop", "studied-relabel"]
    marked = marks(ensemble)
    points = open_points(drop.points)
    for seed, rows in enumerate(members):
        kept = [row["point_id"] for row in rows if row["in_training"] and not marked[row["point_id"]]]
        assert training_ids(drop.members[0].split, points.parts, seed).tolist() == kept
        own = [row["point_id"] for row in rows if row["in_training"]]
        assert training_ids(relabel.members[0].split, points.parts, seed).tolist() == own
    labels = [
        majority(out) if marked[point] and out else label
        for point, label in enumerate(ensemble.labels.tolist())
        for out in [[rows[point]["prediction"] for rows in members if not rows[point]["in_training"]]]
    ]
    assert np.load(relabel.points.relabel).tolist() == labels
    assert open_points(relabel.points).labels.tolist() == labels != ensemble.labels.tolist()
    assert points.labels.tolist() == ensemble.labels.tolist()
    for config in (drop, relabel):
        (entry,) = config.members
        before = load_config(studied_run.manifest["configuration"]).members[0]
        assert entry.training == before.training.model_copy(update={"learning": None})
        assert before.training.learning and entry.parameters == before.parameters
        assert (entry.count, entry.seed, entry.label, entry.probes) == (4, 0, "mlp", ())
    tree = yaml.safe_load(configurations[0].read_text())
    assert tree["engine"] == studied_run.manifest["configuration"]["engine"]


def test_labels_of_part_test_are_not_replaced(ensemble, tmp_path):
    in_test = np.arange(1797) >= 1500
    with_test = replace(ensemble, in_test=in_test, in_training=ensemble.in_training & ~in_test)
    write_again(with_test, tmp_path)
    labels = np.load(tmp_path / "relabel.npy")
    assert (labels[in_test] == -1).all() and (labels[~in_test] >= 0).all()


def test_no_configuration_where_nothing_is_marked_or_was_trained(ensemble, tmp_path):
    right = replace(ensemble, prediction=np.tile(ensemble.labels, (4, 1)))
    assert not marks(right).any() and write_again(right, tmp_path / "again") == []
    given = replace(ensemble, entry=ensemble.entry.model_copy(update={"training": None, "weights": "w-{seed}.pt"}))
    assert marks(given).any() and write_again(given, tmp_path / "again") == []
    assert not (tmp_path / "again").exists()


def test_votes_that_were_not_computed_choose_and_mark_nothing(undecided, tmp_path):
    assert marks(undecided.ensembles[0]) is None and write_again(undecided.ensembles[0], tmp_path / "again") == []
    assert set(accuracy(undecided)) == {"rejection", "risk_coverage"}


def test_a_run_that_cannot_be_paired_is_refused(material, tiny_run):
    with pytest.raises(LeadlineError, match="tiny: no architecture"):
        again(material, [tiny_run])


@pytest.mark.slow
def test_training_again_gains_what_a_loop_says(configurations, material, members, clean, tmp_path):
    run = leadline.run(configurations[0], tmp_path / "run", overrides=("engine.workers=2",))
    found = rows_by(again(material, [run])["trained_again"], "what")
    (other,) = read_ensembles(run)
    plain, trained, votes = [], [], {}
    for seed, rows in enumerate(members):
        right = []
        for row in rows:
            point = row["point_id"]
            if is_untouched(point) and not row["in_training"] and not other.in_training[seed, point]:
                said = row["prediction"], int(other.prediction[seed, point])
                right.append([answer == clean[point] for answer in said])
                votes.setdefault(point, []).append(said)
        plain.append(np.mean(right, axis=0)[0])
        trained.append(np.mean(right, axis=0)[1])
    together = np.mean(
        [[majority(list(said)) == clean[point] for said in zip(*of, strict=True)] for point, of in votes.items()], 0
    )
    expected = {
        "members, plain": np.mean(plain),
        "members, trained again": np.mean(trained),
        "members, gain": np.mean(np.subtract(trained, plain)),
        "ensemble, plain": together[0],
        "ensemble, trained again": together[1],
        "ensemble, gain": together[1] - together[0],
    }
    assert {what: row["value"] for what, row in found.items()} == pytest.approx(expected)
    assert {row["run"] for row in found.values()} == {"studied-drop"}
    assert plain != trained
