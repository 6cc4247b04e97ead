"""Units of a run, done in this process: which points a probe is asked for, and what members share."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_common import by_brute_force
from tiny import TINY, embedded

from leadline.cluster.units import embed, part, share, vote, whole
from leadline.cluster.work import common_bank_parts, list_members
from leadline.cluster.workbench import Workbench
from leadline.config import load_config
from leadline.knn import Bank
from leadline.points import open_points
from leadline.store import RunDirectory


@pytest.fixture
def searches(monkeypatch):
    """The number of queries of every search that is made, and of every bank that is made ready."""
    made = {"queries": [], "banks": 0}
    search, begin = Bank.search, Bank.__init__

    def counted_search(self, queries, *arguments):
        made["queries"].append(len(queries))
        return search(self, queries, *arguments)

    def counted_begin(self, *arguments):
        made["banks"] += 1
        begin(self, *arguments)

    monkeypatch.setattr(Bank, "search", counted_search)
    monkeypatch.setattr(Bank, "__init__", counted_begin)
    return made


def test_a_probe_is_asked_for_the_points_that_no_later_one_decided(tmp_path, searches):
    config = {**TINY, "votes": "until-decided", "members": [{**TINY["members"][0], "count": 1}]}
    bench, directory, (member,) = embedded(config, tmp_path)
    said = np.concatenate([np.load(directory.outputs(member.name, shard)) for shard in range(len(bench.shards))])
    for block, (first, stop) in enumerate(bench.query_blocks):
        open_points = np.arange(first, stop)
        for probe in (3, 2, 1, 0):
            searches["queries"].clear()
            assert vote(bench, member, probe, block) == len(open_points)
            assert searches["queries"] == [len(open_points)]
            part = np.load(directory.votes_part(member.name, probe, block))
            assert part["point_id"].tolist() == open_points.tolist()
            open_points = open_points[part["winner"] == said["prediction"][open_points]]
        assert 0 < len(open_points) < stop - first


def test_a_block_without_open_points_is_not_searched(tmp_path, searches):
    config = {**TINY, "votes": "until-decided", "members": [{**TINY["members"][0], "count": 1}]}
    bench, directory, (member,) = embedded(config, tmp_path)
    vote(bench, member, 3, 0)
    part = np.load(directory.votes_part(member.name, 3, 0))
    part["winner"] = -2  # the last probe disagrees about every point
    np.save(directory.votes_part(member.name, 3, 0), part)
    searches.update(queries=[], banks=0)
    for probe in (2, 1, 0):
        assert vote(bench, member, probe, 0) == 0
    assert searches == {"queries": [], "banks": 0}


def with_splits(tmp_path, votes, *splits):
    """TINY with a member for each of these arrays of training ids."""
    for seed, ids in enumerate(splits):
        np.save(tmp_path / f"split-{seed}.npy", ids)
    split = {"kind": "file", "path": str(tmp_path / "split-{seed}.npy")}
    return {**TINY, "votes": votes, "members": [{**TINY["members"][0], "count": len(splits), "split": split}]}


@pytest.mark.parametrize("votes", ["all", "until-decided"])
def test_votes_from_shared_neighbours_are_those_of_a_search_in_the_members_own_bank(tmp_path, searches, votes):
    labels = open_points(load_config(TINY).points).labels
    splits = [np.arange(1797), np.flatnonzero(labels < 6), np.flatnonzero(np.arange(1797) % 10)]
    config = with_splits(tmp_path, votes, *splits)
    bench, directory, members = embedded(config, tmp_path / "run")
    assert bench.common.pays
    for block, (first, stop) in enumerate(bench.query_blocks):
        later = (3, 2, 1) if votes == "until-decided" else ()
        for member in members:
            for probe in later:
                vote(bench, member, probe, block)
        searches["queries"].clear()
        # Shared by the first two, as if the third were in another group.
        assert share(bench, members[:2], block) == searches["queries"].pop() <= stop - first
        asked = [vote(bench, member, 0, block) for member in members]
        # Many neighbours of a 6 are not below 6, hardly any of them end in 0.
        searched = searches["queries"]
        assert 0 < max(searched) == searched[0] < asked[1]
        assert sum(searched[1:]) < asked[2] / 20
        assert (len(searched) == 1) or votes == "until-decided"
        for member in members:
            alone = load_config({**config, "members": [{**config["members"][0], "seed": member.seed, "count": 1}]})
            other = RunDirectory(tmp_path / "alone", directory.scratch)
            own = Workbench(alone, {}, other)
            assert not own.common.pays
            for stage in ("train", *(["vote"] if later else [])):
                shutil.copytree(directory.root / "units" / stage, other.root / "units" / stage, dirs_exist_ok=True)
            vote(own, member, 0, block)
            place = (member.name, 0, block)
            assert other.votes_part(*place).read_bytes() == directory.votes_part(*place).read_bytes()


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_neighbours_that_are_shared_from_parts_are_those_of_one_search_and_of_a_slow_one(data):
    n, k = data.draw(st.integers(30, 80)), data.draw(st.integers(2, 3))
    # Few distinct places: equal points, and crowds at equal distances, on both sides of every cut.
    inputs = np.array(data.draw(st.lists(st.tuples(*[st.integers(0, 3)] * 2), min_size=n, max_size=n)), np.float32)
    held_out = [data.draw(st.sets(st.integers(0, n - 1), max_size=n // 8)) for _ in range(3)]
    leave_one_out = data.draw(st.booleans())
    memory_budget = 4 * 8 * 2 * n // data.draw(st.integers(2, 6))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        np.save(folder / "inputs.npy", inputs)
        np.save(folder / "labels.npy", np.arange(n) % 2)
        splits = [np.setdiff1d(np.arange(n), sorted(some)) for some in held_out]
        config = {
            **with_splits(folder, "all", *splits),
            "points": {"source": "npy", "inputs": str(folder / "inputs.npy"), "labels": str(folder / "labels.npy")},
            "k": k,
            "leave_one_out": leave_one_out,
            "engine": {"query_block": 50, "memory_budget": memory_budget},
        }
        cut = Workbench(load_config(config), {}, RunDirectory(folder / "cut"))
        embed(cut, (), 0)
        common, members = cut.common, list_members(cut.config)
        assume(common.pays)
        parts = len(common_bank_parts(cut.config, common, cut.input_probe))
        assume(parts > 1)
        del config["engine"]["memory_budget"]
        whole = Workbench(load_config(config), {}, RunDirectory(folder / "whole", cut.directory.scratch))
        for block, (first, stop) in enumerate(cut.query_blocks):
            for number in reversed(range(parts)):
                assert part(cut, members, 0, number, block) == stop - first
            share(cut, members, block)
            share(whole, members, block)
            made = cut.directory.shared(block)
            assert made.read_bytes() == whole.directory.shared(block).read_bytes()
            for point, neighbours in np.load(made):
                expected = by_brute_force(inputs, common.ids, common.k, point, leave_one_out)
                assert neighbours.tolist() == expected.tolist()


def test_members_made_whole_share_one_reading_of_the_points(tmp_path, monkeypatch):
    """As far as there is room, which a CPU has none of; and units that embed a shard keep nothing."""
    # So little memory that every probe goes through the network alone.
    config = {**TINY, "engine": {**TINY["engine"], "placement": "device", "memory_budget": 400_000}}
    bench, directory, members = embedded(config, tmp_path)
    read, inputs, n = [], bench.inputs, len(bench.points)
    monkeypatch.setattr(bench, "inputs", lambda ids: read.extend(ids.tolist()) or inputs(ids))
    embed(bench, members, 0)
    embed(bench, members, 0)
    assert read == 2 * list(range(*bench.shards[0]))

    def votes():
        parts = [directory.votes_part(members[0].name, probe, 0) for probe in range(4)]
        return [np.load(path).tolist() for path in parts]

    read.clear()
    whole(bench, members[0])
    expected = votes()
    assert read == 4 * list(range(n))
    # Room for ten batches of 64 inputs of 64 values, and a little more.
    monkeypatch.setattr(bench.all_batches, "_room", 10 * 64 * 4 * 64 + 1)
    read.clear()
    for member in members:
        whole(bench, member)
    assert read == list(range(n)) + 11 * list(range(640, n))
    assert votes() == expected
