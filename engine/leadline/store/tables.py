"""Parquet files of a run: how they are written, and read back with their checksums held against them."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from leadline.errors import LeadlineError, one_line
from leadline.knn.arrays import Array
from leadline.store.files import replacing
from leadline.store.places import Place

ROWS = 65536  # of a row group: the points that are in memory together when tables are combined


def write_table(path: Place, schema: pa.Schema, tables: Iterable[pa.Table], metadata: dict[str, str]) -> None:
    """Write tables one after another, a row group each at least, and rename the file when it is whole.

    metadata (fingerprints) goes into the file's schema. Pages carry checksums.
    """
    schema = schema.with_metadata(metadata)
    with (
        replacing(path) as beside,
        pq.ParquetWriter(beside, schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        for table in tables:
            writer.write_table(table.cast(schema), row_group_size=ROWS)


def nullable(values: Array) -> pa.Array:
    """NaN, which says that there is nothing to take a mean of, as null."""
    return pa.array(values, mask=np.isnan(values) if values.dtype.kind == "f" else None)


def open_table(path: Place) -> pq.ParquetFile:
    """Raises LeadlineError for a file that is not there or is no Parquet."""
    try:
        source = path if isinstance(path, Path) else path.open("rb")
        return pq.ParquetFile(source, page_checksum_verification=True)
    except FileNotFoundError:
        raise LeadlineError(f"{path}: not there; run the same command again to make it") from None
    except (OSError, pa.ArrowException) as error:
        raise damaged(path, error) from None


def read_table(path: Place, row_group: int | None = None) -> pa.Table:
    """A whole table or one of its row groups. Raises LeadlineError for a file that is not there or is damaged."""
    with open_table(path) as file:
        try:
            return file.read() if row_group is None else file.read_row_group(row_group)
        except (OSError, pa.ArrowException) as error:
            raise damaged(path, error) from None


def damaged(path: Place, error: Exception) -> LeadlineError:
    return LeadlineError(f"{path}: damaged ({one_line(error)}); delete it and run the same command again")
