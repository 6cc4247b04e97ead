"""The units of a run, a group of members at a time: what each needs, and what is there from an earlier try."""

import fnmatch
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch

from leadline.cluster.common import CommonBank
from leadline.cluster.schedule import Thing, Unit
from leadline.cluster.work import (
    Member,
    bank_of_all,
    bank_parts,
    blocks,
    common_bank_parts,
    is_tried,
    list_members,
    may_err,
    shard_edges,
    trained_together,
)
from leadline.config import RunConfig
from leadline.embedding.reductions import check_patterns, choose_reductions, stored_width
from leadline.errors import LeadlineError
from leadline.knn.arrays import Array
from leadline.members.architectures import build
from leadline.members.probes import Probe, place_probes
from leadline.members.splits import training_ids
from leadline.members.train import RESIDENT_BYTES, is_resident
from leadline.points import TRAIN
from leadline.store import RunDirectory
from leadline.store.files import read_json

# Stages in the order in which they are told, and what their work is counted in; some runs have only some of them.
STAGES = {
    "train": "steps", "embed": "points", "trial": "points", "index": "rows", "keep": "rows", "share": "points",
    "part": "points", "vote": "votes", "whole": "votes", "audit": "points", "reduce": "points",
    "free": "members",
}  # fmt: skip


SHARE_OF_MEMORY = 4  # embeddings are kept in memory where they take at most a fourth of what is free
SHARE_OF_DISK = 0.8  # of what is free, for embeddings


class Outline(Protocol):
    """What the units of a run must know of its points."""

    @property
    def parts(self) -> Array: ...

    @property
    def label_names(self) -> tuple[str, ...]: ...

    @property
    def input_shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def read(self, ids: Array, /) -> Array: ...

    def read_on(self, ids: Array, device: torch.device | str, /) -> torch.Tensor: ...


