"""A run from its configuration to its tables, on Ray."""

import fnmatch
import hashlib
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from rich.console import Console

from leadline.cluster.common import CommonBank
from leadline.cluster.pool import Pool, connected
from leadline.cluster.progress import Stages
from leadline.cluster.units import Member, bank_of_all, blocks, is_tried, list_members, shard_edges
from leadline.config import RunConfig, load_config
from leadline.depth import MemberDepths, combine
from leadline.embedding.reductions import check_patterns, choose_reductions, stored_width
from leadline.errors import LeadlineError
from leadline.knn.arrays import Array
from leadline.machine import processor
from leadline.members.architectures import build
from leadline.members.probes import Probe, place_probes
from leadline.members.splits import training_ids
from leadline.points import TRAIN, Points, open_points
from leadline.query import Run, open_run
from leadline.store import RunDirectory
from leadline.store.files import digest, read_json, sweep
from leadline.store.schemas import ENSEMBLE, MEMBERS, POINTS, PROBES
from leadline.store.tables import ROWS, read_table, write_table

MEMORY = Path("/dev/shm")  # a file system in memory
# Stages that only some runs have, and what their work is counted in: in the order of `_compute`, votes before the last.
BESIDE = {"trial": "points", "index": "rows", "keep": "rows", "audit": "points"}
SHARE_OF_MEMORY = 4  # embeddings are kept in memory where they take at most a fourth of what is free


def run(
    config: RunConfig | str | Path | Mapping[str, Any], out: str | Path | None = None, *, address: str | None = None,
    overrides: tuple[str, ...] = (),
) -> Run:  # fmt: skip
    """Compute the depths of every point under every member, and leave them as tables in a directory.

    config: a preset's name, a YAML file, the same as a mapping, or a RunConfig. out: the run's directory, by default
    runs/<name>; a run that was interrupted goes on from its finished units. address: of a Ray cluster; by default one
    is started on this machine. overrides: "key=value" in the configuration. Progress goes to standard error.

    Raises LeadlineError for what is the user's to mend: bad configuration, data or weights, and a directory that holds
    a run of others.
    """
    config = config if isinstance(config, RunConfig) else load_config(config, overrides)
    points = open_points(config.points)
    members = list_members(config)
    for member in members:
        _check_bank(config, points, member)
    _check_members(config, points)
    directory = RunDirectory(Path(out or Path("runs") / config.name).absolute())
    manifest = _manifest(config, points, members)
    if directory.begin(manifest):
        return open_run(directory.root)
    sweep(directory.root)
    stamps = {"leadline.configuration": config.fingerprint(), "leadline.data": manifest["data"]["fingerprint"]}
    with Stages(Console(stderr=True)) as stages:
        stages.say(f"{config.name}: {len(points):,} points, {len(members)} members, in {directory.root}")
        _write_points(directory, points, stamps)
        with connected(config.engine, address) as is_local:
            _compute(config, directory, members, points, is_local, stages, stamps)
        directory.free_scratch()
        _combine(directory, members, points, config, stamps)
        directory.complete(directory.digests(), stages.report())
    return open_run(directory.root)


def _check_bank(config: RunConfig, points: Points, member: Member) -> None:
    ids = training_ids(member.config.split, points.parts, member.seed)
    if len(ids) - config.leave_one_out < config.k:
        raise LeadlineError(
            f"k: {config.k} neighbours are asked for, but member {member.name} has a bank of {len(ids)} points "
            f"({np.count_nonzero(points.parts == TRAIN)} in part train); lower k or give more points"
        )


def _check_members(config: RunConfig, points: Points) -> None:
    """Build a network of each entry and place its probes, so that mistakes are told before any work is paid for."""
    example = torch.from_numpy(points.read(np.zeros(1, np.int64)))
    names: list[str] = []
    for entry in config.members:
        model = build(entry.architecture, entry.parameters, points.input_shape, len(points.label_names), entry.seed)
        probes = choose_reductions(config.reduction, place_probes(model, entry.placement, example))
        names += [probe.name for probe in probes]
    check_patterns(config.reduction, list(dict.fromkeys(names)))
    for name in names:
        config.method_of(name)
    for pattern in config.method if isinstance(config.method, dict) else ():
        if not fnmatch.filter(names, pattern):
            raise LeadlineError(f"method: {pattern} matches no probe; there are {', '.join(dict.fromkeys(names))}")


