"""What networks are asked again: against plain forward passes, autograd and scikit-learn's neighbours."""

from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestNeighbors

from leadline import LeadlineError
from leadline.query import open_run
from leadline.study.networks import Networks

INPUTS = load_digits().data / 16


def logits(weights, inputs):
    for layer in ("hidden.0", "hidden.1"):
        inputs = torch.relu(inputs @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"])
    return inputs @ weights["classifier.weight"].T + weights["classifier.bias"]


@pytest.fixture(scope="module")
def weights(studied_run):
    stored = load_file(studied_run.directory.weights("mlp-1"))
    assert len(stored) == 6
    return {name: tensor.double() for name, tensor in stored.items()}


def test_softmax_is_that_of_a_plain_forward_pass(material, weights):
    found = material.networks.answers("mlp-1").softmax
    assert found.shape == (1797, 10) and found.dtype == np.float32
    expected = torch.softmax(logits(weights, torch.from_numpy(INPUTS)), dim=1).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


def test_input_margins_are_those_of_a_loop_over_classes(material, weights):
    found = material.networks.answers("mlp-1").input_margin
    assert found.shape == (1797,) and found.dtype == np.float32
    for point in (0, 63, 64, 1000, 1796):
        distances = []
        own = int(logits(weights, torch.from_numpy(INPUTS[point])).argmax())
        for other in set(range(10)) - {own}:
            x = torch.tensor(INPUTS[point], requires_grad=True)
            z = logits(weights, x)
            gap = z[own] - z[other]
            (gradient,) = torch.autograd.grad(gap, x)
            distances.append(float(gap.detach() / gradient.norm()))
        assert found[point] == pytest.approx(min(distances), rel=1e-4)


def test_answers_are_kept_and_those_of_another_run_are_refused(studied_run, tiny_run, tmp_path):
    asked = []
    first = Networks(studied_run, tmp_path, asked.append).answers("mlp-0")
    (file,) = tmp_path.rglob("*.parquet")
    written = file.stat().st_mtime_ns
    second = Networks(studied_run, tmp_path, asked.append).answers("mlp-0")
    assert file.stat().st_mtime_ns == written and len(asked) == 1 and "mlp-0" in asked[0]
    np.testing.assert_array_equal(first.softmax, second.softmax)
    np.testing.assert_array_equal(first.input_margin, second.input_margin)
    with pytest.raises(LeadlineError, match="answers for another run") as caught:
        Networks(tiny_run, tmp_path, asked.append).answers("mlp-0")
    assert str(file) in str(caught.value) and len(asked) == 1 and file.stat().st_mtime_ns == written


def test_data_that_have_changed_are_refused(studied_run, tmp_path):
    run = open_run(studied_run.directory.root)
    run.manifest["data"] = {**run.manifest["data"], "fingerprint": "0" * 64}
    with pytest.raises(LeadlineError, match="data have changed"):
        Networks(run, tmp_path, lambda line: None).answers("mlp-0")
    assert not list(tmp_path.rglob("*.parquet"))


def test_votes_by_other_numbers_of_neighbours(material, ensemble, stored):
    winners = material.networks.depth_winners("mlp-1", [10, 30])
    assert set(winners) == {10, 30}
    np.testing.assert_array_equal(winners[30], ensemble.winners("mlp-1"))  # the run's own k, at every probe
    rows = stored["mlp-1"]
    bank = [row["point_id"] for row in rows if row["in_training"]]
    # More than are needed, since scikit-learn has an order of its own for those at one distance.
    search = NearestNeighbors(n_neighbors=60, algorithm="brute").fit(INPUTS[bank])
    distances, places = search.kneighbors(INPUTS)
    for point in range(1797):
        nearest = sorted(zip(distances[point].round(9), places[point], strict=True))
        others = [bank[place] for _, place in nearest if bank[place] != point]
        votes = Counter(rows[other]["label"] for other in others[:10])
        assert winners[10][point, 0] == min(label for label in votes if votes[label] == max(votes.values()))
