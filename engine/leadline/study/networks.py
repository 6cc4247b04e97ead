"""What the study asks of the networks again, since a run keeps no softmax, no gradient and no embedding.

A member's answers are kept in a file of the study's folder, so that a study that was stopped goes on, and a second one
does not ask again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from leadline.embedding import forward_pass
from leadline.errors import LeadlineError
from leadline.knn import bank_on, count_votes
from leadline.knn.arrays import Array, Shards
from leadline.layers import open_layers
from leadline.points import Points
from leadline.query import Run
from leadline.store.files import read_json
from leadline.store.tables import read_table, write_table
from leadline.stored_member import StoredMember, stored_points
from leadline.study.margins import adversarial_input_margin

ANSWERS = pa.schema([("point_id", pa.int64()), ("softmax", pa.list_(pa.float32())), ("input_margin", pa.float32())])
QUERIES = 8192  # that are searched for together


@dataclass(frozen=True)
class Answers:
    """Of one member for N points: softmax float32 [N, C], input_margin float32 [N] (see `adversarial_input_margin`)."""

    softmax: Array
    input_margin: Array


class Networks:
    """The networks of a run, asked again. folder: where their answers are kept; tell: gets a line for each member."""

    def __init__(self, run: Run, folder: Path, tell: Callable[[str], None]) -> None:
        self._run, self._folder, self._tell = run, folder, tell
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._points: Points | None = None

    def answers(self, member: str) -> Answers:
        """Raises LeadlineError for weights or data that are not the run's, and a file of another run's answers."""
        place = self._folder / f"member={member}" / "part-0.parquet"
        if not place.exists():
            self._tell(f"{member}: softmax and input margins of all points")
            write_table(place, ANSWERS, [self._ask(member)], self._stamps(member))
        table = read_table(place)
        found = table.schema.metadata or {}
        if any(found.get(key.encode(), b"").decode() != stamp for key, stamp in self._stamps(member).items()):
            raise LeadlineError(f"{place}: answers for another run; give -o another folder, or delete this one")
        softmax = table["softmax"].combine_chunks().values.to_numpy().reshape(len(table), -1)
        return Answers(softmax, table["input_margin"].to_numpy())

    def depth_winners(self, member: str, ks: list[int]) -> dict[int, Array]:
        """Votes of a member's probes by several numbers of neighbours: for each k, int32 [N, P]. One search a probe."""
        root = self._run.directory.root
        if not isinstance(root, Path):
            raise LeadlineError(f"{root}: other numbers of neighbours are tried on runs on a disk; copy the run")
        self._tell(f"{member}: votes by k = {', '.join(map(str, ks))}")
        layers = open_layers(root, member, self._device)
        winners = {k: np.empty((len(layers.labels), len(layers.names)), np.int32) for k in ks}
        own = layers.own
        for probe in range(len(layers.names)):
            with layers.rows(probe) as rows:
                bank = bank_on(Shards([rows], layers.bank_ids), self._device)
                for first in range(0, len(rows), QUERIES):
                    asked = slice(first, first + QUERIES)
                    found, _ = bank.search(rows[asked], max(ks), None if own is None else own[asked])
                    nearest = layers.labels[layers.bank_ids[bank.by_distance(rows[asked], found)[0]]]
                    for k in ks:
                        winners[k][asked, probe] = count_votes(nearest[:, :k]).winner
        return winners

    @property
    def points(self) -> Points:
        """Raises LeadlineError where they have changed since the run was made."""
        if self._points is None:
            self._points = stored_points(self._run.directory, self._run.manifest)
        return self._points

    def _stamps(self, member: str) -> dict[str, str]:
        trained = read_json(self._run.directory.record("train", member))
        return {
            "leadline.configuration": self._run.manifest["fingerprint"],
            "leadline.data": self._run.manifest["data"]["fingerprint"],
            "leadline.weights": trained["weights_fingerprint"],
        }

    def _ask(self, member: str) -> pa.Table:
        points = self.points
        stored = StoredMember(self._run.directory, self._run.manifest, member, self._device)
        network, size = stored.network(points.input_shape), stored.config.engine.batch_size
        shares, margins = [], []
        for first in range(0, len(points), size):
            inputs = points.read_on(np.arange(first, min(first + size, len(points))), self._device)
            with torch.no_grad(), forward_pass(network, inputs.device, stored.config.precision):
                shares.append(torch.softmax(network(inputs).float(), dim=1).cpu().numpy())
            margins.append(adversarial_input_margin(network, inputs, batch_size=size))
        softmax = np.concatenate(shares)
        offsets = np.arange(len(softmax) + 1, dtype=np.int32) * softmax.shape[1]
        return pa.table(
            {
                "point_id": np.arange(len(softmax)),
                "softmax": pa.ListArray.from_arrays(offsets, softmax.ravel()),
                "input_margin": np.concatenate(margins),
            }
        )
