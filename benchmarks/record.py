"""Run a command and record what it printed, with the command, the versions and the hardware.

python benchmarks/record.py NAME -- COMMAND …     writes benchmarks/results/NAME.txt

Benchmarks that measure in their own process record figures instead: see `stamp` and `write_result`.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

from leadline.cluster.driver import processor
from leadline.knn.product import HAS_BFLOAT16, HAS_INT8

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("leadline", "torch", "numpy", "numba", "pyarrow", "ray")


def stamp(packages: Iterable[str], threads: int) -> dict[str, Any]:
    """What figures depend on beside their input: the command, the commit, versions, hardware, threads."""
    # A folder of this machine says nothing to a reader: of a path only the name is kept.
    given = [Path(argument).name if Path(argument).is_absolute() else argument for argument in sys.argv[1:]]
    return {
        "command": " ".join([f"python benchmarks/{Path(sys.argv[0]).name}", *given]),
        "commit": commit(),
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in packages},
        "hardware": f"{hardware()}, {threads} threads",
        "threads": threads,
    }


def commit() -> str:
    """The commit of the working tree, marked where files differ from it."""
    answer = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=RESULTS.parent, capture_output=True, text=True
    )
    return answer.stdout.strip()


def hardware() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    # The name alone may be that of several generations.
    units = [name for name, has in (("AVX512-BF16", HAS_BFLOAT16), ("AVX512-VNNI", HAS_INT8)) if has]
    kind = ", ".join([llvm.get_host_cpu_name(), *units])
    return f"{processor()} ({kind}), {os.cpu_count()} cores, {memory:.0f} GiB of memory, no GPU used"


def write_result(name: str, result: dict[str, Any]) -> None:
    """Write benchmarks/results/NAME-PROCESSOR.json: figures of two kinds of processor stand side by side."""
    (RESULTS / f"{name}-{llvm.get_host_cpu_name()}.json").write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    name, dashes, *command = sys.argv[1:] or ["", ""]
    if dashes != "--" or not command:
        sys.exit(__doc__)
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in PACKAGES)
    lines = [
        f"$ {' '.join(command)}",
        f"# commit {commit()}; Python {platform.python_version()}, {versions}",
        f"# {hardware()}",
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
