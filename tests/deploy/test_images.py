"""The Dockerfiles, as far as that goes without a builder: instructions, what they copy, what they install."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILES = sorted((ROOT / "deploy" / "docker").glob("Dockerfile.*"))
INSTRUCTIONS = {"FROM", "RUN", "ENV", "WORKDIR", "ARG", "COPY", "CMD"}


def instructions(path):
    """(instruction, its text) in order, comments and continued lines as a builder reads them."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def copied(path):
    """(source, target) of all that is copied into the image."""
    pairs = []
    for name, text in instructions(path):
        if name == "COPY":
            *sources, target = text.split()
            pairs += [(source, target) for source in sources]
    return pairs


@pytest.fixture(params=DOCKERFILES, ids=lambda path: path.suffix[1:])
def path(request):
    return request.param


def test_there_is_one_without_and_one_with_cuda():
    assert [path.name for path in DOCKERFILES] == ["Dockerfile.cpu", "Dockerfile.cuda"]


def test_instructions(path):
    found = instructions(path)
    assert {name for name, _ in found} <= INSTRUCTIONS
    minor = re.fullmatch(r">=(3\.\d+)", PROJECT["requires-python"])[1]
    assert found[0] == ("FROM", f"python:{minor}-slim")
    assert dict(found)["WORKDIR"] == "/opt/leadline"  # where the manifests look for jobs/
    assert found[-1][0] == "CMD"


def test_what_is_copied_is_in_the_repository(path):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    if not tracked:
        pytest.skip("no git repository")
    for source, target in copied(path):
        assert any(name == source or name.startswith(f"{source}/") for name in tracked), source
        assert target in ("./", source)


def test_everything_is_installed_at_the_tested_versions(path):
    there, installed = set(), []
    for name, text in instructions(path):
        if name == "COPY":
            there.update(text.split()[:-1])
        elif "pip" in text:
            assert "pip install --no-cache-dir --constraint constraints.txt " in text
            assert "constraints.txt" in there
            installed += text.split("constraints.txt ")[1].replace('"', "").split()
    *first, project = installed
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert set(first) <= pinned.keys()
    extras = re.fullmatch(r"\.(?:\[([a-z0-9,]+)\])?", project)[1]
    assert set((extras or "").split(",")) - {""} <= PROJECT["optional-dependencies"].keys()


def test_the_project_builds_from_what_is_copied(path, tmp_path):
    """pip's own build of the package, in a folder that has these files and no others."""
    pytest.importorskip("setuptools", "77", reason="the build's own requirement, without the network")
    unwanted = shutil.ignore_patterns("*.egg-info", "__pycache__")
    for source, _ in copied(path):
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, tmp_path / source, ignore=unwanted)
        else:
            shutil.copy(ROOT / source, tmp_path / source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "."]
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("leadline-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(module.relative_to(ROOT / "engine")) for module in (ROOT / "engine").rglob("*.py")}
    presets = {f"leadline/presets/{preset.name}" for preset in (ROOT / "engine/leadline/presets").glob("*.yaml")}
    assert modules | presets <= set(names)


def test_tags_are_of_this_version():
    """Everywhere in deploy/: the project's version, and a Dockerfile of that name."""
    texts = [path.read_text() for path in (ROOT / "deploy").rglob("*") if path.is_file()]
    tags = {tag for text in texts for tag in re.findall(r"\bleadline:([0-9][\w.-]*)", text)}
    assert tags == {f"{PROJECT['version']}-{path.suffix[1:]}" for path in DOCKERFILES}
