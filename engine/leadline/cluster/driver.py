"""A run from its configuration to its tables, on Ray."""

import os
import platform
import shutil
import sys
import uuid
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from rich.console import Console

from leadline.cluster.graph import SHARE_OF_DISK, SHARE_OF_MEMORY, STAGES, Graph, graph_of
from leadline.cluster.pool import MEMORY, Ended, Failure, Pool, Scratch, Seat, connected, untried
from leadline.cluster.progress import Stages
from leadline.cluster.schedule import Schedule, Unit
from leadline.cluster.watch import Watch, watched
from leadline.cluster.work import Member, blocks, shard_edges
from leadline.config import RunConfig, load_config
from leadline.depth import MemberDepths, combine
from leadline.embedding.reductions import stored_width
from leadline.errors import LeadlineError
from leadline.machine import processor
from leadline.members.probes import Probe
from leadline.points import TRAIN, Points, open_points
from leadline.query import Run
from leadline.store import RunDirectory
from leadline.store.files import digest, read_json, sweep
from leadline.store.lease import Lease
from leadline.store.places import place_of
from leadline.store.schemas import ENSEMBLE, MEMBERS, POINTS, PROBES
from leadline.store.tables import ROWS, nullable, read_table, write_table

ELSEWHERE = Path(os.devnull) / "scratch"  # of embeddings that only their workers see: nothing is ever there
GROUPS_OF_A_WORKER = 2  # groups of members that are taken in for each worker, where each has its own place
TOLD = 3  # errors of units that are quoted


def run(
    config: RunConfig | str | Path | Mapping[str, Any], out: str | Path | None = None, *, address: str | None = None,
    overrides: tuple[str, ...] = (), train_only: bool = False,
) -> Run:  # fmt: skip
    """Compute the depths of every point under every member, and leave them as tables in a directory.

    config: a preset's name, a YAML file, the same as a mapping, or a RunConfig. out: the run's directory, or
    s3://bucket/prefix or gs://bucket/prefix, by default runs/<name>; a run that was interrupted goes on from its
    finished units. address: of a Ray cluster; by default what this process is connected to already, else RAY_ADDRESS,
    else this machine. overrides: "key=value" in the configuration. train_only: stop when the weights of all members are
    stored; the same call without it goes on from there. Progress goes to standard error.

    Raises LeadlineError for what is the user's to mend: bad configuration, data or weights, a directory that holds a
    run of others, and one that another driver is at work on.
    """
    config = config if isinstance(config, RunConfig) else load_config(config, overrides)
    points = open_points(config.points)
    graph = graph_of(config, points, train_only)
    directory = RunDirectory(place_of(out or Path("runs") / config.name))
    manifest = _manifest(config, points, graph.members)
    if directory.status(manifest) == "complete":
        return Run(directory)
    stamps = {"leadline.configuration": config.fingerprint(), "leadline.data": manifest["data"]["fingerprint"]}
    with Stages(Console(stderr=True)) as stages, Lease(directory, stages.say) as lease:
        if directory.begin(manifest):
            return Run(directory)  # another driver was faster
        sweep(directory.root)
        with watched(directory, config.name, stages) as watch:
            stages.say(f"{config.name}: {len(points):,} points, {len(graph.members)} members, in {directory.root}")
            _write_points(directory, points, stamps)
            with connected(config.engine, address) as is_local:
                _compute(graph, directory, stamps, is_local, watch, lease)
            if not train_only:
                lease.check()
                directory.free_scratch()
                _combine(directory, graph.members, points, config, stamps)
                digests = directory.digests()
                lease.check()
                directory.complete(digests, stages.report())
    return Run(directory)


def _manifest(config: RunConfig, points: Points, members: Sequence[Member]) -> dict[str, Any]:
    names = ("leadline", "torch", "torchvision", "numpy", "numba", "pyarrow", "ray")
    return {
        "name": config.name,
        "configuration": config.record(),
        "data": {"fingerprint": points.fingerprint(), "points": len(points)},
        "weights": {m.name: digest(m.weights_source) for m in members if m.weights_source},
        "fingerprint": config.fingerprint(),
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in names}},
        "machine": {"processor": processor(), "system": sys.platform},
    }


