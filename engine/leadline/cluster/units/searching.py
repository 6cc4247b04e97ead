"""Votes, and the searches that they are taken from: of a bank, of a part of one, and of what all members share."""

import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any, NamedTuple

import numpy as np

from leadline.cluster.common import own_neighbours
from leadline.cluster.work import VOTES, Member, bank_parts, common_bank_parts, found_by_point, found_in_part
from leadline.cluster.workbench import Workbench, places
from leadline.knn import NOTHING, Cost, Index, Votes, count_votes, merged
from leadline.knn.arrays import Array
from leadline.store.files import read_array, read_json, write_array, write_json
from leadline.store.places import Place
from leadline.store.schemas import VOTE_FIELDS

Spent = dict[str, Any]  # the fields of a Cost, and how the bank was searched; where it is cut, the seconds of its parts


class _BankOf(NamedTuple):
    """A bank as it is searched: the rows of the points `ids`, int64 [M], in what is embedded of `owner` at a probe.

    owner: a member, or "input" for the common bank; k: neighbours that are found; parts: (first, stop) of each.
    """

    owner: str
    probe: int
    ids: Array
    k: int
    parts: list[tuple[int, int]]


def share(bench: Workbench, members: Sequence[Member], block: int) -> int:
    """The common neighbours, at the input, of the points of a block that any of the members is asked for.

    Returns the number of points. With `votes: until-decided`, the members' votes at probe 1 must be there.
    """
    started = time.perf_counter()
    bank, asked = _common_bank(bench), _open_points(bench, members, 0, block)
    shared = np.empty(len(asked), found_by_point(bank.k))
    shared["point_id"] = asked
    if len(bank.parts) > 1:
        shared["neighbours"], cost = _among_parts(bench, bank, block)
    else:
        shared["neighbours"], _, cost = _in_order(bench, bank, bank.ids, asked)
    write_array(bench.directory.shared(block), shared)
    _write_cost(bench.directory.shared_cost(block), cost, started)
    return len(asked)


def part(bench: Workbench, members: Sequence[Member], probe: int, number: int, block: int) -> int:
    """The nearest rows of one part of a bank to a block's open points. Returns their number.

    members: the one whose bank it is, or those that share the common one. A bank that no worker can hold is cut: each
    worker makes a part ready once, for all blocks.
    """
    started = time.perf_counter()
    is_common = probe == 0 and bench.common.pays
    bank = _common_bank(bench) if is_common else _own_bank(bench, members[0], probe)
    asked = _open_points(bench, members, probe, block)
    found = np.empty(len(asked), found_in_part(bank.k))
    ids = bank.ids[slice(*bank.parts[number])]
    found["neighbours"], found["squares"], cost = _in_order(bench, bank, ids, asked)
    place = (bank.owner, probe, number, len(bank.parts), block)
    write_array(bench.directory.part(*place), found)
    _write_cost(bench.directory.part_cost(*place), cost, started)
    return len(asked)


def vote(bench: Workbench, member: Member, probe: int, block: int) -> int:
    """The votes of a block's open points at one probe. Returns their number.

    With `votes: until-decided`, the votes of the block at the next probe must be there; at the input, what the
    members share.
    """
    started = time.perf_counter()
    bank, asked = _own_bank(bench, member, probe), _open_points(bench, [member], probe, block)
    if probe == 0 and bench.common.pays:
        neighbours, cost = _among_shared(bench, bank, block, asked)
    elif len(bank.parts) > 1:
        neighbours, cost = _among_parts(bench, bank, block)
    else:
        neighbours, cost = _among_own(bench, bank, asked)
    if not bench.is_exact(member, probe):
        _keep_sampled(bench, member, probe, block, asked, neighbours)
    votes = count_votes(bench.points.labels[neighbours])
    write_votes(bench, member, probe, block, asked, votes)
    _write_cost(bench.directory.votes_cost(member.name, probe, block), cost, started)
    return len(asked)


def write_votes(bench: Workbench, member: Member, probe: int, block: int, ids: Array, votes: Votes) -> None:
    """Of the points `ids` of a block; the unit's record comes after them."""
    found = np.empty(len(ids), VOTES)
    found["point_id"] = ids
    for field in VOTE_FIELDS:
        found[field] = getattr(votes, field)
    write_array(bench.directory.votes_part(member.name, probe, block), found)


def _write_cost(place: Place, cost: Spent, started: float) -> None:
    """The record of a unit that is done; its seconds are also those of the parts that it has joined."""
    write_json(place, {**cost, "seconds": time.perf_counter() - started + cost.get("seconds", 0.0)})


