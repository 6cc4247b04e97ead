"""Learning from the log of a training elsewhere: the table that the run would have made; logs that are not whole."""

import shutil
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny import WATCHED

import leadline
from leadline import LeadlineError, cli
from leadline.config import Training, load_config
from leadline.embedding import batch_logits
from leadline.learning_import import import_learning
from leadline.members.architectures import build
from leadline.members.splits import training_ids
from leadline.members.train import train
from leadline.points import open_points
from leadline.store import RunDirectory
from leadline.store.files import write_json
from leadline.store.tables import read_table
from leadline.store.verify import verify

N = 1797
STEPS = [0, 1, 2, 3, 6, 10, 12, 18, 25, 32, 38, 50, 56, 60]


@pytest.fixture(scope="module")
def logits(one_thread):
    """Of the first member of a watched run, trained again by hand: {step: float32 [N, 10]}."""
    config, found = load_config(WATCHED), {}
    points, entry = open_points(config.points), config.members[0]
    model = build("mlp", entry.parameters, points.input_shape, 10, seed=0)
    inputs = torch.from_numpy(points.read(np.arange(N)))

    def watch(step):
        found[step] = np.concatenate([batch_logits(model, part, 0, "by hand") for part in inputs.split(64)])

    ids = training_ids(entry.split, points.parts, seed=0)
    train(model, points, ids, Training(**WATCHED["members"][1]["training"]), 0, "cpu", STEPS, watch)
    return found


@pytest.fixture
def copy(watched_run, tmp_path):
    shutil.copytree(watched_run.directory.root, tmp_path / "copy")
    return RunDirectory(tmp_path / "copy")


@pytest.fixture
def few_rows(monkeypatch):
    """A step of a log is read in several pieces."""
    monkeypatch.setattr("leadline.learning_import.ROWS", 500)


def frame(steps, **columns):
    """A log as pandas would write it, in any order of rows."""
    rows = {"step": np.repeat(list(steps), N), "point_id": np.tile(np.arange(N), len(steps)), **columns}
    return pd.DataFrame(rows).sample(frac=1, random_state=0)


def test_logits_make_the_table_that_the_run_makes(copy, logits, tmp_path, few_rows):
    """plain-0 is mlp-0 again, whose training the run has watched."""
    frame(logits, logits=list(np.concatenate(list(logits.values())))).to_parquet(tmp_path / "log.parquet")
    assert import_learning(copy, "plain-0", tmp_path / "log.parquet") == len(STEPS)
    own, found = (read_table(copy.member_table("learning", name)) for name in ("mlp-0", "plain-0"))
    assert found.equals(own)
    assert verify(copy) == []
    run = leadline.open(copy.root)
    assert run.sql("SELECT count(*) FROM learning WHERE member = 'plain-0'")[0][0].as_py() == N


def test_predictions_by_key_and_a_log_that_replaces_another(copy, logits, tmp_path):
    keys = read_table(copy.table("points"))["key"].to_numpy(zero_copy_only=False)
    some = {step: logits[step].argmax(axis=1) for step in (3, 25, 50)}
    log = frame(some, prediction=np.concatenate(list(some.values())).astype(np.uint8))
    log["key"] = pd.Categorical(keys[log.pop("point_id")])
    log.to_parquet(tmp_path / "log.parquet")
    import_learning(copy, "plain-0", tmp_path / "log.parquet")
    first = read_table(copy.member_table("learning", "plain-0"))
    said = np.stack(list(some.values()), axis=1)
    assert first["predictions"].to_pylist() == said.tolist()
    assert first["aum"].null_count == first["el2n"].null_count == first["std_label_probability"].null_count == N
    # The reference is what the run's network says, which has learned for ten steps more.
    final = read_table(copy.member_table("depths", "plain-0"))["prediction"].to_numpy()
    expected = [
        next((step for i, step in enumerate(some) if (row[i:] == one).all()), 50)
        for row, one in zip(said, final, strict=True)
    ]
    assert first["iteration_learned"].to_pylist() == expected and (said[:, -1] != final).any()
    assert verify(copy) == []
    log[log.step > 3].to_parquet(tmp_path / "log.parquet")
    import_learning(copy, "plain-0", tmp_path / "log.parquet")
    assert read_table(copy.member_table("learning", "plain-0"))["steps"][0].as_py() == [25, 50]
    assert verify(copy) == []


def whole(n_steps=2):
    return {
        "step": np.repeat(np.arange(n_steps) * 10, N),
        "point_id": np.tile(np.arange(N), n_steps),
        "prediction": np.zeros(n_steps * N, int),
    }


