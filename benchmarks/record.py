"""Run a command and record what it printed, with the command, the versions and the hardware.

python benchmarks/record.py NAME -- COMMAND …     writes benchmarks/results/NAME.txt
"""

import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from leadline.cluster.driver import processor

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("leadline", "torch", "numpy", "numba", "pyarrow", "ray")


def main() -> None:
    name, dashes, *command = sys.argv[1:] or ["", ""]
    if dashes != "--" or not command:
        sys.exit(__doc__)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in PACKAGES)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    lines = [
        f"$ {' '.join(command)}",
        f"# commit {commit}; Python {platform.python_version()}, {versions}",
        f"# {processor()}, {os.cpu_count()} cores, {memory:.0f} GiB of memory, no GPU used",
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
