"""The shell scripts: their syntax, and the Slurm job on one machine with stand-ins for Slurm's two commands."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import TINY, tables_of

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "deploy" / "slurm" / "leadline.sbatch"
# Ray looks for others of its kind among all processes, and is stopped by name: the job gets a process table of its own.
ALONE = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child"]
# Of sbatch, as its manual has them: those that the script uses.
OPTIONS = {
    "job-name", "nodes", "ntasks-per-node", "cpus-per-task", "gpus-per-node", "mem", "time", "exclusive", "requeue",
    "open-mode", "output",
}  # fmt: skip


def test_syntax():
    subprocess.run(["bash", "-n", SCRIPT], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    subprocess.run(["shellcheck", SCRIPT], check=True)


def test_options_come_before_the_first_command():
    lines = SCRIPT.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    places = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert places and max(places) < first  # sbatch reads no further
    assert {re.match(r"#SBATCH --([a-z-]+)", lines[i])[1] for i in places} == OPTIONS


@pytest.fixture
def sbatch(tmp_path):
    """Runs the script as a job of one node; a clone is stood in for by links to its folders and this environment."""
    if not shutil.which("unshare") or subprocess.run([*ALONE, "true"], capture_output=True).returncode:
        pytest.skip("process tables cannot be made here")
    for folder in ("jobs", "deploy"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "activate").write_text(f'export PATH="{Path(sys.executable).parent}:$PATH"\n')
    slurm = tmp_path / "slurm"
    slurm.mkdir()
    for name, text in {
        "scontrol": 'test "$1 $2" = "show hostnames" && echo "$3"',
        # Options of srun itself begin with --, and it hands the rest to the node.
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    }.items():
        (slurm / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (slurm / name).chmod(0o755)
    job = str(os.getpid())
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
        "PATH": f"{slurm}:{os.environ['PATH']}",
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NODELIST": "here",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_PER_TASK": "2",
    }

    def run(*arguments):
        command = [*ALONE, "bash", "deploy/slurm/leadline.sbatch", *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)

    yield run
    shutil.rmtree(f"/tmp/ray-{job}", ignore_errors=True)


def test_a_job_without_arguments_says_what_is_missing(sbatch):
    answer = sbatch("digits")
    assert answer.returncode != 0 and "on storage that all nodes share" in answer.stderr


@pytest.mark.slow
def test_a_job_computes_the_run(sbatch, tmp_path, tiny_run):
    config, run = tmp_path / "tiny.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(TINY))
    answer = sbatch(config, run, "--set", "engine.workers=2")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert f"{run}: sound" in answer.stdout
    assert tables_of(run) == tables_of(tiny_run.directory.root)
    # One that cannot begin ends badly.
    assert sbatch("no-such-preset", tmp_path / "other").returncode != 0