def _manifest(config: RunConfig, points: Points, members: list[Member]) -> dict[str, Any]:
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
    config: RunConfig, directory: RunDirectory, members: list[Member], points: Points, is_local: bool, stages: Stages,
    stamps: dict[str, str],
) -> None:  # fmt: skip
    """Train, embed, vote and reduce. Every stage leaves out what is there from an earlier try."""
    n_points = len(points)
    n_shards = len(shard_edges(config, n_points))
    n_blocks = len(blocks(n_points, config.engine.query_block))
    common = bank_of_all(config, points.parts)
    untrained = [m for m in members if not directory.record("train", m.name).exists()]
    waiting = [m for m in members if not directory.record("reduce", m.name).exists()]
    pool = Pool(config.engine, (config, stamps))
    stages.plan("train", "steps", len(members), len(members) - len(untrained))
    _do(pool, stages, "train", [("train", (directory, member)) for member in untrained])

    probes = {m.name: read_json(directory.record("train", m.name))["probes"] for m in members}
    groups = [waiting[first:stop] for first, stop in blocks(len(waiting), config.engine.group_size)]
    with _scratch(config, directory, groups, probes, n_points, is_local, stages) as placed:
        shards = [_missing_shards(placed, group, n_shards) for group in groups]
        votes = [_missing_votes(config, placed, group, probes, n_blocks) for group in groups]
        n_votes = sum(len(probes[m.name]) for m in waiting) * n_blocks
        stages.plan("embed", "points", len(groups) * n_shards, len(groups) * n_shards - sum(map(len, shards)))
        unshared: list[int] = []
        if waiting and common.pays:
            unshared = [block for block in range(n_blocks) if not directory.shared_cost(block).exists()]
            stages.plan("share", "points", n_blocks, n_blocks - len(unshared))
        stages.plan("vote", "votes", n_votes, n_votes - sum(len(step) for steps in votes for step in steps))
        beside = {}
        for stage, measure in BESIDE.items():
            units = [_units_beside(stage, config, common, members, group, probes) for group in groups]
            beside[stage] = [[unit for unit in of_group if not _is_done(placed, stage, *unit)] for of_group in units]
            if any(units):
                n_units = sum(map(len, units))
                stages.plan(stage, measure, n_units, n_units - sum(map(len, beside[stage])))
        stages.plan("reduce", "points", len(members), len(members) - len(waiting))
        for group, missing_shards, steps, *others in zip(groups, shards, votes, *beside.values(), strict=True):
            _do(pool, stages, "embed", [("embed", (placed, group, shard)) for shard in missing_shards])
            tries, indexes, banks, audits = others
            for stage, units in (("trial", tries), ("index", indexes), ("keep", banks)):
                _do(pool, stages, stage, [(stage, (placed, *unit)) for unit in units])
            *earlier, last = steps
            for step in earlier:
                _do(pool, stages, "vote", [("vote", (placed, *unit)) for unit in step])
            if unshared:
                # Once for the run, while the input is there; kept until every member is reduced.
                _do(pool, stages, "share", [("share", (placed, group, block)) for block in unshared])
                unshared = []
            _do(pool, stages, "vote", [("vote", (placed, *unit)) for unit in last])
            _do(pool, stages, "audit", [("audit", (placed, *unit)) for unit in audits])
            _do(pool, stages, "reduce", [("reduce", (placed, member)) for member in group])
            for member in group if not config.engine.keep_indexes else ():
                placed.free_indexes(member.name)
            placed.free_scratch()
        # Also of members that an earlier try had reduced when it was killed.
        for member in members:
            placed.free_votes(member.name)
            if not config.engine.keep_indexes:
                placed.free_indexes(member.name)
        placed.free_shared()
        placed.free_scratch()


def _do(pool: Pool, stages: Stages, stage: str, units: list[tuple[str, tuple[Any, ...]]]) -> None:
    if not units:
        return
    stages.start(stage)
    pool.run(units, lambda work: stages.advance(stage, work))
    stages.stop(stage)


def _units_beside(
    stage: str, config: RunConfig, common: CommonBank, members: list[Member], group: list[Member],
    probes: dict[str, Any],
) -> list[tuple[Member, int]]:  # fmt: skip
    """Member and probe of the units of a group, in one of the stages that only some runs have."""
    every = [(member, probe) for member in group for probe in probes[member.name]]
    match stage:
        case "trial":
            # By the first member of each architecture, on behalf of all.
            first = {member.architecture: member.name for member in reversed(members)}.values()
            tried = [(m, p) for m, p in every if m.name in first and is_tried(config, common, p)]
            chosen = tried if "auto" in config.methods else []
        case "index":
            chosen = [(m, p) for m, p in every if config.method_of(p["name"]) != "exact"]
        case "keep":
            # The input is the same for every member, and kept once.
            chosen = [(m, p) for m, p in every if p["index"] or m == members[0]] if config.engine.keep_indexes else []
        case _:
            chosen = [] if config.is_exact else every
    return [(member, probe["index"]) for member, probe in chosen]


