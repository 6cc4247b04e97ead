"""Plans: what they count beside what a run makes, what they refuse, and how they grow."""

import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import TINY, WATCHED, embedded

from leadline.cluster import units
from leadline.cluster.described import describe_cluster, describe_points, without_downloads
from leadline.cluster.graph import graph_of
from leadline.cluster.plan import plan_of
from leadline.cluster.rates import Law, Rates, Search, assumed, networks_of
from leadline.cluster.units import UNITS
from leadline.cluster.work import list_members
from leadline.cluster.workbench import Workbench
from leadline.config import load_config
from leadline.embedding import batch_logits
from leadline.embedding.in_place import embed_in_place
from leadline.errors import LeadlineError
from leadline.knn.exact import SPARE
from leadline.points import open_points
from leadline.store import RunDirectory
from leadline.store.tables import read_table

CONVOLUTIONS = {"architecture": "resnet18", "parameters": {"width": 8, "depth": [1, 1, 1, 1]}}
REDUCED = {
    **TINY,
    "members": [{**TINY["members"][0], "count": 2}],
    "reduction": {"input": "jl:16", "hidden.0": "jl:8"},
    "audit": {"sample": 100},
}


def rates_of(graph, **changed):
    """Round figures, the same for all members and probes."""
    labels = list(graph.probes)
    every = [(label, probe.index) for label in labels for probe in graph.probes[label]]
    search = Search(ready=Law(1, 1e-6, 1), ask=Law(1000, 1e-3, 1), memory=1000)
    step, embed = dict.fromkeys(labels, 1e-2), dict.fromkeys(labels, 1e-4)
    rates = Rates(
        read=1e-5, move=1e-9, file=1e-3, opened=1e-4, step=step, embed=embed, first=0.5,
        search=dict.fromkeys(every, search), pick=1e-5, reduce=1e-6, start=5.0, memory=400_000_000, said=(),
    )  # fmt: skip
    return replace(rates, **changed)


def cluster_of(graph, **changed):
    given = {"nodes": 1, "cpus": 2, "gpus": None, "gpu": None, "memory": 32e9, "scratch": 1e12, "price": None}
    return describe_cluster(graph.config.engine, **{**given, **changed})


def planned(config, points=None, **changed):
    """A plan without a measurement."""
    config = load_config(config)
    points = points or open_points(config.points)
    graph = graph_of(config, points)
    return plan_of(graph, networks_of(graph, points), cluster_of(graph, **changed), rates_of(graph))


def stages(plan):
    return {stage.name: stage for stage in plan.stages}


def written(*patterns):
    return sum(path.stat().st_size for root, pattern in patterns for path in root.glob(pattern))


@pytest.mark.parametrize("config", [TINY, REDUCED], ids=["in full", "reduced and audited"])
def test_units_and_bytes_are_those_that_the_work_leaves(tmp_path, config):
    """All units of a run, done here one after another: their number, their work, and the files they leave."""
    one_group = {**config, "engine": {**config["engine"], "group_size": 3}}
    bench, directory, members = embedded(one_group, tmp_path)
    graph = graph_of(bench.config, bench.points)
    plan = stages(planned(one_group))
    weights = written((tmp_path, "weights/*"))
    assert 0 < weights - plan["train"].written < 4096 * len(members)  # the files' headers
    assert plan["embed"].written == written((directory.scratch, "**/*.npy"))
    units = graph.units(0, members, directory)
    made, done = Counter(), Counter()

    def do(*names):
        for name in names:
            for unit in (unit for unit in units if unit.stage == name):
                made[name] += 1
                done[name] += UNITS[name](bench, *unit.arguments)

    do("share", "vote", "audit", "reduce")
    assert plan["share"].written == written((tmp_path, "units/share/*.npy"))
    voted = written((tmp_path, "units/vote/*/*.npy"))
    headers = 192 * len(list(tmp_path.glob("units/vote/*/*.sample.npy")))  # of what is kept for the audit
    assert plan["vote"].written <= voted <= plan["vote"].written + headers
    if "audit" in plan:
        assert plan["audit"].written == written((tmp_path, "units/audit/*/*.npy"))
    do("free")
    assert made == {name: stage.units for name, stage in plan.items() if name not in ("train", "embed", "combine")}
    assert done == {name: stage.work for name, stage in plan.items() if name not in ("train", "embed", "combine")}
    assert plan["train"].units == len(members) and plan["embed"].units == len(bench.shards)


