"""A study's tables, kept in its folder analysis by analysis: one can be made again while the others stay."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

from leadline.query import Run
from leadline.store.tables import read_table, write_table

OF_RUN = b"leadline.run"


def keep_tables(run: Run, folder: Path, analysis: str, tables: Mapping[str, pa.Table]) -> None:
    """Keep the tables of one analysis, in place of those that it gave before."""
    place = folder / analysis
    for name, table in tables.items():
        write_table(place / f"{name}.parquet", table.schema, [table], {OF_RUN.decode(): _stamp(run)})
    for old in place.glob("*.parquet"):
        if old.stem not in tables:
            old.unlink()


def kept_tables(run: Run, folder: Path) -> dict[str, pa.Table]:
    """All that were kept of this run as it is now, by name; of other runs, and of it before it changed, none.

    Raises LeadlineError for a file that is damaged.
    """
    found = {}
    for place in sorted(folder.glob("*/*.parquet")):
        table = read_table(place)
        if (table.schema.metadata or {}).get(OF_RUN, b"").decode() == _stamp(run):
            found[place.stem] = table.replace_schema_metadata()
    return found


def _stamp(run: Run) -> str:
    """Of what the run was asked for, and the contents of its tables."""
    told = {key: run.manifest[key] for key in ("fingerprint", "data", "files")}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
