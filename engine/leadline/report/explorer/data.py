"""What the explorer asks of a run. DuckDB makes each answer, and none has more rows than a page shows."""

import json
from collections.abc import Iterator
from contextlib import closing
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, model_validator

from leadline.config import load_config
from leadline.errors import LeadlineError
from leadline.new_points import KeptMember
from leadline.query import Run
from leadline.report.explorer.images import Images
from leadline.study.export import with_fingerprints
from leadline.study.kinds import KINDS, UNPLACED
from leadline.study.plane import read_plane

STEPS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # widths of the plane's bins, in layers
BINS = 64  # of each side of the plane, at most
LARGEST = 2**31 - 1  # number that a request may give
ROWS, SECONDS = 1000, 60.0  # of an answer to typed SQL that are shown, and to wait for it
# `study.kinds.kinds`, in SQL.
KIND = f"""coalesce(2 * (mean_depth_held_out > $beyond_held_out)::INT + (mean_depth_training > $beyond_training)::INT,
    {UNPLACED})"""
ORDERS = {
    "depth held out": "mean_depth_held_out",
    "depth in training": "mean_depth_training",
    "accuracy": "held_out_accuracy",
    "consistency": "consensus_consistency",
    "entropy": "mean_entropy_held_out",
    "id": "point_id",
}
Order = Literal["depth held out", "depth in training", "accuracy", "consistency", "entropy", "id"]
Depth = float | None


