"""Every example of docs/query.md is run, and every tool gives the same answers."""

import re
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest
from tiny import tables_of

from leadline.query import named_queries

PAGE = Path(__file__).parents[1] / "docs" / "query.md"
QUESTIONS = ("hardest", "by_class", "trail")
TOOLS = ("With Leadline", "DuckDB", "pandas", "polars", "Arrow")


def sections():
    """(heading, language, code) of every block that has a language."""
    for part in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        for language, code in re.findall(r"^```(\w+)\n(.*?)^```$", part, re.MULTILINE | re.DOTALL):
            yield part.partition("\n")[0], language, code


def plain(answer):
    """Rows of a table of pyarrow, pandas or polars, as values of Python."""
    frame = pd.DataFrame(answer.to_pylist()) if hasattr(answer, "to_pylist") else answer
    frame = frame if isinstance(frame, pd.DataFrame) else frame.to_pandas()
    return [tuple(np.asarray(x).tolist() for x in row) for row in frame.itertuples(index=False)]


@pytest.fixture
def at_home(tiny_run, tmp_path, monkeypatch):
    """Where the examples are given: runs/mine is the tiny run, and labels.csv lies here."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(tiny_run.directory.root)
    keys = tables_of(tiny_run.directory.root)["points.parquet"]["key"].to_pylist()
    mine = pd.DataFrame({"key": keys, "annotator": ["ann" if i % 3 else "bob" for i in range(len(keys))]})
    mine.to_csv(tmp_path / "labels.csv", index=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def expected(tiny_run):
    """By loops over the tables."""
    tables = tables_of(tiny_run.directory.root)
    ensemble = tables["ensemble.parquet"].to_pylist()
    known = [row for row in ensemble if row["mean_depth_held_out"] is not None]
    known.sort(key=lambda row: (-row["mean_depth_held_out"], row["point_id"]))
    classes = sorted({row["label"] for row in ensemble})
    trail = []
    for member in ("mlp-0", "mlp-1", "mlp-2"):
        depths, votes = (
            tables[f"{name}/member={member}/part-0.parquet"].to_pylist()[7] for name in ("depths", "votes")
        )
        trail.append((member, depths["depth"], votes["winner"]))
    return {
        "hardest": [(row["architecture"], row["point_id"], row["mean_depth_held_out"]) for row in known[:20]],
        "by_class": [
            (label, np.mean([row["mean_depth_held_out"] for row in known if row["label"] == label]))
            for label in classes
        ],
        "trail": trail,
    }


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_gives_the_same_answers(tool, at_home, tiny_run, monkeypatch):
    found = {}
    for heading, language, code in sections():
        if heading == tool and language == "python":
            exec(code, found)
        elif heading == tool:
            monkeypatch.chdir(at_home / "runs" / "mine")
            found[re.match(r"-- (\w+):", code)[1]] = duckdb.sql(code).to_arrow_table()
    for question, rows in expected(tiny_run).items():
        answers = plain(found[question])
        assert len(answers) == len(rows)
        for answer, row in zip(answers, rows, strict=True):
            assert answer == pytest.approx(row) if question == "by_class" else answer == row, (tool, question)


def test_own_files_are_joined(at_home, tiny_run):
    found = {}
    exec(next(code for heading, _, code in sections() if heading == "With your own files"), found)
    ensemble = pd.read_parquet("runs/mine/ensemble.parquet")
    means = [ensemble.mean_depth_held_out[ensemble.point_id % 3 != 0], ensemble.mean_depth_held_out[::3]]
    rows = [("ann", 1198, means[0].mean()), ("bob", 599, means[1].mean())]
    assert [row[:2] for row in plain(found["joined"])] == [row[:2] for row in rows]
    assert [row[2] for row in plain(found["joined"])] == pytest.approx([row[2] for row in rows])


def test_all_examples_are_run_and_all_named_queries_are_told():
    assert {heading for heading, *_ in sections()} == {*TOOLS, "With your own files"}
    assert len(list(sections())) == 8
    assert re.findall(r"^\| `([a-z-]+)` \|", PAGE.read_text(), re.MULTILINE) == sorted(named_queries())
