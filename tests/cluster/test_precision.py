"""Runs with `precision: bfloat16`, against what torch's autocast gives of a member's stored weights."""

import json

import numpy as np
import pytest
import torch
from test_placement import SEARCHED
from tiny import TINY, embedded, tables_of

import leadline
from leadline.cluster import rates
from leadline.cluster.graph import graph_of
from leadline.config import load_config
from leadline.embedding import fit_directions
from leadline.embedding.principal import load_directions
from leadline.embedding.reductions import make_reducers
from leadline.members.architectures import build
from leadline.members.weights import load_weights
from leadline.new_points import KeptMember
from leadline.points import open_points
from leadline.store.tables import read_table
from leadline.store.verify import verify
from leadline.study.networks import Networks

ROUNDED = {**TINY, "name": "rounded", "precision": "bfloat16"}
# One step, so that the only checkpoint beside the initialisation is the network itself.
WATCHED_ONCE = {**TINY["members"][0], "count": 1, "training": {"steps": 1, "precision": "float32", "learning": {}}}


def inputs_of(points):
    return torch.from_numpy(points.read(np.arange(len(points))))


def network_of(directory, member, seed):
    model = build("mlp", TINY["members"][0]["parameters"], (1, 8, 8), 10, seed)
    load_weights(model, directory.weights(member))
    return model.eval()


def by_autocast(model, inputs):
    """Embeddings at the four probes and logits, in batches of 64, by the network's layers one after another."""
    parts = []
    with torch.no_grad():
        for batch in inputs.split(64):
            with torch.autocast("cpu", torch.bfloat16):
                first = model.hidden[0](batch.flatten(1))
                second = model.hidden[1](first.relu())
                logits = model.classifier(second.relu())
            parts.append([batch.flatten(1), first.float(), second.float(), logits.float().softmax(1), logits.float()])
    *embeddings, logits = (torch.cat(values).numpy() for values in zip(*parts, strict=True))
    return embeddings, logits


@pytest.fixture(scope="module")
def rounded_run(tmp_path_factory):
    config = {**ROUNDED, "engine": {**ROUNDED["engine"], "keep_indexes": True}}
    return leadline.run(config, tmp_path_factory.mktemp("runs") / "rounded")


def test_what_is_stored_is_what_autocast_gives(tmp_path):
    bench, directory, (member,) = embedded({**ROUNDED, "members": [WATCHED_ONCE]}, tmp_path)
    expected, logits = by_autocast(network_of(directory, member.name, 0), inputs_of(bench.points))
    everything = np.arange(len(bench.points))
    for probe, values in enumerate(expected):
        np.testing.assert_array_equal(bench.rows(member.name if probe else "input", probe, everything)[:], values)
    np.testing.assert_array_equal(bench.outputs(member)[:]["prediction"], logits.argmax(axis=1))
    # And the table of learning: aum is the margin of the label at the last step.
    labels, rest = bench.points.labels, logits.copy()
    rest[everything, labels] = -np.inf
    table = read_table(directory.member_table("learning", member.name))
    np.testing.assert_allclose(table["aum"].to_numpy(), logits[everything, labels] - rest.max(axis=1), rtol=1e-6)


def test_reductions_are_of_rounded_embeddings_and_audits_too(tmp_path):
    config = {**ROUNDED, "members": [{**WATCHED_ONCE, "training": {"steps": 9, "precision": "float32"}}]}
    reduction = {"hidden.0": "pca:5", "hidden.1": "jl:7"}
    bench, directory, (member,) = embedded({**config, "reduction": reduction}, tmp_path)
    model, inputs = network_of(directory, member.name, 0), inputs_of(bench.points)
    expected, _ = by_autocast(model, inputs)
    probes, ids = bench.probes(member), np.arange(3, len(bench.points), 5)
    directions = fit_directions(
        model, probes, lambda ids: inputs[ids], bench.training_ids(member), seed=0, batch_size=64, memory=1 << 30,
        member="m", precision="bfloat16",
    )  # fmt: skip
    assert torch.equal(load_directions(directory.directions(member.name), "cpu")[1].matrix, directions[1].matrix)
    reducers = make_reducers(probes, directions)
    for probe in (1, 2):
        np.testing.assert_array_equal(bench.rows_in_full(member, probe, ids)[:], expected[probe][ids])
        stored = torch.cat([reducers[probe](rows) for rows in torch.from_numpy(expected[probe]).split(64)])
        np.testing.assert_array_equal(bench.rows(member.name, probe, ids)[:], stored.numpy()[ids])


