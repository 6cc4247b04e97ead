"""The comparison on Ray is that of one process."""

import numpy as np
import pytest

from leadline import LeadlineError, bench
from leadline.cluster.bench import bench_knn_on_ray

pytest.importorskip("faiss")

METHODS = ["flat", "ivf-flat:nlist=16,nprobe=1"]


def figures(result):
    """All that does not depend on time."""
    kept = ("method", "index_bytes", "recall", "vote_agreement", "depth_agreement", "depth_error", "plan")
    rows = [*result["methods"], *(row for layer in result["layers"] for row in layer["methods"])]
    return [{name: row[name] for name in kept if name in row} for row in rows]


@pytest.mark.slow
def test_layers_are_measured_in_parallel_with_the_same_result(tmp_path):
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 500)
    np.save(tmp_path / "labels.npy", labels)
    np.save(tmp_path / "predictions.npy", labels)
    for layer in range(3):
        np.save(tmp_path / f"{layer}.npy", random.normal(size=(500, 6)) + labels[:, None])
    told = []
    found = bench_knn_on_ray(tmp_path, None, METHODS, None, 5, None, 1, None, told.append)
    here = bench.bench_knn(bench.prepare(tmp_path, None, METHODS, None, 5, None, 1), told.append)
    assert figures(found) == figures(here) and found["methods"][2]["recall"] < 1
    assert [layer["layer"] for layer in found["layers"]] == ["0", "1", "2"] and len(told) == 6
    assert all("cores" in layer["hardware"] for layer in found["layers"])


@pytest.mark.slow
def test_mistakes_are_told_before_anything_is_measured(tmp_path):
    np.save(tmp_path / "labels.npy", np.zeros(50, np.int64))
    np.save(tmp_path / "0.npy", np.zeros((50, 4), np.float32))
    told = []
    with pytest.raises(LeadlineError, match="too few for k=60"):
        bench_knn_on_ray(tmp_path, None, METHODS, None, 60, None, 1, None, told.append)
    with pytest.raises(LeadlineError, match="--methods, --device: they need a GPU"):
        bench_knn_on_ray(tmp_path, None, ["gpu-flat"], None, 5, None, 1, None, told.append)
    with pytest.raises(LeadlineError, match=r"127\.0\.0\.1:1: no Ray cluster answers"):
        bench_knn_on_ray(tmp_path, None, METHODS, None, 5, None, 1, "127.0.0.1:1", told.append)
    assert told == []
