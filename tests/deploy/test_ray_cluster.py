"""The files of `ray up`, held against Ray's own schema and merged with its defaults by its own code."""

import copy
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from leadline.config import load_config

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "ray-cluster"
FILES = sorted(FOLDER.glob("*.yaml"))


def read(path):
    return yaml.safe_load(path.read_text())


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def path(request):
    return request.param


def test_there_is_one_for_each_cloud():
    assert [read(path)["provider"]["type"] for path in FILES] == ["aws", "gcp"]


def test_ray_takes_them(path):
    prepared = prepare_config(read(path))
    validate_config(prepared)
    # Nothing of Ray's defaults, which install another Ray.
    commands = [line for key in prepared if key.endswith("_commands") for line in prepared[key]]
    assert commands and not [line for line in commands if "wheel" in line or "conda" in line]


@pytest.mark.parametrize("place", [("max_workers",), ("provider",), ("docker", "run_options"), ("file_mounts",)])
def test_ray_finds_a_misspelt_key(path, place):
    tree = copy.deepcopy(read(path))
    node = tree
    for key in place[:-1]:
        node = node[key]
    node[place[-1] + "_"] = node.pop(place[-1])
    with pytest.raises((jsonschema.ValidationError, KeyError)):
        validate_config(prepare_config(tree))


def test_head_without_work_and_workers_on_spot(path):
    tree = read(path)
    types = tree["available_node_types"]
    assert tree["head_node_type"] == "head" and types["head"]["resources"]["CPU"] == 0
    spot = {"aws": "InstanceMarketOptions: {MarketType: spot}", "gcp": "provisioningModel: SPOT"}
    assert path.read_text().count(spot[tree["provider"]["type"]]) == 1
    workers = types["gpu"]
    assert 0 < workers["min_workers"] <= workers["max_workers"] <= tree["max_workers"]
    for config in ("cifar10", str(ROOT / "jobs" / "configs" / "imagenet-torchvision.yaml")):
        engine = load_config(config).engine
        assert engine.threads <= workers["resources"]["CPU"] and engine.gpus <= workers["resources"]["GPU"]


def test_every_node_has_the_token_the_storage_and_memory_for_objects(path):
    tree = read(path)
    options = tree["docker"]["run_options"]
    assert {"--env=RAY_AUTH_MODE=token", "--volume=/shared:/shared", "--shm-size=1g"} <= set(options)
    assert tree["file_mounts"] == {"/root/.ray/auth_token": "~/.ray/auth_token"}
    assert any(line.startswith("mountpoint -q /shared ||") for line in tree["initialization_commands"])
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "--object-store-memory=268435456" in tree[key][-1]
    port = re.search(r"--port=(\d+)", tree["head_start_ray_commands"][-1])[1]
    assert f"--address=$RAY_HEAD_IP:{port} " in tree["worker_start_ray_commands"][-1]


def test_what_must_be_filled_in_is_told(path):
    names = set(re.findall(r"\b[A-Z]{2,}_?[A-Z]+\b", re.sub(r"#.*", "", path.read_text())))
    names -= {"CPU", "GPU", "SPOT", "DELETE", "TERMINATE", "PERSISTENT", "RAY_HEAD_IP", "TORCH_HOME", "RAY_AUTH_MODE"}
    page = (FOLDER / "README.md").read_text()
    assert "IMAGE" in names
    assert {name for name in names if f"| `{name}` |" not in page} == set()