@dataclass(frozen=True)
class Graph:
    """What the units of a run follow from.

    probes: of each architecture; common: what the members share; bank_rows: of each member, by name; points, shards,
    blocks: how many there are. train_only: members are trained, and nothing else.
    """

    config: RunConfig
    members: Sequence[Member]
    probes: dict[str, list[Probe]]
    common: CommonBank
    bank_rows: dict[str, int]
    points: int
    shards: int
    blocks: int
    train_only: bool = False

    def groups(self, members: Sequence[Member]) -> list[Sequence[Member]]:
        """Those that are embedded together, and so at home at one place; where nothing is shared, each member alone."""
        size = 1 if self.whole else self.config.engine.group_size
        return [members[first:stop] for first, stop in blocks(len(members), size)]

    def totals(self, members: Sequence[Member]) -> "Counter[str]":
        """Units of each stage for a group of members, were nothing there already."""
        total = Counter({"train": len(self.begun(members))})
        if self.train_only:
            return total
        if self.whole:
            total.update(whole=len(members), reduce=len(members), free=len(members))
            return total
        total.update(embed=self.shards, reduce=len(members), free=len(members))
        for member in members:
            probes = self.probes[member.architecture]
            total["vote"] += len(probes) * self.blocks
            total["part"] += sum(self.parts(member, probe) for probe in probes) * self.blocks
            for stage in ("trial", "index", "keep", "audit"):
                total[stage] += sum(self.has(stage, member, probe) for probe in probes)
        if self.shares(members):
            total["share"] = self.blocks
            total["part"] += self.common_parts * self.blocks
        return total

    def embedding_bytes(self, members: Sequence[Member]) -> int:
        """Of a group of members, with the input, which is kept once for all."""
        if self.whole:
            return 0
        probes = [self.input_probe, *(probe for m in members for probe in self.probes[m.architecture][1:])]
        return 4 * self.points * sum(stored_width(probe) for probe in probes)

    def placement(self, largest: int, is_local: bool) -> str:
        """Where embeddings lie. largest: bytes of a group's; is_local: on one machine, without a cluster."""
        engine = self.config.engine
        if self.whole:
            return "resident"  # what little a member leaves is joined by the worker that made it
        if engine.placement != "auto":
            return engine.placement
        return "shared" if is_local else "resident" if largest <= engine.memory_budget else "node"

    def units(self, group: int, members: Sequence[Member], directory: RunDirectory) -> list[Unit]:
        """What is still to be done for a group of members, whose embeddings lie in the directory's scratch."""
        made = list(self._train(group, members, directory))
        waiting = [m for m in members if not directory.record("reduce", m.name).exists()]
        if self.train_only or not waiting:
            return made
        if not self.whole:
            made += self._embed(group, waiting, directory)
            made += self._share(group, waiting, directory)
        for member in waiting:
            if self.whole:
                made.append(_unit(group, "whole", (member,), (("trained", member.name),), (("voted", member.name),)))
            else:
                made += self._beside(group, member, directory)
                made += self._vote(group, member, directory)
            # What all members share is counted at the first of them.
            shared = (("shared",),) if member == self.members[0] else ()
            needs = (("voted", member.name), ("audited", member.name), *shared)
            done = ("reduced", member.name)
            made.append(_unit(group, "reduce", (member,), needs, (done,)))
            made.append(_unit(group, "free", (member,), (done,), ()))
        return made

    def _train(self, group: int, members: Sequence[Member], directory: RunDirectory) -> Iterator[Unit]:
        for some in self.begun(members):
            missing = [member for member in some if not directory.record("train", member.name).exists()]
            if missing:
                unit = _unit(group, "train", (some,), (), tuple(("trained", member.name) for member in missing))
                yield replace(unit, roams=True)

    def begun(self, members: Sequence[Member]) -> list[tuple[Member, ...]]:
        """Those that units of a group train: with each of its members that is the first of some, all of these.

        Some of them may be in later groups, none in an earlier one.
        """
        return [self._together[member.name] for member in members if member.name in self._together]

    @cached_property
    def _together(self) -> dict[str, tuple[Member, ...]]:
        """By the name of the first of them."""
        return {some[0].name: some for some in trained_together(self.members)}

    def _embed(self, group: int, members: Sequence[Member], directory: RunDirectory) -> Iterator[Unit]:
        """A shard is read and decoded once for all members; if that fails, once for each, so that others go on."""
        for shard in range(self.shards):
            missing = [m for m in members if not directory.outputs(m.name, shard).exists()]
            parts: list[tuple[tuple[Member, ...], Thing]] = [((m,), ("embedded", m.name)) for m in missing]
            if not directory.embedding("input", 0, shard).exists():
                parts.append(((), ("input", group)))

            def unit(of: tuple[Member, ...], made: tuple[Thing, ...], instead: tuple[Unit, ...], shard: int) -> Unit:
                needs = tuple(("trained", member.name) for member in of)
                return _unit(group, "embed", (of, shard), needs, made, ("networks", group), instead)

            if parts:
                alone = tuple(unit(of, (thing,), (), shard) for of, thing in parts) if len(parts) > 1 else ()
                yield unit(tuple(missing), tuple(thing for _, thing in parts), alone, shard)

    def _share(self, group: int, members: Sequence[Member], directory: RunDirectory) -> Iterator[Unit]:
        """Once for the run, with its first member; kept until every member is reduced."""
        if not self.shares(members):
            return
        there, bank, together = directory.finished("share"), ("input", 0, self.common_parts), tuple(members)
        for block in range(self.blocks):
            if directory.shared_cost(block).name not in there:
                open_in = [("vote", m.name, 1, block) for m in members] if self._until_decided else []
                embedded = [("embedded", m.name) for m in members] if self._until_decided else []
                needs: tuple[Thing, ...] = (("input", group), *embedded, *open_in)
                yield from _parts(group, together, bank, block, needs, directory, there)
                needs, made = (*needs, ("parts", "input", 0, block)), (("shared",), ("share", block))
                yield _unit(group, "share", (together, block), needs, made, ("bank", "input", 0))

    def _beside(self, group: int, member: Member, directory: RunDirectory) -> Iterator[Unit]:
        """Trials, indexes, kept banks and audits, of the runs that have them."""
        needs = _embedded(group, member)
        for probe in self.probes[member.architecture]:
            p, bank = probe.index, ("bank", member.name, probe.index)
            if self.has("trial", member, probe) and not directory.trial(member.architecture, p).exists():
                yield _unit(group, "trial", (member, p), needs, (("tried", member.architecture),), bank)
            if self.has("index", member, probe) and not _is_indexed(directory, member, p):
                tried = (("tried", member.architecture),)
                made = (("index", member.name, p),)
                yield _unit(group, "index", (member, p), (*needs, *tried), made, bank)
            if self.has("keep", member, probe) and not directory.bank(member.name, p).exists():
                # Not a vote, but it reads the embeddings too, which go when all is voted.
                yield _unit(group, "keep", (member, p), needs, (("voted", member.name),))
            if self.has("audit", member, probe) and not directory.audit_record(member.name, p).exists():
                voted = (("voted", member.name),)
                yield _unit(group, "audit", (member, p), (*needs, *voted), (("audited", member.name),), bank)

    def _vote(self, group: int, member: Member, directory: RunDirectory) -> Iterator[Unit]:
        """Wide probes first, or the last one where a vote waits for that of the next probe."""
        probes, there = self.probes[member.architecture], directory.finished("vote", member.name)
        for probe in sorted(probes, key=lambda probe: -probe.index if self._until_decided else -probe.width):
            p, is_shared = probe.index, probe.index == 0 and self.common.pays
            bank = ("shared", member.name) if is_shared else ("bank", member.name, p)
            for block in range(self.blocks):
                if directory.votes_cost(member.name, p, block).name in there:
                    continue
                needs = [*_embedded(group, member), ("index", member.name, p)]
                made: list[Thing] = [("voted", member.name)]
                if is_shared:
                    needs.append(("share", block))
                if self._until_decided:
                    needs.append(("vote", member.name, p + 1, block))
                    made.append(("vote", member.name, p, block))
                cut = (member.name, p, self.parts(member, probe))
                yield from _parts(group, (member,), cut, block, tuple(needs), directory, there)
                needs.append(("parts", member.name, p, block))
                yield _unit(group, "vote", (member, p, block), tuple(needs), tuple(made), bank)

    @property
    def whole(self) -> bool:
        """Whether a worker makes all votes of a member at once, from embeddings that stay in its device."""
        return self.config.engine.placement == "device"

    def shares(self, members: Sequence[Member]) -> bool:
        """Whether what all members share is found with this group of them: with the first one's."""
        return self.common.pays and self.members[0] in members

    def parts(self, member: Member, probe: Probe) -> int:
        """Parts of a member's bank that are searched apart; 0 where it is searched whole, or in the common one."""
        if probe.index == 0 and self.common.pays:
            return 0
        parts = len(bank_parts(self.config, self.bank_rows[member.name], probe))
        return parts if parts > 1 else 0

    @property
    def common_parts(self) -> int:
        """The same of the common bank."""
        if not self.common.pays:
            return 0
        parts = len(common_bank_parts(self.config, self.common, self.input_probe))
        return parts if parts > 1 else 0

    @property
    def input_probe(self) -> Probe:
        """The same for all members."""
        return self.probes[self.members[0].architecture][0]

    @property
    def _until_decided(self) -> bool:
        return self.config.votes == "until-decided"

    def has(self, stage: str, member: Member, probe: Probe) -> bool:
        """Whether a member's probe has a unit of one of the stages that only some runs have."""
        match stage:
            case "trial":
                # By the first member of each architecture, on behalf of all.
                first = next(m for m in self.members if m.architecture == member.architecture)
                return "auto" in self.config.methods and member == first and is_tried(self.config, self.common, probe)
            case "index":
                return self.config.method_of(probe.name) != "exact"
            case "keep":
                # The input is the same for every member, and kept once.
                return self.config.engine.keep_indexes and (probe.index > 0 or member == self.members[0])
            case _:
                # Depths are audited, and they are made from the votes at all probes.
                return any(may_err(self.config, other) for other in self.probes[member.architecture])


