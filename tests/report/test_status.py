"""What is told of a run that goes on, against what was put in its log."""

import json
import random
import re
import time
from io import StringIO

import pytest
from rich.console import Console

from leadline import LeadlineError
from leadline.report import status
from leadline.report.status import as_text, status_of
from leadline.store import RunDirectory
from leadline.store.files import write_json

STAGE = {"measure": "votes", "there": 0, "again": 0, "divided": 0, "set_aside": 0, "seconds": 0.0, "work": 0}
WORKER = {"node": "n", "host": "here", "died": False, "units": 7, "unit": None, "since": 0.0}


def write_run(root, status="running", **last):
    """A run with one session, whose record has these values."""
    directory, now = RunDirectory(root), time.time()
    write_json(directory.manifest_path, {"name": "made", "status": status, "data": {"points": 1234}})
    session = {
        "session": "s", "began": now - 1000, "last": now, "host": "here", "pid": 7, "outcome": None, "error": None,
        "stages": {}, "workers": [], "failures": [],
    }  # fmt: skip
    write_json(directory.session("s"), session | last)
    return directory


def screen(told):
    console = Console(width=160, file=StringIO())
    console.print(as_text(told))
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("manifest", "last", "state"),
    [
        ("running", {}, "running"),
        ("running", {"last": time.time() - 100_000}, "silent"),
        ("running", {"outcome": "failed", "error": "vote mlp-0 3 1: broken"}, "failed"),
        ("running", {"outcome": "finished"}, "stopped"),
        ("complete", {"outcome": "finished"}, "complete"),
    ],
)
def test_the_state_of_a_run(tmp_path, manifest, last, state):
    told = status_of(write_run(tmp_path, manifest, **last))
    assert told["state"] == state and json.loads(json.dumps(told)) == told
    text = screen(told)
    assert f"made: {state}, 1,234 points" in text
    assert ("vote mlp-0 3 1: broken" in text) == (state == "failed")
    assert ("dead or cut off" in text) == (state == "silent")
    if state == "silent":
        assert re.search(r"last sign of life 2[78]\.\d h ago", text)


def test_a_run_without_a_log_and_a_place_without_a_run(tmp_path):
    write_json(RunDirectory(tmp_path).manifest_path, {"name": "old", "status": "running", "data": {"points": 1}})
    assert "old: unknown" in screen(status_of(RunDirectory(tmp_path)))
    with pytest.raises(LeadlineError, match="no run here"):
        status_of(RunDirectory(tmp_path / "nowhere"))


def test_rates_are_of_the_last_minutes(tmp_path):
    chance, now = random.Random(0), time.time()
    units = []
    for stage, since in (("vote", 900), ("embed", 100)):
        at = now - since
        while at < now - 5:
            took = chance.uniform(1, 9)
            state = chance.choice(["done", "done", "again"])
            work = chance.randrange(1000) if state == "done" else None
            units.append({"stage": stage, "state": state, "began": at, "ended": at + took, "work": work})
            at += took
    units.sort(key=lambda unit: unit["ended"])
    directory = write_run(tmp_path, last=now, stages={
        "train": STAGE | {"units": 1, "done": 1, "work": 60, "seconds": 3.0, "worker_seconds": 3.0},
        **{name: STAGE | {"units": 500, "done": 5, "worker_seconds": 9.0} for name in ("vote", "embed")},
    })  # fmt: skip
    for number in range(0, len(units), 50):
        path = directory.log("s", number // 50)
        path.write_text("".join(json.dumps(unit) + "\n" for unit in units[number : number + 50]))
    told = status_of(directory)["stages"]
    for stage in ("vote", "embed"):
        done = [u for u in units if u["stage"] == stage and u["state"] == "done" and u["ended"] >= now - status.WINDOW]
        first = max(min(unit["began"] for unit in done), now - status.WINDOW)
        rate = sum(unit["work"] for unit in done) / (max(unit["ended"] for unit in done) - first)
        assert told[stage]["rate"] == pytest.approx(rate)
    assert told["train"]["rate"] == 20.0  # nothing of it lately


def test_the_time_that_is_left_is_that_of_units_so_far_shared_among_the_workers(tmp_path):
    stages = {
        "train": STAGE | {"units": 10, "done": 4, "worker_seconds": 40.0},
        "vote": STAGE | {"units": 100, "done": 60, "there": 50, "set_aside": 20, "worker_seconds": 5.0},
        "reduce": STAGE | {"units": 3, "done": 0, "worker_seconds": 0.0},
    }
    workers = [WORKER | {"pid": pid, "died": pid == 3, "peak_memory": pid * 10**9} for pid in (1, 2, 3)]
    workers[0] |= {"unit": "vote mlp-0 1 2", "since": time.time() - 30}
    failures = [{"unit": "vote mlp-1 1 2", "state": "again", "ended": 0.0, "tries": 1, "error": "its worker died"}]
    told = status_of(write_run(tmp_path, stages=stages, workers=workers, failures=failures))
    # Two workers; six trainings of 10 s; 20 votes, since 20 are set aside, of half a second; of reductions nothing.
    assert told["seconds_left"] == pytest.approx((6 * 10 + 20 * 0.5) / 2) and told["is_at_least"]
    text = screen(told)
    assert "about 35 s left, and more" in text
    for words in ("vote mlp-0 1 2 (30 s)", "2.00 GB", "60/100", "died", "00:00:00  vote mlp-1 1 2: tried again"):
        assert words in text, words
    del stages["reduce"]
    told = status_of(write_run(tmp_path, stages=stages, workers=workers))
    assert told["seconds_left"] == pytest.approx(35) and not told["is_at_least"]