def _write_points(directory: RunDirectory, points: Points, stamps: dict[str, str]) -> None:
    names = np.array(points.label_names, object)
    clean = points.clean_labels

    def tables() -> Iterator[pa.Table]:
        for first, stop in blocks(len(points), ROWS):
            labels = points.labels[first:stop]
            yield pa.table(
                {
                    "point_id": np.arange(first, stop),
                    "key": points.keys[first:stop],
                    "label": labels,
                    "label_name": pa.array(names[labels], pa.string()),
                    "part": pa.array(np.where(points.parts[first:stop] == TRAIN, "train", "test")),
                    "clean_label": pa.nulls(stop - first, pa.int32()) if clean is None else clean[first:stop],
                }
            )

    write_table(directory.table("points"), POINTS, tables(), stamps)


def _compute(
    graph: Graph, directory: RunDirectory, stamps: dict[str, str], is_local: bool, watch: Watch, lease: Lease
) -> None:
    """Train, embed, vote and reduce what is not there from an earlier try.

    Raises LeadlineError that names the units that were set aside, when all else is done.
    """
    engine = graph.config.engine
    reduced = [m for m in graph.members if directory.record("reduce", m.name).exists()]
    waiting = [m for m in graph.members if m not in reduced]
    groups = graph.groups(waiting)
    stages = watch.stages
    totals = sum((graph.totals(group) for group in groups), Counter(train=len(reduced), reduce=len(reduced)))
    for stage, measure in STAGES.items():
        if totals[stage]:
            stages.plan(stage, measure, totals[stage])
    for stage in ("train", "reduce") if reduced else ():
        stages.found(stage, len(reduced))
    with _scratch(graph, directory, groups, is_local, stages, lease) as (placed, room, scratch):
        with Pool(engine, (graph.config, stamps, placed), scratch, is_local, stages.say) as pool:
            failures = _do(graph, placed, groups, room, pool, watch, lease)
            lease.check()
            pool.close()
        # Also of members that an earlier try had reduced when it was killed.
        for member in reduced:
            placed.free_member(member.name, keep_indexes=engine.keep_indexes)
        for trace in dict.fromkeys(failure.trace for failure in failures if failure.trace):
            stages.say(trace)  # of a defect, for whoever is to mend it
        if failures:
            raise LeadlineError(_told(failures))
        if not graph.train_only:
            placed.free_shared()
            placed.free_scratch()


def _do(
    graph: Graph, directory: RunDirectory, groups: list[Sequence[Member]], room: int | None, pool: Pool, watch: Watch,
    lease: Lease,
) -> list[Failure]:  # fmt: skip
    """Groups of members are taken in as far as their embeddings fit into `room` bytes of scratch, one at least.

    room: None where the workers see to that, each at its own place: then so many that none of them waits for work.
    """
    schedule, waiting, taken = Schedule(ahead=pool.size), deque(enumerate(groups)), dict[int, int]()

    def add(number: int) -> None:
        units = graph.units(number, groups[number], directory)
        there = graph.totals(groups[number]) - Counter(unit.stage for unit in units)
        for stage, units_there in there.items():
            watch.stages.found(stage, units_there)
        put_in(number, units)

    def put_in(number: int, units: list[Unit]) -> None:
        for unit in schedule.add(units):
            watch.ended(unit, untried("needs what an earlier unit, that was set aside, would have made"))
        if units:
            taken[number] = graph.embedding_bytes(groups[number])

    def take_in() -> None:
        for number in [number for number in taken if not schedule.left(number)]:
            del taken[number]
        while waiting:
            number, group = waiting[0]
            if room is None and len(taken) >= GROUPS_OF_A_WORKER * pool.size:
                break
            if room is not None and taken and sum(taken.values()) + graph.embedding_bytes(group) > room:
                break
            waiting.popleft()
            add(number)

    def began(unit: Unit, seat: Seat, at: float) -> None:
        lease.check()
        watch.began(unit, seat, at)

    def ended(unit: Unit, end: Ended) -> None:
        lease.check()
        watch.ended(unit, end, _written_bytes(graph, unit) if end.state == "done" else 0)
        take_in()

    def lost(number: int) -> None:
        watch.stages.say(
            f"embeddings of {', '.join(m.name for m in groups[number])} are lost with their place: made again"
        )
        units = graph.units(number, groups[number], directory)
        redone = Counter(unit.stage for unit in units)
        redone.subtract(unit.stage for unit in schedule.drop(number))
        for stage, more in redone.items():
            watch.stages.more(stage, more)
        put_in(number, units)

    take_in()
    return pool.run(schedule, began, ended, lost)


