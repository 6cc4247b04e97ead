"""Files that are whole or not there, and damage that is found."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from leadline import LeadlineError
from leadline.store import RunDirectory
from leadline.store.files import digest, read_json, replacing, sweep, write_json, writing_rows
from leadline.store.tables import read_table, write_table
from leadline.store.verify import verify


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="boom"), replacing(path) as beside:
        beside.write_text("half")
        raise ValueError("boom")
    assert read_json(path) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_killed_writer_leaves_the_old_file_and_its_leftover_is_swept(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    program = (
        "import sys, time; from pathlib import Path; from leadline.store.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as beside:\n"
        "    beside.write_text('half'); print('written', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        os.kill(writer.pid, signal.SIGKILL)
    assert read_json(path) == {"a": 1}
    assert len(list(tmp_path.iterdir())) == 2
    sweep(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_run_that_was_killed_before_its_manifest_can_begin(tmp_path):
    manifest = {"configuration": {}, "data": {}, "weights": {}}
    (tmp_path / ".run.json.0123.part").write_text("half")
    assert RunDirectory(tmp_path).begin(manifest) is False
    assert RunDirectory(tmp_path).read_manifest()["status"] == "running"


def test_damaged_records_are_named(tmp_path):
    (tmp_path / "a.json").write_text('{"a": ')
    with pytest.raises(LeadlineError, match=r"a\.json: damaged"):
        read_json(tmp_path / "a.json")
    with pytest.raises(LeadlineError, match="No such file"):
        digest(tmp_path / "nowhere")


def test_a_flipped_byte_in_a_table_is_found_when_it_is_read(tmp_path):
    path = tmp_path / "t.parquet"
    schema = pa.schema([("x", pa.int64())])
    numbers = np.random.default_rng(0).integers(0, 1 << 60, 1000)
    write_table(path, schema, [pa.table({"x": numbers})], {})
    assert read_table(path)["x"].to_pylist() == numbers.tolist()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(LeadlineError, match=r"t\.parquet: damaged"):
        read_table(path)
    path.write_bytes(content[:50])
    with pytest.raises(LeadlineError, match=r"t\.parquet: damaged"):
        read_table(path)
    path.unlink()
    with pytest.raises(LeadlineError, match=r"t\.parquet: not there"):
        read_table(path)


@pytest.fixture
def copy(tiny_run, tmp_path):
    shutil.copytree(tiny_run.directory.root, tmp_path / "copy")
    return RunDirectory(tmp_path / "copy")


def rewrite(directory, path, change):
    """Change a table as a careful forger would: schema, stamps and the manifest's digest agree with the new file."""
    table = pq.ParquetFile(path).read()
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), path)
    manifest = directory.read_manifest()
    manifest["files"][str(path.relative_to(directory.root))] = digest(path)
    write_json(directory.manifest_path, manifest)


def with_column(name, change):
    def apply(table):
        values = np.array(table[name].to_pylist())
        place = table.schema.get_field_index(name)
        field = table.schema.field(name)
        return table.set_column(place, field, pa.array(change(values).tolist(), field.type))

    return apply


def add_one(values):
    values[7] += 1
    return values


def flip(values):
    values[7] = not values[7]
    return values


FORGERIES = [
    ("depths", "depth", add_one, "depth of point 7"),
    ("depths", "unsettled", flip, "unsettled"),
    ("depths", "in_training", flip, "points in training"),
    ("depths", "label", add_one, "labels are not those"),
    ("depths", "point_id", add_one, "its ids are not"),
    ("votes", "point_id", add_one, "its ids are not"),
    ("votes", "winner_votes", lambda v: v + 10, "cannot be counts of 10"),
    ("votes", "winner", lambda v: (v + 1) % 10, "its votes make it"),
    ("points", "point_id", add_one, "its ids are not"),
    ("members", "held_out_accuracy", lambda v: v + 0.1, "held_out_accuracy of mlp-0"),
    ("probes", "train_accuracy", lambda v: v + 0.1, "train_accuracy of probe 0 of mlp-0"),
    (
        "ensemble",
        "mean_depth_held_out",
        lambda v: np.array([None if x is None else x + 1 for x in v]),
        "mean_depth_held_out",
    ),
    ("ensemble", "n_training", add_one, "n_training"),
]


@pytest.mark.parametrize(("name", "column", "change", "words"), FORGERIES)
def test_tables_that_disagree_are_found(copy, name, column, change, words):
    path = copy.member_table(name, "mlp-0") if name in ("depths", "votes") else copy.table(name)
    rewrite(copy, path, with_column(column, change))
    faults = verify(copy)
    assert any((words in fault and path.name in fault) or words in fault for fault in faults), faults


