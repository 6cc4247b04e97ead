"""What measured times depend on beside what was asked: command, versions, processor, memory, threads."""

import os
import platform
import shlex
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import torch

from leadline.knn.product import HAS_BFLOAT16, HAS_INT8


def stamp(program: str, packages: Iterable[str], threads: int, device: str = "cpu") -> dict[str, Any]:
    """The command of this process as `program` with its arguments, versions, hardware; packages that are there."""
    return {
        "command": command(program),
        "python": platform.python_version(),
        "versions": {name: told for name in packages if (told := version(name))},
        "hardware": f"{hardware(device)}, {threads} threads",
        "threads": threads,
    }


def command(program: str) -> str:
    """A folder of this machine says nothing to a reader: of a path only the name is kept."""
    given = [Path(argument).name if Path(argument).is_absolute() else argument for argument in sys.argv[1:]]
    return f"{program} {shlex.join(given)}".rstrip()


def hardware(device: str = "cpu") -> str:
    """Processor, its instructions, cores, memory, and the GPU where the device is one."""
    # The name alone may be that of several generations.
    units = [name for name, has in (("AVX512-BF16", HAS_BFLOAT16), ("AVX512-VNNI", HAS_INT8)) if has]
    kind = ", ".join([llvm.get_host_cpu_name(), *units])
    gpu = f"GPU: {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else "no GPU used"
    return f"{processor()} ({kind}), {os.cpu_count()} cores, {memory():.0f} GiB of memory, {gpu}"


def memory() -> float:
    """GiB of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def processor() -> str:
    """The processor's name as Linux tells it; elsewhere what Python knows."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def version(package: str) -> str | None:
    """Of what pip installed by that name; None where it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
