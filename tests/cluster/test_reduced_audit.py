"""The audit of reduced probes: against slow comparisons with whole embeddings, in what runs store, and for `auto`."""

import io
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from rich.console import Console
from scipy.spatial.distance import cdist
from tiny import TINY, embedded, tables_of

import leadline
from leadline.cluster import driver
from leadline.cluster.graph import Graph
from leadline.cluster.units import methods, reducing, searching
from leadline.cluster.work import is_tried
from leadline.knn.choice import Choice
from leadline.members.architectures import build
from leadline.members.probes import Probe, read_probes
from leadline.members.weights import load_weights
from leadline.report import print_summary
from leadline.store import RunDirectory
from leadline.store.files import read_json, write_json
from leadline.store.schemas import AUDIT_FIELDS, MEMBERS, PROBES
from leadline.store.tables import read_table
from leadline.store.verify import _audit_faults, verify

NETWORK = {"width": 4, "depth": [1, 1, 1, 1]}
REDUCTION = {"input": "jl:20", "stem": "pca:8", "blocks.0.sum": "jl:8", "blocks.*.sum": "pool:1x1"}
RESNET = {
    **TINY,
    "members": [
        {
            "architecture": "resnet18",
            "parameters": NETWORK,
            "count": 2,
            "training": {"steps": 8, "batch": 64, "precision": "float32"},
        }
    ],
    "reduction": REDUCTION,
    "audit": {"sample": 1797},
}
MLP = {**TINY, "reduction": {"hidden.*": "jl:6", "input": "pool:2x2"}, "audit": {"sample": 700, "seed": 3}}


def planned(bench, members, probes, stage):
    """Member and probe of the units of one stage, in a run of members with these probes."""
    rows = {member.name: 1617 for member in members}
    graph = Graph(bench.config, members, {"mlp": probes}, bench.common, rows, 1797, len(bench.shards), 1)
    units = graph.units(0, members, RunDirectory(Path("nowhere")))
    assert graph.totals(members)[stage] == sum(unit.stage == stage for unit in units)
    return [unit.arguments for unit in units if unit.stage == stage]


def voted(bench, directory, members):
    """All units of voting of members that are embedded, and of audit and reduction of the last, in this process."""
    last = len(bench.probes(members[0])) - 1
    for probe in range(last, -1, -1):
        for block in range(len(bench.query_blocks)):
            if probe == 0 and bench.common.pays:
                searching.share(bench, members, block)
            for member in members:
                searching.vote(bench, member, probe, block)
    for probe in range(last + 1):
        methods.audit(bench, members[-1], probe)
    reducing.reduce(bench, members[-1])


def nearest(rows, bank, k):
    """Ids [N, k] of the k nearest bank rows to every row, but itself: float64 brute force, ties by lower row."""
    distances = cdist(rows.astype(float), rows[bank].astype(float))
    distances[bank, np.arange(len(bank))] = np.inf
    return bank[np.argsort(distances, axis=1, kind="stable")[:, :k]]


def winners(neighbours, labels):
    return np.array([np.bincount(labels[row]).argmax() for row in neighbours])


def whole_embeddings(bench, directory, member):
    """At every probe, of all points, by a forward pass of the stored weights in the run's batches."""
    config = member.config
    model = build(config.architecture, config.parameters, bench.points.input_shape, 10, member.seed)
    load_weights(model, directory.weights(member.name))
    probes = [Probe(**probe) for probe in read_json(directory.record("train", member.name))["probes"]]
    inputs = torch.from_numpy(bench.points.read(np.arange(1797)))
    batches = [read_probes(model, probes, part)[0] for part in inputs.split(64)]
    return [torch.cat([batch[probe.index] for batch in batches]).numpy() for probe in probes]


@pytest.mark.parametrize("votes", ["all", "until-decided"])
def test_the_audit_of_all_points_is_a_comparison_with_full_width(tmp_path, votes):
    bench, directory, members = embedded({**RESNET, "votes": votes}, tmp_path)
    assert bench.common.pays  # the reduced input is searched once for both members
    voted(bench, directory, members)
    member, k, labels = members[1], TINY["k"], bench.points.labels
    whole = whole_embeddings(bench, directory, member)
    record = read_json(directory.record("reduce", member.name))
    table = read_table(directory.member_table("depths", member.name))
    bank = np.flatnonzero(table["in_training"].to_numpy())
    found = read_table(directory.member_table("votes", member.name))["winner"].to_pylist()
    found = np.array([[-1 if vote is None else vote for vote in row] for row in found])
    assert (found < 0).any() == (votes == "until-decided")
    depths, prediction = table["depth"].to_numpy(), table["prediction"].to_numpy()
    slow = np.zeros(1797, int)
    reductions = [probe.reduction for probe in bench.probes(member)]
    assert reductions == ["jl:20", "pca:8", "jl:8", "pool:1x1", "pool:1x1", "none", "none"]
    for probe, audit in enumerate(record["probes"]):
        neighbours = nearest(whole[probe], bank, k)
        exact = winners(neighbours, labels)
        slow[exact != prediction] = probe + 1
        there = found[:, probe] >= 0
        if reductions[probe] == "none":
            assert audit == {"method": "exact"} and (found[there, probe] == exact[there]).all()
            continue
        assert audit["audit_sample"] == there.sum()
        assert audit["vote_agreement"] == np.mean(found[there, probe] == exact[there])
        stored = bench.rows(member.name, probe, np.arange(1797))[:]
        ours = nearest(stored, bank, k)
        recall = [len(set(a) & set(b)) / k for a, b in zip(ours[there], neighbours[there], strict=True)]
        assert audit["recall"] == pytest.approx(np.mean(recall))
        assert 0.05 < audit["recall"] < 0.99 and audit["vote_agreement"] < 1
    audit = record["audit"]
    assert audit["audit_sample"] == 1797
    assert audit["depth_agreement"] == np.mean(depths == slow) < 1
    assert audit["depth_error"] == pytest.approx(np.abs(depths - slow).mean()) and audit["depth_error_low"] > 0


