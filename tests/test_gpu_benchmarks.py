"""The benchmarks of GPUs run dry, small and on the CPU: a GPU that is there for minutes is to meet no slip in them."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[1]
CIFAR10 = ROOT.parent / "shared" / "data" / "cifar10"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.syspath_prepend(ROOT / "tests" / "knn")
    monkeypatch.setattr(sys, "argv", ["gpu.py"])


def failures(found):
    """Every "failed" in it, however deep."""
    if not isinstance(found, dict):
        return set()
    own = {found["failed"]} if "failed" in found else set()
    return own.union(*(failures(value) for value in found.values()))


@pytest.mark.parametrize("name", ["gpu_members", "gpu_images"])
def test_ways_fail_only_for_want_of_a_gpu(name):
    found = __import__(name).measure("cpu", quick=True)
    assert failures(found) == {"RuntimeError: only on a CUDA device"}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """gpu.py with few rows, on the CPU, where the search is in plain torch."""
    import gpu

    cifar10, latent, build, namespace = gpu.cifar10, gpu.latent, gpu.build, gpu.SimpleNamespace
    some = np.r_[0:300, 50_000:50_060]

    def few(folder):
        inputs, labels, _ = cifar10(folder)
        return inputs[some], labels[some], 300

    def short(**fields):
        return namespace(**{**fields, **({"steps": 3, "batch": 16} if "steps" in fields else {})})

    small = {
        "DEVICE": torch.device("cpu"), "ROWS": 200, "WIDTHS": (96,), "LAYER": (220, 200, 96), "VOTING": (300, 40),
        "cifar10": few, "SimpleNamespace": short, "latent": lambda n, width: latent(n, width, 8),
        "build": lambda name, parameters, shape, classes, seed: build(name, {"width": 4}, shape, classes, seed=seed),
    }  # fmt: skip
    for name, value in small.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(gpu.on_device, "fused", None)
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *about: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *about: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.chdir(tmp_path)
    return gpu


def test_hard_inputs(gpu):
    found = gpu.checks()
    assert found["cases"] >= 100 and not found["wrong"]


def test_rates_a_layer_and_banks_in_main_memory(gpu):
    for row in gpu.rates().values():
        assert row["equal_to_float64"] and row["fraction_of_product"] > 0
    assert all(row["equal_to_float64"] for row in gpu.layer().values())
    assert gpu.apart()["same"]


@pytest.mark.skipif(not CIFAR10.is_dir(), reason="CIFAR-10 is not beside the project")
def test_a_member(gpu):
    found = gpu.member(CIFAR10)
    assert len(found["votes"]) == 11 and all(row["as_cpu"] and row["as_float64"] for row in found["votes"])
    assert sum(found["end_to_end"]["shares"].values()) == pytest.approx(1)
