"""Whole runs on Ray: the same tables however the work is cut, whoever is killed, and however the run is started."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.neighbors import KNeighborsClassifier
from tiny import TINY, descendants, tables_of

import leadline
from leadline import LeadlineError
from leadline.members.probes import Probe, read_probes
from leadline.store.verify import verify

LEADLINE = str(Path(sys.executable).with_name("leadline"))
ROOT = Path(__file__).parents[2]


def changed(**engine):
    return {**TINY, "engine": {**TINY["engine"], **engine}}


def test_a_run_is_complete_and_sound(tiny_run):
    assert tiny_run.manifest["status"] == "complete"
    assert verify(tiny_run.directory) == []
    names = {path.name for path in tiny_run.directory.root.iterdir()}
    expected = {
        "points.parquet",
        "members.parquet",
        "probes.parquet",
        "ensemble.parquet",
        "depths",
        "votes",
        "run.json",
    }
    assert expected <= names
    assert "scratch" not in names
    assert not list(tiny_run.directory.root.rglob("*.part"))


def test_votes_are_scikit_learns_and_depths_follow(tiny_run):
    """Each probe of a stored member, for training and held-out points, in float64 by scikit-learn."""
    import torch

    from leadline.members.architectures import build
    from leadline.members.weights import load_weights
    from leadline.points import open_points

    points = open_points(leadline.config.load_config(TINY).points)
    inputs = torch.from_numpy(points.read(np.arange(len(points))))
    model = build("mlp", {"width": 24, "depth": 3}, points.input_shape, 10, 0)
    load_weights(model, tiny_run.directory.weights("mlp-1"))
    record = json.loads(tiny_run.directory.record("train", "mlp-1").read_text())
    # In the run's own batches, so that embeddings are the same bits.
    batches = [read_probes(model, [Probe(**probe) for probe in record["probes"]], part)[0] for part in inputs.split(64)]
    depths = tiny_run.sql("SELECT * FROM depths WHERE member = 'mlp-1' ORDER BY point_id")
    inside = depths["in_training"].to_numpy()
    bank_ids = np.flatnonzero(inside)
    winners = np.stack(
        tiny_run.sql("SELECT winner FROM votes WHERE member = 'mlp-1' ORDER BY point_id")["winner"].to_pylist()
    )
    assert winners.shape == (1797, 4)
    slow = np.zeros(1797, int)
    for probe in range(4):
        values = torch.cat([batch[probe] for batch in batches]).numpy().astype(np.float64)
        brute = KNeighborsClassifier(10, algorithm="brute").fit(values[bank_ids], points.labels[bank_ids])
        distances, neighbours = brute.kneighbors(values, 12)
        for point in range(1797):
            kept = [(d, n) for d, n in zip(distances[point], bank_ids[neighbours[point]], strict=True) if n != point]
            if kept[9][0] == kept[10][0] or np.isclose(kept[9][0], kept[10][0], rtol=1e-9, atol=1e-12):
                vote = winners[point, probe]  # scikit-learn breaks ties of distance by luck
            else:
                vote = np.bincount(points.labels[[n for _, n in kept[:10]]]).argmax()
            assert winners[point, probe] == vote, (probe, point)
            if vote != depths["prediction"][point].as_py():
                slow[point] = probe + 1
    np.testing.assert_array_equal(depths["depth"].to_numpy(), slow)


def test_the_search_at_the_input_is_made_once_for_all_members(tiny_run):
    """And it is counted at the first; every point has neighbours enough in every member's split."""
    pairs = tiny_run.sql("SELECT pairs FROM probes WHERE probe = 0 ORDER BY member")["pairs"].to_pylist()
    assert pairs[0] > 0 and pairs[1:] == [0, 0]
    assert tiny_run.manifest["stages"]["share"]["work"] == 1797


@pytest.mark.parametrize(
    ("workers", "shard_size", "query_block"),
    [
        pytest.param(1, 100, 300, marks=pytest.mark.slow),
        (3, 640, 300),
        pytest.param(2, 5000, 300, marks=pytest.mark.slow),
    ],
)
def test_tables_do_not_depend_on_workers_or_shards(tiny_run, tmp_path, workers, shard_size, query_block):
    config = changed(workers=workers, shard_size=shard_size, query_block=query_block, group_size=workers)
    other = leadline.run(config, tmp_path / "run")
    assert tables_of(other.directory.root) == tables_of(tiny_run.directory.root)


