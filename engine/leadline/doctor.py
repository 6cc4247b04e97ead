"""What a machine offers, what Leadline uses of it, and whether votes come out right there: `leadline doctor`.

Packages are imported where they are looked at: one that is missing or broken is told beside the others.
"""

import importlib
import os
import re
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from leadline import machine
from leadline.errors import LeadlineError, one_line
from leadline.knn import bank_on, knn_votes, usable_method
from leadline.knn.arrays import Array
from leadline.knn.methods import METHODS
from leadline.knn.screen import precisions
from leadline.torchvision_import import import_torchvision

UNITS = ("avx2", "avx512f", "avx512bw", "avx512vnni", "avx512bf16", "amx-int8", "amx-bf16", "neon", "dotprod", "bf16")
WHEELS = {"faiss-cpu": "for the CPU", "faiss-gpu": "for CUDA 12", "faiss-gpu-cuvs": "for CUDA 13, with cuVS"}
WITH_LEADLINE = "pip install leadline"
PACKAGES = {
    "triton": "torch's wheels for CUDA bring it, on Linux",
    "hnswlib": "pip install 'leadline[hnswlib]'",
    "ray": WITH_LEADLINE,
}
ANY_FAISS = "pip install 'leadline[cpu]', or [cuda12] or [cuda13] for a GPU"
WAIT = 10  # seconds for nvidia-smi, which hangs where the driver does
ROWS, WIDTH, QUERIES, CLASSES, K = 4096, 96, 256, 10, 30  # of the check


@dataclass(frozen=True)
class Finding:
    """A line of a table. is_broken: it is there, and does not work."""

    what: str
    says: str
    is_broken: bool = False


def examine() -> Iterator[tuple[str, list[Finding]]]:
    """Title and lines of each table, as soon as they are known."""
    for title, looks in PARTS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # libraries warn of what is found here
            findings = [finding for look in looks for finding in look()]
        yield title, findings


def as_table(title: str, findings: list[Finding]) -> Table:
    """For the terminal."""
    drawn = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_header=False)
    drawn.add_column(no_wrap=True)
    drawn.add_column(overflow="fold")
    for finding in findings:
        # As Text: in plain strings rich takes the [cpu] of leadline[cpu] for a style.
        drawn.add_row(finding.what, Text(finding.says, style="bold red" if finding.is_broken else ""))
    return drawn


def _processor() -> list[Finding]:
    has = llvm.get_host_cpu_features()
    return [
        Finding("processor", f"{machine.processor()} ({llvm.get_host_cpu_name()}), {os.cpu_count()} cores"),
        Finding("instructions", ", ".join(name for name in UNITS if has.get(name)) or "none that Leadline would use"),
        Finding("memory", f"{machine.memory():.0f} GiB"),
    ]


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() and _fault_of_cuda() is None else ["cpu"]


def _gpus() -> list[Finding]:
    """What torch sees, and what the driver tells by nvidia-smi, which comes with it."""
    findings = []
    seen = torch.cuda.device_count() if "cuda" in _devices() else 0
    for i in range(seen):
        gpu = torch.cuda.get_device_properties(i)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        findings.append(Finding(f"GPU {i}", f"{gpu.name}, {memory}, compute capability {gpu.major}.{gpu.minor}"))
    driver = _driver()
    if not seen:
        there = driver is not None and not driver.is_broken and torch.version.cuda is None
        unused = "not used: torch is built for the CPU; install a torch that is built for CUDA"
        findings.append(Finding("GPU", unused if there else "none that torch can use"))
    return [*findings, driver] if driver else findings