class Asked(BaseModel):
    """Base of what a request asks for: anything else is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Selection(Asked):
    """Points of one architecture. What is None leaves out none.

    label, part, kind (a number of KINDS, or UNPLACED): of the point. member: whose `depth` the point has, or whose vote
    at `probe` is the label (`vote`: agrees) or another class. The last four are the region's sides, mean depths.
    """

    architecture: str
    label: int | None = Field(default=None, ge=0, le=LARGEST)
    part: Literal["train", "test"] | None = None
    kind: int | None = Field(default=None, ge=UNPLACED, lt=len(KINDS))
    member: str | None = None
    depth: int | None = Field(default=None, ge=0, le=LARGEST)
    probe: int | None = Field(default=None, ge=0, lt=LARGEST)
    vote: Literal["agrees", "disagrees"] | None = None
    held_out_from: Depth = None
    held_out_to: Depth = None
    training_from: Depth = None
    training_to: Depth = None

    @model_validator(mode="after")
    def _whole(self) -> "Selection":
        if self.member is None and (self.depth is not None or self.probe is not None):
            raise ValueError("depth and probe are of a member; give one")
        if (self.probe is None) != (self.vote is None):
            raise ValueError("probe and vote belong together; give both")
        return self


class Sorted(Selection):
    """A selection in an order. Points that have no value come last, equals are by point_id."""

    sort: Order = "depth held out"
    descending: bool = True


class Page(Sorted):
    """Some of its points."""

    limit: int = Field(default=48, ge=1, le=200)
    offset: int = Field(default=0, ge=0, le=LARGEST)


class OnePoint(Asked):
    architecture: str


class Neighbours(Asked):
    point_id: int = Field(ge=0)
    member: str
    probe: int = Field(ge=0)


class Statement(Asked):
    query: str


class Explorer:
    """Answers of a finished run, as what JSON can hold.

    Raises LeadlineError, here and in every answer, for a run that is not finished, has no points or is damaged, and for
    names that are not in it.
    """

    def __init__(self, run: Run) -> None:
        run.refuse_unfinished()
        self.run = run
        self.images = Images(run)
        self.neighbours = lru_cache(256)(self._neighbours)  # a search takes seconds
        self._config = load_config(run.manifest["configuration"])
        if not self.run.sql("SELECT count(*) AS n FROM ensemble JOIN points USING (point_id)")["n"][0].as_py():
            raise LeadlineError(f"{run.directory.root}: the run has no points; there is nothing to explore")

    @cached_property
    def about(self) -> dict[str, Any]:
        """The run and all that a selection can name."""
        manifest = self.run.manifest
        classes = self.run.sql("SELECT label, any_value(label_name) AS name FROM points GROUP BY label ORDER BY label")
        parts = self.run.sql("SELECT part, count(*) AS points FROM points GROUP BY part ORDER BY part DESC").to_pylist()
        return {
            "name": manifest["name"],
            "status": manifest["status"],
            "points": sum(part["points"] for part in parts),
            "parts": [part["part"] for part in parts],
            "k": self._config.k,
            "methods": self.run.sql("SELECT DISTINCT method FROM probes ORDER BY method")["method"].to_pylist(),
            "configuration": manifest["fingerprint"],
            "data": manifest["data"]["fingerprint"],
            "leadline": manifest["versions"].get("leadline"),
            "kept": self._config.engine.keep_indexes,
            "classes": classes.to_pylist(),
            "kinds": list(KINDS),
            "orders": list(ORDERS),
            "architectures": [self._architecture(entry.label) for entry in self._config.members],
        }

    def plane(self, selection: Selection) -> dict[str, Any]:
        """How many points lie where, whatever the region: bins around multiples of `step`, and the kinds' counts."""
        step = self._step(selection.architecture)
        chosen, values = self._chosen(selection, region=False)
        rows = self.run.sql(
            f"""SELECT floor(mean_depth_held_out / $step + 0.5)::INT AS x,
                floor(mean_depth_training / $step + 0.5)::INT AS y, kind, count(*) AS points
            FROM ({chosen}) GROUP BY ALL ORDER BY ALL""",
            values={**values, "step": step},
        ).to_pylist()
        kinds, bins = dict.fromkeys(range(UNPLACED, len(KINDS)), 0), dict[tuple[int, int], int]()
        for row in rows:
            kinds[row["kind"]] += row["points"]
            if row["kind"] != UNPLACED:
                place = (row["x"], row["y"])
                bins[place] = bins.get(place, 0) + row["points"]
        unplaced = kinds.pop(UNPLACED)
        return {
            "step": step,
            "thresholds": self._thresholds(selection.architecture),
            "bins": [{"held_out": x * step, "training": y * step, "points": n} for (x, y), n in sorted(bins.items())],
            "kinds": list(kinds.values()),
            "unplaced": unplaced,
        }

    def points(self, page: Page) -> dict[str, Any]:
        """Some points of a selection, and how many it has."""
        chosen, values = self._chosen(page)
        total = self.run.sql(f"SELECT count(*) AS n FROM ({chosen})", values=values)["n"][0].as_py()
        own, join = "", ""
        if page.member is not None:
            own = ", own.depth, own.prediction, own.in_training"
            join = "LEFT JOIN (SELECT * FROM depths WHERE member = $member) AS own USING (point_id)"
        rows = self.run.sql(
            f"""WITH page AS (FROM ({chosen}) ORDER BY {_order(page)} LIMIT $limit OFFSET $offset)
            SELECT point_id, points.key, points.part, page.label, points.clean_label, consensus_class,
                consensus_consistency, held_out_accuracy, mean_depth_held_out, mean_depth_training,
                mean_entropy_held_out, kind {own}
            FROM page JOIN points USING (point_id) {join} ORDER BY {_order(page)}""",
            values={**values, "limit": page.limit, "offset": page.offset} | ({"member": page.member} if join else {}),
        )
        return {"total": total, "points": rows.to_pylist()}

    def point(self, point_id: int, architecture: str) -> dict[str, Any]:
        """All of one point: what its members say of it, their votes through the probes, how it was learned."""
        chosen, values = self._chosen(Selection(architecture=architecture), region=False)
        values["point_id"] = point_id
        (one,) = self.run.sql(
            f"""SELECT points.key, points.part, points.clean_label, one.*
            FROM ({chosen}) AS one JOIN points USING (point_id) WHERE point_id = $point_id""",
            values=values,
        ).to_pylist()
        named = {"point_id": point_id, "members": self._members(architecture)}
        members = self.run.sql(
            """SELECT member, in_training, prediction, confidence, entropy, depth, unsettled, winner, winner_votes
            FROM depths JOIN votes USING (member, point_id)
            WHERE point_id = $point_id AND member IN (SELECT unnest($members))
            ORDER BY list_position($members, member)""",
            values=named,
        ).to_pylist()
        return {**one, "members": members, "learning": self._learning(named)}

    def download(self, selection: Sorted, path: Path) -> None:
        """Write a selection, with ids, labels and fingerprints in every row, as .csv or .parquet, as the path ends."""
        chosen, values = self._chosen(selection)
        names = " ".join(f"WHEN {number} THEN $kind_{number}" for number in range(len(KINDS)))
        tables = (
            with_fingerprints(self.run, pa.Table.from_batches([batch]))
            for batch in self.run.batches(
                f"""SELECT architecture, point_id, key, points.label, label_name, part, clean_label,
                    one.* EXCLUDE (architecture, point_id, label, kind), CASE kind {names} END AS kind
                FROM ({chosen}) AS one JOIN points USING (point_id) ORDER BY {_order(selection)}""",
                values={**values, **{f"kind_{number}": name for number, name in enumerate(KINDS)}},
            )
        )
        first = next(tables, None)
        if first is None:
            raise LeadlineError("download: no point is selected; select others")
        opened = pa_csv.CSVWriter if path.suffix == ".csv" else pq.ParquetWriter
        with opened(str(path), first.schema) as writer:
            writer.write_table(first)
            for table in tables:
                writer.write_table(table)

    def query(self, text: str) -> dict[str, Any]:
        """The first ROWS rows of the answer to typed SQL, as text, null where a value is."""
        columns: list[dict[str, str]] = []
        rows: list[list[str | None]] = []
        with closing(self.run.batches(text, seconds=SECONDS)) as batches:
            for batch in batches:
                columns = [{"name": field.name, "type": str(field.type)} for field in batch.schema]
                rows += islice(_texts(batch), ROWS + 1 - len(rows))
                if len(rows) > ROWS:
                    break
        return {"columns": columns, "rows": rows[:ROWS], "more": len(rows) > ROWS}

    def _neighbours(self, asked: Neighbours) -> list[dict[str, Any]]:
        """The k nearest points of a member's bank at one probe, nearest first."""
        kept = KeptMember(self.run.directory, self.run.manifest, asked.member)
        if asked.probe >= len(kept.probes):
            raise LeadlineError(f"probe: {asked.member} has 0 to {len(kept.probes) - 1}, not {asked.probe}")
        if asked.point_id >= self.about["points"]:
            raise LeadlineError(f"point: {asked.point_id} is not in the run")

        def read() -> Any:
            row = self.run.sql(
                "SELECT architecture FROM members WHERE member = $member", values={"member": asked.member}
            )
            entry = next(entry for entry in self._config.members if entry.label == row["architecture"][0].as_py())
            if ":" in entry.architecture:
                raise LeadlineError(
                    f"{asked.member} holds the point out, and its embedding would take running {entry.architecture}, "
                    "which the explorer does not; choose probe 0 or a member that was trained on the point"
                )
            return self.images.read(asked.point_id)

        ids, distances = kept.neighbours(asked.probe, asked.point_id, read)
        rows = self.run.sql(
            "SELECT point_id, key, label FROM points WHERE point_id IN (SELECT unnest($ids))",
            values={"ids": ids.tolist()},
        ).to_pylist()
        known = {row["point_id"]: row for row in rows}
        return [{**known[i], "distance": d} for i, d in zip(ids.tolist(), distances.tolist(), strict=True)]

    def _architecture(self, name: str) -> dict[str, Any]:
        given = {"architecture": name}
        members = self.run.sql(
            """SELECT member, train_accuracy, held_out_accuracy FROM members WHERE architecture = $architecture
            ORDER BY regexp_extract(member, '[0-9]+$')::INT""",
            values=given,
        ).to_pylist()
        probes = self.run.sql(
            "SELECT DISTINCT probe, name FROM probes WHERE architecture = $architecture ORDER BY probe", values=given
        )
        return {"name": name, "members": members, "probes": probes["name"].to_pylist()}

    def _named(self, architecture: str) -> dict[str, Any]:
        known: list[dict[str, Any]] = self.about["architectures"]
        for one in known:
            if one["name"] == architecture:
                return one
        names = ", ".join(one["name"] for one in known)
        raise LeadlineError(f"architecture: the run has no {architecture!r}; it has {names}")

    def _members(self, architecture: str) -> list[str]:
        return [member["member"] for member in self._named(architecture)["members"]]

    def _step(self, architecture: str) -> float:
        deepest = len(self._named(architecture)["probes"])
        return next((step for step in STEPS if deepest / step < BINS), STEPS[-1])

    @lru_cache(64)  # noqa: B019 (there is one Explorer in a process)
    def _thresholds(self, architecture: str) -> tuple[float, float] | None:
        """Of `study.plane`, held out and in training; None where no point has both depths."""
        return read_plane(self.run, architecture).beyond

    def _chosen(self, selection: Selection, region: bool = True) -> tuple[str, dict[str, Any]]:
        """SQL of the ensemble's rows that a selection has, with their `kind`; and the values of its names."""
        members = self._members(selection.architecture)
        if selection.member is not None and selection.member not in members:
            raise LeadlineError(f"member: {selection.architecture} has no {selection.member!r}; it has {members}")
        beyond = self._thresholds(selection.architecture) or (0.0, 0.0)
        values: dict[str, Any] = {"beyond_held_out": beyond[0], "beyond_training": beyond[1]}
        source, conditions = "ensemble", []
        for name, condition in CONDITIONS.items():
            value = getattr(selection, name)
            if value is not None and (region or name not in REGION):
                conditions.append(condition)
                values |= {name: value} if f"${name}" in condition else {}
        if selection.probe is not None:
            source = "ensemble JOIN (SELECT point_id, winner[$probe + 1] AS vote FROM votes WHERE member = $member) "
            source += "USING (point_id)"
            conditions.append(f"vote {'=' if selection.vote == 'agrees' else '<>'} label")
            values["probe"] = selection.probe
        if selection.depth is not None or selection.probe is not None:
            values["member"] = selection.member
        where = " AND ".join(conditions)
        return f"SELECT ensemble.*, {KIND} AS kind FROM {source} WHERE {where}", values

    def _learning(self, named: dict[str, Any]) -> list[dict[str, Any]]:
        """The share of members that give the point its label, by step, in training and held out."""
        if not self.run.directory.has_table("learning"):
            return []
        rows: list[dict[str, Any]] = self.run.sql(
            """WITH seen AS (
                SELECT label, in_training, unnest(steps) AS step, unnest(predictions) AS prediction FROM learning
                WHERE point_id = $point_id AND member IN (SELECT unnest($members))
            )
            SELECT step, in_training, avg((prediction = label)::DOUBLE) AS right, count(*) AS members
            FROM seen GROUP BY step, in_training ORDER BY in_training, step""",
            values=named,
        ).to_pylist()
        return rows


REGION = {
    "held_out_from": "mean_depth_held_out >= $held_out_from",
    "held_out_to": "mean_depth_held_out <= $held_out_to",
    "training_from": "mean_depth_training >= $training_from",
    "training_to": "mean_depth_training <= $training_to",
}
CONDITIONS = {
    "architecture": "architecture = $architecture",
    "label": "label = $label",
    "kind": f"{KIND} = $kind",
    "part": "point_id IN (SELECT point_id FROM points WHERE part = $part)",
    "depth": "point_id IN (SELECT point_id FROM depths WHERE member = $member AND depth = $depth)",
    **REGION,
}


def _order(asked: Sorted) -> str:
    return f"{ORDERS[asked.sort]} {'DESC' if asked.descending else 'ASC'} NULLS LAST, point_id"


def _texts(batch: pa.RecordBatch) -> Iterator[list[str | None]]:
    for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
        yield [None if value is None else _text(value) for value in row]


def _text(value: Any) -> str:
    return json.dumps(value, default=str) if isinstance(value, (list, dict)) else str(value)
