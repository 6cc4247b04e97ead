"""The units of a run: each is done whole or not at all, and done again gives the same bytes.

A bench does units of one run in one process. It knows nothing of Ray: `pool` puts benches into actors.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from leadline.config import MemberConfig, RunConfig
from leadline.depth import depth_from_votes, is_unsettled
from leadline.embedding import ShardedRows, embed_batch
from leadline.errors import LeadlineError
from leadline.knn import Bank, Votes, count_votes
from leadline.knn.arrays import Array
from leadline.members.architectures import build
from leadline.members.probes import Probe, place_probes
from leadline.members.splits import path_of_seed, training_ids
from leadline.members.train import resolve_precision, train
from leadline.members.weights import load_weights, save_weights, weights_fingerprint
from leadline.points import open_points
from leadline.store import RunDirectory
from leadline.store.files import read_json, replacing, write_json
from leadline.store.schemas import DEPTHS, OUTPUT_FIELDS, VOTE_FIELDS, vote_columns, votes_schema
from leadline.store.tables import ROWS, write_table

OUTPUTS = np.dtype([("prediction", np.int32), *((field, np.float32) for field in OUTPUT_FIELDS[1:])])


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


def blocks(n: int, size: int) -> list[tuple[int, int]]:
    """(first, stop) of the pieces of n things, `size` each."""
    return [(first, min(first + size, n)) for first in range(0, n, size)]


def shard_edges(config: RunConfig, n_points: int) -> list[tuple[int, int]]:
    """First and last + 1 point of each shard. Whole batches, so that a batch has the same points in every sharding."""
    batch = config.engine.batch_size
    return blocks(n_points, -(-config.engine.shard_size // batch) * batch)


class Bench:
    """Does units of one run, on one device, with a fixed number of threads."""

    def __init__(self, config: RunConfig, metadata: dict[str, str]) -> None:
        torch.set_num_threads(config.engine.threads)
        self.config = config
        self.metadata = metadata
        self.device = torch.device("cuda" if config.engine.gpus else "cpu")
        self.points = open_points(config.points)
        self.shards = shard_edges(config, len(self.points))
        self.query_blocks = blocks(len(self.points), config.engine.query_block)
        self._ready: tuple[tuple[str, int], Bank] | None = None
        self._networks: dict[str, tuple[torch.nn.Module, list[Probe]]] = {}

    def train(self, directory: RunDirectory, member: Member) -> int:
        """Train a member, or load its given weights; store them with the places of its probes. Returns the steps."""
        started = time.perf_counter()
        model = self._build(member)
        source, recipe = member.weights_source, member.config.training
        ids = self._training_ids(member)
        if source:
            load_weights(model, source)
        if recipe:
            train(model, self.points, ids, recipe, member.seed, self.device)
        model.float().to(self.device)
        example = torch.from_numpy(self.points.read(np.zeros(1, np.int64))).to(self.device)
        probes = place_probes(model, member.config.placement, example)
        with replacing(directory.weights(member.name)) as beside:
            save_weights(model, beside)
        write_json(
            directory.record("train", member.name),
            {
                "weights_fingerprint": weights_fingerprint(model),
                "n_train": len(ids),
                "steps": recipe.steps if recipe else None,
                "precision": resolve_precision(recipe.precision, self.device) if recipe else None,
                "probes": [asdict(probe) for probe in probes],
                "seconds": time.perf_counter() - started,
            },
        )
        return recipe.steps if recipe else 0

    def embed(self, directory: RunDirectory, members: Sequence[Member], shard: int) -> int:
        """Read a shard of points once and run every member on it. Returns the number of embedded points."""
        networks = [self._network(directory, member) for member in members]
        first, stop = self.shards[shard]
        outputs = [np.empty(stop - first, OUTPUTS) for _ in members]
        with ExitStack() as open_files:
            # The input is the first member's to write, on behalf of all.
            files: list[list[Array | None]] = [
                [
                    self._array(open_files, directory.embedding(member.name, probe.index, shard), stop - first, probe)
                    if probe.index or member is members[0]
                    else None
                    for probe in probes
                ]
                for member, (_, probes) in zip(members, networks, strict=True)
            ]
            for start in range(first, stop, self.config.engine.batch_size):
                ids = np.arange(start, min(start + self.config.engine.batch_size, stop))
                inputs = torch.from_numpy(self.points.read(ids)).to(self.device)
                rows = slice(start - first, start - first + len(ids))
                for member, (model, probes), kept, out in zip(members, networks, files, outputs, strict=True):
                    batch = embed_batch(model, probes, inputs, start, member.name)
                    for array, values in zip(kept, batch.embeddings, strict=True):
                        if array is not None:
                            array[rows] = values
                    for field in OUTPUT_FIELDS:
                        out[field][rows] = getattr(batch.outputs, field)
        for member, out in zip(members, outputs, strict=True):
            with replacing(directory.outputs(member.name, shard)) as beside:
                _save(beside, out)
        return (stop - first) * len(members)

    def vote(self, directory: RunDirectory, member: Member, probe: int, block: int) -> int:
        """The votes of one block of points at one probe. Returns their number."""
        started = time.perf_counter()
        first, stop = self.query_blocks[block]
        paths = [directory.embedding(member.name, probe, shard) for shard in range(len(self.shards))]
        bank_ids = self._training_ids(member)
        queries = np.arange(first, stop)
        exclude = np.searchsorted(bank_ids, queries)
        inside = bank_ids[np.minimum(exclude, len(bank_ids) - 1)] == queries
        exclude = np.where(inside & self.config.leave_one_out, exclude, -1)
        bank = self._bank(member.name, probe, ShardedRows(paths, bank_ids))
        neighbours, cost = bank.search(ShardedRows(paths)[first:stop], self.config.k, exclude)
        votes = count_votes(self.points.labels[bank_ids][neighbours])
        with replacing(directory.votes_part(member.name, probe, block)) as beside:
            _save(beside, np.stack([getattr(votes, field) for field in VOTE_FIELDS], axis=1))
        seconds = time.perf_counter() - started
        write_json(directory.votes_cost(member.name, probe, block), {**asdict(cost), "seconds": seconds})
        return stop - first

    def reduce(self, directory: RunDirectory, member: Member) -> int:
        """Join a member's votes to its tables of votes and depths. Returns the number of its points."""
        trained = read_json(directory.record("train", member.name))
        n_probes = len(trained["probes"])
        votes = [
            ShardedRows([directory.votes_part(member.name, probe, block) for block in range(len(self.query_blocks))])
            for probe in range(n_probes)
        ]
        outputs = ShardedRows([directory.outputs(member.name, shard) for shard in range(len(self.shards))])
        tally = _Tally(n_probes)
        write_table(
            directory.member_table("votes", member.name),
            votes_schema(n_probes),
            (_votes_table(votes, first, stop) for first, stop in blocks(len(self.points), ROWS)),
            self.metadata,
        )
        write_table(
            directory.member_table("depths", member.name),
            DEPTHS,
            self._depth_tables(member, votes, outputs, tally),
            self.metadata,
        )
        costs = [
            [read_json(directory.votes_cost(member.name, probe, block)) for block in range(len(self.query_blocks))]
            for probe in range(n_probes)
        ]
        write_json(
            directory.record("reduce", member.name),
            {
                **tally.accuracies(),
                "cost": [
                    {
                        key: sum(cost[key] for cost in probe)
                        for key in ("pairs", "certified", "reranked", "fell_through")
                    }
                    for probe in costs
                ],
                "vote_seconds": [sum(cost["seconds"] for cost in probe) for probe in costs],
            },
        )
        return len(self.points)

    def _depth_tables(
        self, member: Member, votes: list[ShardedRows], outputs: ShardedRows, tally: "_Tally"
    ) -> Iterator[pa.Table]:
        in_training = np.zeros(len(self.points), bool)
        in_training[self._training_ids(member)] = True
        for first, stop in blocks(len(self.points), ROWS):
            winners = np.stack([probe[first:stop][:, 0] for probe in votes], axis=1)
            said, labels, inside = outputs[first:stop], self.points.labels[first:stop], in_training[first:stop]
            depths = depth_from_votes(winners, said["prediction"])
            tally.add(inside, said["prediction"] == labels, winners == labels[:, None])
            yield pa.table(
                {
                    "point_id": np.arange(first, stop),
                    "label": labels,
                    "in_training": inside,
                    **{field: said[field] for field in OUTPUT_FIELDS},
                    "depth": depths,
                    "unsettled": is_unsettled(depths, len(votes)),
                }
            )

    def _training_ids(self, member: Member) -> Array:
        return training_ids(member.config.split, self.points.parts, member.seed)

    def _build(self, member: Member) -> torch.nn.Module:
        entry = member.config
        n_classes = len(self.points.label_names)
        return build(entry.architecture, entry.parameters, self.points.input_shape, n_classes, member.seed)

    def _bank(self, member: str, probe: int, rows: ShardedRows) -> Bank:
        """The bank of a probe, made ready once for all blocks that come one after another."""
        if self._ready is None or self._ready[0] != (member, probe):
            self._ready = None  # two banks are never in memory together
            self._ready = ((member, probe), Bank(rows, self.device))
        return self._ready[1]

    def _network(self, directory: RunDirectory, member: Member) -> tuple[torch.nn.Module, list[Probe]]:
        """A member with its stored weights, kept for the next shard; networks of another group are dropped."""
        if member.name not in self._networks:
            if len(self._networks) >= self.config.engine.group_size:
                self._networks.clear()
            trained = read_json(directory.record("train", member.name))
            model, path = self._build(member), directory.weights(member.name)
            load_weights(model, path)
            model.float().to(self.device).eval()
            if weights_fingerprint(model) != trained["weights_fingerprint"]:
                raise LeadlineError(f"{path}: not the weights that the run was begun with; restore the file")
            self._networks[member.name] = (model, [Probe(**probe) for probe in trained["probes"]])
        return self._networks[member.name]

    @staticmethod
    def _array(open_files: ExitStack, path: Path, n_rows: int, probe: Probe) -> Array:
        """A new .npy file of a probe, mapped for writing; it takes its name when all files of the unit are whole."""
        beside = open_files.enter_context(replacing(path))
        array = np.lib.format.open_memmap(beside, mode="w+", dtype=np.float32, shape=(n_rows, probe.width))
        open_files.callback(array.flush)
        return array


