"""What a run's log, its status and Ray's metrics say of real runs: finished, going on, killed, and with failures."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections import Counter
from contextlib import suppress
from itertools import groupby, pairwise
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_runs import free_port
from tiny import TINY, descendants

import leadline
from leadline import LeadlineError
from leadline.report import status
from leadline.report.status import status_of
from leadline.report.timeline import draw_timeline
from leadline.store import RunDirectory
from leadline.store.log import ended_units, sessions

LEADLINE = str(Path(sys.executable).with_name("leadline"))
# Three members in groups of two; eight shards; four probes and six blocks; the input's neighbours are shared.
UNITS = {"train": 3, "embed": 2 * 8, "share": 6, "vote": 3 * 4 * 6, "reduce": 3, "free": 3}
WIDTHS = [64, 24, 24, 10]


def logged(directory):
    """Tries of units in all sessions."""
    return [unit for session in sessions(directory) for unit in ended_units(directory, session["session"])]


def start(config, run, *options, environment=None):
    path = run.parent / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [LEADLINE, "run", str(path), "--out", str(run), *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def kill_at_its_unit(driver, directory):
    """Kill an actor of a driver that is at a unit, by the session's record. Returns its process."""
    workers = [process for process, name in descendants(driver.pid).items() if name.startswith("ray::_Actor")]
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    stopped = time.time()

    def busy():
        (session,) = sessions(directory)
        # Later than what was under way when they were stopped: from then on nothing changes.
        return session["last"] > stopped + 1 and [w["pid"] for w in session["workers"] if w["unit"]]

    wait_for(busy)
    killed = busy()[0]
    for worker in workers:
        os.kill(worker, signal.SIGKILL if worker == killed else signal.SIGCONT)
    return killed


def test_every_unit_of_a_run_is_logged_once(tiny_run):
    directory, stages = tiny_run.directory, tiny_run.manifest["stages"]
    units = logged(directory)
    assert len({unit["unit"] for unit in units}) == len(units)
    assert Counter(unit["stage"] for unit in units) == UNITS
    assert {(unit["state"], unit["tries"], unit["error"]) for unit in units} == {("done", 1, None)}
    for name, stage in stages.items():
        own = [unit for unit in units if unit["stage"] == name]
        assert (len(own), sum(unit["work"] for unit in own)) == (stage["units"], stage["work"])
        assert sum(unit["seconds"] for unit in own) == pytest.approx(stage["worker_seconds"], abs=0.01)
        assert {unit["measure"] for unit in own} == {stage["measure"]}
    # The input is kept once, but told by both groups, which are embedded together; the other probes for each of three
    # members; 1,797 points of float32.
    assert sum(unit["bytes_written"] for unit in units) == 4 * 1797 * (2 * WIDTHS[0] + 3 * sum(WIDTHS[1:]))
    (session,) = sessions(directory)
    workers = {(unit["node"], unit["host"], unit["pid"]) for unit in units}
    assert len(workers) == 2 and {worker[1] for worker in workers} == {socket.gethostname()}
    for worker in workers:
        own = [unit for unit in units if unit["pid"] == worker[2]]
        for before, after in pairwise(own):
            assert before["ended"] <= after["began"] and before["peak_memory"] <= after["peak_memory"]
        for unit in own:
            assert session["began"] < unit["began"] and unit["ended"] < session["last"]
            assert 0 <= unit["seconds"] < unit["ended"] - unit["began"] + 0.05
            assert 100e6 < unit["peak_memory"] < 20e9  # torch alone takes the first


def test_the_status_of_a_finished_run(tiny_run):
    told = status_of(tiny_run.directory)
    assert (told["state"], told["points"], told["seconds_left"]) == ("complete", 1797, None)
    assert {name: (stage["done"], stage["units"]) for name, stage in told["stages"].items()} == {
        name: (units, units) for name, units in UNITS.items()
    }
    assert sum(worker["units"] for worker in told["workers"]) == sum(UNITS.values())
    assert told["failures"] == [] and [worker["unit"] for worker in told["workers"]] == [None, None]


def test_what_was_done_before_a_kill_is_logged_and_not_done_again(until_decided_run, tmp_path):
    directory = until_decided_run.directory
    killed, finished = sessions(directory)
    assert (killed["outcome"], finished["outcome"]) == (None, "finished")
    before, after = (Counter(unit["unit"] for unit in ended_units(directory, s["session"])) for s in (killed, finished))
    assert not before & after and set((before | after).values()) == {1}
    for name, stage in status_of(directory)["stages"].items():
        assert stage["done"] == stage["units"]
        assert stage["done"] - stage["there"] == sum(unit.startswith(f"{name} ") for unit in after)
    draw_timeline(directory, tmp_path / "run.svg")
    picture = (tmp_path / "run.svg").read_text()
    assert f"{sum((before + after).values())} units" in picture and "2 sessions" in picture


