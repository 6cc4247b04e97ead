"""What a run is: typed, validated, fingerprinted.

A configuration is a small YAML file (or the same as a mapping), the whole record of an experiment. Unknown keys are
refused, so that a misspelt key is never a silent default.
"""

import hashlib
import json
from collections.abc import Mapping
from copy import deepcopy
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from leadline.embedding.reductions import Choice, checked_choice, parse_reduction
from leadline.errors import LeadlineError
from leadline.knn import parse_method


class Section(BaseModel):
    """Base of every part of a configuration: unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Corruption(Section):
    """Fixed random corruption of the training part's labels; the clean label is kept beside the given one."""

    share: float = Field(gt=0, le=1)
    seed: int = Field(default=0, ge=0)


class PointsSection(Section):
    """What every source of points understands beside its own keys."""

    corrupt: Corruption | None = None
    relabel: Path | None = Field(
        default=None, description=".npy, int [N]: labels of the training part that replace the given ones, -1 for none"
    )
    resize: int | None = Field(default=None, ge=1, description="shorter side of every image, in pixels")
    crop: int | None = Field(default=None, ge=1, description="side of the square cut from the middle, in pixels")
    mean: tuple[float, ...] | None = Field(default=None, description="per channel, subtracted after scaling to [0, 1]")
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(default=None, description="per channel, divided by")

    @model_validator(mode="after")
    def _mean_with_std(self) -> Self:
        if (self.mean is None) != (self.std is None) or len(self.mean or ()) != len(self.std or ()):
            raise ValueError("mean and std go together and have one value for each channel")
        return self


class EncodedPoints(PointsSection):
    """A source of images that are decoded when they are read."""

    decoder: Literal["pillow", "nvjpeg"] = Field(
        default="pillow",
        description="nvjpeg, with engine.gpus: the GPU decodes and resizes JPEGs, to pixels that are some levels off",
    )


class Digits(PointsSection):
    """scikit-learn's 1,797 handwritten digits, 8 x 8; all of them in part train."""

    source: Literal["digits"]


class TorchvisionPoints(PointsSection):
    """A data set that torchvision downloads, or finds in `path`."""

    source: Literal["fashion-mnist", "mnist", "cifar10", "cifar100", "svhn"]
    path: Path | None = Field(
        default=None, description="folder of the files; by default the places where they usually are"
    )
    download: bool = True


class ImageFolder(EncodedPoints):
    """ImageNet's layout: one folder a class, images in it; decoded when they are read."""

    source: Literal["image-folder"]
    train: Path
    test: Path | None = None


class ParquetPoints(EncodedPoints):
    """Parquet files with a column of image bytes or of numeric lists, and a column of integer labels."""

    source: Literal["parquet"]
    train: str = Field(description="a file, a folder or a glob")
    test: str | None = None
    input: str = "image"
    label: str = "label"
    key: str | None = Field(default=None, description="column of names; by default the image's path, or file and row")


class NpyPoints(PointsSection):
    """Arrays on disk, mapped into memory: inputs [N, ...], labels [N], and where given parts [N] (0 train, 1 test)."""

    source: Literal["npy"]
    inputs: Path
    labels: Path
    parts: Path | None = None


PointsConfig = Annotated[
    Digits | TorchvisionPoints | ImageFolder | ParquetPoints | NpyPoints, Field(discriminator="source")
]


class RandomSplit(Section):
    """A member's own random share of the training part; the rest of it, and the test part, are held out."""

    kind: Literal["random"] = "random"
    share: float = Field(default=0.9, gt=0, le=1)


class PartSplit(Section):
    """The whole training part; the test part is held out."""

    kind: Literal["part"]


class FileSplit(Section):
    """Ids of the training points: a one-dimensional integer .npy file; `{seed}` in the path is the member's seed."""

    kind: Literal["file"]
    path: str


SplitConfig = Annotated[RandomSplit | PartSplit | FileSplit, Field(discriminator="kind")]