def _told(failures: list[Failure]) -> str:
    """What was set aside, in one line."""
    said = [f"{failure.unit}: {failure.error}" for failure in failures[:TOLD]]
    others = sum(failure.others for failure in failures)
    return (
        f"{'; '.join(said)}{'; …' * (len(failures) > TOLD)} (set aside: {len(failures)} units, and {others} that need "
        "them; all else is done, and the same command goes on from there)"
    )


@contextmanager
def _scratch(
    graph: Graph, directory: RunDirectory, groups: list[Sequence[Member]], is_local: bool, stages: Stages, lease: Lease
) -> Iterator[tuple[RunDirectory, int | None, Scratch]]:
    """The run's directory with a place for embeddings, the bytes that it has room for, and where workers have theirs.

    Shared embeddings lie in the folder asked for, in memory where they fit, or in the run's own directory, and for a
    run in an object store in this machine's folder of temporary files. Raises LeadlineError where not all nodes of a
    cluster see that.
    """
    engine = graph.config.engine
    largest = max((graph.embedding_bytes(group) for group in groups), default=0)
    name = directory.scratch_name
    placement = graph.placement(largest, is_local)
    scratch = Scratch(placement, engine.scratch, name, uuid.uuid4().hex[:12], largest)
    says = f"embeddings: {largest / 1e9:.2f} GB a group of members"
    if placement != "shared":
        if groups and not graph.train_only:
            where = "embeddings: a member's at a time, where its network runs, placement device"
            stages.say(where if graph.whole else f"{says}, placement {placement}")
        yield RunDirectory(directory.root, ELSEWHERE), None, scratch
        return
    free = free_memory(MEMORY / name) if engine.scratch is None and is_local else 0
    in_memory = largest <= free
    if engine.scratch is not None:
        directory = RunDirectory(directory.root, engine.scratch.absolute() / name)
    elif in_memory:
        directory = RunDirectory(directory.root, MEMORY / name)
    elif not (is_local or graph.train_only or isinstance(directory.root, Path)):
        raise LeadlineError("engine.scratch: give a folder that all nodes see; embeddings do not lie in object stores")
    room = free if in_memory else int(SHARE_OF_DISK * free_disk(directory.scratch))
    if groups and not graph.train_only:
        where = "memory" if in_memory else str(directory.scratch)
        stages.say(f"{says}, placement shared, in {where}, room for {room / 1e9:.2f} GB")
    try:
        yield directory, room, scratch
    finally:
        # Memory is given back also when the run ends early; on disk, finished shards wait for the next try.
        if in_memory and lease.is_held():
            directory.free_scratch()


def _written_bytes(graph: Graph, unit: Unit) -> int:
    """Of embeddings, by a unit that is done."""
    if unit.stage != "embed":
        return 0
    members, shard = unit.arguments
    first, stop = shard_edges(graph.config, graph.points)[shard]
    probes = [probe for member in members for probe in graph.probes[member.architecture][1:]]
    if ("input", unit.group) in unit.makes:
        probes.append(graph.input_probe)
    width = sum(stored_width(probe) for probe in probes)
    return 4 * int(stop - first) * width