def _driver() -> Finding | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    question = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(question, capture_output=True, text=True, timeout=WAIT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("driver", f"nvidia-smi gives no answer ({one_line(error)})", is_broken=True)
    if told.returncode:
        said = " ".join((told.stdout + told.stderr).split())
        return Finding("driver", f"nvidia-smi ends with code {told.returncode} ({said})", is_broken=True)
    return Finding("driver", f"{'; '.join(told.stdout.splitlines())} (nvidia-smi: name, memory, version of the driver)")


def _torch() -> list[Finding]:
    built = f"{torch.__version__}, built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'the CPU'}"
    fault = _fault_of_cuda()
    if fault:
        if shutil.which("nvidia-smi") is None:
            # What PyPI installs by default, on a machine without a GPU: it works there.
            return [Finding("torch", f"{built}, of which there is none here; a build for the CPU is smaller")]
        mend = "mend the driver, or install a torch that is built for the CPU"
        return [Finding("torch", f"{built}, which it cannot use ({fault}); {mend}", is_broken=True)]
    return [Finding("torch", built)]


@cache
def _fault_of_cuda() -> str | None:
    """Why torch cannot compute on the CUDA that it is built for. That a driver which works shows no GPU is no fault."""
    if torch.version.cuda is None:
        return None
    try:
        torch.ones(1, device="cuda").item()
    except (RuntimeError, AssertionError) as error:
        return None if "No CUDA GPUs are available" in str(error) else one_line(error)
    return None


def _bfloat16() -> list[Finding]:
    has = {device: "yes" if _training_precision(device) == "bfloat16" else "no" for device in _devices()}
    return [Finding("bfloat16", "; ".join(f"{device}: {answer}" for device, answer in has.items()))]


def _training_precision(device: str) -> str:
    from leadline.members.train import resolve_precision

    return resolve_precision("auto", device)


def _packages() -> list[Finding]:
    triton, hnswlib, ray = (_package(name, install)[1] for name, install in PACKAGES.items())
    return [triton, _torchvision(), _faiss(), hnswlib, ray]


def _missing() -> list[Finding]:
    """Of the packages that Leadline always needs, those that are not installed."""
    needed = (metadata.requires("leadline") or []) if machine.version("leadline") else []
    names = [re.split(r"[^\w.-]", requirement)[0] for requirement in needed if "extra ==" not in requirement]
    missing = [name for name in names if machine.version(name) is None]
    return [Finding("missing", f"{', '.join(missing)}; {WITH_LEADLINE}")] if missing else []


def _package(name: str, install: str, get: Callable[[], Any] | None = None) -> tuple[Any, Finding]:
    """The package, None where it cannot be had, with its version or why not. get: imports it otherwise than usual."""
    if find_spec(name) is None:
        return None, Finding(name, f"not installed; {install}")
    try:
        package = get() if get else importlib.import_module(name)
    except Exception as error:  # of whatever kind: the package's own code runs, and libraries are loaded
        return None, Finding(name, f"cannot be imported ({one_line(error)}); {install}", is_broken=True)
    return package, Finding(name, str(getattr(package, "__version__", None) or machine.version(name)))


def _torchvision() -> Finding:
    torchvision, finding = _package("torchvision", WITH_LEADLINE, import_torchvision)
    if torchvision is None:
        return finding
    return Finding(finding.what, f"{finding.says}, {_nvjpeg()}")


def _nvjpeg() -> str:
    if "cuda" not in _devices():
        return "nvJPEG is for GPUs alone"
    from leadline.points.device_jpeg import fault_of_nvjpeg

    fault = fault_of_nvjpeg("cuda")
    return f"nvJPEG cannot be used ({fault})" if fault else "nvJPEG decodes on the GPU, where points.decoder is nvjpeg"


def _faiss() -> Finding:
    wheels = [name for name in WHEELS if machine.version(name)]
    if len(wheels) > 1:
        mend = f"pip uninstall {' '.join(wheels)}, then {ANY_FAISS}"
        return Finding("faiss", f"{' and '.join(wheels)} overwrite one another; {mend}", is_broken=True)
    faiss, finding = _package("faiss", ANY_FAISS)
    if faiss is None:
        return finding
    wheel = f"{wheels[0]}, {WHEELS[wheels[0]]}" if wheels else "of none of the wheels that Leadline names"
    gpus = f"it sees {faiss.get_num_gpus()} GPUs" if hasattr(faiss, "GpuIndexFlatL2") else "without GPU support"
    return Finding("faiss", f"{finding.says}, {wheel}; {gpus}")


def _device() -> list[Finding]:
    if "cuda" not in _devices():
        return [Finding("device", "cpu, for searches and networks")]
    where = "cuda in runs with engine.gpus, in leadline bench, and for tensors and models that lie there; else cpu"
    return [Finding("device", where)]


def _searches() -> list[Finding]:
    bank, *_ = _question()
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in precisions())
    loops = f"compiled loops, {torch.get_num_threads()} threads; products of the cheapest of {names} for the bank; "
    return [
        Finding(f"search on {device}", f"{loops if device == 'cpu' else ''}in the check: {bank_on(bank, device).plan}")
        for device in _devices()
    ]


