"""Architectures: shapes, seeds, weight standardisation, and every name or parameter that is refused."""

import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from leadline.errors import LeadlineError
from leadline.members.architectures import OWN, StandardisedConv2d, build

pytestmark = pytest.mark.usefixtures("one_thread")

CIFAR = (3, 32, 32)
SMALL = {"mlp": {"width": 12, "depth": 4}, "resnet18": {"width": 4}, "vgg16": {"width": 4}}


def n_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", list(OWN))
@pytest.mark.parametrize("input_shape", [(1, 8, 8), (1, 28, 28), CIFAR])
def test_logits_for_small_images(name, input_shape):
    model = build(name, SMALL[name], input_shape, 7, seed=0)
    logits = model(torch.rand(2, *input_shape))
    assert logits.shape == (2, 7)
    assert torch.isfinite(logits).all()


def test_vgg16_keeps_a_pixel_of_tiny_and_oblong_images():
    for shape in [(1, 1, 1), (1, 2, 40), (1, 40, 3)]:
        assert build("vgg16", {"width": 2}, shape, 2, 0)(torch.rand(3, *shape)).shape == (3, 2)


def test_sizes_of_the_papers_networks():
    # By hand: the weights and biases of seven dense layers; 13 convolutions and a dense layer.
    widths = [3072, *[2048] * 6, 10]
    assert n_parameters(build("mlp", {}, CIFAR, 10, 0)) == sum((a + 1) * b for a, b in pairwise(widths))
    channels = [3, 64, 64, 128, 128, 256, 256, 256, *[512] * 6]
    convolutions = sum((9 * a + 1) * b for a, b in pairwise(channels))
    assert n_parameters(build("vgg16", {}, CIFAR, 10, 0)) == convolutions + 513 * 10


def test_resnet18_has_the_blocks_of_torchvisions_but_for_the_stem():
    ours = build("resnet18", {"norm": "batch"}, CIFAR, 10, 0)
    theirs = build("torchvision.models:resnet18", {}, CIFAR, 10, 0)
    theirs.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    theirs.maxpool = nn.Identity()
    # The same modules in the same order but for the name, so weights can be handed over one by one.
    assert [t.shape for t in ours.state_dict().values()] == [t.shape for t in theirs.state_dict().values()]
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    inputs = torch.rand(2, *CIFAR)
    ours.eval(), theirs.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(inputs), theirs(inputs))


def test_depth_is_the_number_of_layers():
    assert build("mlp", {"depth": 1}, (1, 4, 4), 3, 0).paper_probes == ()
    assert len(build("resnet18", {"width": 2, "depth": [1, 2, 1, 1]}, (1, 8, 8), 3, 0).paper_probes) == 1 + 5
    assert len(build("vgg16", {"width": 2, "depth": [1, 1, 1, 1, 2]}, (1, 8, 8), 3, 0).paper_probes) == 6


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
@pytest.mark.parametrize("name", ["resnet18", "vgg16"])
def test_norms(name, norm):
    model = build(name, {"width": 4, "norm": norm}, (1, 8, 8), 3, 0)
    kinds = {type(module) for module in model.modules()}
    assert (StandardisedConv2d in kinds) == (nn.GroupNorm in kinds) == (norm == "group")
    assert (nn.BatchNorm2d in kinds) == (norm == "batch")
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert all((module.bias is not None) == (norm == "none") for module in convolutions)


@pytest.mark.parametrize(("width", "groups"), [(64, 32), (128, 32), (16, 8), (8, 4), (6, 1), (5, 1)])
def test_groups_divide_the_width(width, groups):
    model = build("resnet18", {"width": width, "depth": [1, 1, 1, 1]}, (1, 4, 4), 3, 0)
    assert {m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm)} == {groups}


def test_blocks_without_normalisation_begin_as_the_identity():
    model = build("resnet18", {"width": 4, "norm": "none"}, CIFAR, 3, 0)
    inputs = torch.rand(2, 4, 8, 8)
    assert torch.equal(model.blocks[0](inputs), inputs)
    assert model.blocks[2].shortcut.conv.weight.abs().min() > 0


