"""Units of a run, done in this process: which points a probe is asked for."""

import numpy as np
import pytest
from tiny import TINY

from leadline.cluster.units import Bench, list_members
from leadline.config import load_config
from leadline.knn import Bank
from leadline.store import RunDirectory


def trained(config, root):
    """A bench and a directory in which all members are trained and embedded: (bench, directory, members)."""
    config = load_config(config)
    bench, directory, members = Bench(config, {}), RunDirectory(root), list_members(config)
    for member in members:
        bench.train(directory, member)
    for shard in range(len(bench.shards)):
        bench.embed(directory, members, shard)
    return bench, directory, members


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
    bench, directory, (member,) = trained(config, tmp_path)
    said = np.concatenate([np.load(directory.outputs(member.name, shard)) for shard in range(len(bench.shards))])
    for block, (first, stop) in enumerate(bench.query_blocks):
        open_points = np.arange(first, stop)
        for probe in (3, 2, 1, 0):
            searches["queries"].clear()
            assert bench.vote(directory, member, probe, block) == len(open_points)
            assert searches["queries"] == [len(open_points)]
            part = np.load(directory.votes_part(member.name, probe, block))
            assert part["point_id"].tolist() == open_points.tolist()
            open_points = open_points[part["winner"] == said["prediction"][open_points]]
        assert 0 < len(open_points) < stop - first


def test_a_block_without_open_points_is_not_searched(tmp_path, searches):
    config = {**TINY, "votes": "until-decided", "members": [{**TINY["members"][0], "count": 1}]}
    bench, directory, (member,) = trained(config, tmp_path)
    bench.vote(directory, member, 3, 0)
    part = np.load(directory.votes_part(member.name, 3, 0))
    part["winner"] = -2  # the last probe disagrees about every point
    np.save(directory.votes_part(member.name, 3, 0), part)
    searches.update(queries=[], banks=0)
    for probe in (2, 1, 0):
        assert bench.vote(directory, member, probe, 0) == 0
    assert searches == {"queries": [], "banks": 0}
