"""The units of a run: each is done whole or not at all, and done again gives the same bytes.

A bench does units of one run in one process. It knows nothing of Ray: `pool` puts benches into actors.
"""

import io
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from leadline.cluster.common import CommonBank, common_bank, own_neighbours
from leadline.config import MemberConfig, RunConfig
from leadline.depth import depth_from_votes, is_unsettled
from leadline.embedding import EmbeddedRows, embed_batch, embed_input, fit_directions
from leadline.embedding.principal import load_directions, save_directions
from leadline.embedding.reductions import Reducer, choose_reductions, make_reducers, stored_width
from leadline.errors import LeadlineError
from leadline.knn import (
    NOTHING,
    Bank,
    Cost,
    Index,
    Votes,
    build_index,
    count_votes,
    load_index,
    merged,
    parse_method,
)
from leadline.knn.arrays import Array, Rows, Shards
from leadline.knn.audit import audit_depths, draw, interval, recall_at_k
from leadline.knn.choice import Choice, Option, Trial, candidates, choose
from leadline.members.architectures import build
from leadline.members.probes import Probe, place_probes
from leadline.members.splits import path_of_seed, training_ids
from leadline.members.train import resolve_precision, train
from leadline.members.weights import load_weights, save_weights, weights_fingerprint
from leadline.points import open_points
from leadline.store import RunDirectory
from leadline.store.files import digest, fetched, filling, read_json, replacing, write_json
from leadline.store.places import Place
from leadline.store.schemas import DEPTHS, OUTPUT_FIELDS, VOTE_FIELDS, vote_columns, votes_schema
from leadline.store.tables import ROWS, open_table, write_table

PART = (("neighbours", np.int64), ("squares", np.float64))  # of each query's k nearest in a part of a bank
VOTES = np.dtype([("point_id", np.int64), *((field, np.int32) for field in VOTE_FIELDS)])
_Network = tuple[torch.nn.Module, list[Probe], list[Reducer]]
Spent = dict[str, Any]  # the fields of a Cost, and the bank's plan
SHARED = "exact: the members of the run share the search of the input"
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


def bank_of_all(config: RunConfig, parts: Array) -> CommonBank:
    """The common bank of a run's members (see `common_bank`); parts: [N], the points'.

    It does not pay where the input is not searched exactly: what members take from it would not be their own.
    """
    splits = (training_ids(member.config.split, parts, member.seed) for member in list_members(config))
    common = common_bank(splits, len(parts), config.k, config.leave_one_out)
    return replace(common, pays=common.pays and config.method_of("input") in ("exact", "auto"))


def has_choice(config: RunConfig, common: CommonBank, probe: Probe) -> bool:
    """Whether a probe is searched by anything but exact search, or may be."""
    return config.method_of(probe.name) != "exact" and not (probe.index == 0 and common.pays)


def is_tried(config: RunConfig, common: CommonBank, probe: Probe) -> bool:
    """Whether a probe has a trial where `auto` chooses: for its own method, or for what it changes beside others."""
    return has_choice(config, common, probe) or probe.reduction != "none"


def may_err(config: RunConfig, probe: Probe) -> bool:
    """Whether the votes of a probe may be other than exact ones at full width."""
    return config.method_of(probe.name) != "exact" or probe.reduction != "none"


def found_by_point(k: int) -> np.dtype[Any]:
    """A row of a file of neighbours: their point ids, or rows."""
    return np.dtype([("point_id", np.int64), ("neighbours", np.int64, (k,))])


def blocks(n: int, size: int) -> list[tuple[int, int]]:
    """(first, stop) of the pieces of n things, `size` each."""
    return [(first, min(first + size, n)) for first in range(0, n, size)]


