"""What the units of a run find at hand: its points, what earlier units have left, networks and searches made ready."""

import gc
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from leadline.cluster.work import Member, bank_of_all, blocks, shard_edges
from leadline.config import RunConfig
from leadline.embedding import EmbeddedRows
from leadline.embedding.in_place import DECODED
from leadline.embedding.principal import load_directions
from leadline.embedding.reductions import Reducer, choose_reductions, make_reducers
from leadline.errors import LeadlineError
from leadline.knn import ExactBank, Index, bank_on, build_index, load_index, parse_method
from leadline.knn.arrays import Array, Rows, Shards
from leadline.knn.audit import draw
from leadline.knn.on_device import free_memory
from leadline.members.architectures import build
from leadline.members.probes import Probe
from leadline.members.splits import training_ids
from leadline.members.weights import load_weights, weights_fingerprint
from leadline.points import open_points
from leadline.points.ahead import read_ahead
from leadline.points.kept import Batch, KeptBatches
from leadline.store import RunDirectory
from leadline.store.files import digest, fetched, read_json

COLLECTED = 64 << 20  # bytes of a search from which on it is worth a look at all objects to have them back


class Workbench:
    """Of one run in one process, on one device, with a fixed number of threads.

    stamps: what every table of the run carries; directory: the run's, with the scratch that this process sees. sample:
    ids of the points that are audited; tried: of those that methods are tried on. A worker that does units of one kind
    in turn finds ready what the last of them has made so: the networks of a group of members, and one search.
    """

    def __init__(self, config: RunConfig, stamps: dict[str, str], directory: RunDirectory) -> None:
        torch.set_num_threads(config.engine.threads)
        self.config = config
        self.stamps = stamps
        self.directory = directory
        self.device = torch.device("cuda" if config.engine.gpus else "cpu")
        if config.engine.gpus:
            # Workers that share a GPU each keep to their part of its memory, as a plan reckons.
            torch.cuda.set_per_process_memory_fraction(min(1.0, config.engine.gpus))
        self.points = open_points(config.points)
        self.shards = shard_edges(config, len(self.points))
        self.query_blocks = blocks(len(self.points), config.engine.query_block)
        self.common = bank_of_all(config, self.points.parts)
        shape = self.points.input_shape
        (self.input_probe,) = choose_reductions(config.reduction, [Probe(0, "input", math.prod(shape), None, shape)])
        self.sample, self.tried = draw(len(self.points), config.audit.sample, config.audit.seed)
        self._networks: dict[str, tuple[torch.nn.Module, list[Probe], list[Reducer]]] = {}
        self._ready: tuple[tuple[str, int, int, int], ExactBank | Index] | None = None

    # Points and members

    def inputs(self, ids: Array) -> torch.Tensor:
        """Inputs of points on the device, float32 [B, ...]."""
        return self.points.read_on(ids, self.device)

    def batches(self, first: int, stop: int) -> Iterator[Batch]:
        """Points in the batches of a forward pass: ids, and inputs on the device, for which a GPU does not wait."""
        return self._read(self._cut(first, stop))

    @cached_property
    def all_batches(self) -> KeptBatches:
        """All points in such batches, for who goes through them for one member after another.

        On a GPU inputs that were read stay there for good, in a tenth of the memory that is free when the first pass
        begins. `free_memory` no longer counts that in, so what asks later for room has less of it.
        """
        room = DECODED * free_memory(self.device) if self.device.type == "cuda" else 0
        return KeptBatches(self._cut(0, len(self.points)), self._read, room)

    def _cut(self, first: int, stop: int) -> list[Array]:
        size = self.config.engine.batch_size
        return [np.arange(start, min(start + size, stop)) for start in range(first, stop, size)]

    def _read(self, batches: Iterable[Array]) -> Iterator[Batch]:
        if self.device.type == "cuda":
            return read_ahead(self.points, batches, self.device, self.config.engine.threads)
        return ((ids, self.inputs(ids)) for ids in batches)

    def training_ids(self, member: Member) -> Array:
        """Ids of the points of a member's bank, ascending."""
        return training_ids(member.config.split, self.points.parts, member.seed)

    def left_out(self, bank_ids: Array, asked: Array) -> Array | None:
        """The bank row that each of these points must not count."""
        return places(bank_ids, asked) if self.config.leave_one_out else None

    def build(self, member: Member) -> torch.nn.Module:
        """A member's network with new weights."""
        entry, n_classes = member.config, len(self.points.label_names)
        return build(entry.architecture, entry.parameters, self.points.input_shape, n_classes, member.seed)

    def network(self, member: Member) -> tuple[torch.nn.Module, list[Probe], list[Reducer]]:
        """A member with its stored weights, kept for the next shard; networks of another group are dropped.

        Raises LeadlineError where weights or directions are not those that were stored.
        """
        if member.name not in self._networks:
            if len(self._networks) >= self.config.engine.group_size:
                self._networks.clear()
            trained = read_json(self.directory.record("train", member.name))
            model, stored = self.build(member), self.directory.weights(member.name)
            with fetched(stored) as path:
                load_weights(model, path)
            model.float().to(self.device).eval()
            if weights_fingerprint(model) != trained["weights_fingerprint"]:
                raise LeadlineError(f"{stored}: not the weights that the run was begun with; restore the file")
            probes = self.probes(member)
            self._networks[member.name] = (model, probes, self._reducers(member, probes, trained["directions"]))
        return self._networks[member.name]

    def _reducers(self, member: Member, probes: Sequence[Probe], expected: str | None) -> list[Reducer]:
        """expected: digest of the file of the member's directions, None where it has none."""
        if expected is None:
            return make_reducers(probes, {})
        stored = self.directory.directions(member.name)
        with fetched(stored) as path:
            if digest(path) != expected:
                raise LeadlineError(f"{stored}: not the directions that the run was begun with; restore the file")
            return make_reducers(probes, load_directions(path, self.device))

    # What earlier units have left

    def probes(self, member: Member) -> list[Probe]:
        """Of a member that is trained."""
        return [Probe(**probe) for probe in read_json(self.directory.record("train", member.name))["probes"]]

    def outputs(self, member: Member) -> Shards:
        """What a member's logits say of all points, OUTPUTS [N], mapped and not read."""
        return _mapped([self.directory.outputs(member.name, shard) for shard in range(len(self.shards))])

    def rows(self, owner: str, probe: int, ids: Array) -> Shards:
        """The embeddings of some points as they are stored, mapped and not read; owner: a member, or "input"."""
        return _mapped([self.directory.embedding(owner, probe, shard) for shard in range(len(self.shards))], ids)

    def rows_in_full(self, member: Member, probe: int, ids: Array) -> Rows:
        """The embeddings of some points at full width: as they are stored, or made again where those are reduced."""
        if self.probes(member)[probe].reduction == "none":
            return self.rows(member.name, probe, ids)
        model, probes, _ = self.network(member)
        batch_size, precision = self.config.engine.batch_size, self.config.precision
        return EmbeddedRows(model, probes[probe], self.inputs, ids, len(self.points), batch_size, precision)

    def index_record(self, owner: str, probe: int) -> dict[str, Any]:
        """What the unit of indexing left; there is none in an exact run, nor for the common bank."""
        path = self.directory.index_record(owner, probe)
        return read_json(path) if path.exists() else {"method": "exact"}

    def is_exact(self, member: Member, probe: int) -> bool:
        """Whether the run's votes at a probe are exact ones at full width."""
        is_indexed = self.index_record(member.name, probe)["method"] != "exact"
        return not is_indexed and self.probes(member)[probe].reduction == "none"

    # Searches

    def search_of(self, owner: str, probe: int, ids: Array) -> ExactBank | Index:
        """What the rows of these points are searched by: made ready once for blocks that come in turn.

        Raises LeadlineError for an index that is damaged.
        """
        which = (owner, probe, int(ids[0]), len(ids))
        if self._ready is None or self._ready[0] != which:
            self.drop_search()
            rows = self.rows(owner, probe, ids)
            self._ready = (which, self._index(owner, probe, rows) or self.bank(rows))
        return self._ready[1]

    def drop_search(self) -> None:
        """Before another is made ready: two of them are never in memory together."""
        if self._ready is None:
            return
        n_bytes = self._ready[1].size_bytes
        self._ready = None
        if n_bytes > COLLECTED:
            gc.collect()  # a worker was once seen to hold the last one still; why is not known

    def bank(self, rows: Rows) -> ExactBank:
        """Rows made ready for exact search."""
        return bank_on(rows, self.device, self.config.engine.search_memory)

    def build_index(self, method: str, rows: Shards) -> Index:
        """An index of rows, by its method's name."""
        engine = self.config.engine
        return build_index(parse_method(method), rows, threads=engine.threads, memory_budget=engine.search_memory)

    def _index(self, owner: str, probe: int, rows: Shards) -> Index | None:
        """The index that was saved for a bank, None where the method is exact."""
        record, engine = self.index_record(owner, probe), self.config.engine
        if record["method"] == "exact":
            return None
        index, about = self.directory.index(owner, probe), self.directory.about_index(owner, probe)
        with fetched(index, about, sha256=record["sha256"]) as path:
            return load_index(path, rows, threads=engine.threads, memory_budget=engine.search_memory)


def places(ids: Array, wanted: Array) -> Array:
    """Where each wanted id lies in ascending ids, -1 where it does not; int64, as long as `wanted`."""
    return np.where(np.isin(wanted, ids), np.searchsorted(ids, wanted), -1)


def _mapped(paths: Sequence[Path], ids: Array | None = None) -> Shards:
    """Rows of several .npy files, which are mapped and not read."""
    return Shards([np.load(path, mmap_mode="r", allow_pickle=False) for path in paths], ids)
