"""A run's directory: the one place that knows where things lie.

run.json                       what was asked, what it was made of, whether it is complete
drivers/NNNNNN.json            who computes it, or did so last
points.parquet members.parquet probes.parquet ensemble.parquet
depths/member=M/part-0.parquet votes/member=M/part-0.parquet
learning/member=M/part-0.parquet  of members whose training was watched, or logged elsewhere, where there are any
weights/M.safetensors          of every member, trained here or given
directions/M.safetensors       of the probes that are reduced by pca, where there are any
units/train/M.json             records of finished units; a unit without its record is done again
units/vote/M/PPP-BBBBB.npy     computed votes of one probe and query block, until the member is reduced
units/share/BBBBB.npy          neighbours at the input that all members share, until all are reduced
                               (of a bank that is cut, beside either: *.IofN.npy, neighbours in its part I of N)
units/trial/A/PPP.json         what a trial of methods measured in an architecture, until all are reduced
units/index/M/PPP.json         method of a probe, and fingerprint of its index, until the member is reduced
units/audit/M/PPP.npy          exact votes of the audited points, until the member is reduced
units/reduce/M.json
indexes/M/PPP.index            of approximate probes; kept where the configuration says so, with
indexes/M/PPP.npy              the rows of every bank, and indexes/input/000.npy the input of all points
logs/SESSION/session.json      of each driver that was at work: who it was, when it was last alive, how far it came
logs/SESSION/NNNNNNN.jsonl     what befell units, a line for each try (see `log`)
scratch/                       embeddings of the members in flight (or elsewhere: see `scratch`)
"""

import hashlib
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from leadline.errors import LeadlineError
from leadline.store.files import PART, digest, names, read_json, remove, write_json
from leadline.store.places import Place

BY_MEMBER = ("depths", "votes", "learning")
TABLES = ("points", "members", "probes", "ensemble", *BY_MEMBER)


