"""One driver at a time: who is refused, who may take over, and who must stop."""

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from leadline import LeadlineError
from leadline.store import RunDirectory, lease
from leadline.store.files import names, read_json, write_json
from leadline.store.lease import Lease
from leadline.store.places import place_of


@pytest.fixture(params=["directory", "bucket"])
def run(request, tmp_path):
    """An empty run, on a file system and in an object store."""
    if request.param == "directory":
        return RunDirectory(tmp_path)
    return RunDirectory(place_of(f"s3://{request.getfixturevalue('bucket')}/run"))


def record(run, number=1):
    return read_json(run.drivers / f"{number:06d}.json")


def test_the_second_is_refused_until_the_first_ends(run):
    with Lease(run, print) as first:
        about = record(run)
        with pytest.raises(LeadlineError) as error, Lease(run, print):
            pass
        told = f"{run.root}: is being computed by {about['host']} (process {about['process']}), renewed "
        assert str(error.value).startswith(told) and "\n" not in str(error.value)
        first.check()
    assert record(run)["ended"]
    with Lease(run, print) as second:
        second.check()
    assert names(run.drivers) == {"000001.json", "000002.json"}


def test_of_many_at_once_one_has_it(run):
    def try_it(_):
        try:
            return Lease(run, print)
        except LeadlineError:
            return None

    with ThreadPoolExecutor(8) as pool:
        (held,) = [found for found in pool.map(try_it, range(8)) if found]
    with held:
        held.check()


def test_it_ends_with_an_error_too(run):
    with pytest.raises(ValueError, match="boom"), Lease(run, print):
        raise ValueError("boom")
    with Lease(run, print):
        pass


def test_it_is_renewed_as_long_as_it_is_held(run, monkeypatch):
    monkeypatch.setattr(lease, "RENEWAL", 0.02)
    with Lease(run, print):
        first, deadline = record(run)["renewed"], time.monotonic() + 20
        while record(run)["renewed"] <= first + 0.1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert record(run)["renewed"] > first + 0.1
        assert record(run)["since"] <= first
    ended = record(run)
    time.sleep(0.1)
    assert record(run) == ended


def test_a_process_of_this_machine_that_was_killed_is_succeeded_at_once(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from leadline.store import RunDirectory, lease\n"
        "with lease.Lease(RunDirectory(Path(sys.argv[1])), print): print(flush=True); time.sleep(60)\n"
    )
    run = RunDirectory(tmp_path)
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with pytest.raises(LeadlineError, match=rf"process {holder.pid}\)"), Lease(run, print):
            pass
        holder.send_signal(signal.SIGSTOP)
        with pytest.raises(LeadlineError, match=rf"process {holder.pid}\)"), Lease(run, print):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait(10)
        with Lease(run, print) as ours:
            ours.check()
    # Its number, given to another process since, is not it.
    write_json(run.drivers / "000003.json", {**record(run), "process": 1})
    with Lease(run, print) as ours:
        ours.check()


def test_one_of_another_machine_is_succeeded_after_its_silence(run, monkeypatch, capsys):
    monkeypatch.setattr(lease, "LOOK", 0.05)
    with Lease(run, print):
        about = {**record(run), "machine": "another", "host": "far", "process": 1}

    def silent_for(seconds):
        write_json(run.drivers / "000002.json", {**about, "renewed": time.time() - seconds, "ended": False})

    silent_for(10)
    with pytest.raises(LeadlineError, match=r"far \(process 1\), renewed 1[01] s ago"), Lease(run, print):
        pass
    # It may be dead: it is waited for, and lives.
    silent_for(20)
    with ThreadPoolExecutor(1) as other:
        other.submit(lambda: (time.sleep(0.3), silent_for(0)))
        with pytest.raises(LeadlineError, match=r"far \(process 1\), renewed 0 s ago"), Lease(run, print):
            pass
    assert "far (process 1), renewed 20 s ago; this driver takes over if" in capsys.readouterr().out
    silent_for(lease.SECONDS - 0.5)
    began = time.monotonic()
    with Lease(run, print) as ours:
        assert time.monotonic() - began > 0.4
        ours.check()
    assert names(run.drivers) == {"000001.json", "000002.json", "000003.json"}


def test_who_was_silent_stops_if_another_has_taken_over(run, monkeypatch):
    monkeypatch.setattr(lease, "RENEWAL", 60.0)
    with Lease(run, print) as first:
        before = record(run)
        monkeypatch.setattr(lease, "SECONDS", 0.05)
        time.sleep(0.1)
        first.check()  # nobody has: it goes on
        assert record(run)["renewed"] > before["renewed"]
        time.sleep(0.1)
        before = record(run)
        with Lease(run, print) as second:
            with pytest.raises(LeadlineError, match=rf"taken over by {before['host']}.*stops"):
                first.check()
            assert not first.is_held()
            second.check()
    assert record(run) == before  # the loser writes nothing more, not that it has ended


def test_who_is_not_silent_is_told_by_its_next_renewal(run, monkeypatch):
    monkeypatch.setattr(lease, "RENEWAL", 0.02)
    with Lease(run, print) as first:
        write_json(run.drivers / "000002.json", record(run))
        deadline = time.monotonic() + 20
        while first.is_held() and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(LeadlineError, match="taken over"):
            first.check()
