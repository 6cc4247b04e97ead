"""Exported scores, read back by pandas, numpy and pyarrow, against the table that they are from."""

import hashlib
import json
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cleanlab.classification import CleanLearning
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import leadline
from leadline import cli
from leadline.config import load_config
from leadline.query import Run
from leadline.study.export import FINGERPRINTS, FORMATS, export_scores
from leadline.study.scores import architectures, point_scores


def fingerprints(run, architecture):
    """What every row of an architecture carries, from the run's own files."""
    manifest = json.loads(run.directory.manifest_path.read_text())
    members = pd.read_parquet(run.directory.table("members"))
    own = members.loc[members["architecture"] == architecture, "weights_fingerprint"]
    weights = hashlib.sha256("".join(own).encode()).hexdigest()
    return (manifest["fingerprint"], manifest["data"]["fingerprint"], weights)


def is_stamped(run, names, rows):
    stamps = {name: fingerprints(run, name) for name in architectures(run)}
    return all(tuple(row) == stamps[name] for name, row in zip(names, rows, strict=True))


def test_parquet(watched_run, tmp_path):
    table = pq.read_table(export_scores(watched_run, "parquet", tmp_path / "scores.parquet"))
    assert table.drop_columns(list(FINGERPRINTS)).equals(point_scores(watched_run))
    rows = zip(*(table[name].to_pylist() for name in FINGERPRINTS), strict=True)
    assert is_stamped(watched_run, table["architecture"].to_pylist(), rows)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.parquet"]


def test_csv(watched_run, tmp_path):
    frame = pd.read_csv(export_scores(watched_run, "csv", tmp_path / "scores.csv"), dtype={"label_name": str})
    expected = point_scores(watched_run).to_pandas()
    pd.testing.assert_frame_equal(
        frame[expected.columns], expected, check_dtype=False, check_column_type=False, rtol=1e-12, atol=1e-15
    )
    assert is_stamped(watched_run, frame["architecture"], frame[list(FINGERPRINTS)].to_numpy())


def test_npz(watched_run, tmp_path):
    expected = point_scores(watched_run)
    with np.load(export_scores(watched_run, "npz", tmp_path / "scores.npz"), allow_pickle=False) as arrays:
        assert arrays.files == [*expected.column_names, *FINGERPRINTS]
        for field in expected.schema:
            filling = -1 if pa.types.is_integer(field.type) else "" if field.type == pa.string() else np.nan
            values = [filling if value is None else value for value in expected[field.name].to_pylist()]
            np.testing.assert_array_equal(arrays[field.name], values)
            assert arrays[field.name].dtype.kind == {"d": "f", "i": "i", "s": "U"}[str(field.type)[0]], field
        assert arrays["clean_label"].tolist() == [-1] * len(expected)
        rows = zip(*(arrays[name] for name in FINGERPRINTS), strict=True)
        assert is_stamped(watched_run, arrays["architecture"], rows)


def test_label_issues_as_cleanlab_has_them(watched_run, tmp_path):
    place = export_scores(watched_run, "cleanlab", tmp_path / "issues.csv", "mlp")
    frame = pd.read_csv(place)
    assert list(frame.columns) == [
        "is_label_issue", "label_quality", "given_label", "predicted_label", "point_id", "key", *FINGERPRINTS,
    ]  # fmt: skip
    assert frame["is_label_issue"].dtype == bool
    n_probes = len(watched_run.sql("SELECT DISTINCT probe FROM probes WHERE architecture = 'mlp'"))
    rows = point_scores(watched_run, "mlp").to_pylist()
    assert len(rows) == len(frame)
    for row, issue in zip(rows, frame.to_dict("records"), strict=True):
        assert (issue["point_id"], issue["key"], issue["given_label"]) == (row["point_id"], row["key"], row["label"])
        assert (
            issue["predicted_label"] == row["consensus_class"]
            if row["n_held_out"]
            else np.isnan(issue["predicted_label"])
        )
        if row["n_training"]:
            assert issue["label_quality"] == pytest.approx(1 - row["mean_depth_training"] / n_probes, abs=1e-15)
        else:
            assert np.isnan(issue["label_quality"])
        suspect = row["kind"] in ("looks like a different class", "ambiguous")
        assert issue["is_label_issue"] == (suspect and row["consensus_class"] != row["label"])
    assert 0 < frame["is_label_issue"].sum() < len(frame) / 2
    assert is_stamped(watched_run, ["mlp"] * len(frame), frame[list(FINGERPRINTS)].to_numpy())


