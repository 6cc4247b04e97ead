"""Parquet files with a column of image bytes or of numeric lists, and a column of integer labels."""

import json
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, takewhile
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from leadline.errors import LeadlineError, one_line
from leadline.points.source import MAX_CLASSES, EncodedInputs, Inputs, Source, checked_labels, numbered_names, two_parts

if TYPE_CHECKING:
    from leadline.config import ParquetPoints

# Stored bytes that are kept: CIFAR-10 stays in memory, ImageNet does not.
CACHE_BYTES = 1 << 30

_BYTES, _STRUCT = "image bytes", "struct of image bytes"


@dataclass(frozen=True)
class _File:
    """A Parquet file as its footer describes it; `name` is its path from the root of its part."""

    path: Path
    name: str
    schema: Any
    group_rows: tuple[int, ...]

    def where(self, row: int) -> str:
        return f"{self.path} row {row}"


def open_parquet(config: "ParquetPoints", cache_bytes: int = CACHE_BYTES) -> Source:
    """Points in the order of rows, files sorted by their path; labels and names are read now, inputs when asked for.

    Column `input`: image bytes, or a struct of bytes and path as Hugging Face stores images, or lists of numbers, all
    of one length. Column `label`: integers ≥ 0; their names come from the schema's metadata, either `huggingface`
    (ClassLabel) or `label_names` (separated by commas), or else are the numbers. Keys: column `key`, or the image's
    path, or file:row. Raises LeadlineError that names the file, and the column or row, that will not do.

    Inputs are read a row group at a time; the groups used last are kept, up to `cache_bytes` of stored bytes and at
    least one group.
    """
    train = _part(config.train, "points.train")
    test = [] if config.test is None else _part(config.test, "points.test")
    _refuse_shared(train, test)
    files = train + test
    layout = _layout(files, config.input)
    names = _label_names(files, config.label)
    labels = np.concatenate([_labels(file, config.label, len(names) if names else MAX_CLASSES) for file in files])
    n_train = sum(sum(file.group_rows) for file in train)
    return Source(
        inputs=_inputs(files, config.input, layout, cache_bytes),
        labels=labels,
        parts=two_parts(n_train, len(labels) - n_train),
        keys=[key for file in files for key in _keys(file, config)],
        label_names=names or numbered_names(labels),
    )


def _inputs(files: list[_File], column: str, layout: str, cache_bytes: int) -> Inputs:
    if layout == _BYTES:
        return _Images(_RowGroups(files, column, _bytes, cache_bytes))
    if layout == _STRUCT:
        return _Images(_RowGroups(files, f"{column}.bytes", _bytes, cache_bytes))
    return _Numbers(_RowGroups(files, column, _rows, cache_bytes), layout)


class _RowGroups:
    """A column's row groups, counted through all files and loaded when asked for.

    `convert` makes what is kept of a group from its Arrow column and a function from row to its name for messages.
    """

    def __init__(
        self, files: list[_File], column: str, convert: Callable[[Any, Callable[[int], str]], Any], limit: int
    ) -> None:
        self._column = column
        self._convert = convert
        self._limit = limit
        self._groups = [
            (file, group, first_row)
            for file in files
            for group, first_row in zip(
                range(len(file.group_rows)), accumulate(file.group_rows, initial=0), strict=False
            )
        ]
        self._first_ids = list(accumulate((file.group_rows[group] for file, group, _ in self._groups), initial=0))[:-1]
        self._kept = OrderedDict[int, Any]()
        self._kept_bytes = 0
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._groups)

    def place(self, point_id: int) -> tuple[int, int]:
        """The group of a point and its row in the group."""
        group = bisect_right(self._first_ids, point_id) - 1
        return group, point_id - self._first_ids[group]

    def where(self, group: int, row: int) -> str:
        file, _, first_row = self._groups[group]
        return file.where(first_row + row)

    def get(self, group: int) -> Any:
        with self._lock:  # threads that read at once load a group once
            if group in self._kept:
                self._kept.move_to_end(group)
                return self._kept[group]
            loaded = self._kept[group] = self._load(group)
            self._kept_bytes += loaded.nbytes
            while self._kept_bytes > self._limit and len(self._kept) > 1:
                _, oldest = self._kept.popitem(last=False)
                self._kept_bytes -= oldest.nbytes
            return loaded

    def _load(self, group: int) -> Any:
        file, group_in_file, _ = self._groups[group]
        return self._convert(_column(file, self._column, group_in_file), lambda row: self.where(group, row))


