"""Scores of points: what a finished run says of each point in one row, over the members of an architecture."""

import numpy as np
import pyarrow as pa

from leadline.errors import LeadlineError
from leadline.query import Run, quoted
from leadline.study.kinds import KINDS
from leadline.study.plane import plane_of

POINT = ("key", "label", "label_name", "part", "clean_label")
ENSEMBLE = (
    "n_training", "n_held_out", "mean_depth_training", "std_depth_training", "mean_depth_held_out",
    "std_depth_held_out", "consensus_class", "consensus_consistency", "held_out_accuracy", "mean_confidence_held_out",
    "mean_margin_held_out", "mean_entropy_held_out",
)  # fmt: skip
LEARNING = (
    "iteration_learned", "forgetting_events", "never_learned", "el2n", "aum", "mean_label_probability",
    "std_label_probability",
)  # fmt: skip
SPLITS = {"training": "in_training", "held_out": "NOT in_training"}


def point_scores(run: Run, architecture: str | None = None) -> pa.Table:
    """One row for each architecture and point, architectures as in the table of members, then by point_id.

    architecture: only this one. Columns:
    - architecture string, point_id int64, and as in the table of points key, label, label_name, part, clean_label;
    - ENSEMBLE, as in the table of the ensemble (a consensus_class of -1: no member holds the point out);
    - training_accuracy float64, the share of the members trained on the point that predict its label;
    - memorisation float64, training_accuracy - held_out_accuracy (Feldman, "Does learning require memorization?",
      STOC 2020; believed, not verified), null where either is;
    - kind string, a name of KINDS by mean_depth_held_out and mean_depth_training, with thresholds of the architecture's
      own points; null where a point has not both;
    - where the run has a table of learning, for each X of LEARNING mean_X_training, std_X_training, mean_X_held_out and
      std_X_held_out, float64, over the members that have X of the point: std is the sample's, n - 1 below, null for
      fewer than two members. never_learned counts as 0 and 1: its mean is a share.

    Raises LeadlineError for a run that is not finished, and for an unknown architecture.
    """
    run.refuse_unfinished()
    known = architectures(run)
    if architecture is not None and architecture not in known:
        raise LeadlineError(f"--architecture: the run has no {architecture!r}; it has {', '.join(known)}")
    chosen = known if architecture is None else [architecture]
    return pa.concat_tables([_scores(run, one) for one in chosen])


def architectures(run: Run) -> list[str]:
    """Names, in the order of the table of members."""
    return list(dict.fromkeys(run.members.to_table(columns=["architecture"])["architecture"].to_pylist()))


def _scores(run: Run, architecture: str) -> pa.Table:
    name = quoted(architecture)
    own = f"member IN (SELECT member FROM members WHERE architecture = {name})"
    columns = [*(f"points.{column}" for column in POINT), *(f"ensemble.{column}" for column in ENSEMBLE)]
    learned, join = "", ""
    if run.directory.has_table("learning"):
        # In the order of members, or rounding would be another at every call.
        measures = {
            f"{statistic}_{measure}_{split}": f"{function}({measure}::DOUBLE ORDER BY member) FILTER ({where})"
            for measure in LEARNING
            for split, where in SPLITS.items()
            for statistic, function in (("mean", "avg"), ("std", "stddev_samp"))
        }
        aggregates = ", ".join(f"{aggregate} AS {column}" for column, aggregate in measures.items())
        learned = f", learned AS (SELECT point_id, {aggregates} FROM learning WHERE {own} GROUP BY point_id)"
        join = "LEFT JOIN learned USING (point_id)"
    table = run.sql(f"""
        WITH trained AS (
            SELECT point_id, avg((prediction = label)::DOUBLE) AS training_accuracy
            FROM depths WHERE in_training AND {own} GROUP BY point_id
        ){learned}
        SELECT ensemble.architecture, ensemble.point_id, {", ".join(columns)}, training_accuracy,
            training_accuracy - held_out_accuracy AS memorisation
            {", learned.* EXCLUDE (point_id)" if learned else ""}
        FROM ensemble JOIN points USING (point_id) LEFT JOIN trained USING (point_id) {join}
        WHERE ensemble.architecture = {name} ORDER BY ensemble.point_id
    """)
    return table.add_column(table.column_names.index("memorisation") + 1, "kind", _kinds(table))


def _kinds(table: pa.Table) -> pa.Array:
    held_out, training = (table[f"mean_depth_{split}"].to_numpy() for split in ("held_out", "training"))
    number = plane_of(held_out, training).kind
    return pa.array(np.array(KINDS, object)[number], pa.string(), mask=number < 0)
