"""Probes: where they are placed, and that what is read there is what the network computes there."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from leadline.errors import LeadlineError
from leadline.members.architectures import build
from leadline.members.probes import Probe, place_probes, read_probe, read_probes
from leadline.torchvision_import import import_torchvision

pytestmark = pytest.mark.usefixtures("one_thread")

CIFAR = (3, 32, 32)


def names(probes):
    return [probe.name for probe in probes]


def placed(model, probes, input_shape=CIFAR):
    return place_probes(model, probes, torch.rand(1, *input_shape))


def read(model, probes, inputs):
    """Embeddings by the names of the probes, and logits."""
    probes = place_probes(model, probes, inputs[:1])
    embeddings, logits = read_probes(model, probes, inputs)
    return dict(zip(names(probes), embeddings, strict=True)), logits


@pytest.fixture(scope="module")
def resnet():
    """torchvision's ResNet18, whose ReLUs work in place, with statistics that are not those of initialisation."""
    torch.manual_seed(0)
    model = import_torchvision().models.resnet18(num_classes=5)
    with torch.no_grad():
        for _ in range(2):
            model(torch.rand(8, *CIFAR))
    return model.eval()


class Vision(nn.Module):
    """What torchvision's small transformer cannot show: modules called twice and never, tuples and dicts."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.twice = nn.Linear(6, 6)
        self.recurrent = nn.LSTM(6, 4, batch_first=True)
        self.never = nn.Linear(6, 6)
        self.mapping = Mapping()
        self.mean = Mean()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.twice(self.twice(self.first(x)))
        x, _ = self.recurrent(self.mapping(x)["x"][:, None])
        self.mean(x)
        return self.head(x[:, -1])


class Mapping(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return {"x": self.inner(x)}


class Mean(nn.Module):
    def forward(self, x):
        return x.mean()


# --- the paper's places -----------------------------------------------------------------------------------------------


def test_resnet18_has_the_papers_11_probes():
    probes = placed(build("resnet18", {}, CIFAR, 10, 0), "paper")
    assert names(probes) == ["input", "stem", *(f"blocks.{i}.sum" for i in range(8)), "softmax"]
    sides, channels = [32, 32, 16, 16, 8, 8, 4, 4], [64, 64, 128, 128, 256, 256, 512, 512]
    blocks = [side**2 * n for side, n in zip(sides, channels, strict=True)]
    assert [probe.width for probe in probes] == [3072, 65536, *blocks, 10]
    assert [probe.index for probe in probes] == list(range(11))
    assert [probe.place for probe in probes] == [None, *names(probes)[1:-1], None]


def test_vgg16_has_the_papers_15_probes():
    probes = placed(build("vgg16", {}, CIFAR, 10, 0), "paper")
    widths = [(32, 64)] * 2 + [(16, 128)] * 2 + [(8, 256)] * 3 + [(4, 512)] * 3 + [(2, 512)] * 3
    assert [probe.width for probe in probes] == [3072, *(side**2 * n for side, n in widths), 10]


def test_mlp_has_the_papers_8_probes():
    assert [probe.width for probe in placed(build("mlp", {}, CIFAR, 10, 0), "paper")] == [3072, *[2048] * 6, 10]


def test_mlp_embeddings_are_the_pre_activations():
    model = build("mlp", {"width": 9, "depth": 4}, (2, 3), 5, seed=0)
    inputs = torch.randn(7, 2, 3)
    embeddings, logits = read(model, "paper", inputs)
    x = inputs.numpy().astype(np.float64).reshape(7, 6)
    np.testing.assert_array_equal(embeddings["input"], x)
    for i, layer in enumerate([*model.hidden, model.classifier]):
        x = np.maximum(x, 0) if i else x
        x = x @ layer.weight.detach().numpy().astype(np.float64).T + layer.bias.detach().numpy()
        seen = embeddings[f"hidden.{i}"] if i < 3 else logits
        np.testing.assert_allclose(seen, x, atol=1e-5)
    softmax = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(embeddings["softmax"], softmax, atol=1e-6)
    assert (embeddings["hidden.0"] < 0).any()


def standardised(weight):
    mean, std = weight.mean(dim=(1, 2, 3), keepdim=True), weight.std(dim=(1, 2, 3), keepdim=True, correction=0)
    return (weight - mean) / std


def conv_norm(x, module, stride, groups):
    """A weight-standardised convolution and GroupNorm, written again, in float64."""
    weight = module.conv.weight.detach().double()
    x = F.conv2d(x, standardised(weight), stride=stride, padding=weight.shape[-1] // 2)
    shape = x.shape
    x = x.reshape(shape[0], groups, -1)
    x = (x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True, correction=0) + module.norm.eps).sqrt()
    return x.reshape(shape) * module.norm.weight[:, None, None] + module.norm.bias[:, None, None]


def test_resnet18_embeddings_are_the_sums_before_the_last_relu():
    model = build("resnet18", {"width": 8, "depth": [1, 1, 1, 1]}, (3, 12, 12), 4, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    inputs = torch.randn(3, 3, 12, 12)
    embeddings, _ = read(model, "paper", inputs)
    with torch.no_grad():
        stem = conv_norm(inputs.double(), model.stem, 1, 4)
        torch.testing.assert_close(embeddings["stem"], stem.flatten(1).float(), atol=1e-4, rtol=1e-4)
        x = stem.relu()
        for i, block in enumerate(model.blocks):
            inner = conv_norm(x, block.first, 2 if i else 1, 4).relu()
            shortcut = conv_norm(x, block.shortcut, 2, 4) if i else x
            total = conv_norm(inner, block.second, 1, 4) + shortcut
            torch.testing.assert_close(embeddings[f"blocks.{i}.sum"], total.flatten(1).float(), atol=1e-4, rtol=1e-4)
            assert (total < 0).any()
            x = total.relu()


def test_vgg16_embeddings_are_the_convolutions_before_relu():
    model = build("vgg16", {"width": 4}, (1, 8, 8), 4, seed=0)
    inputs = torch.randn(2, 1, 8, 8)
    embeddings, logits = read(model, "paper", inputs)
    x = inputs
    with torch.no_grad():
        for i, convolution in enumerate(m for m in model.modules() if isinstance(m, nn.Conv2d)):
            x = F.conv2d(x, convolution.weight, convolution.bias, padding=1)
            torch.testing.assert_close(embeddings[f"convolutions.{i}"], x.flatten(1))
            x = x.relu()
            if i in (1, 3, 6):  # 8, 4, 2 pixels; nothing is left to pool after that
                x = F.max_pool2d(x, 2)
        torch.testing.assert_close(logits, model.classifier(x.flatten(1)))


def test_paper_is_the_default_where_there_is_one(resnet):
    mlp = build("mlp", {"width": 4, "depth": 3}, (6,), 3, 0)
    assert placed(mlp, None, (6,)) == placed(mlp, "paper", (6,))
    assert placed(resnet, None) == placed(resnet, "auto")
    with pytest.raises(LeadlineError, match=r"ResNet.*mlp, resnet18 and vgg16.*auto"):
        placed(resnet, "paper")


# --- top-level blocks -------------------------------------------------------------------------------------------------


def test_auto_on_a_sequential():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Sequential(nn.Linear(5, 4), nn.ReLU()))
    model.append(nn.Linear(4, 3))
    assert names(placed(model, "auto", (3, 4))) == ["input", "1", "3.0", "softmax"]
    assert names(placed(nn.Linear(4, 2), "auto", (4,))) == ["input", "softmax"]


def test_auto_on_torchvisions_resnet18(resnet):
    probes = placed(resnet, "auto")
    blocks = [f"layer{stage}.{i}" for stage in (1, 2, 3, 4) for i in (0, 1)]
    assert names(probes) == ["input", "conv1", "bn1", *blocks, "softmax"]
    assert [probe.width for probe in probes] == [3072, 16384, 16384, 4096, 4096, 2048, 2048, 1024, 1024, 512, 512, 5]


def test_auto_on_torchvisions_transformer():
    model = import_torchvision().models.VisionTransformer(16, 8, 2, 2, 12, 24, num_classes=3)
    assert names(placed(model, "auto", (3, 16, 16))) == ["input", "conv_proj", "encoder", "softmax"]
    assert names(placed(model, ["encoder.layers.*"], (3, 16, 16)))[1:3] == [
        "encoder.layers.encoder_layer_0",
        "encoder.layers.encoder_layer_1",
    ]
    assert [p.width for p in placed(model, ["encoder.layers.*"], (3, 16, 16))] == [768, 5 * 12, 5 * 12, 3]


def test_auto_looks_through_wrappers(resnet):
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.normalise = nn.Identity()
            self.inner = inner

        def forward(self, x):
            return self.inner(self.normalise(x))

    expected = [f"inner.{name}" for name in names(placed(resnet, "auto"))[1:-1]]
    assert names(placed(Wrapper(resnet), "auto"))[1:-1] == expected
    assert names(placed(Wrapper(Wrapper(resnet)), "auto"))[1:-1] == [f"inner.{name}" for name in expected]


def test_auto_leaves_out_what_is_called_twice_or_never():
    model = Vision()
    model.mapping = nn.Module()
    model.mapping.forward = lambda x: {"x": x}
    probes = placed(model, "auto", (6,))
    assert names(probes) == ["input", "first", "recurrent", "softmax"]
    assert probes[2].width == 4  # the first tensor of the LSTM's tuple


# --- names and wildcards ----------------------------------------------------------------------------------------------


def test_names_come_in_the_order_of_the_forward_pass_and_once(resnet):
    probes = placed(resnet, ["layer2.1", "softmax", "layer*.0", "layer2.*", "conv1", "input"])
    assert names(probes) == [
        *("input", "conv1", "layer1.0", "layer2.0", "layer2.1", "layer3.0", "layer4.0", "softmax"),
    ]
    assert names(placed(resnet, [])) == ["input", "softmax"]
    assert names(placed(resnet, ["layer[12]", "b?1"])) == ["input", "bn1", "layer1", "layer2", "softmax"]
    # A block's ReLU is called twice: a wildcard passes over it.
    assert names(placed(resnet, ["layer1.0.*"]))[1:-1] == [f"layer1.0.{n}" for n in ("conv1", "bn1", "conv2", "bn2")]


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (["layer5"], ["layer5", "did you mean", "layer4"]),
        (["layer9.*"], ["layer9.*", "no module"]),
        (["zzzz"], ["zzzz", "conv1, bn1"]),
        (["layer1.0.relu"], ["layer1.0.relu", "2 times"]),
        (["layer1.*.relu"], ["layer1.*.relu", "exactly once"]),
        ("layer1", ["layer1", "paper", "auto", "list"]),
    ],
)
def test_names_that_are_refused(resnet, patterns, words):
    with pytest.raises(LeadlineError) as caught:
        placed(resnet, patterns)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words)


@pytest.mark.parametrize(
    ("place", "words"), [("never", "0 times"), ("twice", "2 times"), ("mapping", "tensor"), ("mean", r"\(\) for 1")]
)
def test_modules_that_cannot_be_read(place, words):
    with pytest.raises(LeadlineError, match=f"{place}.*{words}"):
        placed(Vision(), [place], (6,))


class Output(nn.Module):
    """Returns what `change` makes of the logits of a dense layer."""

    def __init__(self, change):
        super().__init__()
        self.dense, self.change = nn.Linear(4, 3), change

    def forward(self, x):
        return self.change(self.dense(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits[:, :1],
        lambda logits: logits[:, :, None],
        lambda logits: logits.sum(),
        lambda logits: (logits, logits),
        lambda logits: {"logits": logits},
        lambda logits: logits[:0],
    ],
)
def test_outputs_that_are_not_logits(change):
    with pytest.raises(LeadlineError, match="the model returns"):
        placed(Output(change), "auto", (4,))
    with pytest.raises(LeadlineError, match="the model returns"):
        read_probes(
            Output(change), [Probe(0, "input", 4, None, (4,)), Probe(1, "softmax", 3, None, (3,))], torch.rand(2, 4)
        )


def test_a_model_that_refuses_the_inputs(resnet):
    with pytest.raises(LeadlineError, match=r"\(1, 28, 28\)") as caught:
        placed(resnet, "auto", (1, 28, 28))
    assert "\n" not in str(caught.value)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_in_place_relus_do_not_change_what_was_read(resnet):
    inputs = torch.randn(4, *CIFAR)
    embeddings, logits = read(resnet, ["conv1", "bn1", "layer1.0.bn1", "layer1.0.bn2", "layer1.0"], inputs)
    block = resnet.layer1[0]
    with torch.no_grad():
        conv1 = resnet.conv1(inputs)
        bn1 = resnet.bn1(conv1)
        x = F.max_pool2d(F.relu(bn1), 3, 2, 1)
        inner = block.bn1(block.conv1(x))
        bn2 = block.bn2(block.conv2(F.relu(inner)))
        expected = [inputs, conv1, bn1, inner, bn2, F.relu(bn2 + x), torch.softmax(resnet(inputs), 1)]
        assert torch.equal(logits, resnet(inputs))
    for embedding, tensor in zip(embeddings.values(), expected, strict=True):
        assert torch.equal(embedding, tensor.flatten(1))
    assert (embeddings["bn1"] < 0).any() and (embeddings["layer1.0.bn2"] < 0).any()


def test_a_model_that_works_in_place_leaves_its_inputs_alone():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2))
    inputs = torch.tensor([[-1.0, 2.0, -3.0]])
    assert read(model, "auto", inputs)[0]["input"].tolist() == [[-1.0, 2.0, -3.0]]
    assert inputs.tolist() == [[-1.0, 2.0, -3.0]]


def test_memory_layout_does_not_matter(resnet):
    inputs = torch.rand(2, *CIFAR)
    plain, _ = read(resnet, ["bn1"], inputs)
    channels_last, _ = read(resnet, ["bn1"], inputs.to(memory_format=torch.channels_last))
    torch.testing.assert_close(plain["bn1"], channels_last["bn1"])
    assert torch.equal(plain["input"], channels_last["input"])


def test_low_precision_becomes_float32():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).to(torch.bfloat16)
    embeddings, logits = read(model, "auto", torch.rand(5, 4).to(torch.bfloat16))
    assert {tensor.dtype for tensor in [*embeddings.values(), logits]} == {torch.float32}
    torch.testing.assert_close(embeddings["softmax"].sum(1), torch.ones(5))


def n_hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_modes_are_restored_and_hooks_removed():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    model.train()[1].eval()  # as where a part is frozen
    before = model.state_dict()["1.running_mean"].clone()
    inputs = torch.rand(6, 4)
    probes = place_probes(model, "auto", inputs[:2])
    first, again = (read_probes(model, probes, inputs)[1] for _ in range(2))
    assert torch.equal(first, again)  # no dropout
    with pytest.raises(RuntimeError):
        read_probes(model, probes, torch.rand(6, 5))
    assert [module.training for module in model.modules()] == [True, True, False, True, True]
    assert n_hooks(model) == 0
    assert torch.equal(model.state_dict()["1.running_mean"], before)


def test_one_probe_is_read_as_among_all_and_nothing_after_it_is_computed(resnet):
    probes, inputs = placed(resnet, ["bn1", "layer*.*"]), torch.rand(5, *CIFAR)
    called = []
    handles = [
        module.register_forward_pre_hook(lambda module, inputs, name=name: called.append(name))
        for name, module in resnet.named_modules()
        if name in [probe.place for probe in probes]
    ]
    resnet.train()
    for probe, expected in zip(probes, read_probes(resnet, probes, inputs)[0], strict=True):
        called.clear()
        assert torch.equal(read_probe(resnet, probe, inputs), expected)
        inner = [other.place for other in probes[1 : probe.index + 1] if other.place]
        assert called == (inner if probe.index else [])
        assert n_hooks(resnet) == 0 and all(module.training for module in resnet.modules())
    resnet.eval()
    for handle in handles:
        handle.remove()


def test_other_inputs_than_those_placed_for():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    probes = placed(model, "auto", (1, 8, 8))
    with pytest.raises(LeadlineError, match="input is 100 wide, not 64"):
        read_probes(model, probes, torch.rand(2, 1, 10, 10))


def test_a_module_that_is_called_only_sometimes():
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.dense(x) if len(x) == 1 else x)

    model = Moody()
    probes = placed(model, "auto", (4,))
    with pytest.raises(LeadlineError, match="called module dense 0 times"):
        read_probes(model, probes, torch.rand(2, 4))
