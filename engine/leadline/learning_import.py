"""How a member that was trained elsewhere learned the points: its table of learning, from the log of that training."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from leadline.errors import LeadlineError, one_line
from leadline.knn.arrays import Array
from leadline.learning_table import LearningTable
from leadline.store import RunDirectory
from leadline.store.schemas import CHECKPOINTS, LOGGED, WATCHED
from leadline.store.tables import open_table, read_table
from leadline.study.learning import label_outputs

ROWS = 8192  # of a log that are in memory together
INTEGERS = ("tinyint", "smallint", "integer", "bigint", "utinyint", "usmallint", "uinteger", "ubigint")


def import_learning(directory: RunDirectory, member: str, log: Path) -> int:
    """Make the table of learning of a member of a finished run from a log, or replace it. Returns the steps in the log.

    log: a Parquet file with a row for each step and each point of the run: `step` int; `point_id` int or `key` text, as
    in points.parquet; and `prediction` int or `logits`, a list of a float for each class. Rows may lie in any order;
    where those of a step lie together, it is read once and not once for each step. What is learned is the prediction
    in the table of depths, at the latest at the last step of the log.

    Raises LeadlineError for a run that is not finished, a member that is not in it or whose training it watched itself,
    and for a log that is not so, naming the first step and point that are missing, there twice, or unknown.
    """
    manifest = directory.read_manifest()
    if manifest.get("status") != "complete":
        raise LeadlineError(f"{directory.root}: the run is {manifest.get('status')}; finish it with the same command")
    members = read_table(directory.table("members"))["member"].to_pylist()
    if member not in members:
        raise LeadlineError(f"member: {member!r} is not in the run; there are {', '.join(members)}")
    place = directory.member_table("learning", member)
    if place.is_file():
        with open_table(place) as file:
            if file.schema_arrow.metadata.get(CHECKPOINTS.encode()) == WATCHED.encode():
                raise LeadlineError(f"{place}: the run watched this training itself; import the log of another member")
    depths = read_table(directory.member_table("depths", member))
    labels = depths["label"].to_numpy()
    with duckdb.connect() as connection, _asking(log):
        opened = _Log(connection, log, directory, labels)
        table = LearningTable(labels, depths["in_training"].to_numpy(), opened.steps)
        for step in opened.steps:
            table.add(step, **opened.said(step))
    stamps = {"leadline.configuration": manifest["fingerprint"], "leadline.data": manifest["data"]["fingerprint"]}
    table.write(place, stamps, LOGGED, depths["prediction"].to_numpy())
    directory.record_file(place)
    return len(opened.steps)


@contextmanager
def _asking(log: Path) -> Iterator[None]:
    try:
        yield
    except duckdb.Error as error:
        raise LeadlineError(f"{log}: {one_line(error)}; give a Parquet file") from None


class _Log:
    """A log, of which a step is read at a time. labels: int [N], of the run's points."""

    def __init__(
        self, connection: duckdb.DuckDBPyConnection, path: Path, directory: RunDirectory, labels: Array
    ) -> None:
        self._connection, self._path, self._labels = connection, path, labels
        rows = connection.read_parquet(str(path))
        types = dict(zip(rows.columns, rows.types, strict=True))
        self._point, self._said = _one_of(path, types, "point_id", "key"), _one_of(path, types, "prediction", "logits")
        for name in (_one_of(path, types, "step"), self._point, self._said):
            if not _fits(name, types[name]):
                raise LeadlineError(f"{path}: column {name} is {types[name]}; see the layout of a log in docs/runs.md")
        rows.create_view("log")
        found = [step for (step,) in connection.execute("SELECT DISTINCT step FROM log ORDER BY step").fetchall()]
        if not found or None in found or found[0] < 0:
            raise LeadlineError(f"{path}: a row without a step, with one below 0, or no rows; steps count from 0")
        self.steps: list[int] = found
        self._keys = read_table(directory.table("points"))["key"].combine_chunks() if self._point == "key" else None
        if self._keys is not None and pc.count_distinct(self._keys).as_py() < len(labels):
            raise LeadlineError(f"{path}: several points of the run have the same key; give point_id")

    def said(self, step: int) -> dict[str, Array]:
        """At one step: the prediction, int32 [N], and from logits what `label_outputs` gives, float32 [N]."""
        found: dict[str, Array] = {}
        seen = np.zeros(len(self._labels), bool)
        rows = self._connection.sql(f"SELECT {self._point}, {self._said} FROM log WHERE step = {step}")
        for batch in rows.to_arrow_reader(ROWS):
            ids = self._ids(batch.column(0), step)
            again = seen[ids]
            again[np.setdiff1d(np.arange(len(ids)), np.unique(ids, return_index=True)[1])] = True
            if again.any():
                raise self._fault(step, ids[again.argmax()], "is there twice")
            seen[ids] = True
            for name, values in self._read(batch.column(1), ids, step).items():
                found.setdefault(name, np.empty(len(seen), values.dtype))[ids] = values
        if not seen.all():
            raise self._fault(step, seen.argmin(), "is missing")
        return found

    def _ids(self, points: pa.Array, step: int) -> Array:
        """The ids of points, int64 [B]."""
        n = len(self._labels)
        if self._keys is not None:
            ids = pc.index_in(points.cast(self._keys.type), self._keys)
        else:
            ids = pc.if_else(pc.and_(pc.greater_equal(points, 0), pc.less(points, n)), points, None)
        if ids.null_count:
            unknown = points[pc.index(ids.is_null(), True).as_py()].as_py()
            raise LeadlineError(f"{self._path}: step {step}: {self._point} {unknown!r} is that of no point of the run")
        return np.asarray(ids.to_numpy(), np.int64)

    def _read(self, said: pa.Array, ids: Array, step: int) -> dict[str, Array]:
        if said.null_count:
            raise self._fault(step, ids[pc.index(said.is_null(), True).as_py()], f"has no {self._said}")
        if self._said == "prediction":
            prediction = said.to_numpy()
            wrong = (prediction < 0) | (prediction > np.iinfo(np.int32).max)
            if wrong.any():
                raise self._fault(
                    step, ids[wrong.argmax()], f"has prediction {prediction[wrong][0]}; classes are 0, 1, …"
                )
            return {"prediction": prediction.astype(np.int32)}
        lengths = pc.list_value_length(said).to_numpy()
        n_classes = max(2, int(self._labels.max()) + 1, int(lengths[0]))
        if (lengths != n_classes).any():
            wrong = lengths != n_classes
            raise self._fault(step, ids[wrong.argmax()], f"has {lengths[wrong][0]} logits, not one for each class")
        logits = said.flatten().to_numpy(zero_copy_only=False).reshape(len(ids), n_classes)
        finite = np.isfinite(logits).all(axis=1)
        if not finite.all():
            raise self._fault(step, ids[finite.argmin()], "has a logit that is not finite")
        return asdict(label_outputs(logits, self._labels[ids]))

    def _fault(self, step: int, point: Any, what: str) -> LeadlineError:
        return LeadlineError(f"{self._path}: step {step}: point {point} {what}; every step has every point once")


def _one_of(path: Path, types: dict[str, Any], *names: str) -> str:
    """The only one of these columns that is there."""
    there = [name for name in names if name in types]
    if len(there) != 1:
        raise LeadlineError(f"{path}: has the columns {', '.join(types)}; give one column {' or '.join(names)}")
    return there[0]


def _fits(name: str, kind: Any) -> bool:
    """Whether a column of a log is of this type of DuckDB's."""
    if name == "logits":
        return kind.id in ("list", "array") and kind.children[0][1].id in ("float", "double")
    return kind.id in (("varchar",) if name == "key" else INTEGERS)
