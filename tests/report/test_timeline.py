"""The picture of a run's log, read back from its SVG."""

import json
import re
from collections import Counter
from itertools import pairwise

import pytest

from leadline import LeadlineError
from leadline.report.timeline import draw_timeline
from leadline.store import RunDirectory
from leadline.store.files import write_json


def write_run(root, *logs):
    """A run of sessions of 1000 s, an hour apart, with units (host, pid, stage, state, begin, end)."""
    directory = RunDirectory(root)
    write_json(directory.manifest_path, {"name": "made", "status": "running", "data": {"points": 1}})
    for number, units in enumerate(logs):
        name, began = f"session-{number}", 1e9 + 3600 * number
        rows = [
            {"host": host, "pid": pid, "stage": stage, "state": state, "began": began + begin, "ended": began + end}
            for host, pid, stage, state, begin, end in sorted(units, key=lambda unit: unit[-1])
        ]
        record = {
            "session": name,
            "began": began,
            "last": began + 1000,
            "stages": {"train": {}, "vote": {}, "reduce": {}},
        }
        write_json(directory.session(name), record)
        if rows:
            directory.log(name, 0).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def bars(path):
    """(worker, stage, start, stop) of each bar, and (worker, what, at) of each cross."""
    labels = re.findall(r'aria-label="([^"]*)"', path.read_text())
    marks = [dict(part.split(": ", 1) for part in label.split("; ")) for label in labels if "; " in label]
    unit = next(key for key in marks[0] if key in ("seconds", "minutes", "hours"))
    drawn = [(m["worker"], m["stage"], float(m[unit]), float(m["stop"])) for m in marks if "stop" in m]
    crosses = [(m["worker"], m["failed"], float(m["start"])) for m in marks if "failed" in m]
    return drawn, crosses


def test_every_worker_has_a_row_and_units_of_one_stage_that_follow_closely_are_one_bar(tmp_path):
    directory = write_run(
        tmp_path,
        [
            ("a", 1, "train", "done", 0, 60),
            ("a", 1, "vote", "done", 60.1, 90),
            ("a", 1, "vote", "done", 90.1, 120),  # the same bar
            ("a", 1, "vote", "done", 240, 300),  # after a pause
            ("b", 1, "vote", "done", 0, 60),
            ("b", 2, "vote", "again", 60, 120),
        ],
    )
    draw_timeline(directory, tmp_path / "run.svg")
    drawn, crosses = bars(tmp_path / "run.svg")
    assert sorted(drawn) == [
        ("a 1", "train", 0, 1),
        ("a 1", "vote", pytest.approx(60.1 / 60), 2),
        ("a 1", "vote", 4, 5),
        ("b 1", "vote", 0, 1),
        ("b 2", "vote", 1, 2),
    ]
    assert crosses == [("b 2", "tried again", 2)]
    assert "6 units, 3 workers, 1 session" in (tmp_path / "run.svg").read_text()


def test_sessions_follow_one_another_without_the_time_between(tmp_path):
    units = [
        ("a", 1, "vote", "done", 0, 600),
        ("a", 1, "vote", "set_aside", 600, 900),
        (None, None, "reduce", "set_aside", 900, 900),
    ]
    draw_timeline(write_run(tmp_path, units, units), tmp_path / "run.svg")
    drawn, crosses = bars(tmp_path / "run.svg")
    second = 1000 / 60
    assert sorted(drawn) == [
        ("a 1 (session 1)", "vote", 0, 15),
        ("a 1 (session 2)", "vote", pytest.approx(second), pytest.approx(second + 15)),
    ]
    assert [(worker, what) for worker, what, _ in crosses] == [
        ("a 1 (session 1)", "set aside"), ("a 1 (session 2)", "set aside"),
    ]  # fmt: skip


def test_the_picture_does_not_grow_with_the_number_of_units(tmp_path):
    stages = ["train", "vote", "reduce"]
    units = [("a", 1, stages[i % 3], "done", i / 20, (i + 0.9) / 20) for i in range(20_000)]
    draw_timeline(write_run(tmp_path, units), tmp_path / "run.svg")
    drawn, _ = bars(tmp_path / "run.svg")
    assert 400 < len(drawn) <= 2000
    # And no time is lost: bars follow one another from the first unit to the last.
    assert drawn[0][2] == 0 and drawn[-1][3] == pytest.approx(19_999.9 / 20 / 60)
    gaps = [after[2] - before[3] for before, after in pairwise(drawn)]
    assert max(gaps) < 1 / 60
    assert min(Counter(stage for _, stage, _, _ in drawn).values()) > 100


def test_a_png_is_one_and_what_cannot_be_drawn_is_told(tmp_path):
    directory = write_run(tmp_path, [("a", 1, "vote", "done", 0, 10)])
    draw_timeline(directory, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(LeadlineError, match=r"run.pdf is no picture .* \.svg or \.png"):
        draw_timeline(directory, tmp_path / "run.pdf")
    with pytest.raises(LeadlineError, match="no unit was logged"):
        draw_timeline(write_run(tmp_path / "empty", []), tmp_path / "run.svg")
    with pytest.raises(LeadlineError, match="no run here"):
        draw_timeline(RunDirectory(tmp_path / "nowhere"), tmp_path / "run.svg")
    assert not list(tmp_path.rglob("*.part"))
