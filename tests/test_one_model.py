"""Depths of one model, by the whole definition written out slowly."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import leadline
from leadline import LeadlineError, one_model


@pytest.fixture(scope="module")
def digits():
    data, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(data / 16, dtype=torch.float32)
    targets = torch.tensor(labels)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[:1200]), targets[:1200]).backward()
        optimizer.step()
    return model, TensorDataset(inputs[:1200], targets[:1200]), TensorDataset(inputs[1200:], targets[1200:])


def slow_depths(model, bank, queries, k, leave_out):
    """Embeddings layer by layer, votes by sorting, depth by its definition."""

    def embeddings(inputs):
        hidden = [inputs, model[0](inputs)]
        hidden.append(model[2](model[1](hidden[-1])))
        logits = model[4](model[3](hidden[-1]))
        return [*hidden, logits.softmax(dim=1)], logits.argmax(dim=1)

    with torch.no_grad():
        rows, _ = embeddings(bank.tensors[0])
        asked, predictions = embeddings(queries.tensors[0])
    labels, depths = bank.tensors[1].numpy(), []
    for i in range(len(queries)):
        depth = 0
        for probe, (points, query) in enumerate(zip(rows, asked, strict=True)):
            distances = ((points.double() - query[i].double()) ** 2).sum(dim=1).numpy()
            if leave_out:
                distances[i] = np.inf
            nearest = np.lexsort((np.arange(len(labels)), distances))[:k]
            if np.bincount(labels[nearest]).argmax() != predictions[i]:
                depth = probe + 1
        depths.append(depth)
    return depths


def test_depths_of_held_out_points(digits):
    model, bank, queries = digits
    table = leadline.prediction_depth(model, bank, queries, k=30, batch_size=len(bank))
    assert table.schema.metadata[b"probes"].decode().split("\n") == ["input", "0", "2", "softmax"]
    assert table["depth"].to_pylist() == slow_depths(model, bank, queries, 30, leave_out=False)
    assert table["label"].to_pylist() == queries.tensors[1].tolist()
    assert not any(table["in_training"].to_pylist())
    assert len(table["winner"][0]) == 4


def test_depths_of_the_bank_leave_each_point_out(digits):
    model, bank, _ = digits
    # Every point twice would vote for itself, were it not left out by its place.
    small = TensorDataset(bank.tensors[0][:300], bank.tensors[1][:300])
    table = leadline.prediction_depth(model, small, k=5, batch_size=300)
    assert table["depth"].to_pylist() == slow_depths(model, small, small, 5, leave_out=True)
    assert all(table["in_training"].to_pylist())


def test_the_model_is_left_as_it_was(digits):
    model, bank, queries = digits
    with_dropout = nn.Sequential(model, nn.Dropout(0.5)).train()
    first = leadline.prediction_depth(with_dropout, bank, queries)
    assert with_dropout.training
    assert first.equals(leadline.prediction_depth(with_dropout.eval(), bank, queries))


@pytest.mark.parametrize(("held_out", "reduction"), [(True, "none"), (False, "pca:8")])
def test_groups_of_probes_give_what_all_give_at_once(digits, monkeypatch, held_out, reduction):
    model, bank, queries = digits
    queries = queries if held_out else None
    at_once = leadline.prediction_depth(model, bank, queries, reduction=reduction)
    n_points = len(bank) + (len(queries) if held_out else 0)
    widths = [64, 32, 24, 10] if reduction == "none" else [64, 8, 8, 10]
    groups = []
    real = one_model.probe_groups
    monkeypatch.setattr(one_model, "probe_groups", lambda *about: groups.append(real(*about)) or groups[-1])
    for room, expected in {
        0: [[0], [1], [2], [3]],
        4 * n_points * (widths[1] + widths[2]): [[0], [1, 2], [3]],
        4 * n_points * sum(widths): [[0, 1, 2, 3]],
    }.items():
        monkeypatch.setattr(one_model, "_room", lambda _, room=room: room)
        assert leadline.prediction_depth(model, bank, queries, reduction=reduction).equals(at_once, check_metadata=True)
        assert groups.pop() == expected


def test_bfloat16_changes_the_forward_pass_by_its_rounding(digits):
    model, bank, queries = digits
    exact = leadline.prediction_depth(model, bank, queries)
    rounded = leadline.prediction_depth(model, bank, queries, precision="bfloat16")
    assert exact.schema.metadata[b"precision"] == b"float32"
    assert rounded.schema.metadata[b"precision"] == b"bfloat16"
    confidences = [table["confidence"].to_numpy() for table in (exact, rounded)]
    assert 1e-4 < np.abs(confidences[0] - confidences[1]).max() < 0.1
    votes = [np.array(table["winner"].to_pylist()) for table in (exact, rounded)]
    np.testing.assert_array_equal(votes[0][:, 0], votes[1][:, 0])  # the input is not rounded
    assert (votes[0] == votes[1]).mean() > 0.97
    depths = [table["depth"].to_numpy() for table in (exact, rounded)]
    assert (depths[0] == depths[1]).mean() > 0.9


@pytest.mark.parametrize("reduction", ["none", "pca:1"])
def test_bfloat16_is_that_of_a_model_that_rounds_by_itself(digits, reduction):
    class Rounding(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, inputs):
            with torch.autocast("cpu", torch.bfloat16):
                return self.model(inputs)

    model, bank, queries = digits
    found = leadline.prediction_depth(model, bank, queries, k=5, precision="bfloat16", reduction=reduction)
    assert found == leadline.prediction_depth(Rounding(model), bank, queries, k=5, reduction=reduction)


def test_an_unknown_precision_is_named(digits):
    with pytest.raises(LeadlineError, match="precision: 'x'; allowed: float32, bfloat16") as error:
        leadline.prediction_depth(digits[0], digits[1], precision="x")
    assert "\n" not in str(error.value)


class Items:
    """A data set of a list."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, place):
        return self.items[place]


