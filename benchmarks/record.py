"""Run a command and record what it printed, with the command, the versions and the hardware.

python benchmarks/record.py NAME -- COMMAND …     writes benchmarks/results/NAME.txt

Benchmarks that measure in their own process record figures instead: see `stamp` and `write_result`.
"""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

from leadline import machine

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("leadline", "torch", "numpy", "numba", "pyarrow", "ray")


def stamp(packages: Iterable[str], threads: int) -> dict[str, Any]:
    """What figures depend on beside their input: the command, the commit, versions, hardware, threads."""
    return {"commit": commit(), **machine.stamp(f"python benchmarks/{Path(sys.argv[0]).name}", packages, threads)}


def commit() -> str:
    """The commit of the working tree, marked where files differ from it."""
    answer = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=RESULTS.parent, capture_output=True, text=True
    )
    return answer.stdout.strip()


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Write benchmarks/results/NAME-PROCESSOR.json: figures of two kinds of processor stand side by side."""
    path = RESULTS / f"{name}-{llvm.get_host_cpu_name()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def main() -> None:
    name, dashes, *command = sys.argv[1:] or ["", ""]
    if dashes != "--" or not command:
        sys.exit(__doc__)
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in PACKAGES)
    lines = [
        f"$ {' '.join(command)}",
        f"# commit {commit()}; Python {platform.python_version()}, {versions}",
        f"# {machine.hardware()}",
        "",
    ]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        for line in running.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    lines += ["", f"# exit code {running.returncode} after {time.perf_counter() - started:.0f} s"]
    (RESULTS / f"{name}.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
