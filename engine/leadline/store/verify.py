"""Is a run what it says it is? Files against their digests, tables against each other, depths against votes."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from leadline.depth import depth_from_votes, is_unsettled
from leadline.errors import LeadlineError
from leadline.knn.arrays import Array
from leadline.store.directory import RunDirectory
from leadline.store.files import digest
from leadline.store.places import Place
from leadline.store.schemas import (
    AUDIT_FIELDS,
    CHECKPOINTS,
    DEPTHS,
    ENSEMBLE,
    ERROR_FIELDS,
    LEARNING,
    MEMBERS,
    POINTS,
    PROBES,
    VOTE_FIELDS,
    WATCHED,
    votes_schema,
)
from leadline.store.tables import open_table, read_table


def verify(directory: RunDirectory) -> list[str]:
    """Every fault that is found in a run, a line each; none in a sound run.

    Held against one another: files and the digests of the manifest; schemas; rows and ids; depths and the votes that
    they are made from; counts and accuracies of members, probes and the ensemble and the depths that they sum up; how
    points were learned and the predictions that tell it.
    Raises LeadlineError where there is no run.
    """
    manifest = directory.read_manifest()
    if manifest.get("status") != "complete":
        return [f"{directory.manifest_path}: the run is {manifest.get('status')}; finish it with the same command"]
    faults = list(_file_faults(directory, manifest["files"]))
    if faults:
        return faults  # what is in a damaged table says nothing
    try:
        return list(_table_faults(directory, manifest))
    except LeadlineError as error:
        return [str(error)]


def _file_faults(directory: RunDirectory, digests: dict[str, str]) -> Iterator[str]:
    there = {directory.inside(path) for path in directory.root.rglob("*.parquet")}
    for name in sorted(there - digests.keys()):
        yield f"{directory.root / name}: not a file of this run; remove it"
    for name, expected in sorted(digests.items()):
        path = directory.root / name
        if not path.is_file():
            yield f"{path}: missing"
        elif digest(path) != expected:
            yield f"{path}: damaged or changed (its SHA-256 is not the manifest's)"


def _table_faults(directory: RunDirectory, manifest: dict[str, Any]) -> Iterator[str]:
    members = read_table(directory.table("members")).to_pylist()
    probes = read_table(directory.table("probes")).to_pylist()
    named = [("points", POINTS), ("members", MEMBERS), ("probes", PROBES), ("ensemble", ENSEMBLE)]
    paths = [(directory.table(name), schema) for name, schema in named]
    for member in members:
        paths.append((directory.member_table("depths", member["member"]), DEPTHS))
        paths.append((directory.member_table("votes", member["member"]), votes_schema(member["n_probes"])))
        if directory.member_table("learning", member["member"]).is_file():
            paths.append((directory.member_table("learning", member["member"]), LEARNING))
    wrong = [fault for path, schema in paths for fault in _schema_faults(path, schema, manifest)]
    if wrong:
        yield from wrong
        return
    points = read_table(directory.table("points"))
    n_points = manifest["data"]["points"]
    labels = points["label"].to_numpy()
    yield from _id_faults(directory.table("points"), points, n_points)
    sums: dict[str, _Sums] = {}
    for member in members:
        own = [probe for probe in probes if probe["member"] == member["member"]]
        total = sums.setdefault(member["architecture"], _Sums(n_points))
        yield from _member_faults(directory, member, own, labels, manifest["configuration"], total)
    ensemble = read_table(directory.table("ensemble"))
    for architecture, total in sums.items():
        part = ensemble.filter(pa.compute.equal(ensemble["architecture"], architecture))
        yield from _id_faults(directory.table("ensemble"), part, n_points)
        if len(part) == n_points:
            yield from total.faults(directory.table("ensemble"), architecture, part)


def _schema_faults(path: Place, schema: pa.Schema, manifest: dict[str, Any]) -> Iterator[str]:
    with open_table(path) as file:
        found: pq.FileMetaData = file.schema_arrow
    if not found.equals(schema):
        differing = sorted({field.name for field in set(found) ^ set(schema)})
        yield f"{path}: columns {', '.join(differing)} are not as they should be"
    stamps = found.metadata or {}
    for stamp, expected in (("configuration", manifest["fingerprint"]), ("data", manifest["data"]["fingerprint"])):
        if stamps.get(f"leadline.{stamp}".encode(), b"").decode() != expected:
            yield f"{path}: made from another {stamp} than the manifest's"


def _id_faults(path: Place, table: pa.Table, n_points: int) -> Iterator[str]:
    if not np.array_equal(table["point_id"].to_numpy(), np.arange(n_points)):
        yield f"{path}: its ids are not 0 to {n_points - 1}, each once and in order"


def _member_faults(
    directory: RunDirectory, member: dict[str, Any], probes: list[dict[str, Any]], labels: Array,
    config: dict[str, Any], total: "_Sums",
) -> Iterator[str]:  # fmt: skip
    path, votes_path = (directory.member_table(name, member["member"]) for name in ("depths", "votes"))
    depths, votes = read_table(path), read_table(votes_path)
    faults = [*_id_faults(path, depths, len(labels)), *_id_faults(votes_path, votes, len(labels))]
    if faults:
        yield from faults
        return
    n_probes = member["n_probes"]
    columns = {field: _elements(votes[field], n_probes) for field in VOTE_FIELDS}
    computed = {field: _computed(votes[field], n_probes) for field in VOTE_FIELDS}
    yield from _vote_faults(votes_path, columns, computed["winner"], config["k"])
    prediction, depth = depths["prediction"].to_numpy(), depths["depth"].to_numpy()
    inside = depths["in_training"].to_numpy()
    expected = depth_from_votes(columns["winner"], prediction)
    # All votes, or those from the last probe down to the one that tells the depth.
    first_probe = expected - 1 if config["votes"] == "until-decided" else np.zeros_like(expected)
    yield from _null_faults(votes_path, computed, np.arange(n_probes) >= first_probe[:, None])
    if (depth != expected).any():
        first = int((depth != expected).argmax())
        yield f"{path}: depth of point {first} is {depth[first]}, its votes make it {expected[first]}"
    if (depths["unsettled"].to_numpy() != is_unsettled(expected, n_probes)).any():
        yield f"{path}: column unsettled disagrees with the votes"
    if not np.array_equal(depths["label"].to_numpy(), labels):
        yield f"{path}: its labels are not those of points.parquet"
    if [probe["probe"] for probe in probes] != list(range(n_probes)):
        yield f"{directory.table('probes')}: member {member['member']} does not have the probes 0 to {n_probes - 1}"
        return
    if np.count_nonzero(inside) != member["n_train"]:
        yield f"{path}: {np.count_nonzero(inside)} points in training, members.parquet says {member['n_train']}"
    if directory.member_table("learning", member["member"]).is_file():
        yield from _learning_faults(directory.member_table("learning", member["member"]), depths)
    yield from _audit_faults(directory, member, probes)
    rights, known = (columns["winner"] == labels[:, None]).T, computed["winner"].T
    told = [(member, prediction == labels, np.ones(len(labels), bool)), *zip(probes, rights, known, strict=True)]
    for row, right, there in told:
        for column, where in (("train_accuracy", inside), ("held_out_accuracy", ~inside)):
            share = right[where].mean() if where.any() and there[where].all() else None
            if row[column] != share:
                place = f"probe {row['probe']} of {row['member']}" if "probe" in row else row["member"]
                yield f"{path}: {column} of {place} is {share} by this table, the run says {row[column]}"
    total.add(depth, inside, member["depth_error_high"] or 0.0)


def _learning_faults(path: Place, depths: pa.Table) -> Iterator[str]:
    """depths: of the same member, a row a point. The table of learning is read a row group at a time."""
    with open_table(path) as file:
        n_groups, n_rows, stamps = file.num_row_groups, file.metadata.num_rows, file.schema_arrow.metadata
    if n_rows != len(depths):
        yield f"{path}: {n_rows} rows for {len(depths)} points"
        return
    is_watched, first = stamps.get(CHECKPOINTS.encode()) == WATCHED.encode(), 0
    steps: list[int] = read_table(path, 0)["steps"][0].as_py() or []
    for group in range(n_groups):
        table = read_table(path, group)
        own, first = depths.slice(first, len(table)), first + len(table)
        for column in ("point_id", "label", "in_training"):
            if table[column] != own[column]:
                yield f"{path}: column {column} is not that of the table of depths"
        lengths = [pa.compute.list_value_length(table[column]).fill_null(0) for column in ("steps", "predictions")]
        if not steps or any((length.to_numpy() != len(steps)).any() for length in lengths):
            yield f"{path}: a point has not one prediction for each step"
            return
        every, said = (_elements(table[column], len(steps)) for column in ("steps", "predictions"))
        if (every != steps).any() or any(after <= before for before, after in pairwise(steps)):
            yield f"{path}: its steps are not ascending, or not the same of every point"
        final = own["prediction"].to_numpy()
        if is_watched and (said[:, -1] != final).any():
            yield f"{path}: its last predictions are not those of the table of depths"
        # How many predictions, from the last back, are the final one before the first that is not.
        agreeing = np.logical_and.accumulate(said[:, ::-1] == final[:, None], axis=1).sum(axis=1)
        learned = np.array([*steps, steps[-1]])[len(steps) - agreeing]
        found = table["iteration_learned"].to_numpy()
        if (found != learned).any():
            at = int((found != learned).argmax())
            yield (
                f"{path}: iteration_learned of point {own['point_id'][at]} is {found[at]}, its predictions make it "
                f"{learned[at]}"
            )


def _audit_faults(directory: RunDirectory, member: dict[str, Any], probes: list[dict[str, Any]]) -> Iterator[str]:
    """Every approximate or reduced probe, and a member that has one, carries its measured error; others carry none."""
    approximate = [probe["method"] != "exact" or probe["reduction"] != "none" for probe in probes]
    rows = [
        ("members", member["member"], member, any(approximate), ERROR_FIELDS, member["n_probes"]),
        *(
            ("probes", f"probe {probe['probe']} of {probe['member']}", probe, there, AUDIT_FIELDS, 1)
            for probe, there in zip(probes, approximate, strict=True)
        ),
    ]
    for table, name, row, expected, columns, largest in rows:
        # With `votes: until-decided`, none of the sampled points may have been asked for.
        there = [row[column] is not None for column in columns]
        if (row["audit_sample"] is not None) != expected or set(there) != {bool(row["audit_sample"])}:
            yield f"{directory.table(table)}: {name} has no audit, or one that it should not have"
        elif row["audit_sample"]:
            for value, low, high in (columns[:3], columns[3:]):
                if not 0 <= row[low] <= row[value] <= row[high] <= largest:
                    yield f"{directory.table(table)}: {value} of {name} is not inside its interval"


def _elements(lists: pa.ChunkedArray, size: int) -> Array:
    """The elements of lists that are all so long, [Q, size]; -1 for those that are null."""
    return np.asarray(lists.combine_chunks().values.fill_null(-1).to_numpy()).reshape(-1, size)


def _computed(lists: pa.ChunkedArray, n_probes: int) -> Array:
    """Which elements of fixed-size lists are not null, bool [Q, P]."""
    valid = lists.combine_chunks().values.is_valid()
    return np.asarray(valid.to_numpy(zero_copy_only=False)).reshape(-1, n_probes)


def _vote_faults(path: Place, votes: dict[str, Array], computed: Array, k: int) -> Iterator[str]:
    most, second = votes["winner_votes"], votes["runner_up_votes"]
    wrong = (
        (most < 1)
        | (second < 0)
        | (second > most)
        | (most + second > k)
        | ((votes["runner_up"] == -1) != (second == 0))
    )
    impossible = (wrong & computed).any(axis=1)
    if impossible.any():
        yield f"{path}: the votes of point {int(impossible.argmax())} cannot be counts of {k} neighbours"


def _null_faults(path: Place, computed: dict[str, Array], expected: Array) -> Iterator[str]:
    for field, there in computed.items():
        wrong = (there != expected).any(axis=1)
        if wrong.any():
            yield f"{path}: column {field} of point {int(wrong.argmax())} has nulls at other probes than it should"


class _Sums:
    """Members and depths of each point, summed over the members of an architecture."""

    def __init__(self, n_points: int) -> None:
        self.count = np.zeros((2, n_points))
        self.depth = np.zeros((2, n_points))
        self.error = np.zeros((2, n_points))

    def add(self, depth: Array, inside: Array, error: float) -> None:
        for side, where in enumerate((inside, ~inside)):
            self.count[side] += where
            self.depth[side] += depth * where
            self.error[side] += error * where

    def faults(self, path: Place, architecture: str, table: pa.Table) -> Iterator[str]:
        for side, name in enumerate(("training", "held_out")):
            with np.errstate(invalid="ignore"):
                means, errors = self.depth[side] / self.count[side], self.error[side] / self.count[side]
            sums = ((f"n_{name}", self.count[side]), (f"mean_depth_{name}", means), (f"depth_error_{name}", errors))
            for column, expected in sums:
                found = table[column].to_numpy().astype(np.float64)
                if not np.array_equal(found, expected, equal_nan=True):
                    yield f"{path}: {column} of {architecture} disagrees with the depths of its members"
