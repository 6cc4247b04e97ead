"""A run on a cluster in which workers, a node and the driver are killed at random, again and again."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from ray.cluster_utils import Cluster
from tiny import TINY, descendants, tables_of

import leadline
from leadline.store.verify import verify

pytestmark = pytest.mark.slow
LEADLINE = str(Path(sys.executable).with_name("leadline"))
MOST = 10  # tries of the driver, more than it is killed


def image_folder(root, n):
    """JPEGs [n] of ten classes, brighter from one to the next, in noise; a tenth of them in `val`."""
    random_ = np.random.default_rng(0)
    for i in range(n):
        folder = root / ("val" if i % 10 == 9 else "train") / f"class{i % 7}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random_.normal(30 + 30 * (i % 7), 40, (20, 18, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:05d}.jpg")


def of_images(root):
    return {
        "name": "images",
        "points": {
            "source": "image-folder", "train": str(root / "train"), "test": str(root / "val"), "resize": 16, "crop": 16,
        },
        "members": [{
            "architecture": "mlp", "parameters": {"width": 32, "depth": 3}, "count": 3, "split": {"kind": "random"},
            "training": {"steps": 40, "batch": 64, "precision": "float32"},
        }],
        "k": 10,
        "engine": {"batch_size": 128, "shard_size": 1024, "query_block": 1000, "group_size": 1},
    }  # fmt: skip


def killed_at_random(command, run, nodes, seed):
    """Run the command again and again until it ends well. Returns the logs, and what was killed.

    Something is killed only when units were done since the last time, or on a slow machine nothing would be done.
    """
    chance, logs, lost = random.Random(seed), [], []
    # The last is the first. The driver is, since work stands still until there is another: what is left of a short run
    # is enough for the other two.
    strikes = [*chance.sample(["worker", "driver"] * 3, 6), *chance.sample(["worker", "node"], 2), "driver"]
    while len(logs) < MOST:
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as driver:
            done = units_of(run)
            while strikes and driver.poll() is None:
                time.sleep(chance.uniform(0, 0.3))
                actors = [p for p, name in descendants(os.getpid()).items() if name.startswith("ray::_Actor")]
                if units_of(run) == done or not actors:
                    continue
                lost.append(strikes.pop())
                if lost[-1] == "worker":
                    os.kill(chance.choice(actors), signal.SIGKILL)
                elif lost[-1] == "node":
                    nodes.remove_node(nodes.worker_nodes.copy().pop(), allow_graceful=False)
                    nodes.add_node(num_cpus=1, object_store_memory=80_000_000)
                else:
                    driver.send_signal(signal.SIGKILL)
                done = units_of(run)
            logs.append(driver.stderr.read())
        if driver.returncode == 0:
            return logs, lost
        assert driver.returncode in (-signal.SIGKILL, 2), logs[-1]
    raise AssertionError(logs[-1])


def units_of(run):
    """Records of units that are done and not yet joined."""
    return set(run.glob("units/**/*.json"))


@pytest.mark.parametrize("placement", ["resident", "node", "shared"])
@pytest.mark.parametrize("data", ["digits", "images"])
@pytest.mark.timeout(900)
def test_tables_are_those_of_an_undisturbed_run(tmp_path, placement, data):
    config = {**TINY, "engine": {**TINY["engine"], "query_block": 100}}  # some is left after each loss
    if data == "images":
        image_folder(tmp_path / "images", int(os.environ.get("LEADLINE_TEST_IMAGES", "10000")))
        config = of_images(tmp_path / "images")
    expected = leadline.run(config, tmp_path / "undisturbed")
    engine = {**config["engine"], "placement": placement, "scratch": str(tmp_path / "scratch"), "workers": 2}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({**config, "engine": engine}))
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80_000_000})
    try:
        for _ in range(2):
            nodes.add_node(num_cpus=1, object_store_memory=80_000_000)
        command = [LEADLINE, "run", str(file), "--out", str(tmp_path / "run"), "--address", nodes.address]
        logs, lost = killed_at_random(command, tmp_path / "run", nodes, seed=1)
    finally:
        nodes.shutdown()
    assert {"worker", "driver", "node"} <= set(lost), lost
    assert any("are there already" in log for log in logs[1:])
    assert tables_of(tmp_path / "run") == tables_of(expected.directory.root)
    assert verify(leadline.open(tmp_path / "run").directory) == []
