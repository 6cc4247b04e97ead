"""Embeddings and logits in bfloat16 against torch's own autocast, and networks whose weights lie channels-last."""

import numpy as np
import pytest
import torch
from torch import nn

from leadline.embedding import batch_logits, embed_batch
from leadline.embedding.extract import channels_last
from leadline.errors import LeadlineError
from leadline.members.architectures import build
from leadline.members.probes import place_probes, read_probes

SHAPE = (3, 8, 8)


@pytest.fixture(scope="module")
def network():
    model = build("resnet18", {"width": 4, "depth": [1, 1, 1, 1]}, SHAPE, 10, 0).eval()
    return model, place_probes(model, None, torch.rand(1, *SHAPE))


def by_autocast(model, probes, inputs):
    """The input, the output of every other probe's module, flattened, and the softmax; and the logits."""
    seen = {}
    handles = [
        model.get_submodule(probe.place).register_forward_hook(
            lambda module, args, output, name=probe.name: seen.update({name: output.float().clone()})
        )
        for probe in probes
        if probe.place
    ]
    with torch.no_grad(), torch.autocast(inputs.device.type, torch.bfloat16):
        logits = model(inputs).float()
    for handle in handles:
        handle.remove()
    embeddings = [inputs, *(seen[probe.name] for probe in probes if probe.place), logits.softmax(dim=1)]
    return [values.flatten(1).cpu().numpy() for values in embeddings], logits.cpu().numpy()


def test_bfloat16_is_torchs_autocast(network):
    model, probes = network
    inputs = torch.rand(20, *SHAPE)
    expected, logits = by_autocast(model, probes, inputs)
    found = embed_batch(model, probes, inputs, 0, "m", precision="bfloat16")
    exact = embed_batch(model, probes, inputs, 0, "m")
    for probe, values in enumerate(expected):
        assert found.embeddings[probe].dtype == np.float32
        np.testing.assert_array_equal(found.embeddings[probe], values)
        # The input alone is not rounded.
        assert np.array_equal(exact.embeddings[probe], values) == (probe == 0)
    np.testing.assert_array_equal(batch_logits(model, inputs, 0, "m", "bfloat16"), logits)
    np.testing.assert_array_equal(found.outputs.prediction, logits.argmax(axis=1))
    assert not np.array_equal(batch_logits(model, inputs, 0, "m"), logits)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_channels_last_does_not_change_the_order_of_values(network, layout):
    model, probes = network
    inputs = torch.rand(5, *SHAPE)
    expected, _ = read_probes(model, probes, inputs)
    lies_so, weights = [], {name: (weight.data_ptr(), weight.stride()) for name, weight in model.named_parameters()}

    def look(module, args, output):
        lies_so.append(output.is_contiguous(memory_format=torch.channels_last) and not output.is_contiguous())

    with channels_last(model), model.stem.conv.register_forward_hook(look):
        found, _ = read_probes(model, probes, inputs.to(memory_format=layout))
    assert lies_so == [True]
    for values, in_order in zip(found, expected, strict=True):
        torch.testing.assert_close(values, in_order)
    # Back where they were.
    assert weights == {name: (weight.data_ptr(), weight.stride()) for name, weight in model.named_parameters()}


def test_a_model_that_needs_another_layout_is_told_so():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4 * 6 * 6, 2)
            self.volumes = nn.Conv3d(1, 1, 2)  # weights of five dimensions, which have no such layout

        def forward(self, inputs):
            return self.last(self.first(inputs).view(-1, 4 * 6 * 6))

    model, example = Views(), torch.rand(1, *SHAPE)
    before = [weight.stride() for weight in model.parameters()]
    with pytest.raises(LeadlineError, match=r"the model fails .*Use \.reshape") as error, channels_last(model):
        place_probes(model, "auto", example)
    assert "\n" not in str(error.value)
    assert [weight.stride() for weight in model.parameters()] == before
    assert [probe.name for probe in place_probes(model, "auto", example)] == ["input", "first", "softmax"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="convolutions lie channels-last on a GPU alone")
def test_bfloat16_on_a_gpu_is_that_of_the_cpu(network):
    model, probes = network
    inputs, lies_so = torch.rand(20, *SHAPE), []

    def look(module, args, output):
        lies_so.append(output.is_contiguous(memory_format=torch.channels_last))

    expected, _ = by_autocast(model, probes, inputs)
    with model.stem.conv.register_forward_hook(look):
        found = embed_batch(model.cuda(), probes, inputs.cuda(), 0, "m", precision="bfloat16")
    model.cpu()
    assert lies_so == [True]
    for values, on_cpu in zip(found.embeddings, expected, strict=True):
        np.testing.assert_allclose(values, on_cpu, rtol=0.05, atol=0.05 * np.abs(on_cpu).max())