class _Images(EncodedInputs):
    """A column of them."""

    def __init__(self, groups: _RowGroups) -> None:
        self._groups = groups

    def encoded(self, ids: NDArray[np.int64]) -> Iterator[tuple[int, bytes]]:
        for position, group, row in _by_group(self._groups, ids):
            yield position, self._encoded(group, row)

    def where(self, point_id: int) -> str:
        return self._groups.where(*self._groups.place(point_id))

    def content(self) -> Iterator[bytes]:
        for group in range(len(self._groups)):
            for row in range(len(self._groups.get(group))):
                encoded = self._encoded(group, row)
                yield len(encoded).to_bytes(8, "little") + encoded

    def _encoded(self, group: int, row: int) -> bytes:
        encoded: bytes | None = self._groups.get(group)[row].as_py()
        if encoded is None:
            raise LeadlineError(f"{self._groups.where(group, row)}: no image bytes; store them in the file, not a path")
        return encoded


class _Numbers:
    """Lists of numbers, all of one length."""

    full_scale = None

    def __init__(self, groups: _RowGroups, layout: str) -> None:
        self._groups = groups
        self._layout = layout
        self._width = groups.get(groups.place(0)[0]).shape[1]

    def read(self, ids: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[Any]]]:
        for position, group, row in _by_group(self._groups, ids):
            yield position, self._rows(group)[row]

    def where(self, point_id: int) -> str:
        return self._groups.where(*self._groups.place(point_id))

    def content(self) -> Iterator[bytes]:
        yield f"{self._layout} {self._width}".encode()
        for group in range(len(self._groups)):
            rows = self._rows(group)
            yield rows.astype(rows.dtype.newbyteorder("<")).tobytes()

    def _rows(self, group: int) -> NDArray[Any]:
        rows: NDArray[Any] = self._groups.get(group)
        if len(rows) and rows.shape[1] != self._width:
            raise LeadlineError(_ragged(self._groups.where(group, 0), rows.shape[1], self._width))
        return rows