def graph_of(config: RunConfig, points: Outline, train_only: bool = False) -> Graph:
    """The graph of a run. Raises LeadlineError for banks that are too small and probes that cannot be placed."""
    members = list_members(config)
    _check_training(config, points)
    bank_rows = {member.name: _check_bank(config, points, member) for member in members}
    return Graph(
        config, members, _place_probes(config, points), bank_of_all(config, points.parts), bank_rows, len(points),
        len(shard_edges(config, len(points))), len(blocks(len(points), config.engine.query_block)), train_only,
    )  # fmt: skip


def _check_training(config: RunConfig, points: Outline) -> None:
    """Networks that are trained at once read their batches from inputs on the device."""
    n = int(np.count_nonzero(points.parts == TRAIN))
    at_once = any(entry.training and entry.training.at_once > 1 for entry in config.members)
    if at_once and not is_resident(n, points.input_shape):
        raise LeadlineError(
            f"training.at_once: inputs of {n} points take {4 * n * math.prod(points.input_shape) / 1e9:.1f} GB, and "
            f"are kept on the device only below {RESIDENT_BYTES / 1e9:.1f} GB; leave at_once out"
        )


def _check_bank(config: RunConfig, points: Outline, member: Member) -> int:
    """The rows of a member's bank. Raises LeadlineError where they are too few."""
    ids = training_ids(member.config.split, points.parts, member.seed)
    if len(ids) - config.leave_one_out < config.k:
        raise LeadlineError(
            f"k: {config.k} neighbours are asked for, but member {member.name} has a bank of {len(ids)} points "
            f"({np.count_nonzero(points.parts == TRAIN)} in part train); lower k or give more points"
        )
    return len(ids)


