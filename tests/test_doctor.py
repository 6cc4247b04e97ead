"""What `leadline doctor` says of this machine, and of real folders of packages that are broken."""

import os
import subprocess
import sys
from importlib import metadata

import numpy as np
import pytest
import torch

from leadline import doctor
from leadline.knn.methods import METHODS

WHEELS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs")


def examined(*folders, before="pass", path=""):
    """(exit code, standard output on one line, standard error) of `leadline doctor`; the folders come first for Python.

    before: Python that runs first; path: a folder with programs.
    """
    python = os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])
    programs = os.pathsep.join([*filter(None, [str(path)]), os.environ["PATH"]])
    ran = subprocess.run(
        [sys.executable, "-c", f"import sys; {before}; from leadline.cli import main; main()", "doctor"],
        env={**os.environ, "PYTHONPATH": python, "PATH": programs}, capture_output=True, text=True,
    )  # fmt: skip
    return ran.returncode, " ".join(ran.stdout.split()), ran.stderr


def package(folder, name, text):
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(text)
    return folder


def record(folder, name, more=""):
    """Of an installed package."""
    place = folder / f"{name.replace('-', '_')}-1.15.1.dist-info"
    place.mkdir()
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.15.1\n{more}")


def program(folder, text):
    folder.mkdir()
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{text}\n")
    (folder / "nvidia-smi").chmod(0o755)
    return folder


def the_line(err):
    """The one line on standard error."""
    assert err.startswith("leadline: ") and err.count("\n") == 1, err
    return err


def test_this_machine_is_told_and_its_votes_are_right():
    code, out, err = examined()
    assert code == 0, err
    assert err == ""
    assert f"{os.cpu_count()} cores" in out and f"torch {torch.__version__}, built for" in out
    assert f"ray {metadata.version('ray')}" in out and "search on cpu compiled loops" in out
    assert "missing" not in out
    assert all(f" {name} " in out for name in METHODS)
    assert "votes on cpu all 256 as by brute force in float64" in out
    for wheel in WHEELS:
        try:
            assert f"faiss {metadata.version(wheel)}, {wheel}" in out
        except metadata.PackageNotFoundError:
            assert f", {wheel}," not in out
    gpu = "all 256 as on cpu" if torch.cuda.is_available() else "not checked: there is no GPU that torch can use"
    assert f"votes on cuda {gpu}" in out


def test_all_that_is_broken_is_in_one_line_and_the_rest_is_looked_at(tmp_path):
    package(tmp_path, "faiss", "raise ImportError('libcublas.so.12: cannot open shared object file')")
    package(tmp_path, "hnswlib", "raise OSError('libgomp.so.1: no such file')")
    smi = program(tmp_path / "bin", "echo 'NVIDIA-SMI has failed'; exit 9")
    code, out, err = examined(tmp_path, path=smi)
    line = the_line(err)
    assert code == 2
    assert "faiss: cannot be imported (ImportError: libcublas.so.12: cannot open shared object file); pip inst" in line
    assert "hnswlib: cannot be imported (OSError: libgomp.so.1: no such file); pip install 'leadline[hnswlib]'" in line
    assert "driver: nvidia-smi ends with code 9 (NVIDIA-SMI has failed)" in line
    assert "hnsw needs faiss (ImportError: libcublas.so.12: cannot open shared object file)" in out
    assert "hnswlib needs hnswlib (OSError: libgomp.so.1: no such file)" in out
    assert "exact can be used" in out and "votes on cpu all 256 as by brute force" in out


def test_packages_that_are_missing_or_without_gpu_support_are_no_fault(tmp_path):
    package(tmp_path, "faiss", "__version__ = '9.9'")
    needed = ("torch>=2", "nowhere>=1.2", "never; extra == 'never'")
    record(tmp_path, "leadline", "".join(f"Requires-Dist: {requirement}\n" for requirement in needed))
    smi = program(tmp_path / "bin", "echo 'NVIDIA H100, 81559 MiB, 580.65.06'")
    code, out, err = examined(tmp_path, before="sys.modules['hnswlib'] = sys.modules['ray'] = None", path=smi)
    assert code == 0, err
    assert "hnswlib not installed; pip install 'leadline[hnswlib]'" in out
    assert "ray not installed; pip install leadline" in out
    assert "without GPU support" in out and "faiss 9.9" in out
    assert "gpu-flat is not in the faiss that is installed; pip install 'leadline[cuda12]' in its place" in out
    assert "cagra is not in the faiss that is installed; pip install 'leadline[cuda13]' in its place" in out
    assert "missing nowhere; pip install leadline" in out
    assert "driver NVIDIA H100, 81559 MiB, 580.65.06" in out
    if torch.version.cuda is None:
        assert "GPU not used: torch is built for the CPU" in out


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built for CUDA")
def test_two_wheels_of_faiss_and_a_torch_that_cannot_use_its_cuda(tmp_path):
    """The wheels by their records alone; the torch says that it is built for CUDA, and is not."""
    for wheel in WHEELS[:2]:
        record(tmp_path, wheel)
    package(tmp_path, "faiss", "class GpuIndexFlatL2: pass\ndef get_num_gpus(): return 0")
    claimed = "import torch; torch.version.cuda = '13.0'"
    code, out, _ = examined(tmp_path, before=claimed)
    assert f"torch {torch.__version__}, built for CUDA 13.0, of which there is none here" in out
    smi = program(tmp_path / "bin", "echo 'NVIDIA H100, 81559 MiB, 580.65.06'")
    code, out, err = examined(tmp_path, before=claimed, path=smi)
    line = the_line(err)
    assert code == 2
    assert f"torch: {torch.__version__}, built for CUDA 13.0, which it cannot use (" in line
    assert "faiss: faiss-cpu and faiss-gpu overwrite one another; pip uninstall faiss-cpu faiss-gpu, then" in line
    assert "gpu-ivf-pq needs a GPU, and faiss sees none" in out


# What is compared


def test_brute_force_is_a_slow_loop():
    random = np.random.default_rng(3)
    bank = random.integers(0, 3, (400, 5)).astype(np.float32)  # many distances are equal
    labels, queries = random.integers(0, doctor.CLASSES, 400), bank[:30]
    own = np.where(np.arange(30) % 2, np.arange(30), -1)
    for query, without, counted in zip(queries, own, doctor.brute_force(bank, labels, queries, own), strict=True):
        ranked = sorted((sum((a - b) ** 2 for a, b in zip(query, row, strict=True)), i) for i, row in enumerate(bank))
        near = [labels[i] for _, i in ranked if i != without][: doctor.K]
        (first, n), (second, m) = sorted(((c, near.count(c)) for c in set(near)), key=lambda c: (-c[1], c[0]))[:2]
        assert counted.tolist() == [first, n, second, m]


def test_votes_that_differ_are_counted_and_are_a_fault():
    votes = np.zeros((9, 4), np.int64)
    other = votes.copy()
    other[[2, 5], [0, 3]] = 1
    assert not doctor.compare("cuda", votes, votes, "on cpu", 1.0).is_broken
    finding = doctor.compare("cuda", other, votes, "on cpu", 1.0)
    assert finding.is_broken and "2 of 9 differ from those on cpu" in finding.says