@pytest.mark.slow
@pytest.mark.parametrize("votes", ["all", "until-decided"])
def test_banks_that_no_worker_holds_are_searched_in_parts(request, tmp_path, votes):
    """Cut into up to eight parts, each searched alone; votes and depths are the same, ties and all."""
    other = leadline.run({**changed(memory_budget=480_000), "votes": votes}, tmp_path / "run")
    # For six blocks of points, at three probes of three members, and at the input that they share.
    assert other.manifest["stages"]["part"]["units"] == 6 * (3 * (3 + 3 + 2) + 8)
    assert verify(other.directory) == []
    expected = tables_of(request.getfixturevalue("tiny_run" if votes == "all" else "until_decided_run").directory.root)
    for name, table in tables_of(other.directory.root).items():
        if name == "probes.parquet":
            plans = [plan or "" for plan in table["plan"].to_pylist()]
            assert any(plan.startswith("3 parts, all 24 values") for plan in plans), plans
            assert plans[0].startswith("8 parts, "), plans
        else:
            assert table == expected[name], name


def count(run, pattern):
    return len(list(run.glob(pattern)))


# What shows in the run's directory that a stage is under way, and what it has finished.
STAGES = {
    "train": "units/train/*.json",
    "embed": "scratch/*/*/outputs-*.npy",
    "vote": "units/vote/*/*.json",
    "reduce": "units/reduce/*.json",
    "combine": "members.parquet",
}


@pytest.mark.slow
def test_killing_the_driver_in_each_stage_loses_only_units_in_flight(tiny_run, tmp_path):
    run, config = tmp_path / "run", tmp_path / "tiny.yaml"
    # The scratch is put where the test can see it.
    config.write_text(yaml.safe_dump({**TINY, "engine": {**TINY["engine"], "scratch": str(run / "scratch")}}))
    command = [LEADLINE, "run", str(config), "--out", str(run)]
    done = {}
    for stage, pattern in STAGES.items():
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as driver:
            deadline = time.monotonic() + 120
            while not count(run, pattern) and driver.poll() is None and time.monotonic() < deadline:
                time.sleep(0.002)
            driver.send_signal(signal.SIGKILL)
            log = driver.stderr.read()
        assert count(run, pattern), f"{stage} was never reached"
        assert json.loads((run / "run.json").read_text())["status"] == "running"
        expect_not_redone(log, done)
        time.sleep(1)  # Ray's processes notice that their driver is gone
        # What is left of votes and shards of members that are reduced is not looked at again.
        stages = ("train", "reduce") if count(run, STAGES["reduce"]) else ("train", "embed", "vote")
        done = {name: count(run, STAGES[name]) for name in stages}
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    expect_not_redone(finished.stderr, done)
    assert "the hardest points" in finished.stdout
    assert tables_of(run) == tables_of(tiny_run.directory.root)
    assert verify(leadline.open(run).directory) == []
    assert not (run / "scratch").exists()
    assert not list((run / "units").glob("vote/*")) + list((run / "units").glob("share*"))


def expect_not_redone(log, done):
    """The driver's log says how many units it found finished: as many as there were when the last one was killed."""
    found = {stage: int(units) for stage, units in re.findall(r"(\w+)  (\d+)/\d+ units are there already", log)}
    for stage, units in done.items():
        if stage == "embed":
            units //= 2  # a unit is one shard of a group of two members, a record for each
        assert found.get(stage, 0) >= units, (stage, log)


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced(tiny_run, tmp_path):
    run, config = tmp_path / "run", tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump({**TINY, "engine": {**TINY["engine"], "scratch": str(tmp_path / "scratch")}}))
    command = [LEADLINE, "run", str(config), "--out", str(run)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as driver:
        while count(run, STAGES["vote"]) < 3 and driver.poll() is None:
            time.sleep(0.002)
        workers = [process for process, name in descendants(driver.pid).items() if name.startswith("ray::_Actor")]
        os.kill(workers[0], signal.SIGKILL)
        _, errors = driver.communicate(timeout=120)
        assert driver.returncode == 0, errors
    assert tables_of(run) == tables_of(tiny_run.directory.root)


@pytest.mark.slow
def test_ray_is_left_as_it_was_where_a_process_is_connected_already(tiny_run, tmp_path):
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=80_000_000)
    try:
        with pytest.raises(LeadlineError, match=r"10\.0\.0\.1:6379: this process is connected to Ray already"):
            leadline.run(TINY, tmp_path / "refused", address="10.0.0.1:6379")
        run = leadline.run(TINY, tmp_path / "run")
        assert ray.is_initialized()
        deadline = time.monotonic() + 30
        while any(name.startswith("ray::_Actor") for name in descendants(os.getpid()).values()):
            assert time.monotonic() < deadline, "the run's actors live on"
            time.sleep(0.1)
    finally:
        ray.shutdown()
    assert tables_of(run.directory.root) == tables_of(tiny_run.directory.root)