@pytest.mark.parametrize("keeps", [True, False], ids=["inputs kept", "inputs read again"])
def test_a_training_that_is_watched_passes_all_points_at_each_checkpoint(tmp_path, monkeypatch, keeps):
    for module in ("plan", "units.embedding"):
        monkeypatch.setattr(f"leadline.cluster.{module}.is_resident", lambda *about: keeps)
    config = {**TINY, "members": [{**WATCHED["members"][0], "count": 1}]}
    bench, (member,) = Workbench(load_config(config), {}, RunDirectory(tmp_path)), list_members(load_config(config))
    read, inputs = [], bench.inputs
    monkeypatch.setattr(bench, "inputs", lambda ids: read.append(len(ids)) or inputs(ids))
    passed = []
    monkeypatch.setattr(
        units.embedding, "batch_logits", lambda *about: passed.append(len(about[1])) or batch_logits(*about)
    )
    units.train(bench, [member])
    watched, plain = (stages(planned({**TINY, "members": [entry]}))["train"] for entry in (
        config["members"][0], {**TINY["members"][0], "count": 1}
    ))  # fmt: skip
    graph = graph_of(bench.config, bench.points)
    rates, network = rates_of(graph), networks_of(graph, bench.points)["mlp"]
    assert sum(passed) == 14 * 1797
    assert watched.flops - plain.flops == sum(passed) * network.forward
    assert watched.read - plain.read == 4 * 64 * (sum(read) - 1)  # but the one input that probes are placed by
    seconds = sum(passed) * rates.embed["mlp"] + (sum(read) - 1) * rates.read
    assert watched.seconds - plain.seconds == pytest.approx(seconds)
    assert watched.memory - plain.memory == 4 * 64 * 1797 * keeps
    table = read_table(tmp_path / "learning" / "member=mlp-0" / "part-0.parquet")
    assert watched.written - plain.written == pytest.approx(table.nbytes, rel=0.05)  # offsets of lists


def test_units_are_those_of_a_run(tiny_run):
    plan = stages(planned(TINY))
    told = tiny_run.manifest["stages"]
    assert told.keys() | {"combine"} == plan.keys()
    for name, stage in told.items():
        assert (stage["units"], stage["work"], stage["measure"]) == (
            plan[name].units, plan[name].work, plan[name].measure
        )  # fmt: skip


@pytest.mark.parametrize("memory_budget", [4 << 30, 240_000], ids=["at once", "in tiles"])
def test_an_audit_reads_and_embeds_as_often_as_is_planned(tmp_path, monkeypatch, memory_budget):
    config = {**REDUCED, "members": [{**TINY["members"][0], "count": 1}]}
    bench, directory, (member,) = embedded(
        {**config, "engine": {**TINY["engine"], "memory_budget": memory_budget}}, tmp_path
    )
    graph = graph_of(bench.config, bench.points)
    for unit in graph.units(0, [member], directory):
        if unit.stage in ("part", "share", "vote"):
            UNITS[unit.stage](bench, *unit.arguments)
    read, inputs = [], bench.inputs
    monkeypatch.setattr(bench, "inputs", lambda ids: read.append(len(ids)) or inputs(ids))
    for probe in graph.probes["mlp"]:
        UNITS["audit"](bench, member, probe.index)
    planned_bytes = stages(planned(bench.config.model_dump(mode="json")))["audit"].read
    assert planned_bytes == pytest.approx(4 * 64 * sum(read), rel=0.15)


