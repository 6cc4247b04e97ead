"""Networks by name: the paper's three, torchvision's classifiers, and the user's own functions."""

import difflib
import importlib
import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leadline.errors import LeadlineError, one_line
from leadline.torchvision_import import import_torchvision

NORMS = ("group", "batch", "none")


def build(
    architecture: str, parameters: Mapping[str, Any], input_shape: tuple[int, ...], n_classes: int, seed: int
) -> nn.Module:
    """An untrained network on the CPU, in training mode; the same arguments give the same bits.

    architecture: `mlp`, `resnet18`, `vgg16`; or else a torchvision classifier (`resnet50`), or a function of the
    user's, `module:function`, called as function(**parameters). torchvision's networks are given
    num_classes = n_classes unless the parameters have num_classes or weights.
    input_shape: of one input, without the batch. The caller's random state stays as it was.

    Raises LeadlineError for an unknown name, a module that does not import, parameters that the architecture refuses,
    and a function that does not return a torch.nn.Module.
    """
    # devices=[] and the CPU's own generator: torch.manual_seed would disturb the caller's CUDA generators as well.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if architecture in OWN:
            return _build_own(architecture, parameters, input_shape, n_classes)
        if ":" in architecture:
            return _build_from_function(architecture, parameters, n_classes)
        return _build_torchvision(architecture, parameters, n_classes)


def without_weights(architecture: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the same network with random weights: those that torchvision would download are left out."""
    given = dict(parameters)
    module, _, name = architecture.rpartition(":")
    if architecture in OWN or given.get("weights") is None or module.split(".")[0] not in ("", "torchvision"):
        return given
    models = import_torchvision().models
    if name not in models.list_models(module=models):
        return given
    try:
        weights = models.get_model_weights(name).verify(given["weights"])
    except (KeyError, TypeError):
        return given  # whoever builds the network says what is wrong
    del given["weights"]
    return {"num_classes": len(weights.meta["categories"]), **given}


class MLP(nn.Module):
    """`depth` dense layers of `width` units, ReLU between; the last layer gives the logits. Inputs are flattened."""

    def __init__(self, input_shape: tuple[int, ...], n_classes: int, *, width: int = 2048, depth: int = 7) -> None:
        super().__init__()
        _check_count("mlp", "width", width)
        _check_count("mlp", "depth", depth)
        widths = [math.prod(input_shape)] + [width] * (depth - 1)
        self.hidden = nn.ModuleList(nn.Linear(n, width) for n in widths[:-1])
        self.classifier = nn.Linear(widths[-1], n_classes)
        _initialise(self)
        self.paper_probes = tuple(f"hidden.{i}" for i in range(depth - 1))

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs [B, ...] to logits [B, n_classes]."""
        x = inputs.flatten(1)
        for layer in self.hidden:
            x = F.relu(layer(x))
        logits: Tensor = self.classifier(x)
        return logits


class ResNet18(nn.Module):
    """ResNet18 for small images: a 3 x 3 stem and no max-pool; `depth` blocks in each of four stages.

    The stages are width, 2, 4 and 8 times width channels wide; the last three halve the image.
    norm: "group" (the paper's) has weight-standardised convolutions and GroupNorm, of 32 groups where the width is 64
    or a multiple of it; otherwise half the largest power of two that divides the width, so that a group has two
    channels at least. "batch" has plain convolutions and BatchNorm. "none" has plain convolutions with biases, and
    the last convolution of each block starts at 0, since the sums would otherwise grow from block to block.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        n_classes: int,
        *,
        width: int = 64,
        depth: Sequence[int] = (2, 2, 2, 2),
        norm: str = "group",
    ) -> None:
        super().__init__()
        _check_images("resnet18", input_shape)
        _check_count("resnet18", "width", width)
        _check_counts("resnet18", "depth", depth, 4)
        _check_norm("resnet18", norm)
        groups = _groups(width)
        self.stem = ConvNorm(input_shape[0], width, 3, 1, norm, groups)
        channels, blocks = width, []
        for stage, n_blocks in enumerate(depth):
            for i in range(n_blocks):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(Block(channels, width * 2**stage, stride, norm, groups))
                channels = width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels, n_classes)
        _initialise(self)
        if norm == "none":
            for block in blocks:
                nn.init.zeros_(block.second.conv.weight)
        self.paper_probes = ("stem", *(f"blocks.{i}.sum" for i in range(len(blocks))))

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs [B, C, H, W] to logits [B, n_classes]."""
        x = self.blocks(F.relu(self.stem(inputs)))
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits


class VGG16(nn.Module):
    """VGG16 for small images: 13 convolutions in five stages, a max-pool after each, and one linear layer.

    The stages are width, 2, 4, 8 and 8 times width channels wide, with `depth` convolutions each. A max-pool is left
    out where the image is one pixel high or wide already. A global average pool and a single linear layer follow, as
    is usual for small images, in place of the three dense layers for ImageNet.
    norm: "none" (the paper's) has plain convolutions with biases; "group" and "batch" as in ResNet18.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        n_classes: int,
        *,
        width: int = 64,
        depth: Sequence[int] = (2, 2, 3, 3, 3),
        norm: str = "none",
    ) -> None:
        super().__init__()
        _check_images("vgg16", input_shape)
        _check_count("vgg16", "width", width)
        _check_counts("vgg16", "depth", depth, 5)
        _check_norm("vgg16", norm)
        channels, convolutions = input_shape[0], []
        for n_convolutions, multiple in zip(depth, (1, 2, 4, 8, 8), strict=True):
            for _ in range(n_convolutions):
                convolutions.append(ConvNorm(channels, width * multiple, 3, 1, norm, _groups(width)))
                channels = width * multiple
        self.convolutions = nn.ModuleList(convolutions)
        self.pool_after = frozenset(itertools.accumulate(depth))
        self.classifier = nn.Linear(channels, n_classes)
        _initialise(self)
        self.paper_probes = tuple(f"convolutions.{i}" for i in range(len(convolutions)))

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs [B, C, H, W] to logits [B, n_classes]."""
        x = inputs
        for n_done, convolution in enumerate(self.convolutions, start=1):
            x = F.relu(convolution(x))
            if n_done in self.pool_after and min(x.shape[2:]) > 1:
                x = F.max_pool2d(x, 2)
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits


class Block(nn.Module):
    """Two convolutions beside a shortcut. `sum` is a module of its own, so that a hook sees the sum before its ReLU."""

    def __init__(self, n_in: int, n_out: int, stride: int, norm: str, groups: int) -> None:
        super().__init__()
        self.first = ConvNorm(n_in, n_out, 3, stride, norm, groups)
        self.second = ConvNorm(n_out, n_out, 3, 1, norm, groups)
        same = stride == 1 and n_in == n_out
        self.shortcut = nn.Identity() if same else ConvNorm(n_in, n_out, 1, stride, norm, groups)
        self.sum = Sum()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.sum(self.second(F.relu(self.first(x))), self.shortcut(x)))


