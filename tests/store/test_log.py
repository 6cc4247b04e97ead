"""The log of a run: whole files, each unit once, whatever happens to a write."""

import json
import time

import pytest

from leadline import LeadlineError
from leadline.store import RunDirectory, log
from leadline.store.log import ended_units, session_log, sessions


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(log, "SECONDS", 0.02)


class Source:
    """Units that end, and are taken by the log."""

    def __init__(self):
        self.units, self.ended = [], 0

    def end(self, n):
        for _ in range(n):
            self.units.append({"unit": f"unit {self.ended}", "ended": time.time()})
            self.ended += 1

    def take(self):
        units, self.units = self.units, []
        return units, {"stages": {"vote": {"done": self.ended}}}


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_units_are_logged_while_the_session_goes_on_and_each_is_logged_once(quick, tmp_path):
    directory, source, said = RunDirectory(tmp_path), Source(), []
    with session_log(directory, source.take, said.append):
        (session,) = sessions(directory)  # from the beginning on
        assert session["outcome"] is None and session["stages"]["vote"]["done"] == 0
        for n in (3, 2):
            source.end(n)
            wait_for(lambda: sessions(directory)[0]["stages"]["vote"]["done"] == source.ended)
            assert [unit["unit"] for unit in ended_units(directory, session["session"])] == [
                f"unit {i}" for i in range(source.ended)
            ]
        before = {path: path.read_bytes() for path in directory.logs(session["session"])}
        alive = sessions(directory)[0]["last"]
        wait_for(lambda: sessions(directory)[0]["last"] > alive)  # also while nothing ends
        source.end(1)
    assert [unit["unit"] for unit in ended_units(directory, session["session"])] == [f"unit {i}" for i in range(6)]
    assert {path: path.read_bytes() for path in before} == before
    assert sessions(directory)[0]["outcome"] == "finished" and said == []
    assert not list(tmp_path.rglob("*.part"))


def test_how_a_session_failed_is_told_and_sessions_come_in_order(tmp_path):
    directory = RunDirectory(tmp_path)
    with pytest.raises(LeadlineError), session_log(directory, Source().take, print):
        raise LeadlineError("vote mlp-0 3 1: broken")
    with pytest.raises(KeyboardInterrupt), session_log(directory, Source().take, print):
        raise KeyboardInterrupt
    time.sleep(1.1)  # names tell the second
    with session_log(directory, Source().take, print):
        pass
    told = sessions(directory)
    assert sorted(told[:2], key=lambda session: session["began"])[0]["error"] == "vote mlp-0 3 1: broken"
    assert {session["error"] for session in told[:2]} == {"vote mlp-0 3 1: broken", "KeyboardInterrupt"}
    assert [session["outcome"] for session in told] == ["failed", "failed", "finished"]


def test_a_log_that_cannot_be_written_is_written_later(quick, tmp_path):
    directory, source, said = RunDirectory(tmp_path), Source(), []
    with session_log(directory, source.take, said.append):
        (session,) = sessions(directory)
        folder = directory.session(session["session"]).parent
        folder.rename(tmp_path / "aside")
        folder.write_text("in the way")
        source.end(4)
        wait_for(lambda: said)
        assert "cannot be written" in said[0]
        folder.unlink()
        (tmp_path / "aside").rename(folder)
        source.end(1)
    assert [unit["unit"] for unit in ended_units(directory, session["session"])] == [f"unit {i}" for i in range(5)]


def test_only_the_latest_files_are_read_for_the_latest_units(tmp_path):
    directory = RunDirectory(tmp_path)
    for number in range(4):
        path = directory.log("s", number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"ended": 10 * number + i}) + "\n" for i in range(10)))
    directory.log("s", 0).write_text("damaged\n")
    for since in (40, 39, 25, 20):
        assert [unit["ended"] for unit in ended_units(directory, "s", since=since)] == list(range(since, 40))
    with pytest.raises(LeadlineError, match=r"0000000.jsonl: damaged"):
        list(ended_units(directory, "s"))
