"""Every command line in the pages and files: commands and options are there, and so are the files that they name.

Leadline's own are parsed by Leadline, Ray's by the Ray that is installed.
"""

import re
import shlex
from importlib.metadata import version
from pathlib import Path

import pytest
import typer.main
import yaml
from ray._private import ray_constants
from ray.scripts.scripts import cli as ray_cli

from leadline.cli import app
from leadline.config import preset_names

# Configurations that are not here: a placeholder, a variable, a file on shared storage, one that a study writes.
OF_THE_READER = r"[A-Z]+|\$\w+|/shared/.*|study/.*"
ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "deploy").rglob("*.md"))]
FILES = sorted(path for path in (ROOT / "deploy").rglob("*") if path.suffix in (".yaml", ".sbatch"))
JOBS = {
    "compute_depths.py": ["run"],
    "train_ensemble.py": ["run"],
    "bench_knn.py": ["bench", "knn"],
}  # what of leadline they are
ENDS = {"&&", "||", ";", "|", ">", ">>", "&"}
leadline_cli = typer.main.get_command(app)


def lines_of(path):
    """The command lines of a page or file: blocks without a language, entry points, commands in lists, the script."""
    text = path.read_text()
    if path.suffix == ".yaml":
        lines = list(commands_in(yaml.safe_load(text)))
    elif path.suffix == ".sbatch":
        lines = re.sub(r"\$SLURM_\w+", "2", text).replace("\\\n", " ").splitlines()  # Slurm's are numbers
    else:
        blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        lines = "\n".join(block for language, block in blocks if not language).replace("\\\n", " ").splitlines()
    return [line for line in lines if not line.lstrip().startswith("#")]


def commands_in(node):
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "entrypoint":
                yield value
            elif key.endswith("_commands"):
                yield from value
            else:
                yield from commands_in(value)
    elif isinstance(node, list):
        for part in node:
            yield from commands_in(part)