def test_the_run_says_its_precision_and_differs_from_one_in_float32(rounded_run, tiny_run):
    assert rounded_run.manifest["configuration"]["precision"] == "bfloat16"
    assert json.loads((rounded_run.directory.root / "run.json").read_text())["configuration"]["precision"] == "bfloat16"
    assert verify(rounded_run.directory) == []
    weights, confidences = (
        [run.sql(f"SELECT {what} FROM {table} ORDER BY ALL")[0].to_pylist() for run in (rounded_run, tiny_run)]
        for what, table in (("weights_fingerprint", "members"), ("confidence", "depths"))
    )
    assert weights[0] == weights[1]
    assert confidences[0] != confidences[1]
    assert np.abs(np.subtract(*confidences)).max() < 0.1


@pytest.mark.slow
def test_members_made_whole_have_the_same_tables(rounded_run, tmp_path):
    engine = {**ROUNDED["engine"], "placement": "device", "memory_budget": 8_000_000}
    run = leadline.run({**ROUNDED, "engine": engine}, tmp_path / "run")
    found, expected = tables_of(run.directory.root), tables_of(rounded_run.directory.root)
    probes, others = (tables.pop("probes.parquet").drop_columns(SEARCHED) for tables in (found, expected))
    assert probes == others
    assert found == expected


def test_new_points_and_studies_are_answered_in_the_precision_of_the_run(rounded_run, tmp_path):
    directory = rounded_run.directory
    points = open_points(load_config(TINY).points)
    inputs = inputs_of(points)
    expected, logits = by_autocast(network_of(directory, "mlp-1", 1), inputs)
    embeddings, predictions = KeptMember(directory, rounded_run.manifest, "mlp-1").embed(inputs.numpy())
    for values, of_probe in zip(embeddings, expected, strict=True):
        np.testing.assert_array_equal(values, of_probe)
    np.testing.assert_array_equal(predictions, logits.argmax(axis=1))
    # Held-out points are new to the member, so the run knows their depths.
    stored = read_table(directory.member_table("depths", "mlp-1"))
    held_out = ~stored["in_training"].to_numpy()
    told = rounded_run.depth_of("mlp-1", inputs.numpy())
    for column in ("prediction", "depth"):
        np.testing.assert_array_equal(told[column].to_numpy()[held_out], stored[column].to_numpy()[held_out])
    answers = Networks(rounded_run, tmp_path, lambda line: None).answers("mlp-1")
    np.testing.assert_array_equal(answers.softmax, expected[3])


def test_a_plan_measures_the_forward_pass_of_the_run(rounded_run):
    config = load_config(ROUNDED)
    points = open_points(config.points)
    model = network_of(rounded_run.directory, "mlp-0", 0)
    graph, cpu, ids = graph_of(config, points), torch.device("cpu"), np.arange(64)
    found = rates._embed(graph, "mlp", points, model, cpu, ids)
    sampled, _, _ = rates._sample(graph, "mlp", points, model, cpu)
    drawn = np.random.default_rng(0).permutation(len(points))[: len(sampled[0])]
    for some, of in ((found, ids), (sampled, drawn)):
        expected, _ = by_autocast(model, torch.from_numpy(points.read(of)))
        for values, of_probe in zip(some, expected, strict=True):
            np.testing.assert_array_equal(values, of_probe)