def test_a_finished_run_is_only_opened(tiny_run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_run.directory.root, copy)
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}
    again = leadline.run(TINY, copy)
    assert again.manifest == tiny_run.manifest
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()} == before


def test_another_configuration_or_other_data_are_refused_with_the_difference(tiny_run, tmp_path):
    root = tiny_run.directory.root
    with pytest.raises(LeadlineError, match=r"configuration\.k was 10, is now 11"):
        leadline.run({**TINY, "k": 11}, root)
    with pytest.raises(LeadlineError, match=r"configuration\.members\.0\.training\.steps was 60, is now 61"):
        leadline.run(TINY, root, overrides=("members.0.training.steps=61",))
    manifest = json.loads((root / "run.json").read_text())
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    manifest["data"]["fingerprint"] = "0" * 64
    (copy / "run.json").write_text(json.dumps(manifest))
    with pytest.raises(LeadlineError, match=r"data\.fingerprint was '0000"):
        leadline.run(TINY, copy)
    # The number of workers is no part of what was computed, nor is who is embedded with whom.
    assert leadline.run(changed(workers=1, group_size=1), root).manifest["status"] == "complete"


def test_given_weights_are_taken_and_their_change_is_refused(tiny_run, tmp_path):
    weights = tmp_path / "mlp-{seed}.safetensors"
    for seed in range(3):
        shutil.copy(tiny_run.directory.weights(f"mlp-{seed}"), str(weights).format(seed=seed))
    member = {**TINY["members"][0], "weights": str(weights)}
    del member["training"]
    config = {**TINY, "members": [member]}
    run = leadline.run(config, tmp_path / "run")
    assert run.sql("SELECT * FROM depths").equals(tiny_run.sql("SELECT * FROM depths"))
    shutil.copy(tiny_run.directory.weights("mlp-2"), str(weights).format(seed=0))
    with pytest.raises(LeadlineError, match=r"weights\.mlp-0 was"):
        leadline.run(config, tmp_path / "run")


def test_a_users_network_from_the_folder_of_the_command(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def small(width):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 12))\n"
    )
    member = {
        "architecture": "mine:small",
        "parameters": {"width": 8},
        "training": {"steps": 20, "precision": "float32"},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**TINY, "name": "mine", "members": [member]}))
    subprocess.run([LEADLINE, "run", "mine.yaml"], cwd=tmp_path, check=True, capture_output=True)
    probes = leadline.open(tmp_path / "runs" / "mine").sql("SELECT name, width FROM probes ORDER BY probe")
    assert probes.to_pylist() == [
        {"name": "input", "width": 64},
        {"name": "1", "width": 8},
        {"name": "softmax", "width": 12},
    ]


@pytest.mark.slow
def test_corrupted_labels_vote_and_the_clean_ones_are_kept(tmp_path):
    config = {**TINY, "points": {"source": "digits", "corrupt": {"share": 0.4, "seed": 1}}}
    config["members"] = [{**TINY["members"][0], "count": 1, "training": {"steps": 5, "precision": "float32"}}]
    run = leadline.run(config, tmp_path / "run")
    changed_share = run.sql("SELECT avg((label != clean_label)::DOUBLE) AS share FROM points")["share"][0].as_py()
    assert changed_share == pytest.approx(0.4, abs=1e-3)
    # The input probe votes with the given labels, so it agrees with them far less than on clean data.
    accuracy = run.sql("SELECT held_out_accuracy FROM probes WHERE probe = 0")[0][0].as_py()
    assert 0.3 < accuracy < 0.75


