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
# Of one with the votes of all probes: who asks for one point has all of its row group to decode.
ROWS_OF_VOTES = 16384


def write_table(path: Place, schema: pa.Schema, tables: Iterable[pa.Table], metadata: dict[str, str]) -> None:
    """Write tables one after another, a row group each at least, and rename the file when it is whole.

    metadata (fingerprints) goes into the file's schema. Pages carry checksums. Encodings and sizes: measured by
    `benchmarks/query.py`, see docs/decisions/0012-tables-for-questions.md.
    """
    schema = schema.with_metadata(metadata)
    encodings = {field.name: encoding for field in schema if (encoding := _encoding(field))}
    has_votes = any(pa.types.is_fixed_size_list(field.type) for field in schema)
    with (
        replacing(path) as beside,
        pq.ParquetWriter(
            beside,
            schema,
            compression="zstd",
            write_page_checksum=True,
            column_encoding=encodings,
            use_dictionary=[_leaf(field) for field in schema if field.name not in encodings],
        ) as writer,
    ):
        for table in tables:
            writer.write_table(table.cast(schema), row_group_size=ROWS_OF_VOTES if has_votes else ROWS)


def _encoding(field: pa.Field) -> str | None:
    """Of a column that is no dictionary: ids one after another, and a network's outputs, of which few are equal."""
    if field.name == "point_id":
        return "DELTA_BINARY_PACKED"
    return "BYTE_STREAM_SPLIT" if field.type == pa.float32() else None


def _leaf(field: pa.Field) -> str:
    """A column's name as Parquet writes it."""
    return f"{field.name}.list.element" if pa.types.is_nested(field.type) else field.name


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