def _training() -> list[Finding]:
    return [
        Finding(f"training on {device}", f"products in {_training_precision(device)}, where its precision is auto")
        for device in _devices()
    ]


def _methods() -> list[Finding]:
    findings = []
    for name in METHODS:
        try:
            usable_method(name)
        except LeadlineError as error:
            findings.append(Finding(name, str(error).removeprefix("method: ")))
        else:
            findings.append(Finding(name, "can be used"))
    return findings


def _check() -> list[Finding]:
    """Votes on the CPU against brute force in float64, and on a GPU against those on the CPU."""
    findings, expected, by = [], brute_force(*_question()), "by brute force in float64"
    for device in _devices():
        started = time.perf_counter()
        try:
            votes = _votes(device)
        except Exception as error:  # of whatever kind: a driver, a compiler or a library may be at fault
            findings.append(Finding(f"votes on {device}", f"fail ({one_line(error)})", is_broken=True))
            continue
        findings.append(compare(f"votes on {device}", votes, expected, by, time.perf_counter() - started))
        expected, by = votes, f"on {device}"
    if "cuda" not in _devices():
        findings.append(Finding("votes on cuda", "not checked: there is no GPU that torch can use"))
    return findings


def _question() -> tuple[Array, Array, Array, Array]:
    """Bank float32 [ROWS, WIDTH], labels int64 [ROWS], queries float32 [QUERIES, WIDTH] and own rows int64 [QUERIES].

    Half of the rows are copies of others, and half of the queries are rows that leave themselves out, so distances are
    equal; an offset is added that would leave products in float32 little to tell rows apart by.
    """
    random = np.random.default_rng(0)
    bank = random.standard_normal((ROWS, WIDTH))
    bank[ROWS // 2 :] = bank[random.integers(0, ROWS // 2, ROWS // 2)]
    own = np.full(QUERIES, -1)
    own[::2] = random.choice(ROWS, QUERIES // 2, replace=False)
    queries = np.where(own[:, None] >= 0, bank[own], random.standard_normal((QUERIES, WIDTH)))
    labels = random.integers(0, CLASSES, ROWS)
    return (bank + 100).astype(np.float32), labels, (queries + 100).astype(np.float32), own


def _votes(device: str) -> Array:
    """As `brute_force` counts them."""
    bank, labels, queries, own = _question()
    votes = knn_votes(bank, labels, queries, k=K, exclude=own, device=device)
    return np.stack([votes.winner, votes.winner_votes, votes.runner_up, votes.runner_up_votes], axis=1)


def brute_force(bank: Array, labels: Array, queries: Array, own: Array) -> Array:
    """Winner, its votes, runner-up and its votes, int64 [Q, 4], by numpy alone; arguments: what `_question` gives."""
    votes = np.empty((len(queries), 4), np.int64)
    for i, query in enumerate(queries):
        squares = np.square(query.astype(np.float64) - bank).sum(axis=1)
        if own[i] >= 0:
            squares[own[i]] = np.inf
        counts = np.bincount(labels[np.argsort(squares, kind="stable")[:K]], minlength=CLASSES)
        winner = counts.argmax()
        others = counts.copy()
        others[winner] = 0
        second = others.argmax()
        votes[i] = winner, counts[winner], second if others[second] else -1, others[second]
    return votes


def compare(what: str, votes: Array, expected: Array, by: str, seconds: float) -> Finding:
    """Whether votes [Q, 4] are the expected ones, and if not, how many are not."""
    differ = int((votes != expected).any(axis=1).sum())
    if differ:
        mend = "do not trust votes of this device, and report it"
        return Finding(what, f"{differ} of {len(votes)} differ from those {by}; {mend}", is_broken=True)
    return Finding(what, f"all {len(votes)} as {by}, {K} neighbours of {ROWS:,} rows; {seconds:.1f} s")


PARTS: dict[str, tuple[Callable[[], list[Finding]], ...]] = {
    "this machine offers": (_processor, _gpus, _torch, _bfloat16, _packages, _missing),
    "Leadline uses": (_device, _searches, _training),
    "methods": (_methods,),
    "check": (_check,),
}
