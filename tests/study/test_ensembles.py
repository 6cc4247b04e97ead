"""Ensembles against the tables of their run, row by row."""

from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_digits

from leadline import LeadlineError
from leadline.query import open_run
from leadline.store import RunDirectory
from leadline.store.files import write_json
from leadline.study.ensembles import LEARNING, OUTPUTS, read_ensembles


@pytest.fixture(scope="module")
def ensembles(studied_run):
    return read_ensembles(studied_run)


def test_an_ensemble_is_what_the_tables_say(ensembles, stored, clean):
    assert [one.architecture for one in ensembles] == ["mlp", "mlp-at-0", "mlp-at-20"]
    for one in ensembles:
        assert one.members == tuple(f"{one.architecture}-{seed}" for seed in range(4))
        for number, member in enumerate(one.members):
            rows = stored[member]
            for name in ("in_training", *OUTPUTS):
                np.testing.assert_array_equal(getattr(one, name)[number], [row[name] for row in rows])
            np.testing.assert_array_equal(one.labels, [row["label"] for row in rows])
            np.testing.assert_array_equal(one.winners(member), [row["winner"] for row in rows])
        assert one.held_out.tolist() == (~one.in_training).tolist()
        assert one.clean_labels.tolist() == clean == load_digits().target.tolist()
        assert one.corrupted.sum() == round(0.2 * 1797) and not one.in_test.any()
        assert one.class_names == tuple("0123456789")
        assert one.n_probes == 4 and one.probes[0] == "input" and one.probes[-1] == "softmax"
    assert [one.entry.checkpoint and one.entry.checkpoint.step for one in ensembles] == [None, 0, 20]


def test_learning_is_there_where_training_was_watched(ensembles, studied_run):
    for number, member in enumerate(ensembles[0].members):
        rows = pq.ParquetFile(studied_run.directory.member_table("learning", member)).read().to_pylist()
        for name in LEARNING:
            told = [np.nan if row[name] is None else float(row[name]) for row in rows]
            np.testing.assert_array_equal(ensembles[0].learning[name][number], told)
    assert [one.learning for one in ensembles[1:]] == [{}, {}]


def test_consensus_is_that_of_a_loop(ensembles, stored):
    for one in ensembles:
        tied = 0
        for point, found in enumerate(one.consensus.tolist()):
            rows = [stored[member][point] for member in one.members]
            votes = Counter(row["prediction"] for row in rows if not row["in_training"])
            most = [label for label in votes if votes[label] == max(votes.values())]
            tied += len(most) > 1
            assert found == min(most, default=-1)
        assert (one.consensus < 0).any() and tied


def test_members_may_count_several_times(ensembles, members):
    one, times = ensembles[0], [2, 0, 1, 3]
    found = one.counts(one.in_training, np.array(times))
    for point in range(len(one.labels)):
        votes = Counter()
        for rows, n in zip(members, times, strict=True):
            votes[rows[point]["prediction"]] += n * rows[point]["in_training"]
        assert found[point].tolist() == [votes[label] for label in range(10)]


def test_depths_of_a_split(ensembles, members):
    for split, inside in (("training", True), ("held out", False)):
        expected = [[row["depth"] if row["in_training"] == inside else np.nan for row in rows] for rows in members]
        np.testing.assert_array_equal(ensembles[0].depths(split), expected)


def test_a_run_without_corruption_has_no_clean_labels(tiny_run):
    (one,) = read_ensembles(tiny_run)
    assert one.clean_labels is None and not one.corrupted.any() and one.entry.checkpoint is None


def test_a_run_that_is_not_finished_is_refused(tmp_path, tiny_run):
    write_json(RunDirectory(tmp_path).manifest_path, {**tiny_run.manifest, "status": "running"})
    with pytest.raises(LeadlineError, match="the run is running; finish it with the command that began it"):
        read_ensembles(open_run(tmp_path))
