"""Two drivers on one run: the second is refused, and takes over when the first has been silent for too long."""

import signal
import subprocess
import sys
import time

import pytest
import yaml
from tiny import TINY, tables_of

import leadline
from leadline import LeadlineError
from leadline.store.verify import verify

# The command line, with a lease that runs out sooner.
PROGRAM = (
    "from leadline.store import lease; lease.SECONDS, lease.RENEWAL = 3.0, 0.2; from leadline.cli import main; main()"
)


@pytest.mark.slow
def test_a_driver_that_is_stopped_is_succeeded_and_stops(tiny_run, tmp_path):
    run, config = tmp_path / "run", tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(TINY))
    command = [sys.executable, "-c", PROGRAM, "run", str(config), "--out", str(run)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as first:
        wait_for(run, "units/vote/*/*.json", first)
        with pytest.raises(LeadlineError, match=rf"is being computed by .* \(process {first.pid}\), renewed"):
            leadline.run(TINY, run)
        first.send_signal(signal.SIGSTOP)
        time.sleep(4)
        second = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert second.returncode == 0, second.stderr
        files = times(run)
        first.send_signal(signal.SIGCONT)
        _, errors = first.communicate(timeout=60)
    assert first.returncode == 2
    assert errors.splitlines()[-1].startswith(f"leadline: {run}: was taken over by ")
    assert times(run) == files
    assert tables_of(run) == tables_of(tiny_run.directory.root)
    assert verify(leadline.open(run).directory) == []


def times(run):
    """When the files of a run were written; but for its drivers' own records and logs, each of which has one writer."""
    own = {run / "drivers", *(run / "logs").iterdir()}
    return {path: path.stat().st_mtime_ns for path in run.rglob("*.*") if path.parent not in own}


def wait_for(run, pattern, driver):
    deadline = time.monotonic() + 120
    while not list(run.glob(pattern)) and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert list(run.glob(pattern))