def free_memory(place: Path) -> int:
    """Bytes of embeddings that may lie in memory; what an earlier try left there is this run's already."""
    if not MEMORY.is_dir():
        return 0
    left = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    free = min(shutil.disk_usage(MEMORY).free, int(ray.available_resources().get("memory", 0)))
    return max(left, (free + left) // SHARE_OF_MEMORY)


def free_disk(place: Path) -> int:
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _combine(
    directory: RunDirectory, members: Sequence[Member], points: Points, config: RunConfig, stamps: dict[str, str]
) -> None:
    """Write the tables of members, probes and the ensemble from what the members' reductions left."""
    trained = {m.name: read_json(directory.record("train", m.name)) for m in members}
    reduced = {m.name: read_json(directory.record("reduce", m.name)) for m in members}
    rows = [_member_row(m, trained[m.name], reduced[m.name]) for m in members]
    write_table(directory.table("members"), MEMBERS, [pa.Table.from_pylist(rows, MEMBERS)], stamps)
    rows = [row for m in members for row in _probe_rows(config, m, trained[m.name], reduced[m.name])]
    write_table(directory.table("probes"), PROBES, [pa.Table.from_pylist(rows, PROBES)], stamps)
    # A network may know classes that no point has: as many as its softmax is wide.
    n_classes = max(len(points.label_names), *(record["probes"][-1]["width"] for record in trained.values()))
    errors = {name: record["audit"].get("depth_error_high", 0.0) for name, record in reduced.items()}
    tables = _ensemble_tables(directory, members, points, n_classes, errors)
    write_table(directory.table("ensemble"), ENSEMBLE, tables, stamps)


def _member_row(member: Member, trained: dict[str, Any], reduced: dict[str, Any]) -> dict[str, Any]:
    return {
        "member": member.name,
        "architecture": member.architecture,
        "seed": member.seed,
        "weights_fingerprint": trained["weights_fingerprint"],
        "n_train": trained["n_train"],
        "n_held_out": reduced["n_held_out"],
        "train_accuracy": reduced["train_accuracy"],
        "held_out_accuracy": reduced["held_out_accuracy"],
        "n_probes": len(trained["probes"]),
        "training_steps": trained["steps"],
        "training_precision": trained["precision"],
        **reduced["audit"],
    }


def _probe_rows(
    config: RunConfig, member: Member, trained: dict[str, Any], reduced: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    for probe, cost, record in zip(trained["probes"], reduced["cost"], reduced["probes"], strict=True):
        yield {
            "member": member.name,
            "architecture": member.architecture,
            "probe": probe["index"],
            "name": probe["name"],
            "width": probe["width"],
            "stored_width": stored_width(Probe(**probe)),
            "reduction": probe["reduction"],
            "k": config.k,
            "train_accuracy": reduced["probe_train_accuracy"][probe["index"]],
            "held_out_accuracy": reduced["probe_held_out_accuracy"][probe["index"]],
            **cost,
            **record,
        }


def _ensemble_tables(
    directory: RunDirectory, members: Sequence[Member], points: Points, n_classes: int, errors: dict[str, float]
) -> Iterator[pa.Table]:
    """errors: of each member's depths, see `MemberDepths`."""
    for architecture in dict.fromkeys(m.architecture for m in members):
        own = [m for m in members if m.architecture == architecture]
        for group, (first, stop) in enumerate(blocks(len(points), ROWS)):
            labels = points.labels[first:stop]
            columns = combine((_member_depths(directory, m, group, errors[m.name]) for m in own), labels, n_classes)
            yield pa.table(
                {
                    "architecture": pa.array([architecture] * (stop - first)),
                    "point_id": np.arange(first, stop),
                    "label": labels,
                    **{name: nullable(values) for name, values in columns.items()},
                }
            ).select(ENSEMBLE.names)


def _member_depths(directory: RunDirectory, member: Member, row_group: int, error: float) -> MemberDepths:
    table = read_table(directory.member_table("depths", member.name), row_group)
    arrays = {
        field.name: table[field.name].to_numpy() for field in fields(MemberDepths) if field.name in table.schema.names
    }
    return MemberDepths(**arrays, depth_error=error)
