"""Members that one unit trains at once, in runs: which they are, what is left when it is cut short, and the plan."""

from collections import Counter

import numpy as np
import pytest
from test_plan import planned, stages
from tiny import TINY, embedded

import leadline
from leadline.cluster.graph import graph_of
from leadline.cluster.units import UNITS, embedding
from leadline.cluster.work import list_members
from leadline.cluster.workbench import Workbench
from leadline.config import load_config
from leadline.errors import LeadlineError
from leadline.members import train as train_module
from leadline.members.together import train_together
from leadline.members.weights import weights_fingerprint
from leadline.store import RunDirectory
from leadline.store.files import read_json
from leadline.store.tables import read_table
from leadline.store.verify import verify

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = {**TINY["members"][0]["training"], "steps": 20, "at_once": 2}
ENTRY = {**TINY["members"][0], "count": 3, "training": RECIPE}
OTHER = {**ENTRY, "name": "other", "parameters": {"width": 16, "depth": 2}, "at_steps": [5]}
CONFIG = {**TINY, "members": [ENTRY, OTHER]}


def bench_of(config, root):
    config = load_config(config)
    bench = Workbench(config, {}, RunDirectory(root))
    return bench, graph_of(config, bench.points)


def trainings(bench, graph):
    """Units of training of all groups, in their order."""
    groups = graph.groups(graph.members)
    units = [unit for i, group in enumerate(groups) for unit in graph.units(i, group, bench.directory)]
    return [unit for unit in units if unit.stage == "train"]


def fingerprint(bench, name):
    return read_json(bench.directory.record("train", name))["weights_fingerprint"]


def test_those_of_an_entry_whatever_their_groups(tmp_path):
    """They are the networks that train_together makes, and each of them is made by one unit."""
    found = []
    for size in (1, 2, 4):
        bench, graph = bench_of({**CONFIG, "engine": {**TINY["engine"], "group_size": size}}, tmp_path / str(size))
        made = trainings(bench, graph)
        assert [[member.name for member in unit.arguments[0]] for unit in made] == [
            ["mlp-0", "mlp-1"], ["mlp-2"], ["other-0", "other-1"], ["other-2"],
            ["other-at-5-0", "other-at-5-1"], ["other-at-5-2"],
        ]  # fmt: skip
        assert [thing for unit in made for thing in unit.makes] == [("trained", m.name) for m in graph.members]
        totals = sum((graph.totals(group) for group in graph.groups(graph.members)), Counter())
        assert totals["train"] == len(made)
        assert sum(UNITS["train"](bench, *unit.arguments) for unit in made) == 20 * 6 + 5 * 3
        assert not trainings(bench, graph)
        found.append([fingerprint(bench, member.name) for member in graph.members])
    assert found[0] == found[1] == found[2] and len(set(found[0])) == 9
    models = [bench.build(member) for member in graph.members[:2]]
    ids = [bench.training_ids(member) for member in graph.members[:2]]
    train_together(models, bench.points, ids, graph.members[0].config.training, (0, 1), "cpu")
    assert [weights_fingerprint(model) for model in models] == found[0][:2]


def test_what_is_stored_stays_and_what_is_missing_is_the_same_again(tmp_path):
    bench, graph = bench_of({**CONFIG, "engine": {**TINY["engine"], "group_size": 1}}, tmp_path)
    unit = trainings(bench, graph)[0]
    UNITS["train"](bench, *unit.arguments)
    record, stored = bench.directory.record("train", "mlp-0"), fingerprint(bench, "mlp-1")
    before = record.stat().st_mtime_ns, bench.directory.weights("mlp-0").stat().st_mtime_ns
    bench.directory.record("train", "mlp-1").unlink()
    bench.directory.weights("mlp-1").unlink()
    again = trainings(bench, graph)[0]
    assert again.arguments == unit.arguments and again.makes == (("trained", "mlp-1"),) and again.group == 0
    UNITS["train"](bench, *again.arguments)
    assert fingerprint(bench, "mlp-1") == stored
    assert before == (record.stat().st_mtime_ns, bench.directory.weights("mlp-0").stat().st_mtime_ns)


