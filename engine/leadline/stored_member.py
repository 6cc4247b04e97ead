"""A member of a finished run, made again from its stored weights to embed points as the run did."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from leadline.config import RunConfig, load_config
from leadline.embedding import Embedded, embed_batch
from leadline.embedding.principal import load_directions
from leadline.embedding.reductions import make_reducers, stored_width
from leadline.errors import LeadlineError
from leadline.knn.arrays import Array
from leadline.members.architectures import build
from leadline.members.probes import Probe
from leadline.members.weights import load_weights, weights_fingerprint
from leadline.points import Points, open_points
from leadline.store import RunDirectory
from leadline.store.files import fetched, read_json, writing_rows
from leadline.store.tables import read_table


def stored_points(directory: RunDirectory, manifest: dict[str, Any]) -> Points:
    """The points of a run, opened again. Raises LeadlineError where they are not those that it was made of."""
    points = open_points(load_config(manifest["configuration"]).points)
    if points.fingerprint() != manifest["data"]["fingerprint"]:
        raise LeadlineError(
            f"{directory.root}: its data have changed since it was made; restore them, or make the run anew"
        )
    return points


class StoredMember:
    """One member: its configuration, its probes, and its network with the reducers of the run.

    device: where the network runs. Raises LeadlineError for a member that is not in the run, and for directions that
    are not those of the run.
    """

    def __init__(
        self, directory: RunDirectory, manifest: dict[str, Any], name: str, device: str | torch.device = "cpu"
    ) -> None:
        self._directory, self.name, self._device = directory, name, torch.device(device)
        self.config: RunConfig = load_config(manifest["configuration"])
        rows = read_table(directory.table("members")).to_pylist()
        self._row: dict[str, Any] = next((row for row in rows if row["member"] == name), {})
        if not self._row:
            raise LeadlineError(f"member: {name!r} is not in the run; there are {', '.join(r['member'] for r in rows)}")
        trained = read_json(directory.record("train", name))
        self._fingerprint = trained["weights_fingerprint"]
        self.probes = [Probe(**probe) for probe in trained["probes"]]
        directions = {}
        if trained["directions"]:
            with fetched(directory.directions(name), sha256=trained["directions"]) as path:
                directions = load_directions(path, self._device)
        self._reducers = make_reducers(self.probes, directions)

    def embed(self, points: Array) -> tuple[list[Array], Array]:
        """Embeddings of inputs [Q, ...], float32 [Q, stored width] a probe, and predictions int32 [Q]."""
        if not len(points):
            raise LeadlineError("points: none are given; give at least one")
        network = self.network(points.shape[1:])
        size = self.config.engine.batch_size
        batches = []
        for first in range(0, len(points), size):
            inputs = torch.from_numpy(points[first : first + size]).to(self._device)
            batches.append(self._embed(network, range(len(self.probes)), inputs, first))
        parts = zip(*(batch.embeddings for batch in batches), strict=True)
        return [np.concatenate(part) for part in parts], np.concatenate([b.outputs.prediction for b in batches])

    def write_layer(self, probe: int, points: Points, path: Path) -> None:
        """Write the embeddings of all points at one probe as .npy, float32 [N, stored width].

        The whole network runs, in the run's batches, and one of them is in memory at a time. Raises LeadlineError for
        weights that are not the run's, and where an embedding is not finite.
        """
        network = self.network(points.input_shape)
        # The input and the softmax belong to every forward pass.
        read = [other.index for other in self.probes if other.index == probe or other.place is None]
        size = self.config.engine.batch_size
        with writing_rows(path, len(points), stored_width(self.probes[probe])) as write:
            for first in range(0, len(points), size):
                inputs = points.read_on(np.arange(first, min(first + size, len(points))), self._device)
                write(self._embed(network, read, inputs, first).embeddings[read.index(probe)])

    def network(self, input_shape: tuple[int, ...]) -> torch.nn.Module:
        """With its stored weights, float32 and in eval mode, on the device.

        Raises LeadlineError for weights that are not the run's.
        """
        entry = next(entry for entry in self.config.members if entry.label == self._row["architecture"])
        network = build(entry.architecture, entry.parameters, input_shape, self.probes[-1].width, self._row["seed"])
        place = self._directory.weights(self.name)
        with fetched(place) as path:
            load_weights(network, path)
        network.float().to(self._device).eval()
        if weights_fingerprint(network) != self._fingerprint:
            raise LeadlineError(f"{place}: not the weights that the run was made with; restore the file")
        return network

    def _embed(self, network: torch.nn.Module, read: Sequence[int], inputs: torch.Tensor, first: int) -> Embedded:
        """One batch, on the device, at some of the probes; `first` is the number of its first point."""
        probes, reducers = [self.probes[i] for i in read], [self._reducers[i] for i in read]
        return embed_batch(network, probes, inputs, first, self.name, reducers, self.config.precision)
