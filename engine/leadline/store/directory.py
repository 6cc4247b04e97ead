"""A run's directory: the one place that knows where things lie.

run.json                       what was asked, what it was made of, whether it is complete
points.parquet members.parquet probes.parquet ensemble.parquet
depths/member=M/part-0.parquet votes/member=M/part-0.parquet
weights/M.safetensors          of every member, trained here or given
directions/M.safetensors       of the probes that are reduced by pca, where there are any
units/train/M.json             records of finished units; a unit without its record is done again
units/vote/M/PPP-BBBBB.npy     computed votes of one probe and query block, until the member is reduced
units/share/BBBBB.npy          neighbours at the input that all members share, until all are reduced
units/trial/A/PPP.json         what a trial of methods measured in an architecture, until all are reduced
units/index/M/PPP.json         method of a probe, and fingerprint of its index, until the member is reduced
units/audit/M/PPP.npy          exact votes of the audited points, until the member is reduced
units/reduce/M.json
indexes/M/PPP.index            of approximate probes; kept where the configuration says so, with
indexes/M/PPP.npy              the rows of every bank, and indexes/input/000.npy the input of all points
scratch/                       embeddings of the members in flight (or elsewhere: see `scratch`)
"""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from leadline.errors import LeadlineError
from leadline.store.files import PART, digest, read_json, write_json

BY_MEMBER = ("depths", "votes")
TABLES = ("points", "members", "probes", "ensemble", *BY_MEMBER)