def with_list(column, change, row=7):
    def apply(table):
        lists = table[column].to_pylist()
        lists[row] = change(lists[row])
        place = table.schema.get_field_index(column)
        return table.set_column(place, table.schema.field(place), pa.array(lists, table.schema.field(place).type))

    return apply


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_column("point_id", add_one), "column point_id is not that of"),
        (with_column("label", add_one), "column label is not that of"),
        (with_column("in_training", flip), "column in_training is not that of"),
        (with_column("iteration_learned", add_one), "iteration_learned of point 7"),
        (with_list("predictions", lambda said: [*said[:-1], said[-1] + 1]), "last predictions are not those"),
        (with_list("predictions", lambda said: [*said[:-1], None]), "last predictions are not those"),
        (with_list("predictions", lambda said: [*said[:-2], said[-1] + 1, said[-1]]), "iteration_learned of point 7"),
        (with_list("predictions", lambda said: said[1:]), "not one prediction for each step"),
        (with_list("predictions", lambda said: None), "not one prediction for each step"),
        (with_list("steps", lambda steps: [*steps[:-1], steps[-1] + 1]), "not the same of every point"),
        (with_list("steps", lambda steps: [], row=0), "not one prediction for each step"),
        (lambda table: table.slice(1), "1796 rows for 1797 points"),
        (lambda table: table.drop_columns(["aum"]), "columns aum"),
    ],
)
def test_a_table_of_learning_that_disagrees_is_found(watched_run, tmp_path, change, words):
    shutil.copytree(watched_run.directory.root, tmp_path / "copy")
    directory = RunDirectory(tmp_path / "copy")
    rewrite(directory, directory.member_table("learning", "mlp-0"), change)
    faults = verify(directory)
    assert faults and any(words in fault for fault in faults), faults


def test_nulls_where_votes_should_be_are_found(copy, until_decided_run, tmp_path):
    def without_a_vote(table):
        lists = table["runner_up"].to_pylist()
        lists[7][2] = None
        place = table.schema.get_field_index("runner_up")
        return table.set_column(place, table.schema.field(place), pa.array(lists, table.schema.field(place).type))

    shutil.copytree(until_decided_run.directory.root, tmp_path / "other")
    for directory in (copy, RunDirectory(tmp_path / "other")):
        rewrite(directory, directory.member_table("votes", "mlp-0"), without_a_vote)
        assert any("column runner_up of point 7 has nulls" in fault for fault in verify(directory))


def test_votes_that_should_not_be_there_are_found(tiny_run, until_decided_run, tmp_path):
    shutil.copytree(until_decided_run.directory.root, tmp_path / "other")
    other = RunDirectory(tmp_path / "other")
    whole = pq.ParquetFile(tiny_run.directory.member_table("votes", "mlp-0")).read()
    rewrite(other, other.member_table("votes", "mlp-0"), lambda table: whole)
    assert any("column winner of point" in fault and "has nulls at other probes" in fault for fault in verify(other))


def test_a_missing_or_strange_column_is_found(copy):
    rewrite(copy, copy.table("points"), lambda table: table.drop_columns(["key"]))
    assert any("columns key" in fault for fault in verify(copy))


def test_missing_changed_and_foreign_files_are_found(copy):
    path = copy.member_table("votes", "mlp-1")
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    copy.table("ensemble").unlink()
    shutil.copy(copy.table("points"), copy.root / "depths" / "mine.parquet")
    faults = verify(copy)
    assert len(faults) == 3
    for words in (f"{path}: damaged", "ensemble.parquet: missing", "mine.parquet: not a file of this run"):
        assert any(words in fault for fault in faults), faults


def test_a_table_of_another_run_is_found(copy):
    manifest = copy.read_manifest()
    manifest["fingerprint"] = "0" * 64
    write_json(copy.manifest_path, manifest)
    assert any("another configuration" in fault for fault in verify(copy))


def test_an_unfinished_run_is_no_sound_run(copy):
    manifest = copy.read_manifest()
    manifest["status"] = "running"
    write_json(copy.manifest_path, manifest)
    assert any("the run is running" in fault for fault in verify(copy))


def test_a_damaged_manifest_is_named(copy):
    copy.manifest_path.write_text(json.dumps([1]))
    with pytest.raises(LeadlineError, match=r"run\.json: damaged"):
        verify(copy)


def test_rows_are_written_one_after_another_as_numpy_writes_them_whole(tmp_path):
    rows = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    with writing_rows(tmp_path / "rows.npy", 7, 3) as write:
        for first, stop in ((0, 2), (2, 2), (2, 7)):
            write(rows.T.copy().T[first:stop])  # not contiguous
    np.save(tmp_path / "whole.npy", rows)
    assert (tmp_path / "rows.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    with pytest.raises(ValueError, match="not 7 rows of 3"), writing_rows(tmp_path / "few.npy", 7, 3) as write:
        write(rows[:6])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.npy", "whole.npy"]
