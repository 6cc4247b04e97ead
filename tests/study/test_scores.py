"""Scores of points against a slow loop over the stored tables, which another reader opens."""

import math
import statistics

import numpy as np
import pandas as pd
import pytest

import leadline
from leadline.query import Run
from leadline.store.schemas import ENSEMBLE as STORED
from leadline.study import scores
from leadline.study.kinds import KINDS
from leadline.study.scores import LEARNING, architectures, point_scores


def stored(run, name):
    """A table as rows; of those that have a file for each member, with the member's name."""
    place = run.directory.table(name)
    if place.is_file():
        return pd.read_parquet(place).astype(object).to_dict("records")
    files = sorted(place.glob("member=*/part-0.parquet"))
    frames = [(path.parent.name.removeprefix("member="), pd.read_parquet(path).astype(object)) for path in files]
    return [{**row, "member": member} for member, frame in frames for row in frame.to_dict("records")]


def same(found, expected):
    return expected == pytest.approx(found, rel=1e-12, abs=1e-12) if expected is not None else found is None


@pytest.mark.parametrize("name", ["tiny_run", "watched_run"])
def test_a_row_for_each_architecture_and_point(request, name):
    run = request.getfixturevalue(name)
    points = {row["point_id"]: row for row in stored(run, "points")}
    ensemble = {(row["architecture"], row["point_id"]): row for row in stored(run, "ensemble")}
    table = point_scores(run)
    known = list(dict.fromkeys(row["architecture"] for row in stored(run, "members")))
    assert architectures(run) == known
    rows = table.to_pylist()
    assert [(row["architecture"], row["point_id"]) for row in rows] == [(a, p) for a in known for p in sorted(points)]
    for row in rows:
        kept = {**points[row["point_id"]], **ensemble[row["architecture"], row["point_id"]]}
        for column in (*scores.POINT, *scores.ENSEMBLE):
            expected = None if pd.isna(kept[column]) else kept[column]
            assert row[column] == expected, column
    types = {field.name: field.type for field in table.schema}
    assert all(types[field.name] == field.type for field in STORED if field.name in types)


@pytest.mark.parametrize("name", ["tiny_run", "watched_run"])
def test_accuracy_in_training_and_memorisation(request, name):
    run = request.getfixturevalue(name)
    of = {row["member"]: row["architecture"] for row in stored(run, "members")}
    right = {}
    for row in stored(run, "depths"):
        key = of[row["member"]], row["point_id"], row["in_training"]
        right.setdefault(key, []).append(row["prediction"] == row["label"])
    n_missing = 0
    for row in point_scores(run).to_pylist():
        inside, outside = (right.get((row["architecture"], row["point_id"], split)) for split in (True, False))
        trained = statistics.fmean(inside) if inside else None
        assert same(row["training_accuracy"], trained)
        both = inside and outside
        n_missing += not both
        assert same(row["memorisation"], trained - statistics.fmean(outside) if both else None)
    assert n_missing > 0


def test_kinds_are_of_the_architecture_itself(watched_run):
    for name in architectures(watched_run):
        rows = point_scores(watched_run, name).to_pylist()
        placed = [row for row in rows if row["n_training"] and row["n_held_out"]]
        unplaced = [row for row in rows if not (row["n_training"] and row["n_held_out"])]
        assert unplaced and all(row["kind"] is None for row in unplaced)
        if not placed:
            continue
        beyond = {
            split: np.quantile([row[f"mean_depth_{split}"] for row in placed], 0.75)
            for split in ("held_out", "training")
        }
        for row in placed:
            deep = [row[f"mean_depth_{split}"] > beyond[split] for split in ("held_out", "training")]
            assert row["kind"] == KINDS[2 * deep[0] + deep[1]]
    # One member alone never has a point both in training and held out.
    assert set(point_scores(watched_run, "plain")["kind"].to_pylist()) == {None}
    assert len(set(point_scores(watched_run, "mlp")["kind"].to_pylist())) > 1


def test_learning_over_the_members_that_have_it(watched_run):
    of = {row["member"]: row["architecture"] for row in stored(watched_run, "members")}
    values = {}
    for row in stored(watched_run, "learning"):
        split = "training" if row["in_training"] else "held_out"
        for measure in LEARNING:
            if not pd.isna(row[measure]):
                key = of[row["member"]], row["point_id"], measure, split
                values.setdefault(key, []).append(float(row[measure]))
    sizes = set()
    for row in point_scores(watched_run).to_pylist():
        for measure in LEARNING:
            for split in ("training", "held_out"):
                given = values.get((row["architecture"], row["point_id"], measure, split), [])
                sizes.add(len(given))
                mean = math.fsum(given) / len(given) if given else None
                assert same(row[f"mean_{measure}_{split}"], mean)
                assert same(row[f"std_{measure}_{split}"], statistics.stdev(given) if len(given) > 1 else None)
    assert sizes == {0, 1, 2}


def test_without_a_table_of_learning_its_columns_are_absent(tiny_run, watched_run):
    assert not any(measure in column for column in point_scores(tiny_run).column_names for measure in LEARNING)
    assert set(point_scores(tiny_run).column_names) < set(point_scores(watched_run).column_names)


def test_one_architecture_of_several(watched_run):
    whole = point_scores(watched_run)
    n_points = watched_run.manifest["data"]["points"]
    assert point_scores(watched_run, "plain").equals(whole.slice(n_points).combine_chunks())
    with pytest.raises(leadline.LeadlineError, match="'cnn'; it has mlp, plain"):
        point_scores(watched_run, "cnn")


def test_a_run_that_is_not_finished(tiny_run):
    begun = Run(tiny_run.directory)
    begun.manifest = {**begun.manifest, "status": "running"}
    with pytest.raises(leadline.LeadlineError, match="running; finish it"):
        point_scores(begun)