class Learning(Section):
    """Checkpoints of a training, besides the initialisation and the last step, which always are some."""

    per_decade: int = Field(default=8, ge=1, description="from step 1 on, equally spaced by the logarithm of the step")
    per_epoch: int = Field(default=1, ge=0, description="equally spaced in each epoch of the member's own split")


class Training(Section):
    """SGD as in the paper's appendix (PAPER.md): momentum 0.9, learning rate 0.04 times 0.2 at fixed steps."""

    steps: int = Field(ge=0, description="optimiser steps")
    batch: int = Field(default=128, ge=1, description="points a step")
    learning_rate: float = Field(default=0.04, gt=0)
    milestones: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(), description="steps at which the rate is cut"
    )
    decay: float = Field(default=0.2, gt=0, le=1, description="factor of the learning rate at each milestone")
    momentum: float = Field(default=0.9, ge=0, lt=1)
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="of the training products; auto: bfloat16 where the hardware multiplies it natively"
    )
    at_once: int = Field(
        default=1, ge=1, description="networks of the entry that are trained as one, by vmap: the same, but other bits"
    )
    cuda_graph: bool = Field(default=False, description="on a GPU, a step is captured in a CUDA graph and replayed")
    learning: Learning | None = Field(
        default=None, description="all points are run through the network at its checkpoints: the table `learning`"
    )


class Checkpoint(Section):
    """What an entry of members is where it is one network at an earlier step of its training."""

    of: str = Field(description="the name of the entry that is the network at its last step")
    step: int = Field(ge=0, description="optimiser steps done")


class MemberConfig(Section):
    """`count` members of one architecture, with the seeds `seed` … `seed + count - 1`."""

    architecture: str = Field(description="mlp, resnet18, vgg16, a torchvision classifier, or module:function")
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_.-]+$", description="by default the architecture's")
    parameters: dict[str, Any] = Field(default_factory=dict)
    count: int = Field(default=1, ge=1)
    seed: int = Field(default=0, ge=0)
    split: SplitConfig = RandomSplit()
    weights: str | None = Field(
        default=None, description=".safetensors or state-dict file; `{seed}` is the member's seed"
    )
    training: Training | None = None
    probes: Literal["paper", "auto"] | tuple[str, ...] | None = Field(
        default=None, description="paper for mlp, resnet18 and vgg16, otherwise auto; or module names, with wildcards"
    )
    at_steps: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(), description="earlier steps of its training: an entry NAME-at-STEP is added for each"
    )
    checkpoint: Checkpoint | None = Field(
        default=None, description="of an entry that at_steps added, or of given weights"
    )

    @field_validator("architecture")
    @classmethod
    def _not_empty(cls, value: str) -> str:
        if not value:
            raise ValueError("an architecture has a name")
        return value

    @model_validator(mode="after")
    def _weights_or_training(self) -> Self:
        if self.weights is not None and self.training is not None:
            raise ValueError("give weights or training, not both")
        if self.at_steps and self.training is None:
            raise ValueError(
                "at_steps needs training; for weights of yours give an entry with checkpoint for each step"
            )
        if self.at_steps and self.training and max(self.at_steps) >= self.training.steps:
            raise ValueError(f"at_steps are before the last of {self.training.steps} steps")
        return self

    def at(self, step: int) -> "MemberConfig":
        """The same at an earlier step: trained for fewer steps it is bit for bit the network that training passes."""
        assert self.training is not None
        changes = {
            "name": f"{self.label}-at-{step}",
            "training": self.training.model_copy(update={"steps": step, "learning": None}),
            "at_steps": (),
            "checkpoint": Checkpoint(of=self.label, step=step),
        }
        return self.model_copy(update=changes)

    @property
    def label(self) -> str:
        """The architecture's name in the tables."""
        return self.name or self.architecture.replace(":", ".")

    @property
    def placement(self) -> str | list[str] | None:
        """Its probes as `place_probes` takes them."""
        return list(self.probes) if isinstance(self.probes, tuple) else self.probes


