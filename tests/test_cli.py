"""The command line: what it prints, and that every mistake of the user's ends in one line and exit code 2."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tiny import TINY

from leadline import cli
from leadline.config import load_config, preset_names


@pytest.fixture
def leadline(monkeypatch, capsys):
    """Run the command line in this process: (exit code, standard output, standard error)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["leadline", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return call


@pytest.fixture
def refused(leadline):
    """One line on standard error, nothing on standard output, exit code 2; gives the line.

    begun: the run had begun, so lines of progress come before.
    """

    def call(*arguments, begun=False):
        code, out, err = leadline(*arguments)
        assert (code, out) == (2, ""), (code, out, err)
        lines = err.splitlines()
        assert lines[-1].startswith("leadline: ") and "Traceback" not in err
        assert begun or len(lines) == 1
        return lines[-1]

    return call


def write(path, tree):
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("k=many", ["k:", "integer", "'many'"]),
        ("k=0", ["k:", "greater than or equal to 1", "0"]),
        ("kk=3", ["kk: no such key"]),
        ("points.source=digts", ["points", "'digts'", "'digits'"]),
        ("points.sorce=3", ["points.sorce: no such key"]),
        ("method=magic", ["method", "exact", "auto", "'magic'"]),
        ("method=auto", ["method auto", "audit.depth_agreement"]),
        ("audit.depth_agreement=0.9", ["method auto", "audit.depth_agreement"]),
        ("audit.depth_agreement=1", ["audit.depth_agreement", "less than 1"]),
        ("method={nowhere: flat}", ["method", "nowhere", "input", "softmax"]),
        ("method={'*put': flat, 'in*': flat}", ["method", "probe input", "*put and in*"]),
        ("votes=some", ["votes", "'until-decided'", "'some'"]),
        ("members=[]", ["members", "at least 1"]),
        ("members.0.training.steps=-1", ["members.0.training.steps", "greater than or equal to 0", "-1"]),
        ("members.0.split.kind=odd", ["members.0.split", "'odd'", "'random'"]),
        ("members.0.architecture=resnet19", ["resnet19", "resnet18"]),
        ("members.0.architecture=nowhere:build", ["nowhere"]),
        ("members.0.parameters.breadth=3", ["breadth", "width"]),
        ("members.0.weights=w.pt", ["members.0", "weights or training, not both"]),
        ("members.7.count=2", ["members.7.count", "list of 1"]),
        ("nonsense", ["--set nonsense", "key=value"]),
        ("k=1700", ["k: 1700", "1617 points"]),
        ("points.corrupt.share=2", ["points.corrupt.share", "less than or equal to 1", "2"]),
        ("engine.workers=0", ["engine.workers", "greater than or equal to 1", "0"]),
    ],
)
def test_a_wrong_configuration_names_key_value_and_what_is_allowed(refused, tmp_path, override, words):
    line = refused("run", write(tmp_path / "c.yaml", TINY), "--out", tmp_path / "run", "--set", override)
    for word in words:
        assert word in line, line


def test_a_missing_key_is_named(refused, tmp_path):
    tree = {key: value for key, value in TINY.items() if key != "points"}
    assert "points: required" in refused("run", write(tmp_path / "c.yaml", tree))


