"""Weights: round trips, fingerprints, and files that are refused without being unpickled."""

import os

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from leadline.errors import LeadlineError
from leadline.members.architectures import build
from leadline.members.weights import load_weights, save_weights, weights_fingerprint

pytestmark = pytest.mark.usefixtures("one_thread")


def network(seed=0):
    return build("resnet18", {"width": 4, "norm": "batch", "depth": [1, 1, 1, 1]}, (1, 8, 8), 3, seed)


def assert_same(model, other):
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


@pytest.fixture
def source():
    model = network(seed=1)
    model(torch.rand(5, 1, 8, 8))  # moves the statistics of the batch norms
    return model.eval()


def test_round_trip(source, tmp_path):
    save_weights(source, tmp_path / "member.safetensors")
    target = network(seed=2)
    load_weights(target, tmp_path / "member.safetensors")
    assert_same(source, target)
    assert weights_fingerprint(source) == weights_fingerprint(target)
    inputs = torch.rand(3, 1, 8, 8)
    assert torch.equal(source(inputs), target.eval()(inputs))
    # Another reader of the file sees the same numbers.
    stored = safetensors.torch.load_file(tmp_path / "member.safetensors")
    assert set(stored) == set(source.state_dict())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
    ],
)
def test_state_dicts(source, tmp_path, wrap):
    torch.save(wrap(source.state_dict()), tmp_path / "member.pt")
    target = network(seed=2)
    load_weights(target, tmp_path / "member.pt")
    assert_same(source, target)


def test_a_prefix_that_only_some_keys_have_is_theirs(tmp_path):
    model = nn.Sequential()
    model.add_module("module", nn.Linear(2, 2))
    model.add_module("head", nn.Linear(2, 2))
    torch.save(model.state_dict(), tmp_path / "member.pt")
    before = weights_fingerprint(model)
    load_weights(model, tmp_path / "member.pt")
    assert weights_fingerprint(model) == before


def test_tensors_that_share_memory(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[0].bias = nn.Parameter(torch.arange(6.0)[::2])  # not contiguous
    save_weights(model, tmp_path / "tied.safetensors")
    target = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    load_weights(target, tmp_path / "tied.safetensors")
    assert_same(model, target)


def test_other_precision_becomes_the_models(source, tmp_path):
    torch.save({key: value.half() for key, value in source.state_dict().items()}, tmp_path / "half.pt")
    target = network(seed=2)
    load_weights(target, tmp_path / "half.pt")
    assert target.stem.conv.weight.dtype == torch.float32
    np.testing.assert_allclose(
        target.stem.conv.weight.detach().numpy(), source.stem.conv.weight.detach().numpy(), rtol=1e-3
    )


def test_fingerprint(source):
    same = network(seed=1)
    same.load_state_dict(source.state_dict())
    fingerprint = weights_fingerprint(source)
    assert fingerprint == weights_fingerprint(same) and len(fingerprint) == 64
    seen = {fingerprint}
    for name, tensor in [*source.named_parameters(), *source.named_buffers()]:
        before = tensor.detach().clone()
        with torch.no_grad():
            tensor.view(-1)[-1] += 1
        changed = weights_fingerprint(source)
        assert changed not in seen, name
        seen.add(changed)
        with torch.no_grad():
            tensor.copy_(before)
    assert weights_fingerprint(source) == fingerprint
    assert weights_fingerprint(same.double()) not in seen
    assert weights_fingerprint(source.to(memory_format=torch.channels_last)) == fingerprint


def test_fingerprint_does_not_depend_on_the_order_but_on_names_and_shapes():
    def model(**tensors):
        module = nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor, persistent=False)
        return weights_fingerprint(module)

    a, b = torch.arange(4.0), torch.ones(2, 3, dtype=torch.bfloat16)
    assert model(a=a, b=b) == model(b=b, a=a)
    assert len({model(a=a), model(b=a), model(a=a.reshape(2, 2)), model(a=a[:0]), model()}) == 5
    assert model(a=torch.zeros(2)) != model(a=torch.zeros(2, dtype=torch.int32))


class Malice:
    def __reduce__(self):
        return os.mkdir, (os.environ["LEADLINE_TEST_MALICE"],)


@pytest.mark.parametrize("name", ["member.pt", "member.safetensors"])
def test_a_malicious_file_is_not_executed(tmp_path, monkeypatch, name):
    monkeypatch.setenv("LEADLINE_TEST_MALICE", str(tmp_path / "harm"))
    torch.save({"state_dict": network().state_dict(), "optimizer": Malice()}, tmp_path / name)
    with pytest.raises(LeadlineError, match=name) as caught:
        load_weights(network(), tmp_path / name)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "harm").exists()
    with (tmp_path / name).open("rb") as file:
        torch.load(file, weights_only=False)  # the file does what it was made for
    assert (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("stem.conv.weight"), "missing: stem.conv.weight"),
        (lambda state: state.update(extra=torch.ones(1)), "not of it: extra"),
        (
            lambda state: state.update({"classifier.bias": torch.ones(4)}),
            r"another shape.*classifier.bias \[4\] for \[3\]",
        ),
    ],
)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_weights_of_another_architecture(source, tmp_path, change, words, suffix):
    state = dict(source.state_dict())
    change(state)
    path = tmp_path / f"member.{suffix}"
    (safetensors.torch.save_file if suffix == "safetensors" else torch.save)(state, path)
    with pytest.raises(LeadlineError, match=rf"member\.{suffix}: .*{words}") as caught:
        load_weights(network(), path)
    assert "\n" not in str(caught.value)


def test_only_the_first_keys_are_named(source, tmp_path):
    torch.save({"other": torch.ones(1)}, tmp_path / "member.pt")
    missing = sum("num_batches" not in key for key in source.state_dict()) - 3  # torch makes up for those counts
    with pytest.raises(LeadlineError, match=rf"and {missing} more; not of it: other;") as caught:
        load_weights(source, tmp_path / "member.pt")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("content", [{}, [torch.ones(1)], {"state_dict": 3}, {"a": 1.5}, torch.ones(2)])
def test_what_is_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "member.pt")
    with pytest.raises(LeadlineError, match="no state dict"):
        load_weights(network(), tmp_path / "member.pt")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_damaged_files(source, tmp_path, suffix):
    path = tmp_path / f"member.{suffix}"
    if suffix == "pt":
        torch.save(source.state_dict(), path)
    else:
        save_weights(source, path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:10], whole[: len(whole) // 2], b"\xff" * 100, whole[:-1]):
        path.write_bytes(damaged)
        with pytest.raises(LeadlineError, match="damaged") as caught:
            load_weights(network(), path)
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(LeadlineError, match=f"{path.name}: No such file"):
        load_weights(network(), path)
    path.mkdir()
    with pytest.raises(LeadlineError, match=path.name):
        load_weights(network(), path)