class RunDirectory:
    """Paths and records of one run; holds no open files, so that it can be sent to an actor."""

    def __init__(self, root: Path, scratch: Path | None = None) -> None:
        self.root = root
        self.scratch = scratch or root / "scratch"

    @property
    def manifest_path(self) -> Path:
        return self.root / "run.json"

    def table(self, name: str) -> Path:
        """The file of a table, or the folder of one that has a file for each member."""
        return self.root / (name if name in BY_MEMBER else f"{name}.parquet")

    def member_table(self, name: str, member: str) -> Path:
        """The file of depths or votes of one member."""
        return self.table(name) / f"member={member}" / "part-0.parquet"

    def files(self, name: str) -> str:
        """A table's files, as a glob."""
        return str(self.table(name) / "*" / "*.parquet" if name in BY_MEMBER else self.table(name))

    def weights(self, member: str) -> Path:
        return self.root / "weights" / f"{member}.safetensors"

    def directions(self, member: str) -> Path:
        """Principal directions at a member's probes: fitted once, before any embedding."""
        return self.root / "directions" / f"{member}.safetensors"

    def record(self, stage: str, name: str) -> Path:
        """Of a finished unit of training or reduction."""
        return self.root / "units" / stage / f"{name}.json"

    def votes_part(self, member: str, probe: int, block: int) -> Path:
        return self.root / "units" / "vote" / member / f"{probe:03d}-{block:05d}.npy"

    def votes_cost(self, member: str, probe: int, block: int) -> Path:
        """Record of a finished unit of voting: written after its votes."""
        return self.votes_part(member, probe, block).with_suffix(".json")

    def part(self, member: str, probe: int, part: int, parts: int, block: int) -> Path:
        """Neighbours of a query block in one part of a bank that is cut into so many."""
        return self.votes_part(member, probe, block).with_suffix(f".{part}of{parts}.npy")

    def part_cost(self, member: str, probe: int, part: int, parts: int, block: int) -> Path:
        """Record of a finished unit of searching a part: written after its neighbours."""
        return self.part(member, probe, part, parts, block).with_suffix(".json")

    def sampled(self, member: str, probe: int, block: int) -> Path:
        """Neighbours of the audited points among a unit's, as the run found them."""
        return self.votes_part(member, probe, block).with_suffix(".sample.npy")

    def trial(self, architecture: str, probe: int) -> Path:
        """Record of a finished trial of methods."""
        return self.root / "units" / "trial" / architecture / f"{probe:03d}.json"

    def index_record(self, member: str, probe: int) -> Path:
        """Record of a finished unit of indexing: written after the index, where there is one."""
        return self.root / "units" / "index" / member / f"{probe:03d}.json"

    def index(self, member: str, probe: int) -> Path:
        return self.indexes / member / f"{probe:03d}.index"

    def bank(self, member: str, probe: int) -> Path:
        """Kept rows of a member's bank; at the input, of all points for all members."""
        return self.indexes / ("input" if probe == 0 else member) / f"{probe:03d}.npy"

    @property
    def indexes(self) -> Path:
        return self.root / "indexes"

    def audited(self, member: str, probe: int) -> Path:
        """Exact winners of the audited points."""
        return self.root / "units" / "audit" / member / f"{probe:03d}.npy"

    def audit_record(self, member: str, probe: int) -> Path:
        """Record of a finished unit of the audit: written after its winners."""
        return self.audited(member, probe).with_suffix(".json")

    def shared(self, block: int) -> Path:
        """Common neighbours of a query block at the input."""
        return self.root / "units" / "share" / f"{block:05d}.npy"

    def shared_cost(self, block: int) -> Path:
        """Record of a finished unit of sharing: written after its neighbours."""
        return self.shared(block).with_suffix(".json")

    def embedding(self, member: str, probe: int, shard: int) -> Path:
        """One shard of one probe; the input is the same for every member and kept once."""
        owner = "input" if probe == 0 else member
        return self.scratch / owner / f"{probe:03d}-{shard:05d}.npy"

    def outputs(self, member: str, shard: int) -> Path:
        """What the logits of one shard say; written last, so it is the record of the embedding unit."""
        return self.scratch / member / f"outputs-{shard:05d}.npy"

    def free_member(self, member: str, *, keep_indexes: bool) -> None:
        """Remove a reduced member's embeddings, its units of voting, indexing and audit, and its indexes or not."""
        for stage in ("vote", "index", "audit"):
            shutil.rmtree(self.root / "units" / stage / member, ignore_errors=True)
        shutil.rmtree(self.scratch / member, ignore_errors=True)
        if not keep_indexes:
            shutil.rmtree(self.indexes / member, ignore_errors=True)
            with suppress(OSError):
                self.indexes.rmdir()  # of the last one

    def free_shared(self) -> None:
        """Remove what members share, once all of them are reduced."""
        for stage in ("share", "trial"):
            shutil.rmtree(self.root / "units" / stage, ignore_errors=True)

    def free_scratch(self) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)

    def read_manifest(self) -> dict[str, Any]:
        """Raises LeadlineError where the directory holds no run."""
        if not self.manifest_path.is_file():
            raise LeadlineError(f"{self.root}: no run here (run.json is missing); give the directory of a run")
        return read_json(self.manifest_path)

    def begin(self, manifest: dict[str, Any]) -> bool:
        """Write the manifest of a new run, or hold it against the one that is there; True when that one is complete.

        `configuration`, `data` and `weights` must be as they were: raises LeadlineError with the differences.
        """
        if not self.manifest_path.is_file():
            if self.root.is_dir() and any(not path.name.endswith(PART) for path in self.root.iterdir()):
                raise LeadlineError(f"{self.root}: not empty and no run; give --out a new directory or that of a run")
            write_json(self.manifest_path, {**manifest, "status": "running"})
            return False
        before = self.read_manifest()
        changes = [
            change
            for key in ("configuration", "data", "weights")
            for change in _differences(key, before.get(key), manifest[key])
        ]
        if changes:
            raise LeadlineError(
                f"{self.root}: holds another run: {'; '.join(changes)}; give --out a new directory, or undo the change"
            )
        return before.get("status") == "complete"

    def digests(self) -> dict[str, str]:
        """SHA-256 of the finished tables, and of the banks and indexes that are kept, by path inside the run."""
        kept = [path for path in self.indexes.rglob("*") if path.is_file()]
        return {
            str(path.relative_to(self.root)): digest(path) for path in sorted([*self.root.rglob("*.parquet"), *kept])
        }

    def complete(self, files: dict[str, str], stages: dict[str, Any]) -> None:
        """Record the digests of the finished files, and what the stages took."""
        write_json(self.manifest_path, {**self.read_manifest(), "status": "complete", "files": files, "stages": stages})


def _differences(key: str, before: Any, now: Any) -> list[str]:
    """The leaves at which two JSON values differ, as text."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            line
            for name in sorted(before.keys() | now.keys())
            for line in _differences(f"{key}.{name}", before.get(name), now.get(name))
        ]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [
            line for i, pair in enumerate(zip(before, now, strict=True)) for line in _differences(f"{key}.{i}", *pair)
        ]
    return [] if before == now else [f"{key} was {before!r}, is now {now!r}"]
