"""Depths of points that were not in a run, by the banks and indexes that it has kept."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from leadline.depth import depth_from_votes, is_unsettled
from leadline.embedding.reductions import stored_width
from leadline.errors import LeadlineError
from leadline.knn import Bank, Index, Votes, count_votes, load_index
from leadline.knn.arrays import Array, Shards
from leadline.knn.exact import refuse_non_finite
from leadline.members.probes import Probe
from leadline.store import RunDirectory
from leadline.store.files import fetched
from leadline.store.places import Place
from leadline.store.schemas import vote_columns
from leadline.store.tables import read_table
from leadline.stored_member import StoredMember


class KeptMember(StoredMember):
    """One member of a finished run that has kept its banks.

    Raises LeadlineError for a member that is not in the run, and for a run without banks.
    """

    def __init__(self, directory: RunDirectory, manifest: dict[str, Any], name: str) -> None:
        super().__init__(directory, manifest, name)
        self._files = manifest.get("files", {})
        if not self.config.engine.keep_indexes:
            raise LeadlineError(f"{directory.root}: its banks were not kept; make a run with engine.keep_indexes: true")

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
        ids = self._training()
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

    def neighbours(self, probe: int, point_id: int, read: Callable[[], Array]) -> tuple[Array, Array]:
        """The k points of the bank that are nearest to a point of the run at one probe, itself left out; exactly.

        read: gives the point's input [1, ...]. It is asked for where the point is held out and the probe is not the
        input: what was not kept is computed again, in a batch of its own, so it may differ in its last bits.

        Returns point ids int64 [k], nearest first, and Euclidean distances float64 [k]. Raises LeadlineError for files
        whose SHA-256 is not the manifest's.
        """
        ids = self._training()
        row = int(np.searchsorted(ids, point_id))
        is_inside = row < len(ids) and ids[row] == point_id
        with self._kept(self.probes[probe]) as kept:
            if probe == 0:
                query = kept[[point_id]]
            elif is_inside:
                query = kept[[row]]
            else:
                query = self.embed(read())[0][probe]
            bank = Bank(Shards([kept], ids if probe == 0 else None))
            found, _ = bank.search(query, self.config.k, np.array([row if is_inside else -1]))
            rows, squares = bank.by_distance(query, found)
        return ids[rows[0]], np.sqrt(squares[0])

    def _training(self) -> Array:
        """Ids of the points of the member's bank, int64, ascending."""
        return np.flatnonzero(read_table(self._directory.member_table("depths", self.name))["in_training"].to_numpy())

    @contextmanager
    def _kept(self, probe: Probe) -> Iterator[Array]:
        """The rows that were kept of a probe: those of the bank; at the input, those of all points."""
        kept = self._directory.bank(self.name, probe.index)
        with fetched(kept, sha256=self._digest(kept) or "") as path:
            yield np.load(path, mmap_mode="r", allow_pickle=False)

    def _votes(self, probe: Probe, ids: Array, labels: Array, queries: Array) -> Votes:
        refuse_non_finite(queries, 0, f"probe {probe.name}, point")
        index = self._directory.index(self.name, probe.index)
        with self._kept(probe) as kept:
            bank = Shards([kept], ids if probe.index == 0 else None)
            search: Bank | Index = Bank(bank)
            if self._digest(index):  # a probe that was searched exactly has no index
                about = self._directory.about_index(self.name, probe.index)
                with fetched(index, about, sha256=self._digest(index)) as path:
                    search = load_index(path, bank)
            found, _ = search.search(queries, self.config.k)
        return count_votes(labels[found])

    def _digest(self, place: Place) -> str | None:
        """Of a file in the manifest; None where it has no such file."""
        found: str | None = self._files.get(self._directory.inside(place))
        return found


def as_rows(values: Any, name: str) -> Array:
    """Numbers [Q, ...] as contiguous float32. Raises LeadlineError for what is no array of numbers."""
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.ndim < 2 or array.dtype.kind not in "biuf":
        raise LeadlineError(f"{name}: {array.dtype} of shape {array.shape}; give numbers [points, ...]")
    return np.ascontiguousarray(array, np.float32)