def test_a_bank_that_is_cut_is_planned_in_parts(tmp_path):
    """Those of members, and the one of the input that they share."""
    config = {**TINY, "engine": {**TINY["engine"], "group_size": 3, "memory_budget": 200_000}}
    bench, directory, members = embedded(config, tmp_path)
    graph = graph_of(bench.config, bench.points)
    units = graph.units(0, members, directory)
    made, done = Counter(), Counter()
    for unit in (unit for unit in units if unit.stage in ("part", "share", "vote")):
        made[unit.stage] += 1
        done[unit.stage] += UNITS[unit.stage](bench, *unit.arguments)
    plan = stages(planned(config))
    assert made == {name: plan[name].units for name in made} and done == {name: plan[name].work for name in made}
    assert done["part"] == (3 * (7 + 7 + 3) + 19) * 1797
    # Every pair of a point and a row of a bank is in one part.
    assert plan["part"].flops == pytest.approx(2 * 1797 * (3 * 1617 * (24 + 24 + 10) + 1797 * 64), rel=0.01)
    assert plan["share"].flops == plan["vote"].flops == 0
    in_parts = {folder: written((tmp_path, f"units/{folder}/*of*.npy")) for folder in ("share", "vote/*")}
    assert min(in_parts.values()) > 0 and plan["part"].written == sum(in_parts.values())
    assert plan["share"].written == written((tmp_path, "units/share/*.npy")) - in_parts["share"]
    assert plan["vote"].written == written((tmp_path, "units/vote/*/*.npy")) - in_parts["vote/*"]
    # What is there already is neither planned for nor done again.
    assert not {unit.stage for unit in graph.units(0, members, directory)} & {"part", "share", "vote"}


def test_flops_are_those_of_the_layers():
    config = load_config({**TINY, "reduction": {"hidden.0": "jl:8"}})
    points = open_points(config.points)
    graph = graph_of(config, points)
    network = networks_of(graph, points)["mlp"]
    layers = 2 * (64 * 24 + 24 * 24 + 24 * 10)
    assert (network.forward, network.flops) == (layers, layers + 2 * 24 * 8)
    assert network.weights == 4 * (64 * 24 + 24 + 24 * 24 + 24 + 24 * 10 + 10)
    plan = stages(planned(config.model_dump()))
    n = len(points)
    assert plan["embed"].flops == network.flops * n * 3
    assert plan["train"].flops == 3 * layers * 64 * 60 * 3
    bank = round(0.9 * n)
    widths = [8, 24, 10]
    assert plan["share"].flops == 2 * n * n * 64
    assert plan["vote"].flops == sum(2 * n * bank * width for width in widths) * 3


def test_the_end_comes_when_the_slowest_worker_is_done():
    """Three members on two workers: two rounds of training, and the rest shared out."""
    config = {**TINY, "engine": {**TINY["engine"], "group_size": 3, "workers": None}}
    plan = planned(config)
    work = stages(plan)
    one = work["train"].seconds / 3
    least = 5.5 + 2 * one + sum(work[name].seconds for name in ("share", "vote", "embed")) / 2
    assert least < plan.seconds < least + 2 * max(stage.seconds / stage.units for stage in work.values())
    assert planned(config, cpus=1).seconds > plan.seconds
    alone = planned(config, cpus=3)
    assert alone.seconds < plan.seconds - 0.9 * one


@pytest.mark.parametrize(("memory_budget", "passes"), [(4 << 30, 1), (8_000_000, 2), (1_000_000, 4)])
def test_members_made_whole_take_what_is_planned(tmp_path, monkeypatch, memory_budget, passes):
    """Units, files, passes of all points through the network, and what is in memory when a probe is searched."""
    config = {**TINY, "members": [{**TINY["members"][0], "count": 2}]}
    config = load_config(
        {**config, "engine": {**TINY["engine"], "placement": "device", "memory_budget": memory_budget}}
    )
    directory = RunDirectory(tmp_path)
    bench, members = Workbench(config, {}, directory), list_members(config)
    graph = graph_of(config, bench.points)
    networks, rates = networks_of(graph, bench.points), rates_of(graph)
    # Of a row, as much again as its values for what is made of it.
    search = {(label, p.index): replace(rates.search[label, p.index], memory=8 * p.width) for label in graph.probes
              for p in graph.probes[label]}  # fmt: skip
    plan = stages(plan_of(graph, networks, cluster_of(graph), replace(rates, search=search)))
    read, inputs, kept, taken = [], bench.inputs, [], []
    module, bank = sys.modules["leadline.cluster.units.whole"], bench.bank

    def embedded(*about):
        some, outputs = embed_in_place(*about)
        kept[:] = [values.nbytes for values in some]
        return some, outputs

    def searched(rows):
        made = bank(rows)
        lists = 16 * (10 + SPARE) * min(1797, made._at_once) + 2 * 8 * 10 * 1797
        taken.append(sum(kept) + rows.nbytes + made.size_bytes + lists)
        kept.pop(0)
        return made

    for member in members:
        units.train(bench, [member])
    monkeypatch.setattr(module, "embed_in_place", embedded)
    monkeypatch.setattr(bench, "bank", searched)
    monkeypatch.setattr(bench, "inputs", lambda ids: read.append(len(ids)) or inputs(ids))
    made, done = Counter(), Counter()
    for number, group in enumerate(graph.groups(members)):
        for unit in graph.units(number, group, directory):
            if unit.stage == "reduce":
                files = [path for path in tmp_path.rglob("*.npy") if unit.arguments[0].name in path.parts]
                assert plan["whole"].written == 2 * sum(path.stat().st_size for path in files)
            made[unit.stage] += 1
            done[unit.stage] += UNITS[unit.stage](bench, *unit.arguments)
    assert made == {name: stage.units for name, stage in plan.items() if name not in ("train", "combine")}
    assert done == {name: stage.work for name, stage in plan.items() if name not in ("train", "combine")}
    assert sum(read) == 2 * passes * 1797
    assert plan["whole"].read == 4 * 64 * sum(read)
    pairs = 1797 * 1617 * (64 + 24 + 24 + 10)
    assert plan["whole"].flops == sum(read) * networks["mlp"].forward + 2 * 2 * pairs
    seconds = sum(read) * (rates.embed["mlp"] + rates.read) + 2 * 4 * (1617e-6 + 1797 * 1.617e-3)
    seconds += 2 * ((4 * 6 * 2 + 8) * rates.file + 2 * rates.opened)
    assert plan["whole"].seconds == pytest.approx(seconds)
    assert max(taken) < plan["whole"].memory < 1.5 * max(taken)