def _place_probes(config: RunConfig, points: Outline) -> dict[str, list[Probe]]:
    """The probes of each architecture, as its members will have them: mistakes are told before any work is paid for."""
    example = torch.from_numpy(points.read(np.zeros(1, np.int64)))
    placed: dict[str, list[Probe]] = {}
    for entry in config.members:
        model = build(entry.architecture, entry.parameters, points.input_shape, len(points.label_names), entry.seed)
        probes = choose_reductions(config.reduction, place_probes(model, entry.placement, example))
        placed[entry.label] = list(probes)
    names = list(dict.fromkeys(probe.name for probes in placed.values() for probe in probes))
    check_patterns(config.reduction, names)
    for name in names:
        config.method_of(name)
    for pattern in config.method if isinstance(config.method, dict) else ():
        if not fnmatch.filter(names, pattern):
            raise LeadlineError(f"method: {pattern} matches no probe; there are {', '.join(names)}")
    return placed


def _embedded(group: int, member: Member) -> tuple[Thing, ...]:
    return ("embedded", member.name), ("input", group)


def _parts(
    group: int, members: tuple[Member, ...], bank: tuple[str, int, int], block: int, needs: tuple[Thing, ...],
    directory: RunDirectory, there: frozenset[str],
) -> Iterator[Unit]:  # fmt: skip
    """What is still to be searched for a block in the parts of a bank. bank: whose, at which probe, how many parts."""
    owner, probe, parts = bank
    for part in range(parts):
        if directory.part_cost(owner, probe, part, parts, block).name not in there:
            made, ready = (("parts", owner, probe, block),), ("bank", owner, probe, part)
            yield _unit(group, "part", (members, probe, part, block), needs, made, ready)


def _unit(
    group: int, stage: str, arguments: tuple[Any, ...], needs: tuple[Thing, ...], makes: tuple[Thing, ...],
    warm: Thing | None = None, instead: tuple[Unit, ...] = (),
) -> Unit:  # fmt: skip
    """With a name such as "vote mlp-0 3 12"."""
    said: list[str] = []
    for argument in arguments:
        said += (
            [m.name for m in argument] if isinstance(argument, tuple) else [str(getattr(argument, "name", argument))]
        )
    return Unit(stage, arguments, " ".join([stage, *said]), needs, makes, group, warm, instead)


def _is_indexed(directory: RunDirectory, member: Member, probe: int) -> bool:
    record = directory.index_record(member.name, probe)
    if not record.exists():
        return False
    return read_json(record)["method"] == "exact" or directory.index(member.name, probe).exists()