def with_value(column, row, value):
    return lambda log: {**log, column: [*log[column][:row], value, *log[column][row + 1 :]]}


def with_logits(change):
    def apply(log):
        rows = [[0.0] * 10 for _ in log.pop("prediction")]
        change(rows)
        return {**log, "logits": rows}

    return apply


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda log: {name: values[:-1] for name, values in log.items()}, "step 10: point 1796 is missing"),
        (with_value("point_id", 5, 4), "step 0: point 4 is there twice"),
        (with_value("point_id", N + 1700, 1), "step 10: point 1 is there twice"),
        (with_value("point_id", 5, 1797), "step 0: point_id 1797 is that of no point"),
        (with_value("point_id", N, -1), "step 10: point_id -1 is that of no point"),
        (with_value("point_id", 5, None), "step 0: point_id None is that of no point"),
        (with_value("prediction", N + 7, -1), "step 10: point 7 has prediction -1"),
        (with_value("prediction", 7, None), "step 0: point 7 has no prediction"),
        (with_value("step", 7, None), "a row without a step"),
        (with_value("step", 7, -3), "below 0"),
        (lambda log: {name: values[:0] for name, values in log.items()}, "no rows"),
        (with_value("step", 7, 0.5), "column step is DOUBLE"),
        (with_value("prediction", 7, 0.5), "column prediction is DOUBLE"),
        (lambda log: {**log, "key": ["a"] * 2 * N}, "give one column point_id or key"),
        (lambda log: {name: log[name] for name in ("step", "point_id")}, "give one column prediction or logits"),
        (with_logits(lambda rows: rows.__setitem__(N + 3, [0.0] * 9)), "step 10: point 3 has 9 logits"),
        (with_logits(lambda rows: rows.__setitem__(slice(None), [[0.0] * 9] * 2 * N)), "step 0: point 0 has 9 logits"),
        (with_logits(lambda rows: rows[N + 3].__setitem__(2, float("nan"))), "step 10: point 3 has a logit"),
        (with_logits(lambda rows: rows[N + 3].__setitem__(2, None)), "step 10: point 3 has a logit"),
        (with_logits(lambda rows: rows.__setitem__(4, None)), "step 0: point 4 has no logits"),
        (lambda log: {**log, "prediction": [[1.0]] * 2 * N}, r"column prediction is DOUBLE\[\]"),
    ],
)
def test_a_log_that_is_not_whole_says_where(watched_run, tmp_path, few_rows, change, words):
    pq.write_table(pa.table(change(whole())), tmp_path / "log.parquet")
    files = sorted(watched_run.directory.root.rglob("*"))
    with pytest.raises(LeadlineError, match=words) as caught:
        import_learning(watched_run.directory, "plain-0", tmp_path / "log.parquet")
    assert "\n" not in str(caught.value) and "log.parquet" in str(caught.value)
    assert sorted(watched_run.directory.root.rglob("*")) == files


def test_an_unknown_key_is_named(watched_run, tmp_path):
    log = whole()
    log["key"] = [f"train/{i}" for i in log.pop("point_id")]
    pq.write_table(pa.table(log), tmp_path / "log.parquet")
    with pytest.raises(LeadlineError, match="step 0: key 'train/0' is that of no point"):
        import_learning(watched_run.directory, "plain-0", tmp_path / "log.parquet")


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["leadline", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    return ended.value.code, printed.out + printed.err


def test_the_command(copy, tmp_path, monkeypatch, capsys):
    pq.write_table(pa.table(whole()), tmp_path / "log.parquet")
    told = call(monkeypatch, capsys, "import", copy.root, "plain-0", tmp_path / "log.parquet")
    assert told == (0, f"{copy.root}: learning of plain-0, 2 steps\n")
    assert call(monkeypatch, capsys, "verify", copy.root)[0] == 0
    for member, log, words in (
        ("mlp-0", "log.parquet", "watched this training itself"),
        ("mlp-7", "log.parquet", "'mlp-7' is not in the run; there are mlp-0, mlp-1, plain-0"),
        ("plain-0", "nowhere.parquet", "nowhere.parquet: "),
        ("plain-0", "copy/run.json", "run.json: "),
    ):
        code, told = call(monkeypatch, capsys, "import", copy.root, member, tmp_path / log)
        assert code == 2 and words in told and told.count("\n") == 1
    write_json(copy.manifest_path, {**copy.read_manifest(), "status": "running"})
    code, told = call(monkeypatch, capsys, "import", copy.root, "plain-0", tmp_path / "log.parquet")
    assert code == 2 and "the run is running" in told