def test_filters_are_standardised():
    convolution = build("resnet18", {"width": 4}, CIFAR, 3, 0).blocks[0].first.conv
    with torch.no_grad():
        convolution.weight.mul_(3).add_(5)
    filters = convolution.standardised().detach().numpy().astype(np.float64).reshape(4, -1)
    np.testing.assert_allclose(filters.mean(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(filters.var(axis=1), 1, atol=1e-4)
    inputs = torch.rand(2, 4, 8, 8)
    expected = F.conv2d(inputs, torch.tensor(filters.reshape(4, 4, 3, 3), dtype=torch.float32), padding=1)
    torch.testing.assert_close(convolution(inputs), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [*OWN, "squeezenet1_1"])
def test_seeds(name):
    first, again, other = (build(name, SMALL.get(name, {}), CIFAR, 3, seed) for seed in (3, 3, 4))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in first.state_dict().items())
    assert any(not torch.equal(value, other.state_dict()[key]) for key, value in first.state_dict().items())


def test_callers_random_state_is_left_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    build("mlp", SMALL["mlp"], CIFAR, 3, seed=7)
    assert torch.equal(torch.rand(3), expected)


def test_torchvision_by_name():
    model = build("shufflenet_v2_x0_5", {}, CIFAR, 13, 0)
    assert model.fc.out_features == 13
    assert build("squeezenet1_1", {"num_classes": 4, "dropout": 0.1}, CIFAR, 13, 0).classifier[1].out_channels == 4
    assert type(build("resnet18", {"width": 2}, CIFAR, 3, 0)) is OWN["resnet18"]
    assert "torchvision" in type(build("torchvision.models:resnet18", {}, CIFAR, 3, 0)).__module__


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "user_networks.py").write_text(
        "import torch\n"
        "def linear(width=3):\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, width))\n"
        "def list_of_layers():\n    return [torch.nn.Linear(4, 2)]\n"
        "def fails(size):\n    raise ValueError(f'size {size}\\nis odd')\n"
    )
    (tmp_path / "user_broken.py").write_text("import torch\n1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("user_networks", None)


@pytest.mark.usefixtures("user_module")
def test_users_function():
    model = build("user_networks:linear", {"width": 5}, (4,), 3, seed=1)
    assert model(torch.rand(2, 4)).shape == (2, 5)
    assert torch.equal(model[1].weight, build("user_networks:linear", {"width": 5}, (4,), 3, seed=1)[1].weight)


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize(
    ("name", "parameters", "input_shape", "words"),
    [
        ("mlp", {"wdth": 3}, CIFAR, ["mlp", "wdth", "width, depth"]),
        ("mlp", {"width": 0}, CIFAR, ["mlp", "width", "0", "from 1"]),
        ("mlp", {"width": True}, CIFAR, ["mlp", "width", "True"]),
        ("mlp", {"depth": 2.5}, CIFAR, ["mlp", "depth", "2.5"]),
        ("resnet18", {"norm": "layer"}, CIFAR, ["resnet18", "norm", "layer", "group, batch, none"]),
        ("resnet18", {"norm": None}, CIFAR, ["resnet18", "norm", "None"]),
        ("resnet18", {"depth": [2, 2, 2]}, CIFAR, ["resnet18", "depth", "[2, 2, 2]", "4 integers"]),
        ("vgg16", {"depth": 16}, CIFAR, ["vgg16", "depth", "16", "5 integers"]),
        ("vgg16", {"width": -1}, CIFAR, ["vgg16", "width", "-1"]),
        ("vgg16", {}, (64,), ["vgg16", "(64,)", "mlp"]),
        ("resnet18", {}, (28, 28), ["resnet18", "(28, 28)"]),
        ("resnet51", {}, CIFAR, ["resnet51", "did you mean", "resnet50"]),
        ("vgg_16", {}, CIFAR, ["vgg_16", "vgg16"]),
        ("fasterrcnn_resnet50_fpn", {}, CIFAR, ["fasterrcnn_resnet50_fpn", "no such name"]),
        ("", {}, CIFAR, ["no such name"]),
        ("shufflenet_v2_x0_5", {"wdth": 3}, CIFAR, ["shufflenet_v2_x0_5", "wdth", "stages_repeats"]),
        ("vit_b_16", {"image_size": 33}, CIFAR, ["vit_b_16", "image_size=33", "patch_size"]),
        ("squeezenet1_1", {"weights": "SOME"}, CIFAR, ["squeezenet1_1", "SOME", "weights"]),
        ("torchvision.models:squeezenet1_1", {"drop": 1}, CIFAR, ["squeezenet1_1", "drop", "dropout"]),
        ("user_networks:linear", {"wide": 3}, (4,), ["user_networks:linear", "wide", "allowed parameters: width"]),
        ("user_networks:fails", {"size": 3}, (4,), ["user_networks:fails", "size=3", "is odd"]),
        ("user_networks:lineer", {}, (4,), ["user_networks", "lineer", "linear"]),
        ("user_networks:", {}, (4,), ["user_networks", "module:function"]),
        (":linear", {}, (4,), [":linear", "does not import"]),
        ("user_networks:list_of_layers", {}, (4,), ["list_of_layers", "list", "torch.nn.Module"]),
        ("user_broken:linear", {}, (4,), ["user_broken", "ZeroDivisionError"]),
        ("user_missing:linear", {}, (4,), ["user_missing", "ModuleNotFoundError", "PYTHONPATH"]),
        ("torch.nn:Linear", {"in_features": 3}, (4,), ["torch.nn:Linear", "out_features"]),
    ],
)
def test_what_is_refused(name, parameters, input_shape, words):
    with pytest.raises(LeadlineError) as caught:
        build(name, parameters, input_shape, 10, 0)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