def test_embeddings_of_members_made_whole_go_when_they_are_searched():
    """Whether the first probe's search or the last one's takes most of the memory: three probes' lie there or not."""
    config = load_config({**TINY, "engine": {**TINY["engine"], "placement": "device"}})
    points = open_points(config.points)
    graph = graph_of(config, points)
    networks, rates = networks_of(graph, points), rates_of(graph)
    first, last = (
        stages(plan_of(graph, networks, cluster_of(graph), replace(rates, search={
            **rates.search, ("mlp", costly): replace(rates.search["mlp", costly], memory=1e6)
        })))["whole"].memory
        for costly in (0, 3)
    )  # fmt: skip
    assert first - last == 4 * 1797 * (64 + 24 + 24) + 4 * 1797 * (64 - 10)  # and queries, that are wider


# What is decoded of the points stays, in 0.08 of it: all of them, or 190 kB in whole batches, eleven of them. The third
# member has two workers' first members before it.
@pytest.mark.parametrize(("share", "passes", "read"), [(1, 1, 2 * 1797), (3e-5, 2, 2 * 1797 + 4 * (1797 - 11 * 64))])
def test_passes_of_members_made_whole_are_those_that_their_share_of_a_gpu_has_room_for(share, passes, read):
    """0.24 of it, without the network: of 2.4 MB the input's 460 kB, and then the other probes' 417 kB."""
    engine = {**TINY["engine"], "placement": "device", "gpus": share}
    config = load_config({**TINY, "engine": engine})
    points = open_points(config.points)
    graph = graph_of(config, points)
    networks = networks_of(graph, points)
    plan = plan_of(graph, networks, cluster_of(graph, gpu="h100"), assumed(graph, networks, "h100", 1e-5))
    assert stages(plan)["whole"].read == 4 * 64 * read
    pairs = 1797 * 1617 * (64 + 24 + 24 + 10)
    assert stages(plan)["whole"].flops == 3 * (passes * 1797 * networks["mlp"].forward + 2 * pairs)
    assert (plan.placement, plan.scratch) == ("device", 0)
    if share == 1:
        assert plan.refused == []
    else:
        (line,) = plan.refused
        assert "GPU memory: stage whole" in line and "2.4 MB; choose another engine.placement" in line


def test_members_made_whole_are_shared_out_among_workers():
    """Though groups of three are embedded by one worker elsewhere: four workers have no more to do than three."""
    engine = {**TINY["engine"], "group_size": 3, "placement": "device", "workers": None}
    one, two, three, four = (planned({**TINY, "engine": engine}, cpus=cpus) for cpus in (1, 2, 3, 4))
    work = [stages(one)[name].seconds / 3 for name in ("train", "whole", "reduce", "free")]
    ends = stages(one)["combine"].seconds + 5.5
    for plan, turns in ((one, 3), (two, 2), (three, 1), (four, 1)):
        assert plan.seconds == pytest.approx(ends + turns * sum(work))
    wide = planned({**TINY, "engine": engine}, cpus=20)
    (advice,) = wide.advice
    assert "3 members" in advice and "20 workers" in advice and "group_size" not in advice