LIBRARIES = 960 << 20  # bytes that an actor takes before it searches: Python, torch, Ray, a network, compiled loops


class Engine(Section):
    """How the work is cut, and who does it. A run may go on with others of those keys that `record` leaves out."""

    workers: int | None = Field(
        default=None, ge=1, description="actors; by default as many as the cluster has room for"
    )
    threads: int = Field(default=1, ge=1, description="CPU threads of an actor")
    gpus: float = Field(default=0, ge=0, description="share of a GPU of an actor")
    batch_size: int = Field(default=256, ge=1, description="points of one forward pass")
    shard_size: int = Field(default=8192, ge=1, description="points of one embedding unit, rounded up to whole batches")
    group_size: int = Field(default=4, ge=1, description="members that are embedded and kept on disk together")
    query_block: int = Field(default=8192, ge=1, description="queries of one voting unit")
    memory_budget: int = Field(
        default=4 << 30,
        ge=1,
        description="bytes of memory for an actor; banks that are too large for it are searched in parts",
    )
    scratch: Path | None = Field(
        default=None, description="folder for embeddings; by default memory where they fit, else disk"
    )
    placement: Literal["auto", "shared", "node", "resident", "device"] = Field(
        default="auto",
        description="where embeddings lie: shared, in a folder that all workers see; node, on the disk of the node "
        "that made them; resident, with the worker that made them; device, in its GPU and nowhere else, a member at a "
        "time (for exact votes at full width alone); auto: shared on one machine, elsewhere resident where a group of "
        "members fits memory_budget, else node",
    )
    keep_indexes: bool = Field(
        default=False, description="keep banks and indexes in the run, for the depths of new points"
    )

    @property
    def search_memory(self) -> int:
        """Bytes that searching may take of the budget: what libraries leave of it, or a fourth of a small one."""
        return max(self.memory_budget - LIBRARIES, self.memory_budget // 4)

    def workers_in(self, cpus: float, gpus: float) -> int:
        """How many actors there is room for."""
        room = int(cpus // self.threads)
        return min(room, int(gpus // self.gpus)) if self.gpus else room


class Audit(Section):
    """How the error of indexes and reductions is measured: a random sample is answered exactly at full width too."""

    sample: int = Field(default=1000, ge=1, description="points; all of them where there are fewer")
    seed: int = Field(default=0, ge=0, description="of the sample")
    depth_agreement: float | None = Field(
        default=None, gt=0, lt=1, description="share of exact depths that `method: auto` must keep"
    )


class RunConfig(Section):
    """One configuration, whole."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    points: PointsConfig
    members: tuple[MemberConfig, ...] = Field(min_length=1, description="with those that `at_steps` adds")
    k: int = Field(default=30, ge=1, description="neighbours that vote")
    method: str | dict[str, str] = Field(
        default="exact",
        description="exact, an index as ivf-flat:nlist=1024,nprobe=32, or auto; or one of them for each pattern of "
        "probe names (shell wildcards), and exact where none matches",
    )
    audit: Audit = Audit()
    votes: Literal["all", "until-decided"] = Field(
        default="all",
        description="until-decided: from the last probe down, a point's votes end where its depth is told",
    )
    leave_one_out: bool = Field(default=True, description="a training point is left out of its own neighbours")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of the forward pass that makes embeddings; bfloat16 changes them"
    )
    reduction: str | dict[str, str] = Field(
        default="none",
        description="what is stored of the embeddings: none, pca:M, jl:M or pool:HxW for all layers, or by probe name",
    )
    engine: Engine = Engine()

    @field_validator("members", mode="after")
    @classmethod
    def _with_checkpoints(cls, value: tuple[MemberConfig, ...]) -> tuple[MemberConfig, ...]:
        """Earlier steps come after all final networks, each an entry of its own."""
        final = tuple(entry.model_copy(update={"at_steps": ()}) for entry in value)
        return final + tuple(entry.at(step) for entry in value for step in sorted(set(entry.at_steps)))

    @field_validator("reduction", mode="plain")
    @classmethod
    def _known_reduction(cls, value: Any) -> Choice:
        try:
            choice = checked_choice(value)
        except LeadlineError as error:
            raise ValueError(str(error)) from None
        if not isinstance(choice, str) and parse_reduction(choice.get("input", "none")).kind == "pca":
            raise ValueError("input: pca is fitted to each member, and the input is kept once for all; use jl or pool")
        return choice

    @field_validator("method")
    @classmethod
    def _known_methods(cls, value: str | dict[str, str]) -> str | dict[str, str]:
        if isinstance(value, str):
            return _in_full(value)
        return {pattern: _in_full(method) for pattern, method in value.items()}

    @model_validator(mode="after")
    def _auto_with_target(self) -> Self:
        if ("auto" in self.methods) != (self.audit.depth_agreement is not None):
            raise ValueError("method auto and audit.depth_agreement, which it must keep, go together")
        return self

    @model_validator(mode="after")
    def _nothing_to_keep(self) -> Self:
        plain = self.methods == {"exact"} and self.reduction == "none" and self.votes == "all"
        if self.engine.placement == "device" and (not plain or self.engine.keep_indexes):
            raise ValueError(
                "engine.placement: device keeps no embeddings, so all votes are exact and at full width; leave out "
                "method, reduction, votes and engine.keep_indexes, or choose another placement"
            )
        return self

    @model_validator(mode="after")
    def _decoder_with_gpu(self) -> Self:
        if isinstance(self.points, EncodedPoints) and self.points.decoder == "nvjpeg" and not self.engine.gpus:
            raise ValueError("points.decoder: nvjpeg decodes on a GPU; set engine.gpus, or leave decoder out")
        return self

    @model_validator(mode="after")
    def _distinct_members(self) -> Self:
        named = {member.label: member for member in self.members}
        if len(named) < len(self.members):
            raise ValueError("two entries of members have the same name: give each its own with `name`")
        for member in self.members:
            if member.checkpoint:
                _refuse_other_networks(member, named.get(member.checkpoint.of), member.checkpoint.of)
        return self

    @property
    def methods(self) -> set[str]:
        """All methods that are named."""
        return {self.method} if isinstance(self.method, str) else set(self.method.values())

    def method_of(self, probe: str) -> str:
        """The method of a probe, by its name. Raises LeadlineError where two patterns match it."""
        if isinstance(self.method, str):
            return self.method
        matching = [pattern for pattern in self.method if fnmatchcase(probe, pattern)]
        if len(matching) > 1:
            # Mappings have no order that a fingerprint keeps.
            raise LeadlineError(f"method: probe {probe} matches {' and '.join(matching)}; let one pattern match it")
        return self.method[matching[0]] if matching else "exact"

    def record(self) -> dict[str, Any]:
        """All that the results depend on, as plain JSON values: all but who does the work, and where."""
        record = self.model_dump(mode="json")
        for key in ("workers", "group_size", "memory_budget", "scratch", "placement"):
            del record["engine"][key]
        return record

    def fingerprint(self) -> str:
        """SHA-256 of `record`, in hexadecimal."""
        return hashlib.sha256(json.dumps(self.record(), sort_keys=True).encode()).hexdigest()


def _refuse_other_networks(earlier: MemberConfig, final: MemberConfig | None, name: str) -> None:
    """A checkpoint is compared with the last step of its training member by member, probe by probe."""
    if final is None or final.checkpoint:
        raise ValueError(f"checkpoint: no entry of members has the name {name} and is a network at its last step")
    for key in ("architecture", "parameters", "count", "seed", "split", "probes"):
        if getattr(earlier, key) != getattr(final, key):
            raise ValueError(
                f"checkpoint: {earlier.label} has another {key} than {name}; give the same, as one network"
            )


def _in_full(method: str) -> str:
    """A method with all its parameters, so that one method has one text."""
    if method == "auto":
        return method
    try:
        return str(parse_method(method))
    except LeadlineError as error:
        raise ValueError(f"{str(error).removeprefix('method: ')}, or auto") from None


def preset_names() -> list[str]:
    """The presets that come with the package."""
    return sorted(path.name.removesuffix(".yaml") for path in _presets().iterdir() if path.name.endswith(".yaml"))


def load_config(source: str | Path | Mapping[str, Any], overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read a preset, a YAML file or a mapping, apply `key.key=value` overrides, and validate.

    Raises LeadlineError that names the key, what was given and what is allowed.
    """
    tree, where = (deepcopy(dict(source)), "configuration") if isinstance(source, Mapping) else _read(str(source))
    for override in overrides:
        apply_override(tree, override)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise LeadlineError(f"{where}: {_explain(error, tree)}") from None


def _presets() -> Any:
    return resources.files("leadline") / "presets"


def _read(source: str) -> tuple[dict[str, Any], str]:
    if source in preset_names():
        text, where = (_presets() / f"{source}.yaml").read_text(), f"preset {source}"
    else:
        try:
            text, where = Path(source).read_text(), source
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a text file"
            raise LeadlineError(
                f"{source}: {reason}; give a YAML file or one of the presets {', '.join(preset_names())}"
            ) from None
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        raise LeadlineError(f"{where}:{line} not YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(tree, dict):
        raise LeadlineError(f"{where}: a configuration is a mapping of keys to values, this is {type(tree).__name__}")
    return tree, where


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one value of a configuration, in place: `members.0.training.steps=100`; numbers are places in a list."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise LeadlineError(f"--set {override}: write key=value, as in --set engine.workers=2")
    node: Any = tree
    *parents, last = key.split(".")
    for parent in parents:
        node = _child(node, parent, key)
    if isinstance(node, list):
        _child(node, last, key)
        node[int(last)] = yaml.safe_load(text)
    elif isinstance(node, dict):
        node[last] = yaml.safe_load(text)
    else:
        raise LeadlineError(f"--set {key}: {parents[-1]} has no keys of its own, it is {node!r}")


def _child(node: Any, name: str, key: str) -> Any:
    if isinstance(node, list):
        if not name.isdigit() or int(name) >= len(node):
            raise LeadlineError(
                f"--set {key}: {name} is no place in a list of {len(node)}; allowed 0 to {len(node) - 1}"
            )
        return node[int(name)]
    if isinstance(node, dict):
        if node.get(name) is None:
            node[name] = {}
        return node[name]
    raise LeadlineError(f"--set {key}: {name} cannot be set inside {node!r}")


def _explain(error: ValidationError, tree: dict[str, Any]) -> str:
    """Every mistake in one line: key, what is allowed, what was given."""
    lines = []
    for mistake in error.errors(include_url=False):
        key = _key(mistake["loc"], tree) or "configuration"
        kind = mistake["type"]
        if kind == "extra_forbidden":
            lines.append(f"{key}: no such key (given {mistake['input']!r})")
        elif kind == "missing":
            lines.append(f"{key}: required, not given")
        else:
            given = "" if isinstance(mistake["input"], (dict, list)) else f" (given {mistake['input']!r})"
            lines.append(f"{key}: {mistake['msg'].removeprefix('Value error, ')}{given}")
    return "; ".join(lines)


def _key(place: tuple[int | str, ...], node: Any) -> str:
    """The dotted key of a mistake, without the tags that pydantic puts in where a section has several forms."""
    parts = []
    for part in place:
        if isinstance(node, dict) and part not in node and part in (node.get("source"), node.get("kind")):
            continue
        if isinstance(part, str) and not isinstance(node, dict):
            break  # a form of a value, such as literal[...], is no key
        parts.append(str(part))
        inside = isinstance(node, list) and isinstance(part, int) and part < len(node)
        node = node[part] if inside else node.get(part) if isinstance(node, dict) else None
    return ".".join(parts)
