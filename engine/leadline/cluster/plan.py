"""What a run will take, before anything of it runs: units, bytes, memory, time and cost, stage by stage.

Units and bytes follow from the code that makes them; seconds are those times a worker's rates (`rates`).
"""

import heapq
import io
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from leadline.cluster.graph import SHARE_OF_DISK, STAGES, Graph
from leadline.cluster.rates import BACKWARD, Network, Rates
from leadline.cluster.work import OUTPUTS, VOTES, Member, blocks, found_by_point, found_in_part, may_err, shard_edges
from leadline.config import Learning, Training
from leadline.embedding.extract import SAMPLE, SAMPLE_OF_EACH
from leadline.embedding.in_place import DECODED, EMBEDDED, probe_groups
from leadline.embedding.principal import PASSES, search_bytes
from leadline.embedding.reductions import parse_reduction, stored_width
from leadline.knn.choice import candidates
from leadline.knn.exact import SPARE, cut, fits_memory
from leadline.knn.on_device import KEPT
from leadline.members.probes import Probe
from leadline.members.train import checkpoint_steps, is_resident, steps_per_epoch
from leadline.store.schemas import DEPTHS, LEARNING, VOTE_FIELDS
from leadline.store.tables import ROWS

# Stages that go on side by side; one such step of a group of members begins when the last has ended.
STEPS = (
    ("train",),
    ("whole",),
    ("embed",),
    ("trial", "index", "keep", "share", "part", "vote"),
    ("audit",),
    ("reduce",),
    ("free",),
)
SIMULATED = 4096  # units of a step whose order is played through; more of them end nearly together
ON_A_NODE = 2  # groups of members at a time, where a node's disk holds them: one is searched, the other embedded
MERGED = 6  # times what a block finds in a part: to join it to what was found in others, with copies and their order
WORK = 128 << 20  # bytes of a search beside what is counted, on a device
AHEAD = 3  # batches of inputs in main memory for a device: the one that it has, and two that are read
TABLES = 4  # that the driver writes, run.json among them
HANDED_OUT = 500  # units a second, by the driver, at least
IDLE = 0.5  # share of the workers' time that is worth a word where it is not used


@dataclass(frozen=True)
class Cluster:
    """Where a run is to be. memory: bytes of a node, for its workers; free: bytes of it that embeddings may take where
    the run's workers share them on one machine; disk: free bytes of a node's scratch, or of the one that all share;
    device: bytes of a worker's share of a GPU, None without one. price: of an hour of a node.
    """

    nodes: int
    workers: int
    memory: int
    free: int
    disk: int
    device: int | None
    is_local: bool
    price: float | None
    said: str