def test_watched_each_at_its_own_steps(tmp_path):
    """Their splits are not of one size, so that epochs end at other steps."""
    sizes, splits = (600, 900), tmp_path / "splits-{seed}.npy"
    for seed, size in enumerate(sizes):
        np.save(str(splits).format(seed=seed), np.arange(size) + 100 * seed)
    recipe = {**RECIPE, "learning": {"per_decade": 1}}
    entry = {**ENTRY, "count": 2, "training": recipe, "split": {"kind": "file", "path": str(splits)}}
    bench, directory, members = embedded({**TINY, "members": [entry]}, tmp_path)
    for member, steps in zip(members, ([0, 1, 9, 10, 18, 20], [0, 1, 10, 14, 20]), strict=True):
        table = read_table(directory.member_table("learning", member.name))
        assert table["steps"][0].as_py() == steps
        last = np.array(table["predictions"].to_pylist())[:, -1]
        np.testing.assert_array_equal(last, bench.outputs(member)[:]["prediction"])
        np.testing.assert_array_equal(table["in_training"].to_numpy().nonzero()[0], bench.training_ids(member))
    plain, _, _ = embedded({**TINY, "members": [{**entry, "training": RECIPE}]}, tmp_path / "plain")
    assert [fingerprint(bench, m.name) for m in members] == [fingerprint(plain, m.name) for m in members]


@pytest.mark.slow
def test_a_run_is_sound_and_as_planned(tmp_path):
    config = {**TINY, "members": [{**TINY["members"][0], "training": {**TINY["members"][0]["training"], "at_once": 2}}]}
    run = leadline.run({**config, "engine": {**TINY["engine"], "group_size": 1}}, tmp_path / "run")
    assert verify(run.directory) == []
    told, plan = run.manifest["stages"]["train"], stages(planned(config))["train"]
    assert (told["units"], told["work"]) == (plan.units, plan.work) == (2, 180)


@pytest.mark.parametrize("count", [1, 2], ids=["alone", "at once"])
def test_steps_are_replayed_where_that_is_asked_for(tmp_path, monkeypatch, count):
    asked = []
    for name in ("train_network", "train_together"):
        real = getattr(embedding, name)
        monkeypatch.setattr(
            embedding, name, lambda *a, real=real, replay: asked.append(replay) or real(*a, replay=replay)
        )
    for cuda_graph in (False, True):
        entry = {**ENTRY, "count": count, "training": {**RECIPE, "cuda_graph": cuda_graph}}
        embedded({**TINY, "members": [entry]}, tmp_path / str(cuda_graph))
    assert asked == [False, True]


def test_a_network_that_vmap_cannot_map_is_told(tmp_path, monkeypatch):
    (tmp_path / "waiting.py").write_text(
        "from torch import nn\n\n"
        "class Waiting(nn.Sequential):\n"
        "    def forward(self, inputs):\n"
        "        return super().forward(inputs * inputs.sum().item())\n\n"
        "def build():\n"
        "    return Waiting(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    entry = {"architecture": "waiting:build", "count": 2, "training": RECIPE}
    with pytest.raises(
        LeadlineError, match=r"training\.at_once: the network cannot be .*vmap.*; leave at_once out"
    ) as told:
        embedded({**TINY, "members": [entry]}, tmp_path)
    assert len(str(told.value).splitlines()) == 1


def test_inputs_that_are_too_large_for_the_device_are_told_before_the_run(monkeypatch):
    monkeypatch.setattr(train_module, "RESIDENT_BYTES", 10_000)
    config = load_config(CONFIG)
    with pytest.raises(LeadlineError, match=r"training\.at_once: inputs of 1797 points take .* leave at_once out"):
        graph_of(config, Workbench(config, {}, RunDirectory("nowhere")).points)
    alone = load_config(TINY)
    assert len(graph_of(alone, Workbench(alone, {}, RunDirectory("nowhere")).points).members) == len(
        list_members(alone)
    )
