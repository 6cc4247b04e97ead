"""A member's votes joined to its tables, and what it needs no more removed."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import numpy as np
import pyarrow as pa

from leadline.cluster.work import VOTES, Member, blocks, list_members
from leadline.cluster.workbench import Workbench
from leadline.depth import depth_from_votes, is_unsettled
from leadline.knn import Cost, Votes
from leadline.knn.arrays import Array
from leadline.knn.audit import audit_depths
from leadline.store.files import read_array, read_json, write_json
from leadline.store.schemas import DEPTHS, OUTPUT_FIELDS, VOTE_FIELDS, vote_columns, votes_schema
from leadline.store.tables import ROWS, open_table, write_table


def reduce(bench: Workbench, member: Member) -> int:
    """Join a member's votes to its tables of votes and depths. Returns the number of its points."""
    directory, n_probes = bench.directory, len(bench.probes(member))
    tally = _Tally(n_probes)
    votes, depths = (directory.member_table(name, member.name) for name in ("votes", "depths"))
    write_table(votes, votes_schema(n_probes), _vote_tables(bench, member, n_probes), bench.stamps)
    write_table(depths, DEPTHS, _depth_tables(bench, member, tally), bench.stamps)
    costs = [_costs(bench, member, probe) for probe in range(n_probes)]
    indexes = [bench.index_record(member.name, probe) for probe in range(n_probes)]
    write_json(
        directory.record("reduce", member.name),
        {
            **tally.accuracies(),
            "cost": [
                {
                    **{field.name: sum(cost[field.name] for cost in of_probe) for field in fields(Cost)},
                    "plan": next((cost["plan"] for cost in of_probe if cost["plan"]), None),
                }
                for of_probe in costs
            ],
            "vote_seconds": [sum(cost["seconds"] for cost in of_probe) for of_probe in costs],
            "build_seconds": [index.get("build_seconds", 0.0) for index in indexes],
            "probes": [_probe_record(bench, member, probe, index) for probe, index in enumerate(indexes)],
            "audit": _depth_audit(bench, member, n_probes),
        },
    )
    return len(bench.points)


def free(bench: Workbench, member: Member) -> int:
    """Remove what a member that is reduced needs no more. Returns the members that it was: one."""
    bench.directory.free_member(member.name, keep_indexes=bench.config.engine.keep_indexes)
    return 1


def _costs(bench: Workbench, member: Member, probe: int) -> list[dict[str, Any]]:
    """Of all searches at a probe. What the members share is counted at the first of them."""
    directory, every_block = bench.directory, range(len(bench.query_blocks))
    paths = [directory.votes_cost(member.name, probe, block) for block in every_block]
    if probe == 0 and bench.common.pays and member == list_members(bench.config)[0]:
        paths += [directory.shared_cost(block) for block in every_block]
    return [read_json(path) for path in paths]


def _probe_record(bench: Workbench, member: Member, probe: int, index: dict[str, Any]) -> dict[str, Any]:
    """Method of a probe, its index, and the audit of its votes, as the table of probes has them."""
    audit = bench.directory.audit_record(member.name, probe)
    return {
        **{column: index[column] for column in ("method", "choice", "index_bytes") if column in index},
        **(read_json(audit) if audit.exists() else {}),
    }


def _depth_audit(bench: Workbench, member: Member, n_probes: int) -> dict[str, Any]:
    """The audit of a member's depths; nothing where its votes are exact at full width."""
    paths = [bench.directory.audited(member.name, probe) for probe in range(n_probes)]
    if not paths[0].exists():
        return {}
    said = bench.outputs(member)[bench.sample]["prediction"]
    exact = depth_from_votes(np.stack([read_array(path) for path in paths], axis=1), said)
    with open_table(bench.directory.member_table("depths", member.name)) as table:
        depths = table.read(["depth"])["depth"].to_numpy()[bench.sample]
    agreement, error = audit_depths(depths, exact, n_probes)
    return {"audit_sample": len(exact), **agreement.columns("depth_agreement"), **error.columns("depth_error")}


def _vote_tables(bench: Workbench, member: Member, n_probes: int) -> Iterator[pa.Table]:
    for first, stop in blocks(len(bench.points), ROWS):
        votes = _votes(bench, member, n_probes, first, stop)
        columns = vote_columns([Votes(**{field: probe[field] for field in VOTE_FIELDS}) for probe in votes.T])
        yield pa.table({"point_id": np.arange(first, stop), **columns})


def _depth_tables(bench: Workbench, member: Member, tally: "_Tally") -> Iterator[pa.Table]:
    in_training = np.zeros(len(bench.points), bool)
    in_training[bench.training_ids(member)] = True
    outputs = bench.outputs(member)
    for first, stop in blocks(len(bench.points), ROWS):
        winners = _votes(bench, member, tally.n_probes, first, stop)["winner"]
        said, labels, inside = outputs[first:stop], bench.points.labels[first:stop], in_training[first:stop]
        depths = depth_from_votes(winners, said["prediction"])
        tally.add(inside, said["prediction"] == labels, winners == labels[:, None], winners >= 0)
        yield pa.table(
            {
                "point_id": np.arange(first, stop),
                "label": labels,
                "in_training": inside,
                **{field: said[field] for field in OUTPUT_FIELDS},
                "depth": depths,
                "unsettled": is_unsettled(depths, tally.n_probes),
            }
        )


def _votes(bench: Workbench, member: Member, n_probes: int, first: int, stop: int) -> Array:
    """VOTES [stop - first, P] of a range of points; the winner of a vote that was not computed is -1."""
    votes = np.zeros((stop - first, n_probes), VOTES)
    votes["winner"] = -1
    for block, (start, end) in enumerate(bench.query_blocks):
        for probe in range(n_probes) if start < stop and first < end else ():
            part = read_array(bench.directory.votes_part(member.name, probe, block))
            part = part[(part["point_id"] >= first) & (part["point_id"] < stop)]
            votes[part["point_id"] - first, probe] = part
    return votes


class _Tally:
    """Right answers of the network and of each probe, in training and held out."""

    def __init__(self, n_probes: int) -> None:
        self.n_probes = n_probes
        self.points = np.zeros(2, np.int64)
        self.network = np.zeros(2, np.int64)
        self.probes = np.zeros((2, n_probes), np.int64)
        self.computed = np.zeros((2, n_probes), np.int64)

    def add(self, inside: Array, network: Array, probes: Array, computed: Array) -> None:
        for side, where in enumerate((inside, ~inside)):
            self.points[side] += np.count_nonzero(where)
            self.network[side] += np.count_nonzero(network[where])
            self.probes[side] += probes[where].sum(axis=0)
            self.computed[side] += computed[where].sum(axis=0)

    def accuracies(self) -> dict[str, Any]:
        """Shares of right answers; None where there are no points, or not all of their votes were computed."""

        def share(side: int, right: int, of: int) -> float | None:
            return float(right / of) if 0 < of == self.points[side] else None

        def by_probe(side: int) -> list[float | None]:
            return [share(side, *counts) for counts in zip(self.probes[side], self.computed[side], strict=True)]

        return {
            "n_held_out": int(self.points[1]),
            "train_accuracy": share(0, self.network[0], self.points[0]),
            "held_out_accuracy": share(1, self.network[1], self.points[1]),
            "probe_train_accuracy": by_probe(0),
            "probe_held_out_accuracy": by_probe(1),
        }
