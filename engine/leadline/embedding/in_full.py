"""Embeddings that are not stored: made again, in full, whenever they are read."""

from collections.abc import Callable

import numpy as np
import torch

from leadline.embedding.extract import forward_pass
from leadline.embedding.outputs import Array
from leadline.members.probes import Probe, read_probe


class EmbeddedRows:
    """The embeddings of some points at one probe, float32 [n, width], read as an array is: by slices or by places.

    read: the inputs of points by id, [B, ...] on the model's device; ids: int64 [n], of the rows' points, out of
    n_points. A run cuts its batches by point id, and the last bits of a value may depend on the batch: so each row is
    made in its whole batch of batch_size points, and every reading gives the bits that a run without reductions stores,
    with the same precision of the forward pass.
    Nothing is kept: whoever reads a row twice pays for two forward passes of its batch, which end at the probe.
    """

    def __init__(
        self, model: torch.nn.Module, probe: Probe, read: Callable[[Array], torch.Tensor], ids: Array, n_points: int,
        batch_size: int, precision: str = "float32",
    ) -> None:  # fmt: skip
        self._model = model
        self._probe = probe
        self._read = read
        self._ids = ids
        self._n_points = n_points
        self._batch_size = batch_size
        self._precision = precision
        self.shape = (len(ids), probe.width)

    def __getitem__(self, index: slice | Array, /) -> Array:
        wanted = self._ids[index]
        rows = np.empty((len(wanted), self._probe.width), np.float32)
        batch_of = wanted // self._batch_size
        for batch in np.unique(batch_of):
            here = np.flatnonzero(batch_of == batch)
            rows[here] = self._embedded(wanted[here], batch * self._batch_size)
        return rows

    def _embedded(self, wanted: Array, first: int) -> Array:
        """The rows of some points of the batch that begins with `first`."""
        if self._probe.index == 0:
            # The input needs no network, so its batch does not matter, and others' inputs are not read.
            batch, places = wanted, np.arange(len(wanted))
        else:
            batch = np.arange(first, min(first + self._batch_size, self._n_points))
            places = wanted - first
        inputs = self._read(batch)
        with forward_pass(self._model, inputs.device, self._precision):
            embeddings = read_probe(self._model, self._probe, inputs)
        chosen: Array = embeddings[torch.from_numpy(places).to(embeddings.device)].cpu().numpy()
        return chosen
