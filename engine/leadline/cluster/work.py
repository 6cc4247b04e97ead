"""What the work of a run is: its members, their banks and the parts of these, its shards and blocks, and its arrays.

All of it follows from the configuration and the points. Nothing here computes, or reads what a run has computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from leadline.cluster.common import CommonBank, common_bank
from leadline.config import MemberConfig, RunConfig
from leadline.embedding.reductions import stored_width
from leadline.knn.arrays import Array
from leadline.members.probes import Probe
from leadline.members.splits import path_of_seed, training_ids
from leadline.store.schemas import OUTPUT_FIELDS, VOTE_FIELDS

# Arrays that units leave to later ones, a row for each point.
OUTPUTS = np.dtype([("prediction", np.int32), *((field, np.float32) for field in OUTPUT_FIELDS[1:])])
VOTES = np.dtype([("point_id", np.int64), *((field, np.int32) for field in VOTE_FIELDS)])


def found_by_point(k: int) -> np.dtype[Any]:
    """A point's neighbours: their point ids."""
    return np.dtype([("point_id", np.int64), ("neighbours", np.int64, (k,))])


def found_in_part(k: int) -> np.dtype[Any]:
    """The point ids of the neighbours in a part of a bank, and their squared distances, nearest first."""
    return np.dtype([("neighbours", np.int64, (k,)), ("squares", np.float64, (k,))])


@dataclass(frozen=True)
class Member:
    """One network of a run: `name` is unique and the key of its tables, `architecture` the name of its entry."""

    name: str
    architecture: str
    seed: int
    config: MemberConfig

    @property
    def weights_source(self) -> Path | None:
        """The file that its weights are given in."""
        return path_of_seed("weights", self.config.weights, self.seed) if self.config.weights else None


def list_members(config: RunConfig) -> list[Member]:
    """The members in the order of the configuration."""
    return [
        Member(f"{entry.label}-{seed}", entry.label, seed, entry)
        for entry in config.members
        for seed in range(entry.seed, entry.seed + entry.count)
    ]


def trained_together(members: Sequence[Member]) -> list[tuple[Member, ...]]:
    """Members in the order given, all of a run, cut into those that one unit trains: of one entry, `at_once` in a row.

    Which they are follows from the configuration alone, since it decides the bits of their weights.
    """
    cut = []
    for _, some in groupby(members, key=lambda member: member.architecture):
        of_entry = tuple(some)
        recipe = of_entry[0].config.training
        cut += [of_entry[slice(*edges)] for edges in blocks(len(of_entry), recipe.at_once if recipe else 1)]
    return cut


def bank_of_all(config: RunConfig, parts: Array) -> CommonBank:
    """The common bank of a run's members (see `common_bank`); parts: [N], the points'.

    It does not pay where the input is not searched exactly: what members take from it would not be their own; nor
    where members are made whole, each by one worker.
    """
    splits = (training_ids(member.config.split, parts, member.seed) for member in list_members(config))
    common = common_bank(splits, len(parts), config.k, config.leave_one_out)
    own = config.method_of("input") in ("exact", "auto") and config.engine.placement != "device"
    return replace(common, pays=common.pays and own)


def has_choice(config: RunConfig, common: CommonBank, probe: Probe) -> bool:
    """Whether a probe is searched by anything but exact search, or may be."""
    return config.method_of(probe.name) != "exact" and not (probe.index == 0 and common.pays)


def is_tried(config: RunConfig, common: CommonBank, probe: Probe) -> bool:
    """Whether a probe has a trial where `auto` chooses: for its own method, or for what it changes beside others."""
    return has_choice(config, common, probe) or probe.reduction != "none"


def may_err(config: RunConfig, probe: Probe) -> bool:
    """Whether the votes of a probe may be other than exact ones at full width."""
    return config.method_of(probe.name) != "exact" or probe.reduction != "none"


def blocks(n: int, size: int) -> list[tuple[int, int]]:
    """(first, stop) of the pieces of n things, `size` each."""
    return [(first, min(first + size, n)) for first in range(0, n, size)]


def bank_parts(config: RunConfig, n_bank: int, probe: Probe) -> list[tuple[int, int]]:
    """(first, stop) of the parts of a member's bank; one where a worker's search holds the whole. No index is cut."""
    if config.method_of(probe.name) != "exact":
        return [(0, n_bank)]
    return _cut(n_bank, stored_width(probe), config.k, config.engine.search_memory)


def common_bank_parts(config: RunConfig, common: CommonBank, probe: Probe) -> list[tuple[int, int]]:
    """The same of the common bank; probe: the input."""
    return _cut(len(common.ids), stored_width(probe), common.k, config.engine.search_memory)


def _cut(n_bank: int, width: int, k: int, memory_budget: int) -> list[tuple[int, int]]:
    """(first, stop) of the fewest parts of a bank that a search holds in memory each (see `fits_memory`).

    Or of fewer, so that every part has more than k rows and could answer a query alone.
    """
    held = max(1, memory_budget // (8 * width))  # rows
    parts = max(1, min(-(-n_bank // held), n_bank // (k + 1)))
    return [(n_bank * i // parts, n_bank * (i + 1) // parts) for i in range(parts)]


def shard_edges(config: RunConfig, n_points: int) -> list[tuple[int, int]]:
    """First and last + 1 point of each shard. Whole batches, so that a batch has the same points in every sharding."""
    batch = config.engine.batch_size
    return blocks(n_points, -(-config.engine.shard_size // batch) * batch)
