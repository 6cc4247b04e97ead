"""Scores of points as files for other tools: every row with ids, keys, labels and fingerprints."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from leadline.config import ImageFolder, load_config
from leadline.errors import LeadlineError, one_line
from leadline.knn.arrays import Array
from leadline.query import Run
from leadline.store.files import replacing
from leadline.study.kinds import KINDS
from leadline.study.scores import architectures, point_scores

FINGERPRINTS = ("configuration_fingerprint", "data_fingerprint", "weights_fingerprint")
SUSPECT = (KINDS[1], KINDS[3])  # kinds that are deep in training, against the label that they are given


def export_scores(run: Run, to: str, out: Path | None = None, architecture: str | None = None) -> Path:
    """Write the scores of a run's points, with FINGERPRINTS in every row, and return the file.

    to: a format of FORMATS. out: by default <name of the run>-scores and the format's ending, in the current folder;
    it is written beside and renamed. architecture: by default all of them, one after another.
    - csv, parquet: the table of `point_scores`.
    - npz: one array [N] for each column of it: strings as unicode, nulls NaN in floats, -1 in integers, "" in strings.
    - cleanlab: a CSV with the columns of cleanlab's CleanLearning.get_label_issues, see `cleanlab_issues`.
    - fiftyone: JSON, {"samples": [...]}, each for FiftyOne's Sample.from_dict, of runs over a folder of images.

    cleanlab and fiftyone have one row for each point, so of a run of several architectures one must be named.
    weights_fingerprint is the SHA-256 of the weights fingerprints of the architecture's members, joined in their order.

    Raises LeadlineError as `point_scores` does, for an unknown format, where one architecture must be named, for
    fiftyone where keys are no image files, and where the file cannot be written.
    """
    if to not in FORMATS:
        raise LeadlineError(f"--to: {to!r} is no format; allowed: {', '.join(FORMATS)}")
    ending, write = FORMATS[to]
    known = architectures(run)
    if to in ("cleanlab", "fiftyone") and architecture is None and len(known) > 1:
        raise LeadlineError(f"--to {to}: one row a point, and the run has {', '.join(known)}; name one: --architecture")
    table = with_fingerprints(run, point_scores(run, architecture))
    place = out or Path(f"{run.manifest['name']}-scores.{ending}")
    try:
        with replacing(place) as beside:
            write(run, table, beside)
    except OSError as error:
        raise LeadlineError(f"{place}: cannot be written ({one_line(error)}); give another file with -o") from None
    return place


def with_fingerprints(run: Run, scores: pa.Table) -> pa.Table:
    """The table of `point_scores` and three columns of strings, FINGERPRINTS, in hexadecimal."""
    joined: dict[str, str] = {}
    for member in run.members.to_table(columns=["architecture", "weights_fingerprint"]).to_pylist():
        joined[member["architecture"]] = joined.get(member["architecture"], "") + member["weights_fingerprint"]
    weights = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in joined.items()}
    values = (
        pa.repeat(run.manifest["fingerprint"], len(scores)),
        pa.repeat(run.manifest["data"]["fingerprint"], len(scores)),
        pa.array((weights[name] for name in scores["architecture"].to_pylist()), pa.string()),
    )
    for name, column in zip(FINGERPRINTS, values, strict=True):
        scores = scores.append_column(name, column)
    return scores


def cleanlab_issues(scores: pa.Table, n_probes: int) -> pa.Table:
    """Scores in the columns of cleanlab's table of label issues; what stands in them is ours, not cleanlab's.

    scores: of one architecture, with fingerprints; n_probes: of its members. Columns:
    - is_label_issue bool: the consensus class is not the label, and kind is one of SUSPECT;
    - label_quality float64 in [0, 1]: 1 - mean_depth_training / n_probes, null where no member is trained on the point;
    - given_label int32; predicted_label int32: the consensus class, null where no member holds the point out;
    - point_id, key and FINGERPRINTS.
    """
    held_out = pc.greater(scores["n_held_out"], 0)
    differs = pc.and_(held_out, pc.not_equal(scores["consensus_class"], scores["label"]))
    columns = {
        "is_label_issue": pc.and_(differs, pc.is_in(scores["kind"], pa.array(SUSPECT))),
        "label_quality": pc.subtract(1.0, pc.divide(scores["mean_depth_training"], float(n_probes))),
        "given_label": scores["label"],
        "predicted_label": pc.if_else(held_out, scores["consensus_class"], pa.scalar(None, pa.int32())),
    }
    return pa.table({**columns, **{name: scores[name] for name in ("point_id", "key", *FINGERPRINTS)}})


def _write_csv(_: Run, table: pa.Table, beside: Path) -> None:
    pa_csv.write_csv(table, beside)


def _write_parquet(_: Run, table: pa.Table, beside: Path) -> None:
    pq.write_table(table, beside, compression="zstd", write_page_checksum=True)


def _write_npz(_: Run, table: pa.Table, beside: Path) -> None:
    arrays: dict[str, Any] = {name: _as_array(table[name]) for name in table.column_names}
    with beside.open("wb") as opened:  # a name without .npz would be given one
        np.savez_compressed(opened, **arrays)


def _as_array(column: pa.ChunkedArray) -> Array:
    if pa.types.is_floating(column.type):
        return np.asarray(column.to_numpy())
    if pa.types.is_integer(column.type):
        return np.asarray(column.fill_null(-1).to_numpy())
    return np.array(column.fill_null("").to_pylist(), np.str_)


def _write_cleanlab(run: Run, table: pa.Table, beside: Path) -> None:
    members = run.members.to_table(columns=["architecture", "n_probes"]).to_pylist()
    n_probes = {member["architecture"]: member["n_probes"] for member in members}[table["architecture"][0].as_py()]
    pa_csv.write_csv(cleanlab_issues(table, n_probes), beside)


def _write_fiftyone(run: Run, table: pa.Table, beside: Path) -> None:
    points = load_config(run.manifest["configuration"]).points
    if not isinstance(points, ImageFolder):
        raise LeadlineError(f"--to fiftyone: keys of points.source {points.source} are no image files; export csv")
    roots = {"train": points.train.expanduser(), "test": (points.test or points.train).expanduser()}
    with beside.open("w", encoding="utf-8") as opened:
        opened.write('{"samples": [')
        for number, row in enumerate(row for batch in table.to_batches() for row in batch.to_pylist()):
            opened.write(",\n" if number else "\n")
            json.dump(_sample(row, roots[row["part"]]), opened, allow_nan=False)
        opened.write("\n]}\n")


def _sample(row: dict[str, Any], root: Path) -> dict[str, Any]:
    """What FiftyOne reads as one sample: a file, its class, and a field for every score that is not null."""
    return {
        "filepath": str(root / row["key"]),
        "tags": [row["part"]],
        "ground_truth": {"_cls": "Classification", "label": row["label_name"]},
        **{name: value for name, value in row.items() if value is not None},
    }


FORMATS: dict[str, tuple[str, Callable[[Run, pa.Table, Path], None]]] = {
    "csv": ("csv", _write_csv),
    "npz": ("npz", _write_npz),
    "parquet": ("parquet", _write_parquet),
    "cleanlab": ("cleanlab.csv", _write_cleanlab),
    "fiftyone": ("fiftyone.json", _write_fiftyone),
}