@pytest.mark.slow
def test_a_run_is_watched_from_outside_and_seen_to_be_dead(tmp_path, monkeypatch):
    recipe = {"steps": 100_000, "batch": 64, "precision": "float32"}
    run = tmp_path / "run"
    with start({**TINY, "members": [{**TINY["members"][0], "training": recipe}]}, run) as driver:
        directory = RunDirectory(run)
        wait_for(lambda: run.exists() and any(w["unit"] for s in sessions(directory) for w in s["workers"]))
        told = status_of(directory)
        driver.send_signal(signal.SIGKILL)
    assert told["state"] == "running" and told["age"] < status.SILENT
    assert told["driver"]["pid"] == driver.pid
    assert {worker["unit"] for worker in told["workers"]} <= {"train mlp-0", "train mlp-1"}
    assert (told["stages"]["train"]["done"], told["stages"]["vote"]["units"]) == (0, UNITS["vote"])
    assert told["is_at_least"]  # nothing was timed yet
    monkeypatch.setattr(status, "SILENT", 0.1)
    time.sleep(0.2)
    told = status_of(directory)
    assert told["state"] == "silent" and told["age"] > 0.1
    # Who looks on needs no Ray, and does not wait for a driver that ends.
    code = "import sys; sys.modules['ray'] = None; from leadline.cli import main; main()"
    answer = subprocess.run([sys.executable, "-c", code, "status", str(run), "--json"], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["driver"]["pid"] == driver.pid


@pytest.mark.slow
def test_what_is_tried_again_divided_or_set_aside_is_logged_with_its_error(tiny_run, tmp_path):
    """A member with broken weights, and a worker that is killed."""
    weights = tmp_path / "mlp-{seed}.safetensors"
    for seed in range(3):
        tensors = load_file(tiny_run.directory.weights(f"mlp-{seed}"))
        if seed == 1:
            next(iter(tensors.values())).fill_(float("nan"))
        save_file(tensors, str(weights).format(seed=seed))
    member = {**TINY["members"][0], "weights": str(weights)}
    del member["training"]
    engine = {**TINY["engine"], "group_size": 3, "scratch": str(tmp_path / "scratch")}
    run = tmp_path / "run"
    directory = RunDirectory(run)
    with start({**TINY, "members": [member], "engine": engine}, run) as driver:
        wait_for(lambda: list((tmp_path / "scratch").rglob("outputs-*.npy")) or driver.poll() is not None)
        killed = kill_at_its_unit(driver, directory)
        _, errors = driver.communicate(timeout=120)
    assert driver.returncode == 2
    units = logged(directory)
    ends = {
        name: [unit["state"] for unit in own]
        for name, own in groupby(sorted(units, key=lambda u: u["unit"]), key=lambda u: u["unit"])
    }
    # A shard fails for all three members, is done in parts, and one of these is set aside, with all that needs it.
    whole, broken = [f"embed mlp-0 mlp-1 mlp-2 {i}" for i in range(8)], [f"embed mlp-1 {i}" for i in range(8)]
    assert {tuple(state for state in ends[name] if state != "again") for name in whole} == {("divided",)}
    assert {tuple(state for state in ends[name] if state != "again") for name in broken} == {("set_aside",)}
    assert all(
        "not finite" in unit["error"] for unit in units if unit["unit"] in broken and unit["state"] == "set_aside"
    )
    needing = [unit for unit in units if unit["state"] == "set_aside" and unit["unit"] not in broken]
    assert {unit["unit"] for unit in needing} == {
        *(f"vote mlp-1 {probe} {block}" for probe in range(4) for block in range(6)), "reduce mlp-1", "free mlp-1",
    }  # fmt: skip
    assert all(re.fullmatch(r"needs what embed mlp-1 \d+ makes", unit["error"]) for unit in needing)
    assert {(unit["pid"], unit["tries"]) for unit in needing} == {(None, 0)}
    for member in ("mlp-0", "mlp-2"):
        assert ends[f"reduce {member}"][-1] == "done"
    # The killed worker's unit was tried again, and is told on the console too.
    again = [unit for unit in units if unit["state"] == "again"]
    assert again and all("worker died" in unit["error"] for unit in again)
    assert {unit["pid"] for unit in again} == {killed}
    assert f"{again[0]['unit']}: tried again: its worker died" in errors
    told = status_of(directory)
    assert told["state"] == "failed" and "not finite" in told["driver"]["error"]
    assert [worker["pid"] for worker in told["workers"] if worker["died"]] == [killed]
    embed = told["stages"]["embed"]
    # Eight shards in parts: three members and, but where the input is there already, one more.
    parts = sum(unit["stage"] == "embed" and unit["unit"] not in whole and unit["state"] != "again" for unit in units)
    assert (embed["units"], embed["divided"], embed["set_aside"]) == (parts, 8, 8)
    assert embed["done"] + embed["set_aside"] == embed["units"]
    assert {failure["state"] for failure in told["failures"]} <= {"again", "divided", "set_aside"}
    draw_timeline(directory, tmp_path / "run.svg")
    picture = (tmp_path / "run.svg").read_text()
    assert all(f"failed: {word}" in picture for word in ("tried again", "done in parts", "set aside"))


@pytest.mark.slow
def test_members_behind_a_group_that_fails_whole_have_their_turn(tmp_path, monkeypatch):
    """There is room for one group at a time, and the first cannot even be trained."""
    from leadline.cluster import driver

    monkeypatch.setattr(driver, "free_disk", lambda place: 0)
    weights = tmp_path / "mlp-{seed}.safetensors"
    for seed in range(2):
        save_file({"strange": torch.zeros(1)}, str(weights).format(seed=seed))
    members = [
        {
            **{key: TINY["members"][0][key] for key in ("architecture", "parameters")},
            "name": "given",
            "weights": str(weights),
        },
        {**TINY["members"][0], "count": 2},
    ]
    members[0]["count"] = 2
    config = {**TINY, "members": members, "engine": {**TINY["engine"], "scratch": str(tmp_path / "scratch")}}
    with pytest.raises(LeadlineError, match="train given-0: "):
        leadline.run(config, tmp_path / "run")
    directory = RunDirectory(tmp_path / "run")
    assert [directory.record("train", f"mlp-{seed}").exists() for seed in range(2)] == [True, True]
    # What needs the input's neighbours, which were to be found with the first group, is set aside untried.
    lost = {unit["unit"]: unit["error"] for unit in logged(directory) if "mlp-" in unit["unit"] and unit["error"]}
    votes = {f"vote mlp-{seed} 0 {block}" for seed in range(2) for block in range(6)}
    assert set(lost) == votes | {f"{stage} mlp-{seed}" for stage in ("reduce", "free") for seed in range(2)}
    assert all("an earlier unit, that was set aside" in error for error in lost.values())


def scraped(port):
    """The values of leadline's metrics, by name and the tags that are ours: {(name, tags): value}."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
    except OSError:
        return {}
    values = {}
    for line in lines:
        found = re.fullmatch(r"ray_leadline_(\w+)\{(.*)\} (\S+)", line)
        if found:
            tags = dict(re.findall(r'(\w+)="([^"]*)"', found[2]))
            own = tuple(tags[key] for key in ("run", "stage", "state", "measure", "le") if key in tags)
            values[found[1], own] = float(found[3])
    return values


def answers(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_prometheus_can_scrape_what_a_run_does_from_a_cluster_of_ray(tmp_path):
    ray = str(Path(sys.executable).with_name("ray"))
    port, metrics = free_port(), free_port()
    folder = Path(f"/tmp/leadline-{uuid.uuid4().hex[:8]}")
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": uuid.uuid4().hex + uuid.uuid4().hex,
        "RAY_metrics_report_interval_ms": "200",
    }
    command = [
        ray, "start", "--head", "--block", f"--port={port}", f"--metrics-export-port={metrics}", "--num-cpus=2",
        "--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={folder}", "--object-store-memory=80000000",
    ]  # fmt: skip
    seen = {}
    with (tmp_path / "head.log").open("w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(lambda: answers(port), 60)
        with start(TINY, tmp_path / "run", "--address", f"127.0.0.1:{port}", environment=environment) as driver:
            while driver.poll() is None:
                seen |= scraped(metrics)
                time.sleep(0.05)
            assert driver.returncode == 0, driver.stderr.read()
        seen |= scraped(metrics)
    finally:
        for process in [*descendants(head.pid), head.pid]:
            with suppress(ProcessLookupError):  # some end by themselves when others are gone
                os.kill(process, signal.SIGKILL)
        head.wait(30)
        shutil.rmtree(folder, ignore_errors=True)
    assert {stage: seen["tries_total", ("tiny", stage, "done")] for stage in UNITS} == UNITS
    assert {stage: seen["unit_seconds_count", ("tiny", stage)] for stage in UNITS} == UNITS
    assert seen["work_total", ("tiny", "vote", "votes")] == 3 * 4 * 1797
    assert seen["embedding_bytes_total", ("tiny",)] >= 4 * 1797 * (WIDTHS[0] + 3 * sum(WIDTHS[1:]))