def _is_done(directory: RunDirectory, stage: str, member: Member, probe: int) -> bool:
    match stage:
        case "trial":
            return directory.trial(member.architecture, probe).exists()
        case "index":
            record = directory.index_record(member.name, probe)
            if not record.exists():
                return False
            return read_json(record)["method"] == "exact" or directory.index(member.name, probe).exists()
        case "keep":
            return directory.bank(member.name, probe).exists()
        case _:
            return directory.audit_record(member.name, probe).exists()


def _missing_shards(directory: RunDirectory, group: list[Member], n_shards: int) -> list[int]:
    return [shard for shard in range(n_shards) if not all(directory.outputs(m.name, shard).exists() for m in group)]


def _missing_votes(
    config: RunConfig, directory: RunDirectory, group: list[Member], probes: dict[str, Any], n_blocks: int
) -> list[list[tuple[Member, int, int]]]:
    """Member, probe and block of the votes that are not there, in steps of which each needs the one before.

    Probe 0 is in the last step. Wide probes first: the longest units at the end would leave actors idle.
    """
    units = [
        (member, probe["index"], block)
        for member in group
        for probe in sorted(probes[member.name], key=lambda probe: -probe["width"])
        for block in range(n_blocks)
    ]
    missing = [unit for unit in units if not directory.votes_cost(unit[0].name, unit[1], unit[2]).exists()]
    if config.votes == "all":
        return [missing]
    last = max(probe for _, probe, _ in units)
    return [[unit for unit in missing if unit[1] == probe] for probe in range(last, -1, -1)]


@contextmanager
def _scratch(
    config: RunConfig, directory: RunDirectory, groups: list[list[Member]], probes: dict[str, Any], n_points: int,
    is_local: bool, stages: Stages,
) -> Iterator[RunDirectory]:  # fmt: skip
    """The run's directory with a place for embeddings: the one asked for, memory where they fit, or the run's own."""
    size = max((_embedding_bytes(group, probes, n_points) for group in groups), default=0)
    name = f"leadline-{hashlib.sha256(str(directory.root).encode()).hexdigest()[:16]}"
    in_memory = config.engine.scratch is None and is_local and _fits_memory(size, MEMORY / name)
    if config.engine.scratch is not None:
        directory = RunDirectory(directory.root, config.engine.scratch.absolute() / name)
    elif in_memory:
        directory = RunDirectory(directory.root, MEMORY / name)
    if groups:
        where = "memory" if in_memory else str(directory.scratch)
        stages.say(f"embeddings: {size / 1e9:.2f} GB at a time, in {where}")
    try:
        yield directory
    finally:
        # Memory is given back also when the run ends early; on disk, finished shards wait for the next try.
        if in_memory:
            directory.free_scratch()


def _embedding_bytes(group: list[Member], probes: dict[str, Any], n_points: int) -> int:
    inner = sum(stored_width(Probe(**probe)) for member in group for probe in probes[member.name][1:])
    return 4 * n_points * (inner + stored_width(Probe(**probes[group[0].name][0])))


def _fits_memory(size: int, place: Path) -> bool:
    if not MEMORY.is_dir():
        return False
    free = min(shutil.disk_usage(MEMORY).free, ray.available_resources().get("memory", 0))
    return place.is_dir() or size * SHARE_OF_MEMORY <= free


def _combine(
    directory: RunDirectory, members: list[Member], points: Points, config: RunConfig, stamps: dict[str, str]
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
    directory: RunDirectory, members: list[Member], points: Points, n_classes: int, errors: dict[str, float]
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
                    **{name: _nullable(values) for name, values in columns.items()},
                }
            ).select(ENSEMBLE.names)


def _member_depths(directory: RunDirectory, member: Member, row_group: int, error: float) -> MemberDepths:
    table = read_table(directory.member_table("depths", member.name), row_group)
    arrays = {
        field.name: table[field.name].to_numpy() for field in fields(MemberDepths) if field.name in table.schema.names
    }
    return MemberDepths(**arrays, depth_error=error)


def _nullable(values: Array) -> pa.Array:
    """NaN, which says that there is nothing to take a mean of, as null."""
    return pa.array(values, mask=np.isnan(values) if values.dtype.kind == "f" else None)
