"""A plan for a cluster, or for points, that are not at hand: they are described, and nothing is started."""

import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from leadline.cluster.graph import SHARE_OF_MEMORY, Graph, Outline
from leadline.cluster.plan import Cluster, Plan, plan_of
from leadline.cluster.rates import GPUS, START, assumed, measure, measure_reading, networks_of
from leadline.config import Engine, PointsConfig, RunConfig
from leadline.errors import LeadlineError
from leadline.knn.arrays import Array
from leadline.members.architectures import without_weights
from leadline.points import open_points
from leadline.points.source import two_parts

GPUS_OF_A_NODE = 8  # unless told otherwise


@dataclass(frozen=True)
class Described:
    """Points that are not at hand: how many in each part, of how many classes, and the shape of an input.

    They are read as random numbers.
    """

    train: int
    test: int
    classes: int
    input_shape: tuple[int, ...]

    @cached_property
    def parts(self) -> Array:
        return two_parts(self.train, self.test)

    @cached_property
    def labels(self) -> Array:
        return (np.arange(len(self)) % self.classes).astype(np.int32)

    @cached_property
    def label_names(self) -> tuple[str, ...]:
        return tuple(map(str, range(self.classes)))

    def __len__(self) -> int:
        return self.train + self.test

    def read(self, ids: Array) -> Array:
        """float32 [n, *input_shape]."""
        return np.random.default_rng(0).standard_normal((len(ids), *self.input_shape), np.float32)

    def read_on(self, ids: Array, device: torch.device | str) -> torch.Tensor:
        """The same on a device."""
        return torch.from_numpy(self.read(ids)).to(device)


def without_downloads(config: RunConfig) -> RunConfig:
    """The same run with random weights in place of those that torchvision would download: a plan needs none."""
    members = tuple(
        entry.model_copy(update={"parameters": without_weights(entry.architecture, entry.parameters)})
        for entry in config.members
    )
    return config.model_copy(update={"members": members})


def points_of(config: PointsConfig, count: str | None, classes: int, shape: tuple[int, ...] | None) -> Outline:
    """The points that a configuration names, or those that are described in their place (see `describe_points`)."""
    if count is not None:
        return describe_points(config, count, classes, shape)
    try:
        return open_points(config)
    except LeadlineError as error:
        raise LeadlineError(f"{error}; or describe them: --points TRAIN+TEST --classes N --input SHAPE") from None


def describe_points(config: PointsConfig, count: str, classes: int, shape: tuple[int, ...] | None) -> Described:
    """Points that are not at hand. count: as TRAIN+TEST, or TRAIN alone; shape: of an input, None: as they are cropped.

    Raises LeadlineError for what is no count, and where nothing tells the shape.
    """
    train, plus, test = count.partition("+")
    if not train.isdigit() or not int(train) or (plus and not test.isdigit()):
        raise LeadlineError(f"--points: {count!r} is no count; write that of part train, or TRAIN+TEST, as 60000+10000")
    if shape is None and config.crop is None:
        raise LeadlineError("--input: give the shape of a point's input, as 3x32x32; the configuration has no crop")
    return Described(int(train), int(test or 0), classes, shape or (3, config.crop or 0, config.crop or 0))


def describe_cluster(
    engine: Engine, *, nodes: int, cpus: int | None, gpus: int | None, gpu: str | None, memory: float | None,
    scratch: float | None, price: float | None,
) -> Cluster:  # fmt: skip
    """A cluster that is not at hand; all but nodes and price are a node's, memory and scratch in bytes.

    What is not given is a GPU's share of a node as clouds rent them, or as this machine has it. Raises LeadlineError
    where no worker fits a node, and for a GPU that is not known.
    """
    if gpu is not None and gpu not in GPUS:
        raise LeadlineError(f"--gpu: {gpu!r} is not known; allowed: {', '.join(GPUS)}")
    if engine.gpus and gpu is None:
        raise LeadlineError(
            f"engine.gpus: a worker asks for {engine.gpus:g} GPUs; describe them, as --gpu {next(iter(GPUS))}, "
            "or set it to 0"
        )
    kind, n = (GPUS[gpu], gpus or GPUS_OF_A_NODE) if gpu is not None else (None, 0)
    n_cpus = cpus or (kind.cpus * n if kind else 0) or os.cpu_count() or 1
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    node_memory = int(memory or (kind.host * n if kind else 0) or here)
    room = engine.workers_in(n_cpus, n) * nodes
    workers = engine.workers or room
    if not 0 < workers <= room:
        raise LeadlineError(
            f"engine: {max(workers, 1)} workers of {engine.threads} CPUs and {engine.gpus:g} GPUs do not fit {nodes} "
            f"nodes of {n_cpus} CPUs and {n} GPUs; lower engine.workers, engine.threads or engine.gpus"
        )
    of_a_node = f"{n} {gpu.upper()}, {n_cpus} CPUs" if gpu else f"{n_cpus} CPUs"
    return Cluster(
        nodes=nodes,
        workers=workers,
        memory=node_memory,
        free=node_memory // SHARE_OF_MEMORY,
        disk=int(scratch or (kind.scratch * n if kind else 0) or shutil.disk_usage(Path.cwd()).free),
        device=int(kind.memory * min(1.0, engine.gpus)) if kind and engine.gpus else None,
        is_local=nodes == 1,
        price=price,
        said=f"{nodes} node{'s' * (nodes > 1)} of {of_a_node}, {workers} workers",
    )


def plan_described(graph: Graph, points: Outline, cluster: Cluster, gpu: str | None) -> Plan:
    """Plan a run on a cluster that is not at hand: its GPUs' rates are assumed, its CPUs taken to be as this one's."""
    networks = networks_of(graph, points)
    read, of_reading = measure_reading(graph.config.points, points, at_hand=not isinstance(points, Described))
    if gpu is not None and graph.config.engine.gpus:
        rates = assumed(graph, networks, gpu, read)
        return plan_of(graph, networks, cluster, replace(rates, said=(*rates.said, of_reading)))
    rates = measure(graph, points, Path(tempfile.gettempdir()), Path.cwd())
    said = (*rates.said, f"assumed: {START:g} s until workers are there, whose CPUs are as this machine's")
    if isinstance(points, Described):
        said = (*said, "points are made up at random; in real ones, bounds leave more out of a search", of_reading)
        rates = replace(rates, read=read)
    return plan_of(graph, networks, cluster, replace(rates, start=START, said=said))
