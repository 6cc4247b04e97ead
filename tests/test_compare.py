"""Two runs against one another, held against pandas and against what was put into them."""

import json
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from tiny import MADE_UP, TINY

import leadline
from leadline import LeadlineError, cli
from leadline.compare import compare
from leadline.store import RunDirectory
from leadline.store.files import write_json
from leadline.store.schemas import ENSEMBLE, MEMBERS, POINTS
from leadline.store.tables import write_table


@pytest.fixture(scope="module")
def other_run(tmp_path_factory):
    """As tiny_run, of networks that were trained for less long and have one layer more."""
    mlp = TINY["members"][0]
    member = {**mlp, "parameters": {"width": 24, "depth": 4}, "training": {**mlp["training"], "steps": 30}}
    return leadline.run({**TINY, "name": "other", "members": [member]}, tmp_path_factory.mktemp("runs") / "other")


def ensemble_of(run):
    return pd.read_parquet(run.directory.root / "ensemble.parquet").set_index("point_id")


def test_two_runs_equal_pandas(tiny_run, other_run):
    found = compare(tiny_run, other_run, 7)
    a, b = ensemble_of(tiny_run), ensemble_of(other_run)
    assert (found.points, found.matched_by) == (1797, "point_id")
    moved = found.moved.to_pylist()
    for row, split in zip(found.depths.to_pylist(), ("held_out", "training"), strict=True):
        both = pd.DataFrame({"a": a[f"mean_depth_{split}"] / 4, "b": b[f"mean_depth_{split}"] / 5}).dropna()
        assert (row["architecture"], row["split"], row["n"]) == ("mlp", split, len(both))
        assert row["rank_correlation"] == pytest.approx(both.a.corr(both.b, method="spearman"))
        assert [row["relative_depth_a"], row["relative_depth_b"]] == pytest.approx([both.a.mean(), both.b.mean()])
        change = (both.b - both.a).sort_index()
        order = change.abs().round(12).sort_values(ascending=False, kind="stable").head(7)
        rows = [row for row in moved if row["split"] == split]
        assert [abs(row["moved"]) for row in rows] == pytest.approx(order.tolist())
        for row in rows:
            point = row["point_id"]
            assert row["moved"] == pytest.approx(change[point]) and row["key"] == f"train/{point:05d}"
            assert row["relative_depth_a"] == pytest.approx(both.a[point])
            assert row["consensus_class_b"] == b.consensus_class[point] and row["label"] == a.label[point]
    held = (a.n_held_out > 0) & (b.n_held_out > 0)
    (consensus,) = found.consensus.to_pylist()
    assert consensus["n"] == held.sum() > 0
    assert consensus["agreement"] == pytest.approx((a.consensus_class == b.consensus_class)[held].mean())
    assert consensus["held_out_accuracy_b"] == pytest.approx(b.held_out_accuracy[held].mean())


def test_a_run_beside_itself_moves_nowhere(tiny_run):
    found = compare(tiny_run, tiny_run)
    assert [row["rank_correlation"] for row in found.depths.to_pylist()] == pytest.approx([1, 1])
    assert found.consensus["agreement"].to_pylist() == [1] and found.moved.num_rows == 0


def write_run(root, keys, labels, depth, architecture="net", fingerprint="a", status="complete"):
    """A run of one architecture with 4 probes: points by key and label, with the mean depth held out of each."""
    directory, n, ids = RunDirectory(root), len(keys), np.arange(len(keys))
    points = {
        "point_id": ids, "key": list(keys), "label": np.array(labels, np.int32),
        "label_name": [f"c{label}" for label in labels], "part": ["train"] * n, "clean_label": pa.nulls(n, pa.int32()),
    }  # fmt: skip
    write_table(directory.table("points"), POINTS, [pa.table(points)], {})
    member = {"member": f"{architecture}-0", "architecture": architecture, "n_probes": 4}
    write_table(directory.table("members"), MEMBERS, [pa.Table.from_pylist([member], MEMBERS)], {})
    rows = [
        {"architecture": architecture, "point_id": i, "label": labels[i], "n_held_out": 1, "n_training": 0,
         "mean_depth_held_out": float(depth[i]), "consensus_class": labels[i], "held_out_accuracy": 1.0}
        for i in range(n)
    ]  # fmt: skip
    write_table(directory.table("ensemble"), ENSEMBLE, [pa.Table.from_pylist(rows, ENSEMBLE)], {})
    data = {"fingerprint": fingerprint, "points": n}
    write_json(directory.manifest_path, {**MADE_UP, "status": status, "data": data})
    return leadline.open(root)