def calls(line):
    """(program, arguments) of all that a line runs of Leadline and Ray."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return  # output that a page shows, or half of a quotation
    starts = [i for i, word in enumerate(words) if is_program(words, i, word)]
    for start in starts:
        end = next((i for i in range(start, len(words)) if words[i] in ENDS or words[i].endswith(";")), len(words))
        if words[start] == "python":
            yield Path(words[start + 1]).name, words[start + 2 : end]
        elif words[start].endswith(".sbatch"):
            config, out, *options = words[start + 1 : end]
            yield "compute_depths.py", [config, "--out", out, *options]
        else:
            yield words[start], words[start + 1 : end]


def is_program(words, i, word):
    before = words[i - 1] if i else ""
    first = not before or before in ENDS or before == "--" or re.search(r"^leadline:|^--.*=|;$", before)
    if word == "python":
        return bool(first) and i + 1 < len(words) and re.search(r"(^|/)jobs/\w+\.py$", words[i + 1])
    return (bool(first) and word in ("leadline", "ray")) or (words[0] == "sbatch" and word.endswith(".sbatch"))


def every_call():
    return [
        pytest.param(program, arguments, id=f"{path.relative_to(ROOT)}: {' '.join([program, *arguments])[:70]}")
        for path in (*PAGES, *FILES)
        for line in lines_of(path)
        for program, arguments in calls(line)
    ]


def parse(group, name, arguments):
    """Parse as the program does, without running it: raises where the program would refuse."""
    command = group
    while hasattr(command, "commands"):
        assert arguments, f"{name}: a subcommand is missing"
        name, *arguments = arguments
        assert name in command.commands, f"{name}: no such command; there are {', '.join(command.commands)}"
        command = command.commands[name]
    command.make_context(name, list(arguments))
    return command, arguments


@pytest.mark.parametrize(("program", "arguments"), every_call())
def test_a_command_is_taken(program, arguments):
    if program == "ray":
        command, _ = parse(ray_cli, program, arguments)
        if "symmetric" in command.name:
            own = arguments[1 : arguments.index("--")]
            parse_start = [word for word in own if word.split("=")[0] not in ("--address", "--min-nodes")]
            options = {name for param in ray_cli.commands["start"].params for name in param.opts}
            assert {word.split("=")[0] for word in parse_start if word.startswith("--")} <= options
        return
    if program != "leadline":
        assert (ROOT / "jobs" / program).is_file()
        assert any(word.startswith("--out") for word in arguments)
        arguments = [*JOBS[program], *arguments]
    # What the shell would put in for a variable or its arguments.
    _, given = parse(leadline_cli, "leadline", [word for word in arguments if word != "$@"])
    if arguments[0] == "run":
        config = given[0]
        path = ROOT / config.removeprefix("/opt/leadline/")
        assert config in preset_names() or path.is_file() or re.fullmatch(OF_THE_READER, config), config


def spans():
    """Commands within sentences, often without their arguments."""
    return [
        pytest.param(words, id=f"{path.relative_to(ROOT)}: {' '.join(words)[:70]}")
        for path in PAGES
        for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"(?ms)^```.*?^```$", "", path.read_text()))
        if (words := span.split())[0] in ("leadline", "ray") and len(words) > 1
    ]


@pytest.mark.parametrize("words", spans())
def test_a_command_within_a_sentence_is_there(words):
    command, rest = {"leadline": leadline_cli, "ray": ray_cli}[words[0]], words[1:]
    while hasattr(command, "commands"):
        command, rest = command.commands[rest[0]], rest[1:]
    options = {name for param in command.params for name in param.opts}
    assert {word for word in rest if word.startswith("--")} <= options


def test_commands_are_found():
    """So that the test above is not empty where pages change their form."""
    found = [(param.values[0], *param.values[1][:2]) for param in every_call()]
    for expected in (("leadline", "run"), ("leadline", "verify"), ("ray", "job", "submit"), ("ray", "up"),
                     ("ray", "start"), ("ray", "symmetric-run"), ("compute_depths.py",)):  # fmt: skip
        assert [call for call in found if call[: len(expected)] == expected], expected
    assert len(found) > 30


@pytest.mark.parametrize(
    "line",
    [
        "leadline rum digits",
        "leadline run digits --outt here",
        "ray job submit --adress http://localhost:8265 -- python jobs/compute_depths.py digits --out here",
        "ray job submit -- python jobs/compute_depth.py digits --out here",
        "ray job submit -- python jobs/compute_depths.py digits",
        "ray job submit -- python /opt/leadline/jobs/compute_depths.py cifar11 --out /shared/runs/mine",
        "srun --cpus-per-task=2 ray symmetric-run --address a:1 --num-cpu=2 -- leadline verify here",
    ],
)
def test_wrong_commands_are_found(line):
    with pytest.raises(Exception):  # noqa: B017 (each parser has errors of its own)
        for program, arguments in calls(line):
            test_a_command_is_taken(program, arguments)


@pytest.mark.parametrize("path", [*PAGES, *FILES], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_are_there(path):
    folders = r"(?<![\w/.])(?:/opt/leadline/)?((?:deploy|jobs|benchmarks|docs|tests)/[\w./-]*\w)"
    named = re.findall(folders, path.read_text())
    missing = [name for name in named if not (ROOT / name).exists() and not list(ROOT.glob(f"{name}*"))]
    assert missing == []


@pytest.mark.parametrize("path", [*PAGES, *FILES], ids=lambda path: str(path.relative_to(ROOT)))
def test_ports_and_versions_are_rays(path):
    text = path.read_text()
    assert set(re.findall(r"localhost:(\d+)|HEAD:(\d+)", text)) <= {("8265", ""), ("", "8265")}
    assert ray_constants.DEFAULT_DASHBOARD_PORT == 8265 and ray_constants.DEFAULT_PORT == 6379
    pinned = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert pinned == version("ray")
    assert set(re.findall(r"\bRay (\d+\.\d+(?:\.\d+)?)\b", text)) <= {pinned, pinned.rpartition(".")[0]}
    assert set(re.findall(r'rayVersion: "(.*)"', text)) <= {pinned}
    ports = re.findall(r"name: ([\w-]+), containerPort: (\d+)", text)
    assert set(ports) <= {("gcs-server", "6379"), ("dashboard", "8265")}