def test_a_torchvision_network_over_an_image_folder(tmp_path):
    random = np.random.default_rng(0)
    for part, share in (("train", 12), ("val", 3)):
        for name, colour in (("dark", 60), ("light", 180)):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(share):
                pixels = random.normal(colour, 20, (40 + i, 48, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.jpg")
    config = {
        "name": "folder",
        "points": {
            "source": "image-folder", "train": str(tmp_path / "train"), "test": str(tmp_path / "val"),
            "resize": 36, "crop": 32, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
        },
        "members": [{
            "architecture": "torchvision.models:resnet18", "name": "resnet18", "split": {"kind": "part"},
            "probes": ["layer*.*", "avgpool"],
        }],
        "k": 5,
        "engine": {"workers": 1, "batch_size": 16, "shard_size": 16},
    }  # fmt: skip
    run = leadline.run(config, tmp_path / "run")
    assert verify(run.directory) == []
    assert [row["name"] for row in run.sql("SELECT name FROM probes ORDER BY probe").to_pylist()] == [
        "input", *(f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)), "avgpool", "softmax",
    ]  # fmt: skip
    # Noise about two brightnesses is told apart by the pixels themselves.
    assert run.sql("SELECT held_out_accuracy FROM probes WHERE probe = 0")[0][0].as_py() == 1.0
    assert run.sql("SELECT count(*) FROM depths WHERE NOT in_training")[0][0].as_py() == 6


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_job_is_submitted_to_a_ray_head(tiny_run, tmp_path):
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(TINY))
    ray = str(Path(sys.executable).with_name("ray"))
    port, dashboard = free_port(), free_port()
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": uuid.uuid4().hex + uuid.uuid4().hex,
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }
    start = [
        ray, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=2",
        "--dashboard-host=127.0.0.1", "--disable-usage-stats", f"--temp-dir=/tmp/leadline-{uuid.uuid4().hex[:8]}",
        "--object-store-memory=80000000",
    ]  # fmt: skip
    with (tmp_path / "head.log").open("w") as log:
        head = subprocess.Popen(start, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        submit = [
            ray, "job", "submit", f"--address=http://127.0.0.1:{dashboard}", f"--working-dir={ROOT / 'jobs'}", "--",
            sys.executable, "compute_depths.py", str(config), "--out", str(tmp_path / "run"),
        ]  # fmt: skip
        for _ in range(60):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", dashboard)) == 0:
                    break
            time.sleep(0.5)
        for _ in range(10):  # on a busy machine the head's agent comes a while after its dashboard
            answer = subprocess.run(submit, env=environment, capture_output=True, text=True, timeout=180)
            if "No available agent" not in answer.stdout + answer.stderr:
                break
            time.sleep(2)
        assert answer.returncode == 0, answer.stdout + answer.stderr
        assert "the hardest points" in answer.stdout
    finally:
        for process in [*descendants(head.pid), head.pid]:
            os.kill(process, signal.SIGKILL)
        head.wait(30)
        shutil.rmtree(
            next(part.partition("=")[2] for part in start if part.startswith("--temp-dir")), ignore_errors=True
        )
    assert tables_of(tmp_path / "run") == tables_of(tiny_run.directory.root)


def test_a_job_without_a_lasting_directory_is_refused():
    job = [sys.executable, str(ROOT / "jobs" / "compute_depths.py"), "digits"]
    answer = subprocess.run(job, capture_output=True, text=True)
    assert answer.returncode != 0
    assert "--out" in answer.stderr


def test_a_unit_that_fails_is_set_aside_and_all_else_is_done(tiny_run, tmp_path):
    """One of three members is broken: a shard is then embedded for the others alone."""
    weights = tmp_path / "mlp-{seed}.safetensors"
    for seed in range(3):
        tensors = load_file(tiny_run.directory.weights(f"mlp-{seed}"))
        if seed == 1:
            next(iter(tensors.values())).fill_(float("nan"))
        save_file(tensors, str(weights).format(seed=seed))
    member = {**TINY["members"][0], "weights": str(weights)}
    del member["training"]
    config = {**TINY, "members": [member], "engine": {**TINY["engine"], "group_size": 3}}
    with pytest.raises(LeadlineError, match=r"embed mlp-1 \d+: member mlp-1, probe logits: not finite at point \d+"):
        leadline.run(config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "running"
    for table in ("depths", "votes"):
        found = {path.parent.name: pq.read_table(path) for path in (tmp_path / "run" / table).rglob("*.parquet")}
        assert sorted(found) == ["member=mlp-0", "member=mlp-2"]
        for name, rows in found.items():
            expected = pq.read_table(tiny_run.directory.root / table / name / "part-0.parquet")
            assert rows.replace_schema_metadata().equals(expected.replace_schema_metadata())


@pytest.mark.slow
def test_a_job_that_only_trains_leaves_weights_that_the_run_goes_on_from(tmp_path, tiny_run):
    config, run = tmp_path / "tiny.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(TINY))

    def job(script):
        command = [sys.executable, str(ROOT / "jobs" / script), str(config), "--out", str(run)]
        return subprocess.run(command, capture_output=True, text=True, check=True)

    assert "embed" not in job("train_ensemble.py").stderr
    weights = {path: path.stat().st_mtime_ns for path in sorted((run / "weights").iterdir())}
    assert [path.stem for path in weights] == ["mlp-0", "mlp-1", "mlp-2"]
    assert [path.name for path in run.rglob("*.parquet")] == ["points.parquet"]
    assert json.loads((run / "run.json").read_text())["status"] == "running"
    # Who is embedded with whom is no part of what is computed.
    config.write_text(yaml.safe_dump(changed(group_size=3)))
    job("compute_depths.py")
    assert weights == {path: path.stat().st_mtime_ns for path in weights}
    assert tables_of(run) == tables_of(tiny_run.directory.root)