def test_points_of_other_data_are_matched_by_key(tmp_path):
    keys, labels, depth = [f"k{i}" for i in range(30)], [i % 3 for i in range(30)], np.arange(30) % 5
    order = np.random.default_rng(0).permutation(30)
    a = write_run(tmp_path / "a", keys, labels, depth)
    deeper = np.where(np.arange(30) == 10, depth + 3, depth)
    b = write_run(tmp_path / "b", [keys[i] for i in order], [labels[i] for i in order], deeper[order], fingerprint="b")
    found = compare(a, b)
    assert found.matched_by == "key" and len(found.moved) == 1
    (moved,) = found.moved.to_pylist()
    assert (moved["key"], moved["point_id"], moved["moved"], moved["split"]) == ("k10", 10, 0.75, "held_out")
    training = found.depths.to_pylist()[1]
    assert (training["n"], training["rank_correlation"]) == (0, None)  # nothing is trained on
    flat = write_run(tmp_path / "flat", keys, labels, [2] * 30)
    assert compare(a, flat).depths["rank_correlation"].to_pylist() == [None, None]


def test_what_cannot_be_compared_is_refused(tmp_path):
    keys, labels, depth = [f"k{i}" for i in range(9)], [0, 1, 2] * 3, range(9)
    a = write_run(tmp_path / "a", keys, labels, depth)

    def refused(other):
        with pytest.raises(LeadlineError) as error:
            compare(a, other)
        assert "\n" not in str(error.value)
        return str(error.value)

    other = write_run(tmp_path / "keys", ["x", *keys[1:]], labels, depth, fingerprint="b")
    assert "only in the first: 1 (k0), only in the second: 1 (x)" in refused(other)
    other = write_run(tmp_path / "fewer", keys[:7], labels[:7], depth, fingerprint="b")
    assert "only in the first: 2 (k7), only in the second: none" in refused(other)
    other = write_run(tmp_path / "more", [*keys, "z"], [*labels, 1], range(10), fingerprint="b")
    assert "only in the first: none, only in the second: 1 (z)" in refused(other)
    other = write_run(tmp_path / "labels", keys, [0, 1, 1, *labels[3:]], depth, fingerprint="b")
    assert "labels differ at 1 of 9 points, first at k2: 2 and 1" in refused(other)
    other = write_run(tmp_path / "corrupted", keys, [0, 1, 1, *labels[3:]], depth)  # of one fingerprint
    assert "labels differ at 1 of 9 points" in refused(other)
    other = write_run(tmp_path / "twice", ["k1", *keys[1:]], labels, depth, fingerprint="b")
    assert "twice: some points have one key" in refused(other)
    other = write_run(tmp_path / "architecture", keys, labels, depth, architecture="tree")
    assert "has net" in refused(other) and "has tree" in refused(other)
    other = write_run(tmp_path / "unfinished", keys, labels, depth, status="running")
    assert "unfinished: the run is running" in refused(other)
    with pytest.raises(LeadlineError, match="--n: 0"):
        compare(a, a, 0)


def test_the_command_prints_tables_or_json(tiny_run, other_run, monkeypatch, capsys):
    roots = [str(run.directory.root) for run in (tiny_run, other_run)]

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["leadline", "compare", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    expected = compare(tiny_run, other_run, 3)
    code, out, _ = call(*roots, "--n", "3", "--format", "json")
    assert code == 0 and json.loads(out) == {"a": roots[0], "b": roots[1], **expected.record()}
    code, out, _ = call(*roots, "--n", "3")
    assert code == 0 and "1,797 points, by point_id" in out
    assert f"{expected.depths['rank_correlation'][0].as_py():.4f}" in out
    assert all(key in out for key in expected.moved["key"].to_pylist())
    code, out, err = call(roots[0], roots[0] + "-not-there")
    assert (code, out) == (2, "") and "no run here" in err and len(err.splitlines()) == 1
