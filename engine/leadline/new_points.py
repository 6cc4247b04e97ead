"""Depths of points that were not in a run, by the banks and indexes that it has kept."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from leadline.depth import depth_from_votes, is_unsettled
from leadline.embedding.reductions import stored_width
from leadline.errors import LeadlineError
from leadline.knn import Bank, Votes, count_votes, load_index
from leadline.knn.arrays import Array, Shards
from leadline.knn.exact import refuse_non_finite
from leadline.members.probes import Probe
from leadline.store import RunDirectory
from leadline.store.files import check
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
        inside = read_table(self._directory.member_table("depths", self.name))["in_training"].to_numpy()
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
        rows = np.load(self._checked(self._directory.bank(self.name, probe.index)), mmap_mode="r", allow_pickle=False)
        bank = Shards([rows], ids if probe.index == 0 else None)
        path = self._directory.index(self.name, probe.index)
        # A probe that was searched exactly has no index.
        is_indexed = str(path.relative_to(self._directory.root)) in self._files
        search = load_index(self._checked(path), bank) if is_indexed else Bank(bank)
        found, _ = search.search(queries, self.config.k)
        return count_votes(labels[found])

    def _checked(self, path: Path) -> Path:
        check(path, self._files.get(str(path.relative_to(self._directory.root)), ""))
        return path


def as_rows(values: Any, name: str) -> Array:
    """Numbers [Q, ...] as contiguous float32. Raises LeadlineError for what is no array of numbers."""
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.ndim < 2 or array.dtype.kind not in "biuf":
        raise LeadlineError(f"{name}: {array.dtype} of shape {array.shape}; give numbers [points, ...]")
    return np.ascontiguousarray(array, np.float32)