def _by_group(groups: _RowGroups, ids: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
    """Position in ids, group and row of every id; in the order of groups, so that each is loaded once."""
    for position in np.argsort(ids, kind="stable").tolist():
        yield position, *groups.place(int(ids[position]))


def _bytes(column: Any, where: Callable[[int], str]) -> Any:
    return pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column


def _rows(column: Any, where: Callable[[int], str]) -> NDArray[Any]:
    """A column of lists as an array [rows, width]."""
    lengths = pc.list_value_length(column)
    _refuse_null(lengths, where, "list")
    if not len(lengths):
        return np.empty((0, 0), dtype=np.float32)
    lengths = lengths.to_numpy()
    width = int(lengths[0])
    if width == 0:
        raise LeadlineError(f"{where(0)}: an empty list; give every point the same number of values")
    ragged = np.flatnonzero(lengths != width)
    if ragged.size:
        raise LeadlineError(_ragged(where(int(ragged[0])), int(lengths[ragged[0]]), width))
    values = pc.list_flatten(column)
    _refuse_null(values, lambda value: where(value // width), "value in the list")
    return np.asarray(values.to_numpy()).reshape(len(lengths), width)


def _ragged(where: str, length: int, width: int) -> str:
    return f"{where}: a list of {length} values among lists of {width}; give every point the same number of values"


def _refuse_null(column: Any, where: Callable[[int], str], what: str) -> None:
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise LeadlineError(f"{where(row)}: no {what} (null); fill it in or leave the row out")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The open file; what pyarrow says against it in the block becomes a LeadlineError that names it."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as parquet:
            yield parquet
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise LeadlineError(f"{path}: damaged or no Parquet file ({one_line(error)}); replace the file") from None


def _column(file: _File, name: str, group: int | None = None) -> Any:
    """A column of the file, or of one of its row groups."""
    with _opened(file.path) as parquet:
        table = parquet.read(columns=[name]) if group is None else parquet.read_row_group(group, columns=[name])
        table.validate(full=True)  # text that is not UTF-8 is found here
    expected = sum(file.group_rows) if group is None else file.group_rows[group]
    if len(table) != expected:
        raise LeadlineError(f"{file.path}: {len(table)} rows where its footer has {expected}; replace the file")
    return table.column(0)


def _part(pattern: str, key: str) -> list[_File]:
    """The files of a file name, a folder or a glob, sorted; at least one row in all."""
    root, paths = _found(Path(pattern).expanduser())
    if not paths:
        raise LeadlineError(f"{key}: no Parquet file at {pattern}; give a file, a folder of .parquet files or a glob")
    files = [_described(path, path.relative_to(root).as_posix()) for path in paths]
    if not any(sum(file.group_rows) for file in files):
        raise LeadlineError(f"{key}: no rows in {pattern}; give files that have some, or leave {key} out")
    return files


def _found(path: Path) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the files."""
    if path.is_file():
        return path.parent, [path]
    if path.is_dir():
        return path, sorted(path.rglob("*.parquet"))
    plain = takewhile(lambda part: not any(letter in part for letter in "*?["), path.parts[:-1])
    root = Path(*plain)
    return root, sorted(found for found in root.glob(str(path.relative_to(root))) if found.is_file())


def _described(path: Path, name: str) -> _File:
    with _opened(path) as parquet:
        metadata = parquet.metadata
        group_rows = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        schema = parquet.schema_arrow
        str(schema)  # column names that are not UTF-8 are found here
        return _File(path, name, schema, group_rows)


def _refuse_shared(train: list[_File], test: list[_File]) -> None:
    shared = {file.path.resolve() for file in train} & {file.path.resolve() for file in test}
    if shared:
        raise LeadlineError(f"points.test: {min(shared)} is also a file of points.train; give separate files")


def _type(file: _File, column: str, key: str) -> Any:
    if column not in file.schema.names:
        raise LeadlineError(
            f"{file.path}: no column {column!r}; set {key} to one of {', '.join(map(repr, file.schema.names))}"
        )
    return file.schema.field(column).type


def _layout(files: list[_File], column: str) -> str:
    """How inputs are stored: _BYTES, _STRUCT, or `list of` a type; the same in all files."""
    layouts = [_layout_of(_type(file, column, "points.input")) for file in files]
    for file, layout in zip(files, layouts, strict=True):
        if layout is None:
            raise LeadlineError(
                f"{file.path}: column {column!r} is {file.schema.field(column).type}; "
                "set points.input to a column of image bytes or of lists of numbers"
            )
        if layout != layouts[0]:
            raise LeadlineError(
                f"{file.path}: column {column!r} is {layout}, in {files[0].path} {layouts[0]}; store all files alike"
            )
    return layouts[0] or ""


def _layout_of(kind: Any) -> str | None:
    if _is_bytes(kind):
        return _BYTES
    if pa.types.is_struct(kind):
        return _STRUCT if kind.get_field_index("bytes") >= 0 and _is_bytes(kind.field("bytes").type) else None
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if is_list and (pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type)):
        return f"list of {kind.value_type}"
    return None


def _is_bytes(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _labels(file: _File, column: str, classes: int) -> NDArray[np.int32]:
    kind = _type(file, column, "points.label")
    if not pa.types.is_integer(kind):
        raise LeadlineError(f"{file.path}: column {column!r} is {kind}; set points.label to a column of integers")
    labels = _column(file, column)
    _refuse_null(labels, file.where, "label")
    return checked_labels(labels.to_numpy(), classes, file.where)


def _label_names(files: list[_File], column: str) -> tuple[str, ...] | None:
    """The names in the files' metadata, which may not contradict one another; None where no file has any."""
    named = [(file, names) for file in files if (names := _names_in(file, column))]
    for file, names in named:
        if names != named[0][1]:
            raise LeadlineError(f"{file.path}: other label names than in {named[0][0].path}; give files of one set")
    return named[0][1] if named else None


def _names_in(file: _File, column: str) -> tuple[str, ...]:
    metadata = file.schema.metadata or {}
    try:
        info = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {})
        names = info.get("features", {}).get(column, {}).get("names")
        if names is None and b"label_names" in metadata:
            names = metadata[b"label_names"].decode().split(",")
        return tuple(str(name) for name in names or ())
    except (ValueError, AttributeError, TypeError):
        raise LeadlineError(f"{file.path}: label names in its metadata cannot be read; write the file again") from None


def _keys(file: _File, config: "ParquetPoints") -> list[str]:
    """A name for every row."""
    if config.key is not None:
        return _key_column(file, config.key)
    paths: list[str | None] = [None] * sum(file.group_rows)
    kind = _type(file, config.input, "points.input")
    if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0 and _is_text(kind.field("path").type):
        paths = pc.struct_field(_column(file, f"{config.input}.path"), "path").to_pylist()
    return [path or f"{file.name}:{row}" for row, path in enumerate(paths)]


def _key_column(file: _File, name: str) -> list[str]:
    kind = _type(file, name, "points.key")
    if not (_is_text(kind) or pa.types.is_integer(kind)):
        raise LeadlineError(f"{file.path}: column {name!r} is {kind}; set points.key to a column of text or integers")
    column = _column(file, name)
    _refuse_null(column, file.where, "key")
    return [str(key) for key in column.to_pylist()]