def bank_parts(config: RunConfig, n_bank: int, probe: Probe) -> list[tuple[int, int]]:
    """(first, stop) of the parts of a bank, each of which a worker's search can hold; one where it holds the whole.

    Every part has more than k rows, so that it alone could answer a query.
    """
    parts = -(-8 * n_bank * stored_width(probe) // config.engine.memory_budget)
    parts = max(1, min(parts, n_bank // (config.k + 1))) if config.method_of(probe.name) == "exact" else 1
    return [(n_bank * i // parts, n_bank * (i + 1) // parts) for i in range(parts)]


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
        self.common = bank_of_all(config, self.points.parts)
        shape = self.points.input_shape
        (self.input_probe,) = choose_reductions(config.reduction, [Probe(0, "input", math.prod(shape), None, shape)])
        # What is audited, and what methods are tried on.
        self.sample, self.tried = draw(len(self.points), config.audit.sample, config.audit.seed)
        self._ready: tuple[tuple[str, int, int, int], Bank | Index] | None = None
        self._networks: dict[str, _Network] = {}

    def train(self, directory: RunDirectory, member: Member) -> int:
        """Train a member, or load its given weights; store them with its probes and what their reductions need.

        Returns the steps.
        """
        started = time.perf_counter()
        model = self._build(member)
        source, recipe = member.weights_source, member.config.training
        ids = self._training_ids(member)
        if source:
            load_weights(model, source)
        if recipe:
            train(model, self.points, ids, recipe, member.seed, self.device)
        model.float().to(self.device)
        example = self._inputs(np.zeros(1, np.int64))
        probes = choose_reductions(self.config.reduction, place_probes(model, member.config.placement, example))
        with replacing(directory.weights(member.name)) as beside:
            save_weights(model, beside)
        directions = self._fit_directions(directory, member, model, probes)
        write_json(
            directory.record("train", member.name),
            {
                "weights_fingerprint": weights_fingerprint(model),
                "n_train": len(ids),
                "steps": recipe.steps if recipe else None,
                "precision": resolve_precision(recipe.precision, self.device) if recipe else None,
                "probes": [asdict(probe) for probe in probes],
                "directions": directions,
                "seconds": time.perf_counter() - started,
            },
        )
        return recipe.steps if recipe else 0

    def _fit_directions(
        self, directory: RunDirectory, member: Member, model: torch.nn.Module, probes: Sequence[Probe]
    ) -> str | None:
        """Store the directions of a member's probes that are reduced by pca. Returns the file's digest, None for none.

        All shards are reduced by what lies in the file, so a fit on another machine cannot be mixed in.
        """
        found = fit_directions(
            model, probes, self._inputs, self._training_ids(member), seed=member.seed,
            batch_size=self.config.engine.batch_size, memory=self.config.engine.memory_budget, member=member.name,
        )  # fmt: skip
        if not found:
            return None
        path = directory.directions(member.name)
        with replacing(path) as beside:
            save_directions(found, beside)
        return digest(path)

    def embed(self, directory: RunDirectory, members: Sequence[Member], shard: int) -> int:
        """Read a shard of points once and run every member on it. Returns the number of embedded points.

        The input, the same for all members of the run, is kept with the first of them that comes by.
        """
        networks = [self._network(directory, member) for member in members]
        first, stop = self.shards[shard]
        outputs = [np.empty(stop - first, OUTPUTS) for _ in members]
        kept = directory.embedding("input", 0, shard)
        with ExitStack() as open_files:
            of_input = stored_width(self.input_probe)
            rows_in = None if kept.exists() else self._array(open_files, kept, stop - first, of_input)
            files = [
                [
                    self._array(
                        open_files, directory.embedding(member.name, p.index, shard), stop - first, stored_width(p)
                    )
                    for p in probes[1:]
                ]
                for member, (_, probes, _) in zip(members, networks, strict=True)
            ]
            for start in range(first, stop, self.config.engine.batch_size):
                ids = np.arange(start, min(start + self.config.engine.batch_size, stop))
                inputs = self._inputs(ids)
                rows = slice(start - first, start - first + len(ids))
                for member, network, arrays, out in zip(members, networks, files, outputs, strict=True):
                    model, probes, reducers = network
                    batch = embed_batch(model, probes, inputs, start, member.name, reducers)
                    for array, values in zip(arrays, batch.embeddings[1:], strict=True):
                        array[rows] = values
                    for field in OUTPUT_FIELDS:
                        out[field][rows] = getattr(batch.outputs, field)
                if rows_in is not None:
                    rows_in[rows] = embed_input(self.input_probe, inputs, start)
        for member, out in zip(members, outputs, strict=True):
            with replacing(directory.outputs(member.name, shard)) as beside:
                _save(beside, out)
        return (stop - first) * len(members)

    def trial(self, directory: RunDirectory, member: Member, probe: int) -> int:
        """Measure the methods that a probe may have, beside exact search, on a sample. Returns the sample's points.

        What they change is told against exact votes at full width, and so is what the probe's reduction changes alone.
        Stored for the architecture: which method pays is the same for all its members, or nearly so.
        """
        about = self._probes(directory, member)[probe]
        bank_ids = self._training_ids(member)
        rows, queries, own = self._question(directory, member.name, probe, bank_ids, self.tried)
        said = self._outputs(directory, member)[self.tried]["prediction"]

        def agrees(neighbours: Array) -> Array:
            return np.asarray(count_votes(self.points.labels[neighbours]).winner == said)

        def measured(method: str) -> tuple[float, float, Array]:
            """Seconds to make ready, seconds for all points, and where the sample's votes are the prediction."""
            started = time.perf_counter()
            search = self._bank(rows) if method == "exact" else self._built(method, rows)
            ready = time.perf_counter() - started
            started = time.perf_counter()
            found, _ = search.search(queries, self.config.k, own)
            seconds = time.perf_counter() - started
            return ready, seconds * len(self.points) / len(self.tried), agrees(bank_ids[found])

        measured("exact")  # compiles
        ready, seconds, stored = measured("exact")
        exact = stored
        if about.reduction != "none":
            exact = agrees(self._exact_neighbours(directory, member, probe, self.tried))
        exact_seconds, options = ready + seconds, []
        method = self.config.method_of(about.name)
        methods = candidates(len(bank_ids)) if method == "auto" else [method]
        for option in methods if has_choice(self.config, self.common, about) else []:
            ready, seconds, votes = measured(option)
            changed = np.flatnonzero(votes != exact).tolist()
            options.append({"method": option, "seconds": ready + seconds, "changed": changed})
            if ready > exact_seconds:
                break  # the others take as long to build
        reduced = np.flatnonzero(stored != exact).tolist()
        record = {"exact_seconds": exact_seconds, "reduced": reduced, "options": options}
        write_json(directory.trial(member.architecture, probe), record)
        return len(self.tried)

    def index(self, directory: RunDirectory, member: Member, probe: int) -> int:
        """Settle the method of a probe, and save its index where it is not exact. Returns the rows of the bank."""
        choice = self._choice(directory, member, probe)
        record: dict[str, Any] = {"method": choice.method, "choice": choice.why or None}
        bank_ids = self._training_ids(member)
        if choice.method != "exact":
            started = time.perf_counter()
            place = directory.index(member.name, probe)
            built = self._built(choice.method, self._rows(directory, member.name, probe, bank_ids))
            with filling(place.parent) as folder:
                built.save(folder / place.name)
            record |= {"index_bytes": built.size_bytes, "build_seconds": time.perf_counter() - started}
            record["sha256"] = digest(place)
        write_json(directory.index_record(member.name, probe), record)
        return len(bank_ids)

    def keep(self, directory: RunDirectory, member: Member, probe: int) -> int:
        """Keep the rows of a member's bank in the run; at the input those of all points. Returns their number."""
        ids = np.arange(len(self.points)) if probe == 0 else self._training_ids(member)
        rows = self._rows(directory, member.name, probe, ids)
        with replacing(directory.bank(member.name, probe)) as beside:
            kept = np.lib.format.open_memmap(beside, mode="w+", dtype=np.float32, shape=rows.shape)
            for first, stop in blocks(len(ids), self.config.engine.query_block):
                kept[first:stop] = rows[first:stop]
            kept.flush()
        return len(ids)

    def _choice(self, directory: RunDirectory, member: Member, probe: int) -> Choice:
        """The method of a probe, and why, where `auto` took it: the same whenever it is asked for."""
        probes = self._probes(directory, member)
        given = {own.index: self.config.method_of(own.name) for own in probes}
        if given[probe] != "auto":
            return Choice(given[probe], "")
        if not has_choice(self.config, self.common, probes[probe]):
            return Choice("exact", SHARED)
        changed, trials = np.zeros(len(self.tried), bool), {}
        for own in probes:
            if is_tried(self.config, self.common, own):
                record = read_json(directory.trial(member.architecture, own.index))
                changed |= _mask(record["reduced"], len(self.tried))
                options = [
                    Option(option["method"], option["seconds"], _mask(option["changed"], len(self.tried)))
                    for option in record["options"]
                ]
                if given[own.index] == "auto" and options:
                    trials[own.index] = Trial(record["exact_seconds"], options)
                elif options:
                    changed |= options[0].changed
        assert self.config.audit.depth_agreement is not None  # the configuration has it wherever it has `auto`
        return choose(trials, self.config.audit.depth_agreement, changed)[probe]

    def share(self, directory: RunDirectory, members: Sequence[Member], block: int) -> int:
        """The common neighbours, at the input, of the points of a block that any of the members is asked for.

        Returns the number of points. With `votes: until-decided`, the members' votes at probe 1 must be there.
        """
        started = time.perf_counter()
        asked = np.unique(np.concatenate([self._open_points(directory, member, 0, block) for member in members]))
        rows, cost = self._search(directory, "input", 0, self.common.ids, asked, self.common.k)
        if len(asked):
            bank = self._search_of(
                directory, "input", 0, self._rows(directory, "input", 0, self.common.ids), self.common.ids
            )
            assert isinstance(bank, Bank)  # there is no index of the common bank
            rows, _ = bank.by_distance(self._rows(directory, "input", 0, asked), rows)
        shared = np.empty(len(asked), found_by_point(self.common.k))
        shared["point_id"], shared["neighbours"] = asked, self.common.ids[rows]
        with replacing(directory.shared(block)) as beside:
            _save(beside, shared)
        write_json(directory.shared_cost(block), {**cost, "seconds": time.perf_counter() - started})
        return len(asked)

    def part(self, directory: RunDirectory, member: Member, probe: int, part: int, block: int) -> int:
        """The nearest rows of one part of a bank to a block's open points. Returns their number.

        A bank that no worker can hold is cut: each worker makes a part ready once, for all blocks.
        """
        started = time.perf_counter()
        bank_ids, asked = self._training_ids(member), self._open_points(directory, member, probe, block)
        parts = bank_parts(self.config, len(bank_ids), self._probes(directory, member)[probe])
        own = bank_ids[slice(*parts[part])]
        rows, cost = self._search(directory, member.name, probe, own, asked, self.config.k)
        found = np.empty(len(asked), [(name, kind, (self.config.k,)) for name, kind in PART])
        if len(asked):
            bank, queries, _ = self._question(directory, member.name, probe, own, asked)
            search = self._search_of(directory, member.name, probe, bank, own)
            assert isinstance(search, Bank)  # an index is never cut
            rows, found["squares"] = search.by_distance(queries, rows)
        found["neighbours"] = own[rows]
        with replacing(directory.part(member.name, probe, part, len(parts), block)) as beside:
            _save(beside, found)
        record = directory.part_cost(member.name, probe, part, len(parts), block)
        write_json(record, {**cost, "seconds": time.perf_counter() - started})
        return len(asked)

    def vote(self, directory: RunDirectory, member: Member, probe: int, block: int) -> int:
        """The votes of a block's open points at one probe. Returns their number.

        With `votes: until-decided`, the votes of the block at the next probe must be there; at the input, what the
        members share.
        """
        started = time.perf_counter()
        asked = self._open_points(directory, member, probe, block)
        parts = len(bank_parts(self.config, len(self._training_ids(member)), self._probes(directory, member)[probe]))
        if probe == 0 and self.common.pays:
            neighbours, cost = self._among_shared(directory, member, block, asked)
        elif parts > 1:
            neighbours, cost = self._among_parts(directory, member, probe, parts, block)
        else:
            neighbours, cost = self._among_own(directory, member, probe, asked)
        if not self._is_exact(directory, member, probe):
            self._save_sampled(directory.sampled(member.name, probe, block), asked, neighbours)
        votes = count_votes(self.points.labels[neighbours])
        part = np.empty(len(asked), VOTES)
        part["point_id"] = asked
        for field in VOTE_FIELDS:
            part[field] = getattr(votes, field)
        with replacing(directory.votes_part(member.name, probe, block)) as beside:
            _save(beside, part)
        seconds = time.perf_counter() - started + cost.get("seconds", 0.0)  # of the bank's parts
        write_json(directory.votes_cost(member.name, probe, block), {**cost, "seconds": seconds})
        return len(asked)

    def audit(self, directory: RunDirectory, member: Member, probe: int) -> int:
        """Exact votes of the sample at one probe, at full width, and what the run's own are beside them.

        Where the run's are such votes, they are taken as they are, and only those made that `votes: until-decided` left
        out, since another vote at a later probe may have done so wrongly. Returns the sample's points.
        """
        n_probes = len(self._probes(directory, member))
        if all(self._is_exact(directory, member, other) for other in range(n_probes)):
            write_json(directory.audit_record(member.name, probe), {})
            return 0
        part = np.concatenate([_load(path) for path in self._blocks(directory.votes_part, member, probe)])
        place = places(part["point_id"], self.sample)
        voted = place >= 0
        winner = np.full(len(self.sample), -1, np.int32)
        winner[voted] = part["winner"][place[voted]]
        is_exact = self._is_exact(directory, member, probe)
        exact, asked = winner.copy(), self.sample[~voted] if is_exact else self.sample
        neighbours = self._exact_neighbours(directory, member, probe, asked)
        exact[~voted if is_exact else slice(None)] = count_votes(self.points.labels[neighbours]).winner
        record: dict[str, Any] = {}
        if not is_exact:
            record["audit_sample"] = int(voted.sum())
        if not is_exact and voted.any():
            sampled = np.concatenate([_load(path) for path in self._blocks(directory.sampled, member, probe)])
            recall = recall_at_k(sampled["neighbours"], neighbours[voted])
            record |= interval(recall).columns("recall")
            record |= interval(winner[voted] == exact[voted]).columns("vote_agreement")
        with replacing(directory.audited(member.name, probe)) as beside:
            _save(beside, exact)
        write_json(directory.audit_record(member.name, probe), record)
        return len(self.sample)

    def _is_exact(self, directory: RunDirectory, member: Member, probe: int) -> bool:
        """Whether the run's votes at a probe are exact ones at full width."""
        record = self._index_record(directory, member.name, probe) or {"method": "exact"}
        return bool(record["method"] == "exact" and self._probes(directory, member)[probe].reduction == "none")

    def _blocks(self, path: Callable[[str, int, int], Place], member: Member, probe: int) -> list[Place]:
        """The files of a probe's query blocks, in order."""
        return [path(member.name, probe, block) for block in range(len(self.query_blocks))]

    def _exact_neighbours(self, directory: RunDirectory, member: Member, probe: int, asked: Array) -> Array:
        """Ids of the k nearest points of a member's own bank, [Q, k], whatever the method and the reduction."""
        bank_ids = self._training_ids(member)
        if not len(asked):
            return np.empty((0, self.config.k), np.int64)
        self._ready = None  # two banks are never in memory together
        rows, queries = (self._in_full(directory, member, probe, ids) for ids in (bank_ids, asked))
        found, _ = self._bank(rows).search(queries, self.config.k, self._left_out(bank_ids, asked))
        return bank_ids[found]

    def _in_full(self, directory: RunDirectory, member: Member, probe: int, ids: Array) -> Rows:
        """The embeddings of some points at full width: as they are stored, or made again where those are reduced."""
        if self._probes(directory, member)[probe].reduction == "none":
            return self._rows(directory, member.name, probe, ids)
        model, probes, _ = self._network(directory, member)
        batch_size = self.config.engine.batch_size
        return EmbeddedRows(model, probes[probe], self._inputs, ids, len(self.points), batch_size)

    def _save_sampled(self, path: Place, asked: Array, neighbours: Array) -> None:
        """Keep what the run found for the points that are audited: the audit is of just these votes."""
        place = places(asked, self.sample)
        place = place[place >= 0]
        sampled = np.empty(len(place), found_by_point(self.config.k))
        sampled["point_id"], sampled["neighbours"] = asked[place], neighbours[place]
        with replacing(path) as beside:
            _save(beside, sampled)

    def _open_points(self, directory: RunDirectory, member: Member, probe: int, block: int) -> Array:
        """Ids of the points of a block that a probe is asked for: all of them, or those that no later probe decided."""
        first, stop = self.query_blocks[block]
        last = len(self._probes(directory, member)) - 1
        if self.config.votes == "all" or probe == last:
            return np.arange(first, stop)
        later = _load(directory.votes_part(member.name, probe + 1, block))
        said = self._outputs(directory, member)[later["point_id"]]["prediction"]
        return np.asarray(later["point_id"][later["winner"] == said])

    def _among_own(self, directory: RunDirectory, member: Member, probe: int, asked: Array) -> tuple[Array, Spent]:
        """Ids of the k nearest points of a member's own bank, [Q, k], and what they cost."""
        bank_ids = self._training_ids(member)
        rows, cost = self._search(directory, member.name, probe, bank_ids, asked, self.config.k)
        return bank_ids[rows], cost

    def _among_parts(
        self, directory: RunDirectory, member: Member, probe: int, parts: int, block: int
    ) -> tuple[Array, Spent]:
        """The same from the searches of all parts of the bank."""
        place = [(member.name, probe, part, parts, block) for part in range(parts)]
        found = np.stack([_load(directory.part(*one)) for one in place], axis=1)
        costs = [read_json(directory.part_cost(*one)) for one in place]
        neighbours, squares = (found[name].reshape(len(found), -1) for name, _ in PART)
        return merged(neighbours, squares, self.config.k), {
            **{
                name: sum(cost[name] for cost in costs) for name in ("seconds", *(field.name for field in fields(Cost)))
            },
            "plan": next((f"{parts} parts, {cost['plan']}" for cost in costs if cost["plan"]), None),
        }

    def _among_shared(self, directory: RunDirectory, member: Member, block: int, asked: Array) -> tuple[Array, Spent]:
        """The same at the input, from what the members share; searched for where that says too little."""
        shared = _load(directory.shared(block))
        place = places(shared["point_id"], asked)
        inside = np.zeros(len(self.points), bool)
        inside[self._training_ids(member)] = True
        neighbours = np.empty((len(asked), self.config.k), np.int64)
        known = place >= 0
        neighbours[known], enough = own_neighbours(shared["neighbours"][place[known]], inside, self.config.k)
        known[known] = enough
        neighbours[~known], cost = self._among_own(directory, member, 0, asked[~known])
        return neighbours, cost

    def _search(
        self, directory: RunDirectory, owner: str, probe: int, bank_ids: Array, asked: Array, k: int
    ) -> tuple[Array, Spent]:
        """The k nearest rows of a bank, [Q, k] ascending, to the points that are asked for, and what they cost and how.

        owner: a member, whose embeddings and bank they are, or "input" for the common bank.
        """
        if not len(asked):
            # The bank need not be made ready.
            return np.empty((0, k), np.int64), {**asdict(NOTHING), "plan": None}
        bank, queries, own = self._question(directory, owner, probe, bank_ids, asked)
        search = self._search_of(directory, owner, probe, bank, bank_ids)
        rows, cost = search.search(queries, k, own)
        return rows, {**asdict(cost), "plan": search.plan}

    def _question(
        self, directory: RunDirectory, owner: str, probe: int, bank_ids: Array, asked: Array
    ) -> tuple[Shards, Shards, Array | None]:
        """Rows of a bank, queries [Q, width], neither of which is read yet, and the row that each must not count."""
        rows, queries = (self._rows(directory, owner, probe, ids) for ids in (bank_ids, asked))
        return rows, queries, self._left_out(bank_ids, asked)

    def _left_out(self, bank_ids: Array, asked: Array) -> Array | None:
        """The bank row that each of these points must not count."""
        return places(bank_ids, asked) if self.config.leave_one_out else None

    def _rows(self, directory: RunDirectory, owner: str, probe: int, ids: Array) -> Shards:
        """The embeddings of some points, which are mapped and not read."""
        return _mapped([directory.embedding(owner, probe, shard) for shard in range(len(self.shards))], ids)

    def reduce(self, directory: RunDirectory, member: Member) -> int:
        """Join a member's votes to its tables of votes and depths. Returns the number of its points."""
        trained = read_json(directory.record("train", member.name))
        n_probes = len(trained["probes"])
        tally = _Tally(n_probes)
        write_table(
            directory.member_table("votes", member.name),
            votes_schema(n_probes),
            self._vote_tables(directory, member, n_probes),
            self.metadata,
        )
        write_table(
            directory.member_table("depths", member.name),
            DEPTHS,
            self._depth_tables(directory, member, tally),
            self.metadata,
        )
        every_block = range(len(self.query_blocks))
        costs = [
            [read_json(path) for path in self._blocks(directory.votes_cost, member, probe)] for probe in range(n_probes)
        ]
        if self.common.pays and member == list_members(self.config)[0]:
            costs[0] += [read_json(directory.shared_cost(block)) for block in every_block]
        write_json(
            directory.record("reduce", member.name),
            {
                **tally.accuracies(),
                "cost": [
                    {
                        **{field.name: sum(cost[field.name] for cost in probe) for field in fields(Cost)},
                        "plan": next((cost["plan"] for cost in probe if cost["plan"]), None),
                    }
                    for probe in costs
                ],
                "vote_seconds": [sum(cost["seconds"] for cost in probe) for probe in costs],
                "build_seconds": [
                    (self._index_record(directory, member.name, probe) or {}).get("build_seconds", 0.0)
                    for probe in range(n_probes)
                ],
                "probes": [self._probe_record(directory, member, probe) for probe in range(n_probes)],
                "audit": self._depth_audit(directory, member, n_probes),
            },
        )
        return len(self.points)

    def free(self, directory: RunDirectory, member: Member) -> int:
        """Remove what a member that is reduced needs no more. Returns the members that it was: one."""
        directory.free_member(member.name, keep_indexes=self.config.engine.keep_indexes)
        return 1

    def _probe_record(self, directory: RunDirectory, member: Member, probe: int) -> dict[str, Any]:
        """Method of a probe, its index, and the audit of its votes, as the table of probes has them."""
        index = self._index_record(directory, member.name, probe) or {"method": "exact"}
        audit = directory.audit_record(member.name, probe)
        return {
            **{column: index[column] for column in ("method", "choice", "index_bytes") if column in index},
            **(read_json(audit) if audit.exists() else {}),
        }

    def _depth_audit(self, directory: RunDirectory, member: Member, n_probes: int) -> dict[str, Any]:
        """The audit of a member's depths; nothing where its votes are exact at full width."""
        paths = [directory.audited(member.name, probe) for probe in range(n_probes)]
        if not paths[0].exists():
            return {}
        said = self._outputs(directory, member)[self.sample]["prediction"]
        exact = depth_from_votes(np.stack([_load(path) for path in paths], axis=1), said)
        with open_table(directory.member_table("depths", member.name)) as table:
            depths = table.read(["depth"])["depth"].to_numpy()[self.sample]
        agreement, error = audit_depths(depths, exact, n_probes)
        return {"audit_sample": len(exact), **agreement.columns("depth_agreement"), **error.columns("depth_error")}

    def _vote_tables(self, directory: RunDirectory, member: Member, n_probes: int) -> Iterator[pa.Table]:
        for first, stop in blocks(len(self.points), ROWS):
            votes = self._votes(directory, member, n_probes, first, stop)
            columns = vote_columns([Votes(**{field: probe[field] for field in VOTE_FIELDS}) for probe in votes.T])
            yield pa.table({"point_id": np.arange(first, stop), **columns})

    def _depth_tables(self, directory: RunDirectory, member: Member, tally: "_Tally") -> Iterator[pa.Table]:
        in_training = np.zeros(len(self.points), bool)
        in_training[self._training_ids(member)] = True
        outputs = self._outputs(directory, member)
        for first, stop in blocks(len(self.points), ROWS):
            winners = self._votes(directory, member, tally.n_probes, first, stop)["winner"]
            said, labels, inside = outputs[first:stop], self.points.labels[first:stop], in_training[first:stop]
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

    def _votes(self, directory: RunDirectory, member: Member, n_probes: int, first: int, stop: int) -> Array:
        """VOTES [stop - first, P] of a range of points; the winner of a vote that was not computed is -1."""
        votes = np.zeros((stop - first, n_probes), VOTES)
        votes["winner"] = -1
        for block, (start, end) in enumerate(self.query_blocks):
            for probe in range(n_probes) if start < stop and first < end else ():
                part = _load(directory.votes_part(member.name, probe, block))
                part = part[(part["point_id"] >= first) & (part["point_id"] < stop)]
                votes[part["point_id"] - first, probe] = part
        return votes

    def _outputs(self, directory: RunDirectory, member: Member) -> Shards:
        return _mapped([directory.outputs(member.name, shard) for shard in range(len(self.shards))])

    def _training_ids(self, member: Member) -> Array:
        return training_ids(member.config.split, self.points.parts, member.seed)

    def _inputs(self, ids: Array) -> torch.Tensor:
        """Inputs of points on the device, float32 [B, ...]."""
        return torch.from_numpy(self.points.read(ids)).to(self.device)

    def _build(self, member: Member) -> torch.nn.Module:
        entry = member.config
        n_classes = len(self.points.label_names)
        return build(entry.architecture, entry.parameters, self.points.input_shape, n_classes, member.seed)

    def _search_of(
        self, directory: RunDirectory, owner: str, probe: int, rows: Shards, ids: Array
    ) -> Bank | Index:  # fmt: skip
        """What a probe, or a part of its bank, is searched by: made ready once for blocks that come in turn."""
        which = (owner, probe, int(ids[0]), len(ids))
        if self._ready is None or self._ready[0] != which:
            self._ready = None  # those of two probes are never in memory together
            self._ready = (which, self._index(directory, owner, probe, rows) or self._bank(rows))
        return self._ready[1]

    def _bank(self, rows: Rows) -> Bank:
        return Bank(rows, self.device, self.config.engine.memory_budget)

    def _built(self, method: str, rows: Shards) -> Index:
        engine = self.config.engine
        return build_index(parse_method(method), rows, threads=engine.threads, memory_budget=engine.memory_budget)

    def _index(self, directory: RunDirectory, owner: str, probe: int, rows: Shards) -> Index | None:
        """The index that was saved for a bank, None where the method is exact; LeadlineError if damaged."""
        record = self._index_record(directory, owner, probe)
        if not record or record["method"] == "exact":
            return None
        index, about, engine = directory.index(owner, probe), directory.about_index(owner, probe), self.config.engine
        with fetched(index, about, sha256=record["sha256"]) as path:
            return load_index(path, rows, threads=engine.threads, memory_budget=engine.memory_budget)

    @staticmethod
    def _index_record(directory: RunDirectory, owner: str, probe: int) -> dict[str, Any] | None:
        """What the unit of indexing left; None in an exact run, and for the common bank."""
        path = directory.index_record(owner, probe)
        return read_json(path) if path.exists() else None

    @staticmethod
    def _probes(directory: RunDirectory, member: Member) -> list[Probe]:
        return [Probe(**probe) for probe in read_json(directory.record("train", member.name))["probes"]]

    def _network(self, directory: RunDirectory, member: Member) -> _Network:
        """A member with its stored weights, kept for the next shard; networks of another group are dropped."""
        if member.name not in self._networks:
            if len(self._networks) >= self.config.engine.group_size:
                self._networks.clear()
            trained = read_json(directory.record("train", member.name))
            model, stored = self._build(member), directory.weights(member.name)
            with fetched(stored) as path:
                load_weights(model, path)
            model.float().to(self.device).eval()
            if weights_fingerprint(model) != trained["weights_fingerprint"]:
                raise LeadlineError(f"{stored}: not the weights that the run was begun with; restore the file")
            probes = self._probes(directory, member)
            self._networks[member.name] = (model, probes, self._reducers(directory, member, probes))
        return self._networks[member.name]

    def _reducers(self, directory: RunDirectory, member: Member, probes: Sequence[Probe]) -> list[Reducer]:
        expected = read_json(directory.record("train", member.name))["directions"]
        if expected is None:
            return make_reducers(probes, {})
        stored = directory.directions(member.name)
        with fetched(stored) as path:
            if digest(path) != expected:
                raise LeadlineError(f"{stored}: not the directions that the run was begun with; restore the file")
            return make_reducers(probes, load_directions(path, self.device))

    @staticmethod
    def _array(open_files: ExitStack, path: Path, n_rows: int, width: int) -> Array:
        """A new .npy file, mapped for writing; it takes its name when all files of the unit are whole."""
        beside = open_files.enter_context(replacing(path))
        array = np.lib.format.open_memmap(beside, mode="w+", dtype=np.float32, shape=(n_rows, width))
        open_files.callback(array.flush)
        return array


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


def places(ids: Array, wanted: Array) -> Array:
    """Where each wanted id lies in ascending ids, -1 where it does not; int64, as long as `wanted`."""
    return np.where(np.isin(wanted, ids), np.searchsorted(ids, wanted), -1)


def _mask(places: Sequence[int], n: int) -> Array:
    """bool [n], true at these places."""
    mask = np.zeros(n, bool)
    mask[list(places)] = True
    return mask


def _load(place: Place) -> Array:
    return np.asarray(np.load(io.BytesIO(place.read_bytes()), allow_pickle=False))


def _save(path: Path, array: Array) -> None:
    with path.open("wb") as opened:
        np.save(opened, array, allow_pickle=False)


def _mapped(paths: Sequence[Path], ids: Array | None = None) -> Shards:
    """Rows of several .npy files, which are mapped and not read."""
    return Shards([np.load(path, mmap_mode="r", allow_pickle=False) for path in paths], ids)