def _keep_sampled(bench: Workbench, member: Member, probe: int, block: int, asked: Array, neighbours: Array) -> None:
    """Keep what the run found for the points that are audited: the audit is of just these votes."""
    place = places(asked, bench.sample)
    place = place[place >= 0]
    sampled = np.empty(len(place), found_by_point(bench.config.k))
    sampled["point_id"], sampled["neighbours"] = asked[place], neighbours[place]
    write_array(bench.directory.sampled(member.name, probe, block), sampled)


def _own_bank(bench: Workbench, member: Member, probe: int) -> _BankOf:
    ids, about = bench.training_ids(member), bench.probes(member)[probe]
    return _BankOf(member.name, probe, ids, bench.config.k, bank_parts(bench.config, len(ids), about))


def _common_bank(bench: Workbench) -> _BankOf:
    common = bench.common
    return _BankOf("input", 0, common.ids, common.k, common_bank_parts(bench.config, common, bench.input_probe))


def _open_points(bench: Workbench, members: Sequence[Member], probe: int, block: int) -> Array:
    """Ids of the points of a block that any of the members is asked for at a probe.

    All of them, or those that no later probe has decided.
    """
    every = np.arange(*bench.query_blocks[block])
    is_open = np.zeros(len(every), bool)
    for member in members:
        if bench.config.votes == "all" or probe == len(bench.probes(member)) - 1:
            return every
        later = read_array(bench.directory.votes_part(member.name, probe + 1, block))
        said = bench.outputs(member)[later["point_id"]]["prediction"]
        is_open[later["point_id"][later["winner"] == said] - every[0]] = True
    return every[is_open]


def _among_own(bench: Workbench, bank: _BankOf, asked: Array) -> tuple[Array, Spent]:
    """Ids of the nearest points of a bank, [Q, k], and what they cost."""
    rows, cost = _search(bench, bank, bank.ids, asked)
    return bank.ids[rows], cost


def _among_parts(bench: Workbench, bank: _BankOf, block: int) -> tuple[Array, Spent]:
    """The same, in the order of (distance, id), from the searches of all parts of the bank."""
    n = len(bank.parts)
    searched = [(bank.owner, bank.probe, number, n, block) for number in range(n)]
    found = read_array(bench.directory.part(*searched[0]))
    for place in searched[1:]:
        # One after another: what two parts have found is in memory, not what all have.
        other = read_array(bench.directory.part(*place))
        rows, squares = (np.concatenate([found[name], other[name]], axis=1) for name in ("neighbours", "squares"))
        found["neighbours"], found["squares"] = merged(rows, squares, bank.k)
    costs = [read_json(bench.directory.part_cost(*place)) for place in searched]
    return found["neighbours"], {
        **{name: sum(cost[name] for cost in costs) for name in ("seconds", *(field.name for field in fields(Cost)))},
        "plan": next((f"{n} parts, {cost['plan']}" for cost in costs if cost["plan"]), None),
    }


def _among_shared(bench: Workbench, bank: _BankOf, block: int, asked: Array) -> tuple[Array, Spent]:
    """The same at the input, from what the members share; searched for where that says too little."""
    shared = read_array(bench.directory.shared(block))
    place = places(shared["point_id"], asked)
    inside = np.zeros(len(bench.points), bool)
    inside[bank.ids] = True
    neighbours = np.empty((len(asked), bank.k), np.int64)
    known = place >= 0
    neighbours[known], enough = own_neighbours(shared["neighbours"][place[known]], inside, bank.k)
    known[known] = enough
    neighbours[~known], cost = _among_own(bench, bank, asked[~known])
    return neighbours, cost


def _in_order(bench: Workbench, bank: _BankOf, ids: Array, asked: Array) -> tuple[Array, Array, Spent]:
    """The nearest of some of a bank's points: ids [Q, k] by (distance, id), their squared distances, and the cost."""
    rows, cost = _search(bench, bank, ids, asked)
    squares = np.empty(rows.shape)
    if len(asked):
        search = bench.search_of(bank.owner, bank.probe, ids)
        assert not isinstance(search, Index)  # an index is neither cut nor shared
        rows, squares = search.by_distance(bench.rows(bank.owner, bank.probe, asked), rows)
    return ids[rows], squares, cost


def _search(bench: Workbench, bank: _BankOf, ids: Array, asked: Array) -> tuple[Array, Spent]:
    """The rows of the nearest of some of a bank's points, [Q, k] ascending, and what they cost and how."""
    if not len(asked):
        # The bank need not be made ready.
        return np.empty((0, bank.k), np.int64), {**asdict(NOTHING), "plan": None}
    search = bench.search_of(bank.owner, bank.probe, ids)
    queries = bench.rows(bank.owner, bank.probe, asked)
    rows, cost = search.search(queries, bank.k, bench.left_out(ids, asked))
    return rows, {**asdict(cost), "plan": search.plan}