class _Tally:
    """Right answers of the network and of each probe, in training and held out."""

    def __init__(self, n_probes: int) -> None:
        self.points = np.zeros(2, np.int64)
        self.network = np.zeros(2, np.int64)
        self.probes = np.zeros((2, n_probes), np.int64)

    def add(self, inside: Array, network: Array, probes: Array) -> None:
        for side, where in enumerate((inside, ~inside)):
            self.points[side] += np.count_nonzero(where)
            self.network[side] += np.count_nonzero(network[where])
            self.probes[side] += probes[where].sum(axis=0)

    def accuracies(self) -> dict[str, Any]:
        def share(right: Array, side: int) -> Any:
            return (right[side] / self.points[side]).tolist() if self.points[side] else None

        return {
            "n_held_out": int(self.points[1]),
            "train_accuracy": share(self.network, 0),
            "held_out_accuracy": share(self.network, 1),
            "probe_train_accuracy": share(self.probes, 0),
            "probe_held_out_accuracy": share(self.probes, 1),
        }


def _votes_table(votes: list[ShardedRows], first: int, stop: int) -> pa.Table:
    columns = vote_columns([Votes(*probe[first:stop].T) for probe in votes])
    return pa.table({"point_id": np.arange(first, stop), **columns})


def _save(path: Path, array: Array) -> None:
    with path.open("wb") as opened:
        np.save(opened, array, allow_pickle=False)