def test_a_reduction_that_loses_nothing_agrees_everywhere(tmp_path):
    """Images of which every four pixels are one: their means say all, and distances are twice as short."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 400)
    coarse = random.integers(0, 3, (400, 1, 2, 2)) + labels[:, None, None, None]
    np.save(tmp_path / "inputs.npy", coarse.repeat(2, axis=2).repeat(2, axis=3).astype(np.float32))
    np.save(tmp_path / "labels.npy", labels)
    points = {"source": "npy", "inputs": str(tmp_path / "inputs.npy"), "labels": str(tmp_path / "labels.npy")}
    member = {**TINY["members"][0], "count": 1, "training": {"steps": 2, "precision": "float32"}}
    config = {**TINY, "points": points, "members": [member], "reduction": {"input": "pool:2x2"}}
    bench, directory, members = embedded(config, tmp_path / "run")
    voted(bench, directory, members)
    record = read_json(directory.record("reduce", members[0].name))
    assert record["probes"][0]["recall"] == record["probes"][0]["vote_agreement"] == 1
    assert record["probes"][0]["recall_low"] < 1
    assert record["audit"]["depth_agreement"] == 1 and record["audit"]["depth_error"] == 0
    assert record["audit"]["audit_sample"] == 400
    # A run is only sound with it.
    trained = read_json(directory.record("train", members[0].name))
    rows = list(driver._probe_rows(bench.config, members[0], trained, record))
    probes = pa.Table.from_pylist(rows, PROBES).to_pylist()
    row = pa.Table.from_pylist([driver._member_row(members[0], trained, record)], MEMBERS).to_pylist()[0]
    assert list(_audit_faults(directory, row, probes)) == []
    for column in ("audit_sample", *AUDIT_FIELDS):
        probes[0][column] = None
    (fault,) = _audit_faults(directory, row, probes)
    assert "probe 0 of mlp-0 has no audit" in fault


def test_where_no_probe_is_narrowed_there_is_no_audit(tmp_path):
    """`jl:100` is wider than every layer: what is stored is the whole, and the votes are exact."""
    config = {**TINY, "reduction": "jl:100"}
    bench, directory, members = embedded(config, tmp_path)
    probes = bench.probes(members[0])
    assert planned(bench, members, probes, "audit") == []
    voted(bench, directory, members)
    record = read_json(directory.record("reduce", members[-1].name))
    assert record["audit"] == {} and record["probes"] == [{"method": "exact"}] * 4
    # One narrow probe is enough for an audit of the depths, to which all probes belong.
    probes[2] = replace(probes[2], reduction="jl:8")
    assert planned(bench, members, probes, "audit") == [(member, probe) for member in members for probe in range(4)]


# By `auto`


def test_auto_counts_what_reductions_have_changed(tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(methods, "candidates", lambda n_bank: ["flat"])
    config = {
        **MLP,
        "members": [{**TINY["members"][0], "count": 1}],
        "reduction": {"hidden.1": "jl:4"},
        "method": {"hidden.0": "auto", "hidden.1": "auto"},
        "audit": {"sample": 500, "depth_agreement": 0.97},
    }
    bench, directory, (member,) = embedded(config, tmp_path)
    probes = bench.probes(member)
    assert [is_tried(bench.config, bench.common, probe) for probe in probes] == [False, True, True, False]
    labels, bank = bench.points.labels, bench.training_ids(member)
    prediction = bench.outputs(member)[:]["prediction"]
    records = {}
    for probe, whole in ((1, None), (2, whole_embeddings(bench, directory, member)[2])):
        methods.trial(bench, member, probe)
        records[probe] = json.loads(directory.trial("mlp", probe).read_text())
        stored = bench.rows(member.name, probe, np.arange(1797))[:]
        ours, exact = (
            winners(nearest(rows, bank, 10), labels) for rows in (stored, stored if whole is None else whole)
        )
        changed = np.flatnonzero(((ours == prediction) != (exact == prediction))[bench.tried]).tolist()
        # The index of all distances finds the nearest of what is stored, and changes what the reduction has changed.
        assert records[probe]["reduced"] == records[probe]["options"][0]["changed"] == changed
    assert records[1]["reduced"] == [] and len(records[2]["reduced"]) > 15
    for reduced, expected in ((records[2]["reduced"], "exact"), ([], "flat")):
        for probe in (1, 2):
            options = [{"method": "flat", "seconds": 1.0, "changed": reduced if probe == 2 else []}]
            record = {"exact_seconds": 9.0, "reduced": reduced if probe == 2 else [], "options": options}
            write_json(directory.trial("mlp", probe), record)
        choices = [methods.choice_of(bench, member, probe) for probe in (1, 2)]
        assert [choice.method for choice in choices] == [expected, expected]
        assert ("no cheaper method meets 0.97" in choices[0].why) == bool(reduced)


def test_auto_tries_a_reduced_probe_that_is_searched_exactly(tmp_path):
    config = {
        **MLP,
        "reduction": {"input": "jl:9", "hidden.1": "jl:4"},
        "method": {"input": "auto", "hidden.0": "auto"},
        "audit": {"sample": 300, "depth_agreement": 0.97},
    }
    bench, directory, members = embedded(config, tmp_path)
    assert bench.common.pays
    tried = planned(bench, members, bench.probes(members[0]), "trial")
    assert tried == [(members[0], probe) for probe in (0, 1, 2)]
    for unit in ((members[0], 0), (members[0], 2)):
        methods.trial(bench, *unit)
        record = json.loads(directory.trial("mlp", unit[1]).read_text())
        assert record["reduced"] and record["options"] == []
    write_json(
        directory.trial("mlp", 1),
        {"exact_seconds": 9.0, "reduced": [], "options": [{"method": "flat", "seconds": 1.0, "changed": []}]},
    )
    assert methods.choice_of(bench, members[1], 0) == Choice("exact", methods.SHARED)
    assert "no cheaper method meets" in methods.choice_of(bench, members[1], 1).why


# Whole runs


@pytest.fixture(scope="module")
def reduced_run(tmp_path_factory):
    """A run of reduced layers; it was killed once, in the audit, and went on."""
    folder = tmp_path_factory.mktemp("reduced")
    run, config = folder / "run", folder / "tiny.yaml"
    config.write_text(yaml.safe_dump({**MLP, "engine": {**MLP["engine"], "scratch": str(folder / "scratch")}}))
    command = [str(Path(sys.executable).with_name("leadline")), "run", str(config), "--out", str(run)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not list(run.glob("units/audit/*/*.json")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert json.loads((run / "run.json").read_text())["status"] == "running"
    time.sleep(1)  # Ray's processes notice that their driver is gone
    done = len(list(run.glob("units/audit/*/*.json")))
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done and f"audit  {done}/12 units are there already" in finished.stderr, finished.stderr
    return leadline.open(run)


@pytest.mark.slow
def test_a_reduced_run_is_sound_and_says_how_wrong_it_is(reduced_run):
    assert verify(reduced_run.directory) == []
    probes = reduced_run.sql("SELECT * FROM probes ORDER BY member, probe").to_pylist()
    assert len(probes) == 12
    for row in probes:
        assert row["method"] == "exact" and row["index_bytes"] is None
        if row["probe"] < 3:
            assert row["audit_sample"] == 700
            assert 0.1 < row["recall_low"] < row["recall"] < row["recall_high"] < 1
            assert 0.3 < row["vote_agreement_low"] < row["vote_agreement"] < row["vote_agreement_high"] <= 1
        else:
            assert row["audit_sample"] is row["recall"] is row["vote_agreement"] is None
    members = reduced_run.sql("SELECT * FROM members").to_pylist()
    assert all(0 < row["depth_error_low"] < row["depth_error"] < row["depth_error_high"] for row in members)
    bars = reduced_run.sql("""
        SELECT avg(depth_error_high) AS bar, any_value(depth_error_held_out) AS stored
        FROM depths JOIN members USING (member) JOIN ensemble USING (point_id) WHERE NOT in_training GROUP BY point_id
    """)
    np.testing.assert_allclose(bars["stored"].to_numpy(), bars["bar"].to_numpy())
    console = Console(width=150, file=io.StringIO())
    print_summary(reduced_run, console)
    said = console.file.getvalue()
    assert "jl:6" in said and "pool:2x2" in said and "on 700 points of each" in said


@pytest.mark.slow
def test_audits_do_not_depend_on_workers_or_kills(reduced_run, tmp_path):
    engine = {**MLP["engine"], "workers": 1, "shard_size": 640, "group_size": 1}
    other = leadline.run({**MLP, "engine": engine}, tmp_path / "run")
    assert tables_of(other.directory.root) == tables_of(reduced_run.directory.root)