@pytest.mark.parametrize("placement", ["shared", "node", "resident", "auto", "device"])
def test_more_nodes_are_never_slower(placement):
    entry = {**TINY["members"][0], "count": 20}
    config = {**TINY, "members": [entry], "engine": {**TINY["engine"], "workers": None, "placement": placement}}
    seconds = [planned(config, nodes=nodes).seconds for nodes in (1, 2, 3, 4, 5, 8, 13, 40)]
    assert seconds == sorted(seconds, reverse=True) and seconds[-1] < seconds[0] / 3


def test_costs_are_of_all_nodes_for_the_time_from_beginning_to_end():
    plan = planned({**TINY, "engine": {**TINY["engine"], "workers": None}}, nodes=4, price=3.0)
    record = plan.record()
    assert record["cost"] == pytest.approx(plan.seconds / 3600 * 4 * 3.0)
    assert sum(stage["cost"] for stage in record["stages"]) < record["cost"]
    assert json.loads(json.dumps(record)) == record
    assert planned(TINY).record()["cost"] is None


def test_what_cannot_fit_is_refused_with_what_to_change():
    assert planned(TINY).refused == []
    (line,) = planned({**TINY, "engine": {**TINY["engine"], "scratch": "/nowhere"}}, scratch=1e6).refused
    assert "scratch" in line and "group_size" in line and "jl:1024" in line
    (line,) = planned(TINY, memory=0.7e9).refused
    assert "2 workers" in line and "700 MB" in line
    config = load_config(
        {**TINY, "members": [{**CONVOLUTIONS, "training": {"steps": 9}}], "engine": {"gpus": 0.001, "workers": 1}}
    )
    points = describe_points(config.points, "9000", 10, (3, 64, 64))
    graph = graph_of(config, points)
    networks = networks_of(graph, points)
    plan = plan_of(graph, networks, cluster_of(graph, gpu="h100"), assumed(graph, networks, "h100", 1e-3))
    (line,) = plan.refused
    assert "GPU memory" in line and "80 MB" in line and "engine.query_block" in line
    with pytest.raises(LeadlineError, match=r"2 workers .* 1 nodes of 1 CPUs"):
        planned(TINY, cpus=1)


def test_memory_of_training_grows_with_what_the_backward_pass_needs():
    """Of a network of one hidden layer: its input, and the layer before and after its ReLU."""
    entry = {"architecture": "mlp", "parameters": {"width": 50, "depth": 2}, "training": {"steps": 1}}
    config = load_config({**TINY, "members": [entry]})
    points = open_points(config.points)
    saved = networks_of(graph_of(config, points), points)["mlp"].saved
    assert 4 * (64 + 50) <= saved <= 4 * (64 + 50 + 50 + 10)


def test_points_and_weights_need_not_be_at_hand(tmp_path):
    config = load_config("imagenet", (f"points.train={tmp_path}/nowhere", "engine.shard_size=10000"))
    config = without_downloads(config)
    assert all("weights" not in entry.parameters for entry in config.members)
    assert [entry.parameters["num_classes"] for entry in config.members] == [1000] * 3
    config = config.model_copy(update={"members": config.members[:1]})
    points = describe_points(config.points, "1281167+50000", 1000, None)
    assert (len(points), points.input_shape, np.count_nonzero(points.parts)) == (1_331_167, (3, 224, 224), 50_000)
    graph = graph_of(config, points)
    widths = [probe.width for probe in graph.probes["resnet18"]]
    assert widths == [150_528, *[200_704] * 2, *[100_352] * 2, *[50_176] * 2, *[25_088] * 2, 512, 1000]
    networks = networks_of(graph, points)
    rates = assumed(graph, networks, "h100", 1e-3)
    given = {"gpu": "h100", "cpus": None, "memory": None, "scratch": None}
    one, eight = (plan_of(graph, networks, cluster_of(graph, nodes=n, **given), rates) for n in (1, 8))
    assert (one.cluster.workers, eight.cluster.workers, one.placement, eight.placement) == (8, 64, "shared", "node")
    assert stages(one)["embed"].units == math.ceil(1_331_167 / 10_240)
    assert stages(one)["embed"].written > 4 * 1_331_167 * sum(widths)
    assert one.scratch == eight.scratch == 4 * 1_331_167 * sum(widths)
    # ResNet18: 1.8 G multiplications and additions an image.
    assert stages(one)["embed"].flops / 1_331_167 == pytest.approx(3.63e9, rel=0.01)