def test_cleanlab_trains_without_the_issues_that_it_is_given(watched_run, tmp_path):
    issues = pd.read_csv(export_scores(watched_run, "cleanlab", tmp_path / "issues.csv", "mlp"))
    inputs, labels = load_digits().data / 16, issues["given_label"].to_numpy()
    issue = issues["is_label_issue"].to_numpy()
    learner = CleanLearning(LogisticRegression(max_iter=30, tol=1e-2)).fit(inputs, labels, label_issues=issues)
    without = LogisticRegression(max_iter=30, tol=1e-2).fit(inputs[~issue], labels[~issue])
    np.testing.assert_allclose(learner.predict_proba(inputs), without.predict_proba(inputs), atol=0.05)
    assert learner.get_label_issues()["is_label_issue"].to_numpy().tolist() == issue.tolist()


@pytest.mark.parametrize("to", ["cleanlab", "fiftyone"])
def test_one_row_a_point_is_of_one_architecture(watched_run, tmp_path, to):
    with pytest.raises(leadline.LeadlineError, match="mlp, plain; name one: --architecture"):
        export_scores(watched_run, to, tmp_path / "scores")
    assert list(tmp_path.iterdir()) == []


def over_images(run, images):
    """The same run as if its points had been images in two folders."""
    tree = {**run.manifest["configuration"], "points": {"source": "image-folder", **images}}
    folder = Run(run.directory)
    folder.manifest = {**run.manifest, "configuration": load_config(tree).record()}
    return folder


def test_samples_as_fiftyone_reads_them(tiny_run, tmp_path):
    run = over_images(tiny_run, {"train": "/images/train", "test": "/images/val"})
    samples = json.loads(export_scores(run, "fiftyone", tmp_path / "samples.json").read_text())["samples"]
    rows = point_scores(tiny_run).to_pylist()
    assert len(samples) == len(rows)
    stamps = dict(zip(FINGERPRINTS, fingerprints(tiny_run, "mlp"), strict=True))
    for row, sample in zip(rows, samples, strict=True):
        assert sample.pop("filepath") == f"/images/train/{row['key']}"
        assert sample.pop("tags") == [row["part"]]
        assert sample.pop("ground_truth") == {"_cls": "Classification", "label": row["label_name"]}
        assert sample == {name: value for name, value in {**row, **stamps}.items() if value is not None}


def test_keys_that_are_no_image_files(tiny_run, tmp_path):
    with pytest.raises(leadline.LeadlineError, match=r"of points\.source digits are no image"):
        export_scores(tiny_run, "fiftyone", tmp_path / "samples.json")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tiny_run, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(leadline.LeadlineError, match="cannot be written"):
        export_scores(tiny_run, "csv", tmp_path / "file" / "scores.csv")
    (tmp_path / "folder").mkdir()
    with pytest.raises(leadline.LeadlineError, match="cannot be written"):
        export_scores(tiny_run, "csv", tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_the_command(tiny_run, tmp_path, monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["leadline", "export", str(tiny_run.directory.root), *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return ended.value.code, printed.out.strip(), printed.err

    monkeypatch.chdir(tmp_path)
    for to in ("csv", "npz", "parquet", "cleanlab"):
        assert call("--to", to) == (0, f"tiny-scores.{FORMATS[to][0]}", "")
    assert len(pd.read_csv("tiny-scores.csv")) == len(pd.read_csv("tiny-scores.cleanlab.csv"))
    assert call("--to", "csv", "-o", "there/mine.csv", "--architecture", "mlp") == (0, "there/mine.csv", "")
    code, out, err = call("--to", "csv", "--architecture", "cnn")
    assert (code, out) == (2, "") and "it has mlp" in err and len(err.splitlines()) == 1
    code, out, err = call("--to", "xlsx")
    assert (code, out) == (2, "") and "csv, npz, parquet, cleanlab, fiftyone" in err
