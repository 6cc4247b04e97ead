"""`votes: until-decided`: the depths of `votes: all` from fewer votes."""

import duckdb
import numpy as np
import pytest
from tiny import TINY, tables_of

import leadline
from leadline import LeadlineError
from leadline.report.summary import _probe_table
from leadline.store.verify import verify

FIELDS = ("winner", "winner_votes", "runner_up", "runner_up_votes")


def test_depths_are_those_of_all_votes_and_the_run_is_sound(tiny_run, until_decided_run):
    assert verify(until_decided_run.directory) == []
    whole, part = tables_of(tiny_run.directory.root), tables_of(until_decided_run.directory.root)
    assert whole.keys() == part.keys()
    for name in whole:
        if name.split("/")[0] not in ("votes", "probes.parquet"):
            assert part[name] == whole[name], name


def test_votes_are_there_from_the_last_probe_down_to_the_one_that_decides(tiny_run, until_decided_run):
    depths = until_decided_run.depths.to_table().to_pylist()
    whole, part = (run.votes.to_table().to_pylist() for run in (tiny_run, until_decided_run))
    missing = 0
    for depth, expected, found in zip(depths, whole, part, strict=True):
        assert depth["member"] == expected["member"] == found["member"]
        assert depth["point_id"] == expected["point_id"] == found["point_id"]
        first = max(depth["depth"] - 1, 0)
        missing += first
        for field in FIELDS:
            assert found[field] == [None] * first + expected[field][first:]
    assert missing > 50


def test_the_table_of_probes_tells_the_smaller_work(tiny_run, until_decided_run):
    whole, part = (run.probes.to_table().to_pylist() for run in (tiny_run, until_decided_run))
    depths = until_decided_run.depths.to_table()
    for expected, found in zip(whole, part, strict=True):
        depth, inside = (
            depths.filter(np.array(depths["member"]) == found["member"])[name].to_numpy()
            for name in ("depth", "in_training")
        )
        there = depth - 1 <= found["probe"]
        for column, side in (("train_accuracy", inside), ("held_out_accuracy", ~inside)):
            assert found[column] == (expected[column] if there[side].all() else None)
        if found["probe"] == 3:
            assert found == expected
        else:
            assert found["train_accuracy"] is None
    work = {
        probe: [sum(row["pairs"] for row in rows if row["probe"] == probe) for rows in (part, whole)]
        for probe in range(3)
    }
    assert all(less < all_of_it for less, all_of_it in work.values()), work


def test_readers_cope_with_votes_that_are_not_there(tiny_run, until_decided_run):
    lists = until_decided_run.sql("SELECT winner FROM votes WHERE winner[1] IS NULL LIMIT 1")["winner"].to_pylist()
    assert lists[0][0] is None and lists[0][-1] is not None
    files = str(until_decided_run.directory.root / "votes" / "*" / "*.parquet")
    ((count,),) = duckdb.sql(f"SELECT count(*) FROM '{files}' WHERE winner[1] IS NULL").fetchall()
    (deep,) = until_decided_run.sql("SELECT count(*) FROM depths WHERE depth > 1")[0].to_pylist()
    assert count == deep > 0
    shown = list(_probe_table(until_decided_run, "mlp").columns[3].cells)
    assert shown[0] == "-" and shown[3] == list(_probe_table(tiny_run, "mlp").columns[3].cells)[3]


def test_another_kind_of_votes_is_another_run(tiny_run):
    with pytest.raises(LeadlineError, match=r"configuration\.votes was 'all', is now 'until-decided'"):
        leadline.run({**TINY, "votes": "until-decided"}, tiny_run.directory.root)