@dataclass
class Stage:
    """What a stage takes, of all members together. work: in its own measure; read, written: bytes; memory, device: the
    most that one of its units takes of a worker and of its GPU; seconds: of all workers together.
    """

    name: str
    measure: str
    units: int = 0
    work: int = 0
    flops: float = 0
    read: int = 0
    written: int = 0
    memory: int = 0
    device: int = 0
    seconds: float = 0.0

    def add(self, other: "Stage") -> None:
        """Another group's share."""
        for name in ("units", "work", "flops", "read", "written", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.memory, self.device = max(self.memory, other.memory), max(self.device, other.device)


@dataclass
class Plan:
    """stages: in the order of a run; base: bytes of a worker beside what its units take; scratch: of the embeddings of
    the largest group of members; seconds: from beginning to end, start: of them, until workers are there; advice: what
    would be quicker; refused: what cannot be, and what to change.
    """

    name: str
    points: int
    members: int
    probes: int
    placement: str
    cluster: Cluster
    stages: list[Stage]
    base: int
    scratch: int
    start: float
    seconds: float
    assumptions: list[str]
    advice: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def time(self, stage: Stage) -> float:
        """Seconds of a stage if it had all workers to itself; the last is the driver's own."""
        return stage.seconds if stage.name == "combine" else stage.seconds / self.cluster.workers

    @property
    def busy(self) -> float:
        """Share of the workers' time that is not spent waiting."""
        return sum(stage.seconds for stage in self.stages[:-1]) / (self.seconds * self.cluster.workers)

    def cost(self, seconds: float) -> float | None:
        """Of so many seconds of all nodes."""
        price = self.cluster.price
        return None if price is None else seconds / 3600 * self.cluster.nodes * price

    def record(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        stages = [
            {**asdict(stage), "time": self.time(stage), "cost": self.cost(self.time(stage))} for stage in self.stages
        ]
        totals = {"busy": self.busy, "cost": self.cost(self.seconds)}
        return {**asdict(self), "stages": stages, **totals}


def plan_of(graph: Graph, networks: Mapping[str, Network], cluster: Cluster, rates: Rates) -> Plan:
    """Plan a run on a cluster by what one of its workers does in a second."""
    engine, members = graph.config.engine, graph.members
    groups = graph.groups(members)
    largest = max(graph.embedding_bytes(group) for group in groups)
    placement = graph.placement(largest, cluster.is_local)
    places = {"shared": 1, "node": min(cluster.nodes, cluster.workers), "resident": cluster.workers}[placement]
    own = max(1, cluster.workers // places)
    reckoning = _Reckoning(graph, networks, rates, own, min(places, len(groups)), cluster.device)
    works = [reckoning.group(number, group) for number, group in enumerate(groups)]
    stages = {name: Stage(name, measure) for name, measure in STAGES.items()}
    for work in works:
        for name, stage in work.items():
            stages[name].add(stage)
    combine = reckoning.combine()
    in_memory = cluster.is_local and placement == "shared" and engine.scratch is None and largest <= cluster.free
    room = _room(cluster, placement, in_memory)
    together = _together(placement, room, largest)
    elapsed = _elapsed(works, cluster.workers, places, placement, together)
    handed_out = sum(stage.units for stage in stages.values()) / HANDED_OUT
    plan = Plan(
        name=graph.config.name,
        points=graph.points,
        members=len(members),
        probes=sum(len(graph.probes[member.architecture]) for member in members),
        placement="device" if graph.whole else placement,
        cluster=cluster,
        stages=[*(stage for stage in stages.values() if stage.units), combine],
        base=rates.memory,
        scratch=largest,
        start=rates.start,
        seconds=rates.start + rates.first + max(elapsed, handed_out) + combine.seconds,
        assumptions=[*rates.said, *reckoning.said()],
    )
    plan.refused = _refused(plan, in_memory, room)
    plan.advice = [*_waiting(plan, len(groups), places), *_audited(plan)]
    return plan


def _room(cluster: Cluster, placement: str, in_memory: bool) -> int:
    """Bytes for the embeddings of groups of members, at each place."""
    if in_memory:
        return cluster.free
    if placement == "shared":
        return int(SHARE_OF_DISK * cluster.disk)
    return cluster.disk if placement == "node" else cluster.disk // _per_node(cluster)


def _together(placement: str, room: int, largest: int) -> int:
    """Groups of members that are at a place at a time."""
    if placement == "resident":
        return 1
    return room // largest if placement == "shared" else min(ON_A_NODE, room // largest)


def _per_node(cluster: Cluster) -> int:
    return -(-cluster.workers // cluster.nodes)


def _elapsed(works: list[dict[str, Stage]], workers: int, places: int, placement: str, together: int) -> float:
    """Seconds until the last group is done. together: groups that are at a place at a time, so that one fills the gaps
    that another leaves; only the last has its own to the end.
    """
    if placement == "shared":
        return _of_a_place(works, workers, together)
    trained = _makespan([work["train"] for work in works], workers)
    at: list[list[dict[str, Stage]]] = [[] for _ in range(places)]
    for number, work in enumerate(works):
        at[number % places].append({name: stage for name, stage in work.items() if name != "train"})
    own = max(1, workers // places)
    return trained + max(_of_a_place(some, own, together) for some in at if some)


def _of_a_place(works: list[dict[str, Stage]], workers: int, together: int) -> float:
    alone = works if together <= 1 else works[-1:]
    filled = sum(stage.seconds for work in works[: len(works) - len(alone)] for stage in work.values()) / workers
    return filled + sum(_makespan([work[n] for n in names if n in work], workers) for work in alone for names in STEPS)


def _makespan(stages: Sequence[Stage], workers: int) -> float:
    """Seconds that workers take for the units of some stages, the longest of them first."""
    units = sorted(((stage.seconds / stage.units, stage.units) for stage in stages if stage.units), reverse=True)
    if sum(n for _, n in units) > SIMULATED:
        return max(units[0][0], sum(seconds * n for seconds, n in units) / workers)
    busy = [0.0] * workers
    for seconds, n in units:
        for _ in range(n):
            heapq.heapreplace(busy, busy[0] + seconds)
    return max(busy)


def _waiting(plan: Plan, groups: int, places: int) -> list[str]:
    if plan.busy >= IDLE or plan.placement == "shared":
        return []
    if plan.placement == "device":
        return [
            f"{groups} members, each made by one worker (placement device), have {places} workers, so workers wait; "
            "set engine.placement to shared, or take fewer nodes"
        ]
    return [
        f"{groups} groups of members have {places} places (placement {plan.placement}), so workers wait; set "
        "engine.placement to shared, lower engine.group_size, or take fewer nodes"
    ]


def _audited(plan: Plan) -> list[str]:
    seconds = {stage.name: stage.seconds for stage in plan.stages}
    share = seconds.get("audit", 0.0) / max(sum(seconds.values()), 1e-9)
    if share < IDLE:
        return []
    return [
        f"{share:.0%} of the work is the audit, for which the network makes whole embeddings of reduced probes again, "
        "bank and all; lower audit.sample, raise engine.memory_budget, or reduce fewer probes"
    ]


def _refused(plan: Plan, in_memory: bool, room: int) -> list[str]:
    """Of each thing that cannot be one line: what, how much, and what to change."""
    refused, cluster = [], plan.cluster
    if plan.scratch > room and not in_memory:
        refused.append(
            f"scratch: the embeddings of a group of members take {_bytes(plan.scratch)}, and there is room for "
            f"{_bytes(room)}; lower engine.group_size, or choose a reduction, as jl:1024, also for the input"
        )
    per_node = _per_node(cluster)
    most = max(plan.stages, key=lambda stage: stage.memory)
    needed = per_node * (plan.base + most.memory) + (plan.scratch if in_memory else 0)
    if needed > cluster.memory:
        refused.append(
            f"memory: {per_node} workers of a node take {_bytes(plan.base + most.memory)} each in stage {most.name}, "
            f"and it has {_bytes(cluster.memory)}; {_mend(most)}"
        )
    on_device = max(plan.stages, key=lambda stage: stage.device)
    if cluster.device is not None and on_device.device > cluster.device:
        refused.append(
            f"GPU memory: stage {on_device.name} takes {_bytes(on_device.device)}, and a worker has "
            f"{_bytes(cluster.device)}; {_mend(on_device)}"
        )
    return refused


def _mend(stage: Stage) -> str:
    if stage.name == "train":
        return "lower training.batch, training.at_once or engine.workers"
    if stage.name == "whole":
        return "choose another engine.placement, as auto, or fewer workers (engine.workers, engine.gpus)"
    if stage.name == "embed":
        return "lower engine.shard_size, engine.batch_size or engine.group_size, or choose a reduction"
    return "lower engine.memory_budget or engine.query_block, or choose a reduction"


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n < 1000 or unit == "TB":
            break
        n /= 1000
    return f"{n:.3g} {unit}" if n < 1000 else f"{n:,.0f} {unit}"


def _row_bytes(schema: pa.Schema, listed: int = 0) -> int:
    """Of a table before it is compressed; listed: values of each of its lists."""
    lists = [kind.value_type for kind in schema.types if pa.types.is_list(kind)]
    single = [kind for kind in schema.types if not pa.types.is_list(kind)]
    return sum(max(1, kind.bit_width // 8) for kind in [*single, *lists * listed])


def npy_bytes(dtype: Any, *shape: int) -> int:
    """Of a file of an array."""
    header = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    return len(header.getvalue()) + int(np.dtype(dtype).itemsize) * math.prod(shape)


@dataclass(frozen=True)
class _Reckoning:
    """Adds up what each stage takes for a group of members. workers: at a place; places: that have any group; device:
    bytes of a worker's share of a GPU, None without one.
    """

    graph: Graph
    networks: Mapping[str, Network]
    rates: Rates
    workers: int
    places: int
    device: int | None

    def group(self, number: int, members: Sequence[Member]) -> dict[str, Stage]:
        totals: Counter[str] = self.graph.totals(members)
        reckon: dict[str, Callable[[Stage, int, Sequence[Member]], None]] = {
            "train": self._train, "embed": self._embed, "trial": self._trial, "index": self._index,
            "keep": self._keep, "share": self._share, "part": self._part, "vote": self._vote, "whole": self._whole,
            "audit": self._audit, "reduce": self._reduce, "free": self._free,
        }  # fmt: skip
        stages = {}
        for name, measure in STAGES.items():
            if totals[name]:
                stages[name] = Stage(name, measure, totals[name])
                reckon[name](stages[name], number, members)
                written, opened = self._files(name, members)
                stages[name].seconds += totals[name] * (written * self.rates.file + opened * self.rates.opened)
        return stages

    def _files(self, stage: str, members: Sequence[Member]) -> tuple[int, int]:
        """Files that a unit writes, with its record, and those that it reads whole; shards are mapped."""
        probes = [len(self.graph.probes[member.architecture]) for member in members]
        match stage:
            case "embed":
                return sum(probes) + 1, len(members)
            case "whole":
                return 2 * sum(probes) // len(probes) * self.graph.blocks + self.graph.shards, 2
            case "reduce":
                of_a_member = sum(probes) // len(probes) * self.graph.blocks
                return 3, of_a_member * (1 + 2 * -(-self.graph.points // ROWS))
            case "free":
                return 0, sum(probes) // len(probes) * (self.graph.shards + 2 * self.graph.blocks)
            case _:
                return 2, 2

    def said(self) -> list[str]:
        """What is left out, or taken as the most that it may be."""
        graph = self.graph
        said = [
            "left out: hashing the data's contents before the run, and records of units (some hundred bytes each)",
            "inputs are counted as decoded, 4 bytes a value; tables before they are compressed",
            f"the driver hands out {HANDED_OUT} units a second",
        ]
        if graph.config.votes == "until-decided":
            said.append("votes until-decided: counted as if every vote were needed, the most that there may be")
        if graph.config.methods != {"exact"}:
            said.append("indexes are unmeasured: each is taken to cost as much as exact search of all points")
        if any(probe.reduction != "none" for probes in graph.probes.values() for probe in probes):
            said.append(
                "audit of reduced probes: the network runs to the end, not just to the probe; rows that float64 must "
                "settle are left out"
            )
        return said

    def combine(self) -> Stage:
        """The driver's last step: tables of members, of probes, and of the ensemble."""
        n = self.graph.points * len(self.graph.members)
        row = _row_bytes(DEPTHS)
        seconds = self.rates.reduce * 3 * n  # columns of depths, as many as three votes have
        seconds += TABLES * self.rates.file
        return Stage("combine", "points", 1, self.graph.points, read=n * row, seconds=seconds)

    def _train(self, stage: Stage, number: int, members: Sequence[Member]) -> None:
        for some in self.graph.begun(members):
            taken = [self._train_one(stage, member) for member in some]
            self._takes(stage, sum(needed for needed, _ in taken), sum(beside for _, beside in taken))

    def _train_one(self, stage: Stage, member: Member) -> tuple[int, int]:
        """Bytes that it needs without a GPU, and beside one; of several at once, as if they were trained alone."""
        values = math.prod(self._input.shape)
        recipe, network, n = member.config.training, self.networks[member.architecture], self._bank(member)
        kept = 4 * n * values if is_resident(n, self._input.shape) else 0
        probes = self.graph.probes[member.architecture]
        fitted = [(probe, parse_reduction(probe.reduction)) for probe in probes if "pca" in probe.reduction]
        stage.written += network.weights + sum(4 * p.width * (1 + r.size[0]) for p, r in fitted)
        needed = network.weights
        if recipe:
            stage.work += recipe.steps
            stage.seconds += recipe.steps * self.rates.step[member.architecture]
            stage.flops += BACKWARD * network.forward * recipe.steps * recipe.batch
            batch = min(recipe.batch, n)
            stage.read += kept or 4 * values * recipe.steps * batch
            stage.seconds += self.rates.read * (n if kept else recipe.steps * batch)
            needed = 3 * network.weights + kept + batch * (network.saved + 4 * values)  # with gradients, momentum
            if recipe.learning:
                needed += self._watch(stage, member, recipe, recipe.learning)
        if fitted:
            needed += max(search_bytes(p.width, r.size[0]) for p, r in fitted)
            sample = min(n, max(SAMPLE, SAMPLE_OF_EACH * max(r.size[0] for _, r in fitted)))
            passed = PASSES * sample
            stage.flops += passed * network.forward
            stage.seconds += passed * (self.rates.read + self.rates.embed[member.architecture])
        return needed, kept + network.weights

    def _watch(self, stage: Stage, member: Member, recipe: Training, learning: Learning) -> int:
        """Passes of all points at the checkpoints of a training. Returns the bytes of inputs that are kept for them."""
        n, values = self.graph.points, math.prod(self._input.shape)
        checkpoints = len(checkpoint_steps(recipe.steps, steps_per_epoch(self._bank(member), recipe.batch), learning))
        keeps, passed = is_resident(n, self._input.shape), n * checkpoints
        read = n if keeps else passed
        stage.read += 4 * values * read
        stage.written += n * _row_bytes(LEARNING, checkpoints)
        stage.flops += passed * self.networks[member.architecture].forward
        stage.seconds += read * self.rates.read + passed * self.rates.embed[member.architecture]
        return 4 * values * n if keeps else 0

    def _embed(self, stage: Stage, number: int, members: Sequence[Member]) -> None:
        graph, engine = self.graph, self.graph.config.engine
        probes = [probe for member in members for probe in graph.probes[member.architecture][1:]]
        if number < self.places:
            probes.append(self._input)
        sizes = [stop - first for first, stop in self._shards]
        stage.work = graph.points * len(members)
        stage.written = sum(npy_bytes(np.float32, n, stored_width(probe)) for n in sizes for probe in probes)
        stage.written += len(members) * self._outputs
        stage.read = 4 * graph.points * math.prod(self._input.shape)
        stage.flops = sum(self.networks[member.architecture].flops for member in members) * graph.points
        stage.seconds = graph.points * (
            self.rates.read + sum(self.rates.embed[member.architecture] for member in members)
        )
        stage.seconds += stage.written * self.rates.move
        weights = sum(self.networks[member.architecture].weights for member in members)
        held = weights + max(map(self._batch, members)) + self._signs(probes)
        self._takes(stage, held, 4 * engine.batch_size * sum(map(stored_width, probes)), held)

    def _share(self, stage: Stage, number: int, members: Sequence[Member]) -> None:
        graph, common = self.graph, self.graph.common
        stage.work = graph.points
        stage.written = self._found(found_by_point(common.k))
        if graph.common_parts:
            self._merge(stage, graph.common_parts, common.k)
            return
        key, width = (self._first.architecture, 0), stored_width(self._input)
        self._search(stage, key, len(common.ids), width, graph.points, stage.units, 1, common.k)
        stage.read += 4 * width * graph.points  # again, to put the neighbours in order

    def _part(self, stage: Stage, number: int, members: Sequence[Member]) -> None:
        graph, common, banks = self.graph, self.graph.common, self._side_by_side(members)
        if graph.shares(members):
            self._in_parts(stage, self._first, self._input, len(common.ids), graph.common_parts, banks, common.k)
        for member in members:
            for probe in graph.probes[member.architecture]:
                parts = graph.parts(member, probe)
                self._in_parts(stage, member, probe, self._bank(member), parts, banks, graph.config.k)

    def _in_parts(
        self, stage: Stage, member: Member, probe: Probe, n_bank: int, parts: int, banks: int, k: int
    ) -> None:  # fmt: skip
        """Searches of all points in every part of a bank; banks: as of `_search`."""
        graph, key, width = self.graph, (member.architecture, probe.index), stored_width(probe)
        for _ in range(parts):
            stage.work += graph.points
            stage.written += self._found(found_in_part(k))
            self._search(stage, key, n_bank // parts, width, graph.points, graph.blocks, banks, k)
            stage.read += 4 * width * graph.points  # again, to put the neighbours in order

    def _merge(self, stage: Stage, parts: int, k: int) -> None:
        """What was found in the parts of a bank, read and joined."""
        read = parts * self._found(found_in_part(k))
        stage.read += read
        stage.seconds += parts * self.graph.points * self.rates.pick
        block = max(stop - first for first, stop in self._blocks)
        memory = MERGED * block * found_in_part(k).itemsize
        self._takes(stage, memory, memory, 0)

    def _vote(self, stage: Stage, number: int, members: Sequence[Member]) -> None:
        graph = self.graph
        for member in members:
            for probe in graph.probes[member.architecture]:
                parts = graph.parts(member, probe)
                stage.work += graph.points
                stage.written += self._found(VOTES)
                if may_err(graph.config, probe):
                    stage.written += self._sample * found_by_point(graph.config.k).itemsize
                if parts:
                    self._merge(stage, parts, graph.config.k)
                elif probe.index == 0 and graph.common.pays:
                    stage.read += self._found(found_by_point(graph.common.k))
                    stage.seconds += graph.points * self.rates.pick
                else:
                    self._search(
                        stage, (member.architecture, probe.index), self._bank(member), stored_width(probe),
                        graph.points, graph.blocks, self._side_by_side(members), graph.config.k,
                    )  # fmt: skip

    def _whole(self, stage: Stage, number: int, members: Sequence[Member]) -> None:
        """All points go through the network once for each group of probes that is kept where the network runs.

        What a GPU keeps of their inputs is read in its worker's first pass alone.
        """
        graph, engine = self.graph, self.graph.config.engine
        for member in members:
            probes, network = graph.probes[member.architecture], self.networks[member.architecture]
            held = min(engine.group_size, len(graph.members)) * network.weights  # so many stay with a worker
            free = engine.search_memory if self.device is None else KEPT * (self.device - held)
            decoded = 0 if self.device is None else self._decoded(DECODED * free)
            of_one = 4 * math.prod(self._input.shape)
            inputs = decoded * of_one
            later = number >= self.places  # a worker's first member finds nothing decoded
            groups = probe_groups(probes, graph.points, EMBEDDED * (free - later * KEPT * inputs))
            passed = graph.points * len(groups)
            read = passed - decoded * (len(groups) - 1 + later)
            stage.work += graph.points * len(probes)
            stage.written += len(probes) * self._found(VOTES) + self._outputs
            stage.read += read * of_one
            stage.flops += passed * network.forward
            stage.seconds += read * self.rates.read + passed * self.rates.embed[member.architecture]
            for group in groups:
                self._in_place(stage, member, [probes[index] for index in group], held + inputs)

    def _decoded(self, room: float) -> int:
        """Points whose inputs stay on a device, in whole batches; room: bytes for them."""
        n, batch_size = self.graph.points, self.graph.config.engine.batch_size
        fit = max(0, int(room // (4 * math.prod(self._input.shape))))
        return n if fit >= n else fit // batch_size * batch_size

    def _in_place(self, stage: Stage, member: Member, group: Sequence[Probe], held: int) -> None:
        """Searches of probes whose embeddings are kept together, each until it is searched; held: bytes beside them."""
        n, n_bank, k = self.graph.points, self._bank(member), self.graph.config.k
        kept = 4 * n * sum(map(stored_width, group))
        inputs = AHEAD * 4 * self.graph.config.engine.batch_size * math.prod(self._input.shape)
        self._takes(stage, held + kept + self._batch(member), inputs)
        for probe in group:
            rates, width = self.rates.search[member.architecture, probe.index], stored_width(probe)
            stage.flops += 2.0 * n * n_bank * width
            stage.seconds += rates.ready.at(n_bank) + n * rates.ask.at(n_bank)
            found = 16 * n * k  # neighbours of all points, and once more in order
            needed = held + kept + int(rates.memory * n_bank) + self._lists(n_bank, width, n, k) + found
            self._takes(stage, needed, found, needed + WORK)
            kept -= 4 * n * width

    def _found(self, kind: np.dtype[Any]) -> int:
        """Bytes of the files of what all points find, a row of this kind for each."""
        return sum(npy_bytes(kind, stop - first) for first, stop in self._blocks)

    def _side_by_side(self, members: Sequence[Member]) -> int:
        """Banks, and parts of banks, that a group of members is searched in."""
        graph = self.graph
        own = sum(
            max(1, graph.parts(member, probe)) for member in members for probe in graph.probes[member.architecture]
        )
        return own + (graph.common_parts if graph.shares(members) else 0)

    def _search(
        self, stage: Stage, rates_of: tuple[str, int], n_bank: int, width: int, n: int, units: int, banks: int, k: int
    ) -> None:  # fmt: skip
        """n queries in so many units; banks: searched side by side, which tells how often each is made ready."""
        rates = self.rates.search[rates_of]
        at_once = -(-n // units)
        times = min(max(self.workers / banks, 1.0), float(units)) + units * self._looks(n_bank, width, at_once)
        read = int(4 * width * (n_bank * times + n))
        stage.read += read
        stage.flops += 2.0 * n * n_bank * width
        stage.seconds += times * rates.ready.at(n_bank) + n * rates.ask.at(n_bank) + read * self.rates.move
        self._holds(stage, rates.memory, n_bank, width, at_once, k)

    def _looks(self, n_bank: int, width: int, at_once: int) -> int:
        """How often a search of so many queries goes over its bank, beside the first look: 0 where it fits memory."""
        budget = self.graph.config.engine.search_memory
        return 0 if fits_memory(n_bank, width, budget) else -(-at_once // cut(n_bank, width, budget)[1])

    def _holds(self, stage: Stage, of_a_row: float, n_bank: int, width: int, at_once: int, k: int) -> None:
        """A bank, or tiles of it, and so many queries as are read together."""
        budget = self.graph.config.engine.search_memory
        memory = int(of_a_row * n_bank) if fits_memory(n_bank, width, budget) else budget
        queries = self._lists(n_bank, width, at_once, k)
        self._takes(stage, memory + queries, min(memory, 4 * n_bank * width) + queries, memory + queries + WORK)

    def _lists(self, n_bank: int, width: int, at_once: int, k: int) -> int:
        """Bytes of so many queries, or as many as are searched together, and of what is found for them."""
        at_once = min(at_once, cut(n_bank, width, self.graph.config.engine.search_memory)[1])
        return at_once * (4 * width + 8 * k + 16 * (k + SPARE))

    def _trial(self, stage: Stage, number: int, members: Sequence[Member]) -> None:
        self._as_searches(stage, "trial", members, lambda n_bank: (1 + len(candidates(n_bank)), self._sample))

    def _index(self, stage: Stage, number: int, members: Sequence[Member]) -> None:
        self._as_searches(stage, "index", members, lambda n_bank: (1, n_bank))

    def _as_searches(
        self, stage: Stage, name: str, members: Sequence[Member], counts: Callable[[int], tuple[int, int]]
    ) -> None:
        """Indexes, which nobody measured, as exact searches. counts: of searches, and of what the stage's work is."""
        for member in members:
            for probe in self.graph.probes[member.architecture]:
                if self.graph.has(name, member, probe):
                    n_bank = self._bank(member)
                    searches, work = counts(n_bank)
                    key, width = (member.architecture, probe.index), stored_width(probe)
                    for _ in range(searches):
                        self._search(
                            stage, key, n_bank, width, self.graph.points, self.graph.blocks, stage.units,
                            self.graph.config.k,
                        )  # fmt: skip
                    stage.work += work

    def _keep(self, stage: Stage, number: int, members: Sequence[Member]) -> None:
        for member in members:
            for probe in self.graph.probes[member.architecture]:
                if self.graph.has("keep", member, probe):
                    rows, width = self._bank(member) if probe.index else self.graph.points, stored_width(probe)
                    stage.work += rows
                    stage.read += 4 * rows * width
                    stage.written += npy_bytes(np.float32, rows, width)
                    self._takes(stage, 4 * rows * width)
        stage.seconds = (stage.read + stage.written) * self.rates.move

    def _audit(self, stage: Stage, number: int, members: Sequence[Member]) -> None:
        config = self.graph.config
        for member in members:
            for probe in self.graph.probes[member.architecture]:
                stage.work += self._sample
                stage.written += npy_bytes(np.int32, self._sample)
                if probe.reduction != "none":
                    self._embed_again(stage, member, probe)
                elif may_err(config, probe):
                    key = member.architecture, probe.index
                    self._search(
                        stage, key, self._bank(member), probe.width, self._sample, 1, stage.units, config.k
                    )  # fmt: skip

    def _embed_again(self, stage: Stage, member: Member, probe: Probe) -> None:
        """A bank of whole embeddings is made by the network whenever it is read, and so are the queries."""
        graph, engine, n_bank = self.graph, self.graph.config.engine, self._bank(member)
        times = 1 + self._looks(n_bank, probe.width, self._sample)
        if probe.index == 0:
            # The input needs no network, nor the others of its batch.
            again, of_network = n_bank * times + self._sample, 0
        else:
            # A tile's first and last batch are made for the tile before and the one after it as well.
            tiles = -(-n_bank // cut(n_bank, probe.width, engine.search_memory)[0]) if times > 1 else 1
            of_batches = min(graph.points + (tiles - 1) * engine.batch_size, tiles * graph.points)
            again = times * of_batches + min(self._sample * engine.batch_size, graph.points)
            of_network = again
        rates, wider = self.rates.search[member.architecture, probe.index], probe.width / stored_width(probe)
        stage.read += 4 * again * math.prod(self._input.shape)
        stage.flops += of_network * self.networks[member.architecture].forward
        stage.flops += 2.0 * self._sample * n_bank * probe.width
        stage.seconds += again * self.rates.read + of_network * self.rates.embed[member.architecture]
        stage.seconds += wider * (times * rates.ready.at(n_bank) + self._sample * rates.ask.at(n_bank))
        self._holds(stage, 8 * probe.width, n_bank, probe.width, self._sample, graph.config.k)

    def _reduce(self, stage: Stage, number: int, members: Sequence[Member]) -> None:
        n = self.graph.points
        for member in members:
            n_probes = len(self.graph.probes[member.architecture])
            stage.work += n
            stage.read += 2 * n * n_probes * VOTES.itemsize + n * OUTPUTS.itemsize
            row = 8 + 4 * len(VOTE_FIELDS) * n_probes
            stage.written += n * (row + _row_bytes(DEPTHS))
            stage.seconds += n * n_probes * self.rates.reduce
            self._takes(stage, 3 * min(n, ROWS) * n_probes * VOTES.itemsize)

    def _free(self, stage: Stage, number: int, members: Sequence[Member]) -> None:
        stage.work = len(members)

    def _takes(self, stage: Stage, alone: int, beside: int | None = None, device: int | None = None) -> None:
        """Of memory: without a GPU; beside one; and of the GPU, by default as much as without one."""
        if self.graph.config.engine.gpus:
            stage.device = max(stage.device, alone if device is None else device)
            alone = alone if beside is None else beside
        stage.memory = max(stage.memory, alone)

    def _batch(self, member: Member) -> int:
        """Bytes of a batch in its network."""
        widths = [probe.width for probe in self.graph.probes[member.architecture]]
        return 4 * self.graph.config.engine.batch_size * (sum(widths) + 3 * max(widths))

    def _signs(self, probes: Sequence[Probe]) -> int:
        """Bytes of the random signs of projections, which a worker keeps."""
        asked = {(probe.width, parse_reduction(probe.reduction).size[0]) for probe in probes if "jl" in probe.reduction}
        return sum(width * -(-size // 8) for width, size in asked)

    def _bank(self, member: Member) -> int:
        """Rows of a member's bank."""
        return self.graph.bank_rows[member.name]

    @property
    def _outputs(self) -> int:
        """Bytes of the files of what a member's logits say."""
        return sum(npy_bytes(OUTPUTS, stop - first) for first, stop in self._shards)

    @cached_property
    def _shards(self) -> list[tuple[int, int]]:
        return shard_edges(self.graph.config, self.graph.points)

    @cached_property
    def _blocks(self) -> list[tuple[int, int]]:
        return blocks(self.graph.points, self.graph.config.engine.query_block)

    @property
    def _first(self) -> Member:
        return self.graph.members[0]

    @property
    def _input(self) -> Probe:
        return self.graph.input_probe

    @property
    def _sample(self) -> int:
        return min(self.graph.config.audit.sample, self.graph.points)