def test_what_is_no_configuration_is_refused(refused, tmp_path):
    assert "digits" in refused("run", "digit")  # the presets are told
    (tmp_path / "bad.yaml").write_text("a: [1")
    assert "line" in refused("run", tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    assert "mapping" in refused("run", tmp_path / "list.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not a text file" in refused("run", tmp_path / "binary.yaml")


def test_wrong_words_on_the_command_line_are_refused(refused):
    assert "--n" in refused("hardest", "somewhere", "--n", "many")
    assert "no such command" in refused("runn").lower()
    assert "RUN" in refused("show")


def test_a_folder_without_a_run_is_refused(refused, tmp_path):
    for command in (
        ["show"],
        ["verify"],
        ["hardest"],
        ["query", "SELECT 1"],
        ["status"],
        ["timeline", "-o", "run.svg"],
        ["study"],
        ["report"],
        ["export", "--to", "csv"],
    ):
        assert "no run here" in refused(command[0], tmp_path, *command[1:])
    (tmp_path / "mine.txt").write_text("dear")
    assert "not empty" in refused("run", "digits", "--out", tmp_path)


def test_no_cluster_at_an_address(refused, tmp_path):
    line = refused(
        "run", write(tmp_path / "c.yaml", TINY), "--out", tmp_path / "run", "--address", "127.0.0.1:1", begun=True
    )
    assert "127.0.0.1:1" in line


def test_workers_that_do_not_fit_are_refused(refused, tmp_path):
    config = write(tmp_path / "c.yaml", TINY)
    line = refused("run", config, "--out", tmp_path / "run", "--set", "engine.gpus=64", begun=True)
    assert "64 GPUs do not fit" in line and "engine.gpus" in line


def numeric(tmp_path, inputs, labels):
    np.save(tmp_path / "x.npy", inputs)
    np.save(tmp_path / "y.npy", labels)
    points = {"source": "npy", "inputs": str(tmp_path / "x.npy"), "labels": str(tmp_path / "y.npy")}
    return write(tmp_path / "c.yaml", {**TINY, "points": points})


def test_inputs_that_are_not_finite_are_found(refused, tmp_path):
    inputs = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
    inputs[123, 2] = np.nan
    line = refused("run", numeric(tmp_path, inputs, np.arange(200) % 3), "--out", tmp_path / "run", begun=True)
    assert "123" in line and "finite" in line


@pytest.mark.slow
def test_embeddings_that_are_not_finite_are_found(refused, tmp_path):
    (tmp_path / "broken.py").write_text(
        "import torch\n"
        "class Broken(torch.nn.Sequential):\n"
        "    def forward(self, x):\n"
        "        x = self[0](x)\n"
        "        return self[1](torch.where(x > 0, x, torch.log(x)) if len(x) > 1 else x)\n"
        "def build():\n"
        "    return Broken(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))\n"
    )
    inputs = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
    config = numeric(tmp_path, inputs, np.arange(200) % 3)
    sys.path.insert(0, str(tmp_path))
    try:
        line = refused(
            "run", config, "--out", tmp_path / "run",
            "--set", "members=[{architecture: 'broken:build', name: broken}]", begun=True,
        )  # fmt: skip
    finally:
        sys.path.remove(str(tmp_path))
    assert "broken-0" in line and "not finite" in line and "point 0" in line


def test_labels_out_of_range_are_found(refused, tmp_path):
    inputs = np.zeros((200, 6), np.float32)
    labels = np.arange(200) % 3
    labels[17] = -1
    line = refused("run", numeric(tmp_path, inputs, labels), "--out", tmp_path / "run")
    assert "17" in line and "-1" in line


def test_unreadable_images_are_named(refused, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "train" / name / f"{i}.png").write_bytes(b"no image")
    tree = {**TINY, "points": {"source": "image-folder", "train": str(tmp_path / "train")}, "k": 2}
    assert "0.png" in refused("run", write(tmp_path / "c.yaml", tree), "--out", tmp_path / "run")


def test_a_study_tells_its_page(leadline, refused, tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tiny_run.directory.root
    assert leadline("study", run, "--only", "members", "--only", "kinds") == (
        0,
        "study/tiny/page.md\n",
        "kinds\nmembers\n",
    )
    page = Path("study/tiny/page.md").read_text()
    assert "# Study of tiny" in page and "## Kinds of difficulty" in page and "## Rank correlations" not in page
    code, out, _ = leadline("study", run, "-o", tmp_path / "mine", "--only", "layers")
    assert (code, out) == (0, f"{tmp_path / 'mine' / 'page.md'}\n")
    assert "'magic' is no analysis" in refused("study", run, "--only", "magic")
    assert "no run here" in refused("study", run, "--again", tmp_path)


def test_queries_in_every_format(leadline, tiny_run, tmp_path):
    run = tiny_run.directory.root
    question = (
        "SELECT label, count(*) AS n, avg(mean_depth_held_out) AS depth FROM ensemble GROUP BY label ORDER BY label"
    )
    code, out, _ = leadline("query", run, question, "--format", "csv")
    assert code == 0
    rows = list(csv.DictReader(io.StringIO(out)))
    code, out, _ = leadline("query", run, question, "--format", "json")
    assert code == 0
    objects = json.loads(out)
    code, out, _ = leadline("query", run, question)
    assert code == 0 and "depth" in out
    assert [int(row["label"]) for row in rows] == [row["label"] for row in objects] == list(range(10))
    assert [float(row["depth"]) for row in rows] == [row["depth"] for row in objects]
    command = [
        sys.executable,
        "-m",
        "leadline.cli",
        "query",
        str(run),
        "SELECT * FROM votes LIMIT 5",
        "--format",
        "parquet",
    ]
    answer = subprocess.run(
        [command[0], "-c", "from leadline.cli import main; main()", *command[3:]], capture_output=True, check=True
    )
    assert pq.read_table(pa.BufferReader(answer.stdout)).num_rows == 5


@pytest.mark.parametrize(
    "query",
    [
        "DROP VIEW points",
        "SELECT 1; SELECT 2",
        "COPY points TO '/tmp/leadline-must-not-be.csv'",
        "CREATE TABLE t (x INT)",
        "INSTALL httpfs",
        "SELECT * FROM nowhere",
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT FROM WHERE",
    ],
)
def test_queries_only_read_the_run(refused, tiny_run, query):
    assert "query" in refused("query", tiny_run.directory.root, query)
    assert not Path("/tmp/leadline-must-not-be.csv").exists()


def test_named_queries_and_own_files(leadline, refused, tiny_run, tmp_path):
    run = tiny_run.directory.root
    code, out, _ = leadline("query", run, "--list")
    assert code == 0 and "label-issues" in out and "Which class is taken for which" in out
    code, out, _ = leadline("query", run, "--list", "--format", "json")
    names = [row["name"] for row in json.loads(out)]
    assert code == 0 and "hardest-by-class" in names and names == sorted(names)
    code, out, _ = leadline("query", run, "--named", "members", "--format", "json")
    assert code == 0 and [row["member"] for row in json.loads(out)] == ["mlp-0", "mlp-1", "mlp-2"]
    line = refused("query", run, "--named", "member")
    assert all(name in line for name in ["'member'", *names])
    (tmp_path / "mine.csv").write_text("key,score\ntrain/00007,0.5\n")
    mine = f"mine={tmp_path / 'mine.csv'}"
    question = "SELECT point_id, score FROM points JOIN mine USING (key)"
    code, out, _ = leadline("query", run, question, "--with", mine, "--format", "csv")
    assert (code, out) == (0, "point_id,score\n7,0.5\n")
    assert "give NAME=FILE" in refused("query", run, question, "--with", "mine.csv")
    assert "given twice" in refused("query", run, question, "--with", mine, "--with", mine)
    assert "no such file" in refused("query", run, question, "--with", "mine=nowhere.csv")
    for given in ([], ["SELECT 1", "--list"], ["SELECT 1", "--named", "members"]):
        assert "one of SQL, --named NAME and --list" in refused("query", run, *given)


def test_hardest_points_equal_pandas(leadline, tiny_run):
    run = tiny_run.directory.root
    depths = pd.concat(pd.read_parquet(file) for file in sorted(run.glob("depths/*/*.parquet")))
    for split, inside in (("held-out", False), ("training", True)):
        code, out, _ = leadline("hardest", run, "--n", 5, "--split", split, "--label", 3)
        side = depths[(depths.in_training == inside) & (depths.label == 3)]
        grouped = side.assign(right=side.prediction == side.label).groupby("point_id")
        expected = grouped.agg(depth=("depth", "mean"), right=("right", "mean")).reset_index()
        expected = expected.sort_values(["depth", "right", "point_id"], ascending=[False, True, True]).head(5)
        assert code == 0
        found = [line.split() for line in out.splitlines() if line.strip().startswith("mlp")]
        assert [int(fields[1]) for fields in found] == expected.point_id.tolist()


def test_an_unknown_label_or_split_is_refused(refused, tiny_run):
    assert "'eleven'" in refused("hardest", tiny_run.directory.root, "--label", "eleven")
    assert "held-out" in refused("hardest", tiny_run.directory.root, "--split", "both")
    assert "--n" in refused("hardest", tiny_run.directory.root, "--n", 0)


def test_show_prints_what_the_tables_hold(leadline, tiny_run):
    code, out, _ = leadline("show", tiny_run.directory.root)
    assert code == 0
    accuracy = tiny_run.sql("SELECT avg(held_out_accuracy) FROM probes WHERE probe = 0")[0][0].as_py()
    assert f"{accuracy:.4f}" in out
    unsettled = tiny_run.sql("SELECT count(*) FROM depths WHERE unsettled")[0][0].as_py()
    code, settled, _ = leadline("show", tiny_run.directory.root, "--settled-only")
    assert code == 0 and unsettled > 0 and settled != out


def test_the_status_of_a_run_is_printed(leadline, tiny_run):
    code, out, _ = leadline("status", tiny_run.directory.root)
    assert code == 0 and "tiny: complete, 1,797 points" in out and "72/72" in out
    watched = leadline("status", tiny_run.directory.root, "--watch")
    assert watched == (0, out, "")  # it has ended
    code, out, _ = leadline("status", tiny_run.directory.root, "--json")
    (line,) = out.splitlines()
    assert code == 0 and json.loads(line)["stages"]["vote"]["done"] == 72


def test_the_timeline_of_a_run_is_drawn(leadline, refused, tiny_run, tmp_path):
    assert leadline("timeline", tiny_run.directory.root, "-o", tmp_path / "run.svg") == (0, "", "")
    assert "103 units, 2 workers, 1 session" in (tmp_path / "run.svg").read_text()
    assert "run.pdf is no picture" in refused("timeline", tiny_run.directory.root, "-o", tmp_path / "run.pdf")


def test_probes_are_printed_with_their_widths(leadline, refused):
    code, out, _ = leadline("probes", "resnet18", "--input", "3x32x32", "--set", "width=8")
    rows = [line.split() for line in out.splitlines() if line.split() and line.split()[0].isdigit()][-11:]
    assert code == 0 and "11 probes" in out
    assert rows[0][1:] == ["input", "3072"] and rows[-1][1:] == ["softmax", "10"]
    code, out, _ = leadline(
        "probes", "torchvision.models:resnet18", "--input", "3x64x64", "--classes", 5, "--probe", "layer*.*"
    )
    rows = [line.split() for line in out.splitlines() if line.split() and line.split()[0].isdigit()]
    assert code == 0 and "10 probes" in out and rows[-1][2] == "5"
    assert "--input" in refused("probes", "mlp", "--input", "3xx")
    assert "layr" in refused("probes", "resnet18", "--input", "3x32x32", "--probe", "layr*")


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_valid(name):
    assert load_config(name).name == name


def test_duckdb_and_pandas_alone_can_answer(tiny_run):
    """With no help from Leadline."""
    root = tiny_run.directory.root
    by_label = duckdb.sql(
        f"SELECT label, avg(mean_depth_held_out) AS depth FROM '{root}/ensemble.parquet' GROUP BY label ORDER BY label"
    ).df()
    ensemble = pd.read_parquet(root / "ensemble.parquet")
    np.testing.assert_allclose(by_label.depth, ensemble.groupby("label").mean_depth_held_out.mean())
    deepest = duckdb.sql(
        f"SELECT point_id, avg(depth) AS depth FROM '{root}/depths/*/*.parquet' GROUP BY point_id "
        "ORDER BY depth DESC, point_id LIMIT 20"
    ).df()
    depths = pd.read_parquet(root / "depths")
    assert set(depths.member) == {"mlp-0", "mlp-1", "mlp-2"}
    again = (
        depths.groupby("point_id")
        .depth.mean()
        .reset_index()
        .sort_values(["depth", "point_id"], ascending=[False, True])
    )
    assert deepest.point_id.tolist() == again.point_id.head(20).tolist()
    by_layer = duckdb.sql(
        f"SELECT probe, avg(held_out_accuracy) AS accuracy FROM '{root}/probes.parquet' GROUP BY probe ORDER BY probe"
    ).df()
    assert len(by_layer) == 4 and by_layer.accuracy.iloc[-1] > 0.5
