"""Two runs over the same points: do they order them alike, do they say the same classes, and which points moved."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.stats import spearmanr

from leadline.errors import LeadlineError
from leadline.knn.arrays import Array
from leadline.query import Run, quoted

SPLITS = ("held_out", "training")


@dataclass(frozen=True)
class Comparison:
    """What two runs, a and b, say of the same N points.

    matched_by: "point_id" where their data have one fingerprint, else "key". Depths are relative: mean depth over the
    members of an architecture, divided by the number of its probes in that run. Tables, of every architecture that both
    have:
    - depths, one row a split (held_out, training): architecture, split, n, the points with a mean depth in both runs;
      rank_correlation, Spearman's, null where it is not defined; relative_depth_a, relative_depth_b, their means;
    - consensus, one row: architecture, n, the points that members hold out in both runs; agreement, the share of them
      with one consensus class; held_out_accuracy_a, held_out_accuracy_b, means over them;
    - moved, the points whose depth differs most, by split: architecture, split, point_id (that of a), key, label,
      label_name, relative_depth_a, relative_depth_b, moved (b less a), consensus_class_a, consensus_class_b.
    """

    points: int
    matched_by: str
    depths: pa.Table
    consensus: pa.Table
    moved: pa.Table

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        tables = {name: getattr(self, name).to_pylist() for name in ("depths", "consensus", "moved")}
        return {"points": self.points, "matched_by": self.matched_by, **tables}


def compare(a: Run, b: Run, n: int = 20) -> Comparison:
    """Hold two finished runs against one another; n: so many points that moved, of each architecture and split.

    Raises LeadlineError for runs that are not finished, whose points are not the same, with the same labels, and that
    have no architecture in common.
    """
    if n < 1:
        raise LeadlineError(f"--n: {n}; give at least 1")
    matched_by, points, place_in_b = _matched(a, b)
    names = [_architectures(run) for run in (a, b)]
    common = [name for name in names[0] if name in names[1]]
    if not common:
        raise LeadlineError(
            f"{a.directory.root} has {', '.join(names[0])}, {b.directory.root} has {', '.join(names[1])}; "
            "compare runs that have an architecture in common"
        )
    depths, consensus, moved = [], [], []
    for architecture in common:
        in_a, in_b = _ensemble(a, architecture), _ensemble(b, architecture).take(place_in_b)
        consensus.append({"architecture": architecture, **_consensus(in_a, in_b)})
        for split in SPLITS:
            depth_a, depth_b = (table[split].to_numpy() for table in (in_a, in_b))
            depths.append({"architecture": architecture, "split": split, **_correlation(depth_a, depth_b)})
            rows = _most_moved(depth_a, depth_b, n)
            moved.append(_moved_table(architecture, split, rows, points, in_a, in_b))
    return Comparison(
        len(points), matched_by, pa.Table.from_pylist(depths), pa.Table.from_pylist(consensus), pa.concat_tables(moved)
    )


def _matched(a: Run, b: Run) -> tuple[str, pa.Table, Array]:
    """How points were matched; those of a, ordered by id; and the row of each among those of b, int64 [N]."""
    query = "SELECT point_id, key, label, label_name FROM points ORDER BY point_id"
    in_a, in_b = a.sql(query), b.sql(query)
    if a.manifest["data"]["fingerprint"] == b.manifest["data"]["fingerprint"]:
        matched_by, place = "point_id", np.arange(len(in_a))
    else:
        matched_by, place = "key", _places(a, b, in_a["key"], in_b["key"])
    labels = [in_a["label"].to_numpy(), in_b["label"].to_numpy()[place]]
    differing = np.flatnonzero(labels[0] != labels[1])
    if len(differing):
        first = int(differing[0])
        raise LeadlineError(
            f"{a.directory.root} and {b.directory.root}: labels differ at {len(differing):,} of {len(in_a):,} points, "
            f"first at {in_a['key'][first]}: {labels[0][first]} and {labels[1][first]}; give runs over the same labels"
        )
    return matched_by, in_a, place


def _places(a: Run, b: Run, keys_a: pa.ChunkedArray, keys_b: pa.ChunkedArray) -> Array:
    """The row of each key of a among those of b."""
    for run, keys in ((a, keys_a), (b, keys_b)):
        if pc.count_distinct(keys).as_py() < len(keys):
            raise LeadlineError(
                f"{run.directory.root}: some points have one key; runs over other data are matched by it"
            )
    place = pc.index_in(keys_a, value_set=keys_b)
    if place.null_count or len(keys_a) < len(keys_b):
        raise LeadlineError(
            f"{a.directory.root} and {b.directory.root}: not the same points; only in the first: "
            f"{_only(keys_a, keys_b)}, only in the second: {_only(keys_b, keys_a)}; give runs over the same points"
        )
    return np.asarray(place.to_numpy())


def _only(keys: pa.ChunkedArray, others: pa.ChunkedArray) -> str:
    """How many keys are not among others, with the first of them."""
    alone = keys.filter(pc.invert(pc.is_in(keys, value_set=others)))
    return f"{len(alone):,} ({alone[0]})" if len(alone) else "none"


def _architectures(run: Run) -> list[str]:
    found: list[str] = run.sql("SELECT DISTINCT architecture FROM members ORDER BY architecture")[0].to_pylist()
    return found


def _ensemble(run: Run, architecture: str) -> pa.Table:
    """One row a point, by id: relative depths as the splits are named, null where there is no member."""
    return run.sql(f"""
        SELECT mean_depth_held_out / n_probes AS held_out, mean_depth_training / n_probes AS training, consensus_class,
            held_out_accuracy
        FROM ensemble, (SELECT max(n_probes) AS n_probes FROM members WHERE architecture = {quoted(architecture)})
        WHERE architecture = {quoted(architecture)} ORDER BY point_id
    """)


def _correlation(a: Array, b: Array) -> dict[str, Any]:
    both = ~np.isnan(a + b)
    a, b = a[both], b[both]
    is_defined = len(a) > 1 and np.ptp(a) > 0 and np.ptp(b) > 0
    return {
        "n": len(a),
        "rank_correlation": float(spearmanr(a, b).statistic) if is_defined else None,
        "relative_depth_a": float(a.mean()) if len(a) else None,
        "relative_depth_b": float(b.mean()) if len(b) else None,
    }


def _consensus(a: pa.Table, b: pa.Table) -> dict[str, Any]:
    classes = [table["consensus_class"].to_numpy() for table in (a, b)]
    both = (classes[0] >= 0) & (classes[1] >= 0)
    n = int(both.sum())
    right = [float(table["held_out_accuracy"].to_numpy()[both].mean()) if n else None for table in (a, b)]
    return {
        "n": n,
        "agreement": float((classes[0] == classes[1])[both].mean()) if n else None,
        "held_out_accuracy_a": right[0],
        "held_out_accuracy_b": right[1],
    }


def _most_moved(a: Array, b: Array, n: int) -> Array:
    """Rows of the n points whose depth differs most and differs at all, ties by lower id."""
    distance = np.nan_to_num(np.abs(a - b))
    rows = np.argsort(-distance, kind="stable")[:n]
    return np.asarray(rows[distance[rows] > 0])


def _moved_table(
    architecture: str, split: str, rows: Array, points: pa.Table, in_a: pa.Table, in_b: pa.Table
) -> pa.Table:
    chosen, a, b = points.take(rows), in_a.take(rows), in_b.take(rows)
    return pa.table(
        {
            "architecture": pa.array([architecture] * len(rows), pa.string()),
            "split": pa.array([split] * len(rows), pa.string()),
            **{name: chosen[name] for name in ("point_id", "key", "label", "label_name")},
            "relative_depth_a": a[split],
            "relative_depth_b": b[split],
            "moved": pc.subtract(b[split], a[split]),
            "consensus_class_a": a["consensus_class"],
            "consensus_class_b": b["consensus_class"],
        }
    )
