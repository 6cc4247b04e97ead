"""What several rooms' tests share."""

import os

import torch

# Without a GPU Triton's interpreter runs the kernels of the search. Triton reads this when it is first imported.
os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

import json
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import yaml
from tiny import STUDIED, TINY, WATCHED

WITHOUT_RUNS = ("knn", "points", "members", "depth", "test_one_model.py", "test_doctor.py", "test_gpu_benchmarks.py")
CLUSTER = ("cluster", "test_cli.py")


def pytest_itemcollected(item):
    """Tests that make runs, and share some, are in two groups, each in one process: a run has many of its own."""
    place = item.path.relative_to(Path(__file__).parent).parts[0]
    if place not in WITHOUT_RUNS:
        item.add_marker(pytest.mark.xdist_group("cluster" if place in CLUSTER else "runs"))


@pytest.fixture(scope="module")
def one_thread():
    """For networks, or searches, that are too small for two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A finished run of digits, to be read and not changed."""
    import leadline

    return leadline.run(TINY, tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="session")
def watched_run(tmp_path_factory):
    """A finished run of digits with a table of learning of two of its three members, to be read and not changed."""
    import leadline

    return leadline.run(WATCHED, tmp_path_factory.mktemp("runs") / "watched")


@pytest.fixture(scope="session")
def studied_run(tmp_path_factory):
    """A finished run of digits that every analysis of a study says something of, to be read and not changed."""
    import leadline

    return leadline.run(STUDIED, tmp_path_factory.mktemp("runs") / "studied")


@pytest.fixture(scope="session")
def until_decided_run(tmp_path_factory):
    """The same with `votes: until-decided`; it was killed once, when the first neighbours were shared, and went on."""
    import leadline

    folder = tmp_path_factory.mktemp("until-decided")
    run, config = folder / "run", folder / "tiny.yaml"
    engine = {**TINY["engine"], "scratch": str(folder / "scratch")}
    config.write_text(yaml.safe_dump({**TINY, "votes": "until-decided", "engine": engine}))
    command = [str(Path(sys.executable).with_name("leadline")), "run", str(config), "--out", str(run)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
        deadline = time.monotonic() + 400
        while not list(run.glob("units/share/*.json")) and driver.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        driver.send_signal(signal.SIGKILL)
    assert json.loads((run / "run.json").read_text())["status"] == "running"
    time.sleep(1)  # Ray's processes notice that their driver is gone
    shared, voted = len(list(run.glob("units/share/*.json"))), len(list(run.glob("units/vote/*/*.json")))
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    # Three probes of two members, six blocks each, are voted for before the input's neighbours are shared.
    assert shared > 0 and voted >= 36
    for stage, units in (("share", shared), ("vote", voted)):
        assert f"{stage}  {units}/" in finished.stderr, finished.stderr
    return leadline.open(run)


@pytest.fixture(scope="session")
def s3():
    """A client (boto3, which Leadline does not use) of an S3 server that runs here, which the environment points to."""
    import boto3

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_REGION": "us-east-1",
    }
    server = [sys.executable, "-m", "moto.server", "-p", str(port)]
    with (
        pytest.MonkeyPatch.context() as patch,
        subprocess.Popen(server, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process,
    ):
        for name, value in environment.items():
            patch.setenv(name, value)
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None and time.monotonic() < deadline, "the S3 server does not start"
            time.sleep(0.1)
        yield boto3.client("s3")
        process.kill()


@pytest.fixture
def bucket(s3):
    """The name of a new one. The engine keeps its clients by bucket, and each its endpoint."""
    name = f"b{uuid.uuid4().hex}"
    s3.create_bucket(Bucket=name)
    return name