def test_forward_passes_in_bfloat16_are_taken_to_be_as_fast_as_training():
    said, embed = {}, {}
    for precision in ("float32", "bfloat16"):
        config = load_config({**TINY, "precision": precision, "reduction": "jl:8", "engine": {"gpus": 1}})
        points = open_points(config.points)
        graph = graph_of(config, points)
        network = networks_of(graph, points)["mlp"]
        rates = assumed(graph, {"mlp": network}, "h100", 1e-3)
        said[precision], embed[precision] = rates.said[0], rates.embed["mlp"]
    assert network.flops > network.forward > 0  # the reductions stay in float32
    saved = network.forward * (1 / (0.5 * 67e12) - 1 / (0.3 * 989e12))
    assert embed["float32"] - embed["bfloat16"] == pytest.approx(saved)
    assert "50% are reached by embedding" in said["float32"] and "30% by training" in said["float32"]
    assert "50% are reached by reductions" in said["bfloat16"]
    assert "30% by forward passes and training" in said["bfloat16"]


@pytest.mark.parametrize(
    ("count", "shape", "words"),
    [("many", (3, 8, 8), "--points"), ("0", (3, 8, 8), "--points"), ("90", None, "--input")],
)
def test_points_that_are_badly_described_are_refused(count, shape, words):
    with pytest.raises(LeadlineError, match=words):
        describe_points(load_config("digits").points, count, 10, shape)


def test_a_gpu_that_is_needed_has_to_be_described():
    engine = load_config("imagenet").engine
    given = {"cpus": None, "gpus": None, "memory": None, "scratch": None, "price": None}
    with pytest.raises(LeadlineError, match="--gpu h100"):
        describe_cluster(engine, nodes=1, gpu=None, **given)
    with pytest.raises(LeadlineError, match="allowed: h100, h200"):
        describe_cluster(engine, nodes=1, gpu="b300", **given)


def test_a_described_plan_needs_no_ray():
    said = subprocess.run(
        [sys.executable, "-c", "import sys, leadline.cluster.described; print('ray' in sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said.stdout.strip() == "False"


@pytest.fixture
def plan_command(tmp_path, monkeypatch, capsys):
    """`leadline plan tiny.yaml` on described nodes: (exit code, standard output, standard error)."""
    from leadline import cli

    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(json.dumps(TINY))
    threads = torch.get_num_threads()

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["leadline", "plan", "tiny.yaml", "--nodes", "2", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    yield call
    torch.set_num_threads(threads)


def test_the_command_prints_all_of_it_as_json(plan_command, tmp_path):
    code, out, err = plan_command("--cpus-per-node", "2", "--price", "1", "--json")
    assert (code, err) == (0, "")
    plan = json.loads(out)
    assert [stage["name"] for stage in plan["stages"]] == [
        "train",
        "embed",
        "share",
        "vote",
        "reduce",
        "free",
        "combine",
    ]
    assert plan["cluster"]["workers"] == 2 and plan["cost"] > 0 and plan["seconds"] > plan["start"]
    assert all(stage["seconds"] > 0 for stage in plan["stages"])
    assert any("measured" in text for text in plan["assumptions"])
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]  # nothing is left behind


def test_the_command_shows_what_it_refuses(plan_command):
    code, out, err = plan_command("--cpus-per-node", "2", "--set", "engine.workers=4", "--memory-per-node", "1")
    assert code == 2 and len(err.splitlines()) == 1 and "memory: 2 workers of a node" in err
    for word in ("train", "embed", "vote", "from beginning to end", "advice: 2 groups of members have 4 places"):
        assert word in out, out
    code, out, err = plan_command("--set", "points={source: npy, inputs: no.npy, labels: no.npy}")
    assert (code, out) == (2, "") and "--points TRAIN+TEST" in err