class RunDirectory:
    """Paths and records of one run; holds no open files, so that it can be sent to an actor."""

    def __init__(self, root: Place, scratch: Path | None = None) -> None:
        """scratch: on a file system, since embeddings are mapped into memory; by default in the run's own directory,
        and for a run in an object store in this machine's temporary folder.
        """
        self.root = root
        in_root = root / "scratch" if isinstance(root, Path) else Path(tempfile.gettempdir()) / self.scratch_name
        self.scratch = scratch or in_root

    @property
    def scratch_name(self) -> str:
        """Of its folder where several runs have theirs."""
        return f"leadline-{hashlib.sha256(str(self.root).encode()).hexdigest()[:16]}"

    @property
    def manifest_path(self) -> Place:
        return self.root / "run.json"

    @property
    def drivers(self) -> Place:
        """Folder of the records of who computes the run (see `lease`)."""
        return self.root / "drivers"

    def table(self, name: str) -> Place:
        """The file of a table, or the folder of one that has a file for each member."""
        return self.root / (name if name in BY_MEMBER else f"{name}.parquet")

    def member_table(self, name: str, member: str) -> Place:
        """The file of depths, votes or learning of one member."""
        return self.table(name) / f"member={member}" / "part-0.parquet"

    def files(self, name: str) -> list[Path]:
        """A table's files on a file system, members in order of their names; none where there is no table."""
        assert isinstance(self.root, Path)
        return sorted(self.root.glob(f"{name}/*/*.parquet" if name in BY_MEMBER else f"{name}.parquet"))

    def has_table(self, name: str) -> bool:
        """Whether there is a table, of one member at least; the folder that a writer has made is none."""
        table = self.table(name)
        return any(True for _ in table.rglob("*.parquet")) if name in BY_MEMBER else table.is_file()

    def weights(self, member: str) -> Place:
        return self.root / "weights" / f"{member}.safetensors"

    def directions(self, member: str) -> Place:
        """Principal directions at a member's probes: fitted once, before any embedding."""
        return self.root / "directions" / f"{member}.safetensors"

    def record(self, stage: str, name: str) -> Place:
        """Of a finished unit of training or reduction."""
        return self.root / "units" / stage / f"{name}.json"

    def votes_part(self, member: str, probe: int, block: int) -> Place:
        return self.root / "units" / "vote" / member / f"{probe:03d}-{block:05d}.npy"

    def votes_cost(self, member: str, probe: int, block: int) -> Place:
        """Record of a finished unit of voting: written after its votes."""
        return self.votes_part(member, probe, block).with_suffix(".json")

    def part(self, owner: str, probe: int, part: int, parts: int, block: int) -> Place:
        """Neighbours of a query block in one part of a bank that is cut into so many.

        owner: the member, or "input" for the bank that all share.
        """
        whole = self.shared(block) if owner == "input" else self.votes_part(owner, probe, block)
        return whole.with_suffix(f".{part}of{parts}.npy")

    def part_cost(self, owner: str, probe: int, part: int, parts: int, block: int) -> Place:
        """Record of a finished unit of searching a part: written after its neighbours."""
        return self.part(owner, probe, part, parts, block).with_suffix(".json")

    def sampled(self, member: str, probe: int, block: int) -> Place:
        """Neighbours of the audited points among a unit's, as the run found them."""
        return self.votes_part(member, probe, block).with_suffix(".sample.npy")

    def trial(self, architecture: str, probe: int) -> Place:
        """Record of a finished trial of methods."""
        return self.root / "units" / "trial" / architecture / f"{probe:03d}.json"

    def index_record(self, member: str, probe: int) -> Place:
        """Record of a finished unit of indexing: written after the index, where there is one."""
        return self.root / "units" / "index" / member / f"{probe:03d}.json"

    def finished(self, stage: str, name: str = "") -> frozenset[str]:
        """Names of the files that units of voting for a member, or of sharing, have left."""
        folder = self.root / "units" / stage
        return names(folder / name if name else folder)

    def index(self, member: str, probe: int) -> Place:
        return self.indexes / member / f"{probe:03d}.index"

    def about_index(self, member: str, probe: int) -> Place:
        """What `Index.save` writes beside an index."""
        return self.index(member, probe).with_suffix(".index.json")

    def bank(self, member: str, probe: int) -> Place:
        """Kept rows of a member's bank; at the input, of all points for all members."""
        return self.indexes / ("input" if probe == 0 else member) / f"{probe:03d}.npy"

    @property
    def indexes(self) -> Place:
        return self.root / "indexes"

    def audited(self, member: str, probe: int) -> Place:
        """Exact winners of the audited points."""
        return self.root / "units" / "audit" / member / f"{probe:03d}.npy"

    def audit_record(self, member: str, probe: int) -> Place:
        """Record of a finished unit of the audit: written after its winners."""
        return self.audited(member, probe).with_suffix(".json")

    def shared(self, block: int) -> Place:
        """Common neighbours of a query block at the input."""
        return self.root / "units" / "share" / f"{block:05d}.npy"

    def shared_cost(self, block: int) -> Place:
        """Record of a finished unit of sharing: written after its neighbours."""
        return self.shared(block).with_suffix(".json")

    def embedding(self, member: str, probe: int, shard: int) -> Path:
        """One shard of one probe; the input is the same for every member and kept once."""
        owner = "input" if probe == 0 else member
        return self.scratch / owner / f"{probe:03d}-{shard:05d}.npy"

    def outputs(self, member: str, shard: int) -> Path:
        """What the logits of one shard say; written last, so it is the record of the embedding unit."""
        return self.scratch / member / f"outputs-{shard:05d}.npy"

    def session(self, session: str) -> Place:
        """Record of one driver's time with the run."""
        return self.root / "logs" / session / "session.json"

    def sessions(self) -> list[Place]:
        """The records of all sessions, oldest first."""
        return sorted((self.root / "logs").rglob("session.json"), key=str)

    def log(self, session: str, number: int) -> Place:
        return self.root / "logs" / session / f"{number:07d}.jsonl"

    def logs(self, session: str) -> list[Place]:
        """A session's files of units, oldest first."""
        return sorted((self.root / "logs" / session).rglob("*.jsonl"), key=str)

    def free_member(self, member: str, *, keep_indexes: bool) -> None:
        """Remove a reduced member's embeddings, its units of voting, indexing and audit, and its indexes or not."""
        for stage in ("vote", "index", "audit"):
            remove(self.root / "units" / stage / member)
        shutil.rmtree(self.scratch / member, ignore_errors=True)
        if not keep_indexes:
            remove(self.indexes / member)
            if isinstance(self.indexes, Path):
                with suppress(OSError):
                    self.indexes.rmdir()  # of the last one

    def free_shared(self) -> None:
        """Remove what members share, once all of them are reduced."""
        for stage in ("share", "trial"):
            remove(self.root / "units" / stage)

    def free_scratch(self) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)

    def read_manifest(self) -> dict[str, Any]:
        """Raises LeadlineError where the directory holds no run."""
        if not self.manifest_path.is_file():
            raise LeadlineError(f"{self.root}: no run here (run.json is missing); give the directory of a run")
        return read_json(self.manifest_path)

    def begin(self, manifest: dict[str, Any]) -> bool:
        """Write the manifest of a new run, or hold it against the one that is there; True when that one is complete.

        Raises LeadlineError as `status` does.
        """
        status = self.status(manifest)
        if status is None:
            write_json(self.manifest_path, {**manifest, "status": "running"})
        return status == "complete"

    def status(self, manifest: dict[str, Any]) -> str | None:
        """Of the run that is here; None where one can begin.

        `configuration`, `data` and `weights` must be those of the manifest: raises LeadlineError with the differences,
        and where the directory holds something else.
        """
        if not self.manifest_path.is_file():
            if self._holds_others():
                raise LeadlineError(f"{self.root}: not empty and no run; give --out a new directory or that of a run")
            return None
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
        return str(before.get("status"))

    def _holds_others(self) -> bool:
        """Whether there is anything but what a driver that was killed before the manifest may have left."""
        if isinstance(self.root, Path):
            inside = self.root.iterdir() if self.root.is_dir() else iter(())
            return any(not path.name.endswith(PART) and path != self.drivers for path in inside)
        return any(path.parent != self.drivers for path in self.root.rglob("*"))

    def digests(self) -> dict[str, str]:
        """SHA-256 of the finished tables, and of the banks and indexes that are kept, by path inside the run."""
        kept = [path for path in self.indexes.rglob("*") if path.is_file()]
        return {self.inside(path): digest(path) for path in sorted([*self.root.rglob("*.parquet"), *kept])}

    def inside(self, place: Place) -> str:
        """The path of a place inside the run."""
        return str(place).removeprefix(f"{self.root}/")

    def record_file(self, path: Place) -> None:
        """Record the digest of one more file of a complete run, or of one that has been replaced."""
        manifest = self.read_manifest()
        files = {**manifest["files"], self.inside(path): digest(path)}
        write_json(self.manifest_path, {**manifest, "files": files})

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
