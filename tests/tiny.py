"""A run of digits that takes a second of work, and how its tables are compared."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from leadline.cluster.units import embed, train
from leadline.cluster.work import list_members, trained_together
from leadline.cluster.workbench import Workbench
from leadline.config import load_config
from leadline.store import RunDirectory

TINY = {
    "name": "tiny",
    "points": {"source": "digits"},
    "members": [
        {
            "architecture": "mlp",
            "parameters": {"width": 24, "depth": 3},
            "count": 3,
            "training": {"steps": 60, "batch": 64, "precision": "float32"},
        }
    ],
    "k": 10,
    "engine": {"workers": 2, "batch_size": 64, "shard_size": 256, "query_block": 300, "group_size": 2},
}

# Two members whose training is watched, and the first of them again with nobody looking on.
WATCHED = {
    **TINY,
    "name": "watched",
    "members": [
        {
            **TINY["members"][0],
            "count": 2,
            "training": {**TINY["members"][0]["training"], "learning": {"per_decade": 4, "per_epoch": 2}},
        },
        {**TINY["members"][0], "count": 1, "name": "plain"},
    ],
}

# All that a study asks for: corrupted labels, training that is watched, networks in the midst of it.
STUDIED = {
    "name": "studied",
    "points": {"source": "digits", "corrupt": {"share": 0.2}},
    "members": [
        {
            "architecture": "mlp",
            "parameters": {"width": 32, "depth": 3},
            "count": 4,
            "split": {"kind": "random", "share": 0.75},
            "at_steps": [0, 20],
            "training": {
                "steps": 300,
                "batch": 64,
                "precision": "float32",
                "learning": {"per_decade": 2, "per_epoch": 0},
            },
        }
    ],
    "k": 30,
    "engine": {"workers": 2, "batch_size": 64},
}

# What the manifest of a finished run has, for tests that write tables without computing them.
MADE_UP = {
    "name": "made up",
    "configuration": {},
    "data": {"fingerprint": "a", "points": 0},
    "fingerprint": "a",
    "versions": {},
    "files": {},
    "stages": {},
    "status": "complete",
}


def tables_of(run: Path) -> dict[str, pa.Table]:
    """Every table of a run, by its file's name, as columns of plain values (no metadata, which tells the sharding)."""
    return {
        str(path.relative_to(run)): pq.ParquetFile(path).read().replace_schema_metadata()
        for path in sorted(run.rglob("*.parquet"))
    }


def embedded(config, root):
    """A workbench on which all members are trained and embedded: (bench, its directory, members)."""
    config = load_config(config)
    bench, members = Workbench(config, {}, RunDirectory(root)), list_members(config)
    for some in trained_together(members):
        train(bench, some)
    for shard in range(len(bench.shards)):
        embed(bench, members, shard)
    return bench, bench.directory, members


def descendants(ancestor):
    """Processes below another, as Linux lists them: {id: command line}."""
    parents, commands = {}, {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
            commands[int(status.parent.name)] = (status.parent / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue  # it ended while we looked

    def is_below(process):
        while process in parents and process != ancestor:
            process = parents[process]
        return process == ancestor

    return {process: command for process, command in commands.items() if process != ancestor and is_below(process)}
