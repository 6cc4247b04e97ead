"""The tables of a run. A column's name is a promise: add, do not rename."""

from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import pyarrow as pa

from leadline.knn import Cost, Votes

VOTE_FIELDS = ("winner", "winner_votes", "runner_up", "runner_up_votes")  # of `leadline.Votes`
AUDIT_FIELDS = ("recall", "recall_low", "recall_high", "vote_agreement", "vote_agreement_low", "vote_agreement_high")
ERROR_FIELDS = (
    "depth_agreement", "depth_agreement_low", "depth_agreement_high",
    "depth_error", "depth_error_low", "depth_error_high",
)  # fmt: skip
OUTPUT_FIELDS = ("prediction", "confidence", "margin", "entropy")

POINTS = pa.schema(
    [
        ("point_id", pa.int64()),
        ("key", pa.string()),
        ("label", pa.int32()),
        ("label_name", pa.string()),
        ("part", pa.string()),
        ("clean_label", pa.int32()),  # null in a run without corruption
    ]
)

MEMBERS = pa.schema(
    [
        ("member", pa.string()),
        ("architecture", pa.string()),
        ("seed", pa.int64()),
        ("weights_fingerprint", pa.string()),
        ("n_train", pa.int64()),
        ("n_held_out", pa.int64()),
        ("train_accuracy", pa.float64()),
        ("held_out_accuracy", pa.float64()),  # null where nothing is held out
        ("n_probes", pa.int16()),
        ("training_steps", pa.int64()),  # null where the weights were given
        ("training_precision", pa.string()),
        # Points whose depth was told exactly at full width too; null, as the error, if all votes are so.
        ("audit_sample", pa.int64()),
        *((field, pa.float64()) for field in ERROR_FIELDS),
    ]
)

PROBES = pa.schema(
    [
        ("member", pa.string()),
        ("architecture", pa.string()),
        ("probe", pa.int16()),
        ("name", pa.string()),
        ("width", pa.int64()),
        ("stored_width", pa.int64()),
        ("reduction", pa.string()),
        ("method", pa.string()),
        ("k", pa.int32()),
        ("train_accuracy", pa.float64()),  # of the votes; null where not all of them were computed
        ("held_out_accuracy", pa.float64()),  # also null where nothing is held out
        # What the search did. Where the members share the input's neighbours, that search is the run's first member's.
        *((field.name, pa.int64()) for field in fields(Cost)),
        ("plan", pa.string()),  # how the bank was searched, as a sample of it decided; null where nothing was searched
        ("choice", pa.string()),  # why `auto` took the method; null where the method was given
        ("index_bytes", pa.int64()),  # null where the method is exact
        # Points whose vote was told exactly at full width too; null, as all below, where the run's votes are so.
        ("audit_sample", pa.int64()),
        *((field, pa.float64()) for field in AUDIT_FIELDS),  # null where audit_sample is 0
    ]
)

DEPTHS = pa.schema(
    [
        ("point_id", pa.int64()),
        ("label", pa.int32()),
        ("in_training", pa.bool_()),
        ("prediction", pa.int32()),
        ("confidence", pa.float32()),
        ("margin", pa.float32()),
        ("entropy", pa.float32()),
        ("depth", pa.int16()),
        ("unsettled", pa.bool_()),
    ]
)

# NaN of a measure is null, and so is every measure that a log of predictions alone does not give.
LEARNING = pa.schema(
    [
        ("point_id", pa.int64()),
        ("label", pa.int32()),
        ("in_training", pa.bool_()),
        ("iteration_learned", pa.int64()),
        ("forgetting_events", pa.int32()),
        ("never_learned", pa.bool_()),
        *((field, pa.float64()) for field in ("el2n", "aum", "mean_label_probability", "std_label_probability")),
        ("steps", pa.list_(pa.int64())),  # of the checkpoints: the same in every row of a member, kept once by Parquet
        ("predictions", pa.list_(pa.int32())),  # at these
    ]
)
# Where a table of learning is from, in its metadata: the run's own training, or a log of a training elsewhere.
CHECKPOINTS, WATCHED, LOGGED = "leadline.checkpoints", "watched", "logged"

ENSEMBLE = pa.schema(
    [
        ("architecture", pa.string()),
        ("point_id", pa.int64()),
        ("label", pa.int32()),
        ("n_training", pa.int32()),
        ("n_held_out", pa.int32()),
        ("mean_depth_training", pa.float64()),
        ("std_depth_training", pa.float64()),
        ("mean_depth_held_out", pa.float64()),
        ("std_depth_held_out", pa.float64()),
        ("n_unsettled_training", pa.int32()),
        ("n_unsettled_held_out", pa.int32()),
        ("consensus_class", pa.int32()),
        ("consensus_consistency", pa.float64()),
        ("held_out_accuracy", pa.float64()),
        ("mean_confidence_held_out", pa.float64()),
        ("mean_margin_held_out", pa.float64()),
        ("mean_entropy_held_out", pa.float64()),
        ("depth_error_training", pa.float64()),  # error bar of mean_depth_training by indexes and reductions; 0: exact
        ("depth_error_held_out", pa.float64()),
    ]
)


def votes_schema(n_probes: int) -> pa.Schema:
    """One row a point; the votes of a member's P probes side by side, null at the probes that were not computed."""
    lists = pa.list_(pa.int32(), n_probes)
    return pa.schema([("point_id", pa.int64()), *((field, lists) for field in VOTE_FIELDS)])


def vote_columns(votes: Sequence[Votes]) -> dict[str, pa.Array]:
    """Votes of each of P probes as fixed-size lists over probes: one array [Q] of P int32 for each field.

    A winner of -1 says that the vote was not computed: it is null in every field.
    """
    columns = {field: np.stack([getattr(vote, field) for vote in votes], axis=1).ravel() for field in VOTE_FIELDS}
    missing = columns["winner"] < 0
    return {
        field: pa.FixedSizeListArray.from_arrays(pa.array(values, pa.int32(), mask=missing), len(votes))
        for field, values in columns.items()
    }
