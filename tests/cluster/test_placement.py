"""Runs on a cluster of several nodes, which are processes of this machine: the three placements, and lost nodes."""

import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from ray.cluster_utils import Cluster
from tiny import TINY, tables_of

import leadline
from leadline.cluster.graph import graph_of
from leadline.cluster.schedule import Schedule
from leadline.config import load_config
from leadline.knn import Cost
from leadline.points import open_points
from leadline.report.status import status_of
from leadline.store import RunDirectory
from leadline.store.verify import verify

LEADLINE = str(Path(sys.executable).with_name("leadline"))
# Columns of probes.parquet on what a search did, which depends on what it was asked together.
SEARCHED = [*(field.name for field in fields(Cost)), "plan"]


@pytest.fixture
def cluster():
    """A head without work, and two nodes of one CPU."""
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80_000_000})
    nodes.workers = [nodes.add_node(num_cpus=1, object_store_memory=80_000_000) for _ in range(2)]
    yield nodes
    nodes.shutdown()


def placed(placement, scratch, **engine):
    # One member a group: more groups than places.
    engine = {**TINY["engine"], "group_size": 1, "placement": placement, "scratch": str(scratch), **engine}
    return {**TINY, "engine": engine}


def is_at_work(node):
    """Whether a worker of a run has begun there: Ray calls its process by its class, and by what it does."""
    raylet = node.all_processes["raylet"][0].process.pid
    children = Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split()
    titles = [Path("/proc", child, "cmdline").read_bytes() for child in children]
    return any(title.startswith(b"ray::") and b"IDLE" not in title and b"__init__" not in title for title in titles)


def run_that_loses_a_node(placement, folder, cluster):
    """The directory and the log of a run, one of whose nodes is lost in the midst of voting."""
    config, run = folder / "tiny.yaml", folder / "run"
    config.write_text(yaml.safe_dump(placed(placement, folder / "scratch")))
    command = [LEADLINE, "run", str(config), "--out", str(run), "--address", cluster.address]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as driver:
        while len(list(run.glob("units/vote/*/*.json"))) < 5 and driver.poll() is None:
            time.sleep(0.002)
        # The other may have no worker yet, and so nothing to lose.
        cluster.remove_node(next(filter(is_at_work, cluster.workers)), allow_graceful=False)
        _, log = driver.communicate(timeout=200)
        assert driver.returncode == 0, log
    return run, log


SLOW = [pytest.param(placement, marks=pytest.mark.slow) for placement in ("node", "shared")]


@pytest.mark.parametrize("placement", ["resident", *SLOW])
def test_placements_give_the_same_tables(tiny_run, tmp_path, cluster, placement):
    run = leadline.run(placed(placement, tmp_path / "scratch"), tmp_path / "run", address=cluster.address)
    assert tables_of(run.directory.root) == tables_of(tiny_run.directory.root)
    assert verify(run.directory) == []
    # Embeddings are gone, wherever they were.
    assert not [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()]


def test_members_made_whole_have_the_same_tables(tiny_run, tmp_path, cluster):
    scratch = tmp_path / "scratch"
    # So little memory that some probes go through the network alone.
    config = placed("device", scratch, memory_budget=8_000_000)
    run = leadline.run(config, tmp_path / "run", address=cluster.address)
    found, expected = tables_of(run.directory.root), tables_of(tiny_run.directory.root)
    probes, others = (tables.pop("probes.parquet").drop_columns(SEARCHED) for tables in (found, expected))
    assert probes == others
    assert found == expected
    assert verify(run.directory) == []
    assert not [path for path in scratch.rglob("*") if path.is_file()]
    assert leadline.run(config, tmp_path / "run", address=cluster.address).manifest["status"] == "complete"


def test_any_worker_may_make_a_member_whole(tmp_path):
    """A group of three would be at home with the worker that has its first unit."""
    config = load_config(placed("device", tmp_path, group_size=3))
    graph, schedule = graph_of(config, open_points(config.points)), Schedule(ahead=3)
    for number, group in enumerate(graph.groups(graph.members)):
        schedule.add(graph.units(number, group, RunDirectory(tmp_path)))
    for _ in range(3):
        schedule.done(schedule.take(place="one"))
    first = schedule.take(place="one")
    schedule.settle(first.group, "one")
    assert (first.name, schedule.take(place="other").name) == ("whole mlp-0", "whole mlp-1")


@pytest.mark.slow
def test_members_made_whole_outlive_their_workers(tiny_run, tmp_path, cluster):
    run, _ = run_that_loses_a_node("device", tmp_path, cluster)
    found, expected = tables_of(run), tables_of(tiny_run.directory.root)
    assert found.keys() == expected.keys()
    assert all(found[name] == expected[name] for name in found if name != "probes.parquet")
    assert verify(RunDirectory(run)) == []


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["resident", "node"])
def test_what_is_lost_with_a_node_is_made_again(tiny_run, tmp_path, cluster, placement):
    run, log = run_that_loses_a_node(placement, tmp_path, cluster)
    assert "are lost with their place: made again" in log
    # What was made again was not planned; all is done in the end.
    for name, stage in status_of(RunDirectory(run))["stages"].items():
        assert stage["done"] == stage["units"], name
    assert tables_of(run) == tables_of(tiny_run.directory.root)