class Sum(nn.Module):
    """The sum of two tensors."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left + right


class ConvNorm(nn.Module):
    """A convolution that keeps the image's size (but for its stride) and its normalisation, before any ReLU."""

    def __init__(self, n_in: int, n_out: int, size: int, stride: int, norm: str, groups: int) -> None:
        super().__init__()
        convolution = StandardisedConv2d if norm == "group" else nn.Conv2d
        self.conv = convolution(n_in, n_out, size, stride, padding=size // 2, bias=norm == "none")
        self.norm: nn.Module = nn.Identity()
        if norm == "group":
            self.norm = nn.GroupNorm(groups, n_out)
        elif norm == "batch":
            self.norm = nn.BatchNorm2d(n_out)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.norm(self.conv(x))
        return output


class StandardisedConv2d(nn.Conv2d):
    """A convolution whose filters are used with mean 0 and variance 1 over their input channels and pixels."""

    def standardised(self) -> Tensor:
        """The filters as used, [n_out, n_in, size, size]."""
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        standardised: Tensor = (self.weight - mean) * torch.rsqrt(variance + 1e-10)
        return standardised

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self._conv_forward(x, self.standardised(), self.bias)
        return output


OWN: dict[str, type[nn.Module]] = {"mlp": MLP, "resnet18": ResNet18, "vgg16": VGG16}


def _initialise(model: nn.Module) -> None:
    """He et al.'s normal initialisation, without which a deep network that has no normalisation does not train."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _groups(width: int) -> int:
    """Groups of GroupNorm: at most 32, a divisor of the width, two channels or more to a group (but for odd widths)."""
    return max(1, math.gcd(64, width) // 2)


def _build_own(name: str, parameters: Mapping[str, Any], input_shape: tuple[int, ...], n_classes: int) -> nn.Module:
    allowed = [p.name for p in inspect.signature(OWN[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for key in parameters:
        if key not in allowed:
            raise LeadlineError(f"architecture {name}: no parameter {key}; allowed: {', '.join(allowed)}")
    return OWN[name](input_shape, n_classes, **parameters)


def _build_torchvision(name: str, parameters: Mapping[str, Any], n_classes: int) -> nn.Module:
    models = import_torchvision().models
    known = models.list_models(module=models)
    if name not in known:
        close = difflib.get_close_matches(name, [*OWN, *known], n=4)
        hint = f"did you mean {', '.join(close)}" if close else f"give one of {', '.join(OWN)}"
        raise LeadlineError(
            f"architecture {name}: no such name; {hint}, a torchvision classifier, or a function of yours, "
            "module:function"
        )
    return _call(name, models.get_model_builder(name), _with_classes(parameters, n_classes))


def _build_from_function(architecture: str, parameters: Mapping[str, Any], n_classes: int) -> nn.Module:
    module_name, _, function_name = architecture.partition(":")
    if module_name.split(".")[0] == "torchvision":
        import_torchvision()
        parameters = _with_classes(parameters, n_classes)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may raise anything
        raise LeadlineError(
            f"architecture {architecture}: module {module_name} does not import ({one_line(error)}); "
            "install it, mend it, or put its folder on PYTHONPATH"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        close = difflib.get_close_matches(function_name, [n for n, v in vars(module).items() if callable(v)])
        hint = f"did you mean {', '.join(close)}" if close else "write module:function"
        raise LeadlineError(f"architecture {architecture}: {module_name} has no function {function_name!r}; {hint}")
    return _call(architecture, function, parameters)


def _with_classes(parameters: Mapping[str, Any], n_classes: int) -> dict[str, Any]:
    """Parameters for torchvision; weights come with their own number of classes."""
    if "num_classes" in parameters or parameters.get("weights") is not None:
        return dict(parameters)
    return {**parameters, "num_classes": n_classes}


def _call(architecture: str, function: Callable[..., Any], parameters: Mapping[str, Any]) -> nn.Module:
    given = ", ".join(f"{key}={value!r}" for key, value in parameters.items())
    try:
        model = function(**parameters)
    except Exception as error:  # code that is not ours may raise anything
        raise LeadlineError(
            f"architecture {architecture}: called with ({given}) it fails ({one_line(error)}); "
            f"allowed parameters: {_allowed(function)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise LeadlineError(
            f"architecture {architecture}: it returned {type(model).__name__}; return a torch.nn.Module"
        )
    return model


def _allowed(function: Callable[..., Any]) -> str:
    """The parameters that a function takes."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some functions written in C have no signature
        return "those of its documentation"
    names = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if _is_torchvision_builder(function):  # which hands most parameters on to a class
        with torch.device("meta"):  # builds the network without its memory
            names += [name for name in inspect.signature(type(function())).parameters if name not in names]
    elif len(names) < len(parameters):
        names.append("others that it hands on")
    return ", ".join(names) or "none"


def _is_torchvision_builder(function: Callable[..., Any]) -> bool:
    if not getattr(function, "__module__", "").startswith("torchvision.models."):
        return False
    models = import_torchvision().models
    return function in map(models.get_model_builder, models.list_models(module=models))


def _check_count(name: str, parameter: str, value: Any) -> None:
    if not _is_count(value):
        raise LeadlineError(f"architecture {name}: {parameter} is {value!r}; allowed: an integer from 1")


def _check_counts(name: str, parameter: str, values: Any, length: int) -> None:
    if not isinstance(values, (list, tuple)) or len(values) != length or not all(_is_count(v) for v in values):
        raise LeadlineError(
            f"architecture {name}: {parameter} is {values!r}; allowed: a list of {length} integers from 1"
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_norm(name: str, norm: Any) -> None:
    if norm not in NORMS:
        raise LeadlineError(f"architecture {name}: norm is {norm!r}; allowed: {', '.join(NORMS)}")


def _check_images(name: str, input_shape: tuple[int, ...]) -> None:
    if len(input_shape) != 3:
        raise LeadlineError(
            f"architecture {name}: it takes images of shape (channels, height, width), these inputs have shape "
            f"{tuple(input_shape)}; use mlp"
        )
