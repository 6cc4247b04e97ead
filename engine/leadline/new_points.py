"""Depths of points that were not in a run, by the banks and indexes that it has kept."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from leadline.config import RunConfig, load_config
from leadline.depth import depth_from_votes, is_unsettled
from leadline.embedding import embed_batch
from leadline.embedding.principal import load_directions
from leadline.embedding.reductions import make_reducers, stored_width
from leadline.errors import LeadlineError
from leadline.knn import Bank, Index, Votes, count_votes, load_index
from leadline.knn.arrays import Array, Shards
from leadline.knn.exact import refuse_non_finite
from leadline.members.architectures import build
from leadline.members.probes import Probe
from leadline.members.weights import load_weights
from leadline.store import RunDirectory
from leadline.store.files import fetched, read_json
from leadline.store.places import Place
from leadline.store.schemas import vote_columns
from leadline.store.tables import read_table


class KeptMember:
    """One member of a finished run that has kept its banks.

    Raises LeadlineError for a member that is not in the run, and for a run without banks.
    """

    def __init__(self, directory: RunDirectory, manifest: dict[str, Any], name: str) -> None:
        self._directory, self._files, self._name = directory, manifest.get("files", {}), name
        self._config: RunConfig = load_config(manifest["configuration"])
        rows = read_table(directory.table("members")).to_pylist()
        self._row = next((row for row in rows if row["member"] == name), None)
        if self._row is None:
            raise LeadlineError(f"member: {name!r} is not in the run; there are {', '.join(r['member'] for r in rows)}")
        if not self._config.engine.keep_indexes:
            raise LeadlineError(f"{directory.root}: its banks were not kept; make a run with engine.keep_indexes: true")
        trained = read_json(directory.record("train", name))
        self.probes = [Probe(**probe) for probe in trained["probes"]]
        directions = {}
        if trained["directions"]:
            with fetched(directory.directions(name), sha256=trained["directions"]) as path:
                directions = load_directions(path, torch.device("cpu"))
        self._reducers = make_reducers(self.probes, directions)

    def embed(self, points: Array) -> tuple[list[Array], Array]:
        """Embeddings of inputs [Q, ...], float32 [Q, stored width] a probe, and predictions int32 [Q]."""
        if not len(points):
            raise LeadlineError("points: none are given; give at least one")
        network = self._network(points.shape[1:])
        size = self._config.engine.batch_size
        batches = [
            embed_batch(network, self.probes, torch.from_numpy(some), first, self._name, self._reducers)
            for first in range(0, len(points), size)
            for some in [points[first : first + size]]
        ]
        parts = zip(*(batch.embeddings for batch in batches), strict=True)
        return [np.concatenate(part) for part in parts], np.concatenate([b.outputs.prediction for b in batches])

    def depths(self, embeddings: Sequence[Array], predictions: Array) -> pa.Table:
        """Table of prediction, depth, unsettled and votes, from embeddings [Q, stored width] of every probe."""
        widths = [stored_width(probe) for probe in self.probes]
        given = [values.shape[1] for values in embeddings]
        lengths = {len(values) for values in embeddings} | {len(predictions)}
        if given != widths or len(lengths) > 1:
            raise LeadlineError(
                f"embeddings: widths {given}, lengths with predictions {sorted(lengths)}; give those of the probes, "
                f"{widths}, of the same points"
            )
        inside = read_table(self._directory.member_table("depths", self._name))["in_training"].to_numpy()
        ids = np.flatnonzero(inside)
        labels = read_table(self._directory.table("points"))["label"].to_numpy()[ids]
        votes = [self._votes(probe, ids, labels, values) for probe, values in zip(self.probes, embeddings, strict=True)]
        depths = depth_from_votes(np.stack([vote.winner for vote in votes], axis=1), predictions)
        return pa.table(
            {
                "prediction": pa.array(predictions, pa.int32()),
                "depth": depths,
                "unsettled": is_unsettled(depths, len(self.probes)),
                **vote_columns(votes),
            }
        )

    def _votes(self, probe: Probe, ids: Array, labels: Array, queries: Array) -> Votes:
        refuse_non_finite(queries, 0, f"probe {probe.name}, point")
        kept, index = (place(self._name, probe.index) for place in (self._directory.bank, self._directory.index))
        with fetched(kept, sha256=self._digest(kept) or "") as path:
            bank = Shards([np.load(path, mmap_mode="r", allow_pickle=False)], ids if probe.index == 0 else None)
            search: Bank | Index = Bank(bank)
            if self._digest(index):  # a probe that was searched exactly has no index
                about = self._directory.about_index(self._name, probe.index)
                with fetched(index, about, sha256=self._digest(index)) as path:
                    search = load_index(path, bank)
            found, _ = search.search(queries, self._config.k)
        return count_votes(labels[found])

    def _digest(self, place: Place) -> str | None:
        """Of a file in the manifest; None where it has no such file."""
        found: str | None = self._files.get(self._directory.inside(place))
        return found

    def _network(self, input_shape: tuple[int, ...]) -> torch.nn.Module:
        assert self._row is not None
        entry = next(entry for entry in self._config.members if entry.label == self._row["architecture"])
        network = build(entry.architecture, entry.parameters, input_shape, self.probes[-1].width, self._row["seed"])
        with fetched(self._directory.weights(self._name)) as path:
            load_weights(network, path)
        return network.float().eval()


def as_rows(values: Any, name: str) -> Array:
    """Numbers [Q, ...] as contiguous float32. Raises LeadlineError for what is no array of numbers."""
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.ndim < 2 or array.dtype.kind not in "biuf":
        raise LeadlineError(f"{name}: {array.dtype} of shape {array.shape}; give numbers [points, ...]")
    return np.ascontiguousarray(array, np.float32)