@pytest.mark.parametrize(("room", "n_kept"), [(0, 0), (700 * 4 * 64, 512), (1200 * 4 * 64, 1200)])
def test_inputs_that_have_room_are_read_once(digits, room, n_kept):
    _, bank, _ = digits
    read = []

    class Counted(Items):
        def __getitem__(self, place):
            read.append(place)
            return super().__getitem__(place)

    points = one_model._Points(Counted(bank), "bank", torch.device("cpu"), 256)
    assert points.batches._room == 0  # a CPU keeps nothing
    points.batches._room = room
    for passed in range(3):
        read.clear()
        inputs = torch.cat([of_batch for _, of_batch in points.batches])
        assert torch.equal(inputs, bank.tensors[0]) and points.labels.tolist() == bank.tensors[1].tolist()
        assert read == list(range(n_kept if passed else 0, 1200))


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([], "bank: the data set is empty"),
        ([torch.zeros(64)] * 40, "item 0 is Tensor"),
        ([(torch.zeros(64), "cat")] * 40, "item 0.*'cat'"),
        ([(torch.zeros(64), 1)] * 35 + [(torch.zeros(3), 1)], "input 35 has shape"),
        ([(torch.zeros(64), -2)] * 40, "label -2"),
        ([(torch.full((64,), torch.nan), 1)] * 40, "not finite at point 0"),
        ([(torch.zeros(64), 1)] * 30, "too few for k=30"),
    ],
)
def test_bad_data_sets_are_named(digits, items, words):
    with pytest.raises(LeadlineError, match=words):
        leadline.prediction_depth(digits[0], Items(items))


def test_no_queries_and_devices_that_are_not_here_are_named(digits):
    model, bank = digits[:2]
    with pytest.raises(LeadlineError, match="queries: the data set is empty"):
        leadline.prediction_depth(model, bank, Items([]))
    with pytest.raises(LeadlineError, match="device: cuda:99: torch sees"):
        leadline.prediction_depth(model, bank, device="cuda:99")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
def test_several_gpus_share_the_searches(digits):
    model, bank = digits[:2]
    one, two = (leadline.prediction_depth(model, bank, device=d) for d in ("cuda:1", ["cuda:1", "cuda:0"]))
    assert one.equals(two)


def test_importing_and_calling_needs_no_ray_duckdb_or_pydantic():
    program = """
import sys
for name in ("ray", "duckdb", "pydantic", "faiss", "typer", "yaml", "rich"):
    sys.modules[name] = None
import leadline, torch
from torch.utils.data import TensorDataset
points = TensorDataset(torch.randn(40, 8), torch.arange(40) % 2)
model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
table = leadline.prediction_depth(model, points)
print(table.num_rows)
"""
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "40"
