"""A run of digits that takes a second of work, and how its tables are compared."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

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


def tables_of(run: Path) -> dict[str, pa.Table]:
    """Every table of a run, by its file's name, as columns of plain values (no metadata, which tells the sharding)."""
    return {
        str(path.relative_to(run)): pq.ParquetFile(path).read().replace_schema_metadata()
        for path in sorted(run.rglob("*.parquet"))
    }
