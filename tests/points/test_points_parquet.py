import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from leadline.config import ParquetPoints
from leadline.points import TEST, TRAIN, open_points
from leadline.points.dataset import Points
from leadline.points.parquet import open_parquet

CIFAR10 = Path(__file__).parents[3] / "shared/data/cifar10"
RANDOM = np.random.default_rng(11)


def _encoded(seed: int, size: tuple[int, int] = (9, 7), kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def _decoded(encoded: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image.convert("RGB"), dtype=np.float32).transpose(2, 0, 1) / 255


def _hugging_face(names: list[str]) -> dict[bytes, bytes]:
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


def _images(seeds, labels, paths=None, **sizes) -> pa.Table:
    paths = paths or [f"p/{seed}.png" for seed in seeds]
    rows = [{"bytes": _encoded(seed, **sizes), "path": path} for seed, path in zip(seeds, paths, strict=True)]
    return pa.table({"image": rows, "label": pa.array(labels, pa.int64())})


def _write(path: Path, table: pa.Table, rows: int = 3, **options) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows, **options)
    return str(path)


def _config(train: str, **keys) -> ParquetPoints:
    return ParquetPoints(source="parquet", train=train, **keys)


def _numbers(values, labels=None) -> pa.Table:
    labels = list(range(len(values))) if labels is None else labels
    return pa.table({"x": values, "label": labels})


def test_hugging_faces_layout(tmp_path: Path) -> None:
    table = _images(range(8), [0, 1, 2, 0, 1, 2, 0, 1]).replace_schema_metadata(_hugging_face(["ape", "bat", "cow"]))
    train = _write(tmp_path / "train.parquet", table)
    test = _write(tmp_path / "test.parquet", _images(range(8, 12), [2, 2, 1, 0], [None, "q", None, ""]))
    points = open_points(_config(train, test=test))
    assert len(points) == 12 and points.input_shape == (3, 7, 9)
    assert points.label_names == ("ape", "bat", "cow")
    assert points.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 2, 1, 0] and points.labels.dtype == np.int32
    assert points.parts.tolist() == [TRAIN] * 8 + [TEST] * 4
    assert points.keys[:2] == ["p/0.png", "p/1.png"]
    assert points.keys[8:] == ["test.parquet:0", "q", "test.parquet:2", "test.parquet:3"]
    ids = RANDOM.permutation(12)
    expected = np.stack([_decoded(_encoded(seed)) for seed in ids])
    np.testing.assert_array_equal(points.read(ids), expected)
    np.testing.assert_array_equal(
        points.read(np.array([7, 7, 0])), np.stack([_decoded(_encoded(s)) for s in (7, 7, 0)])
    )


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_plain_image_bytes_and_another_key(tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.table(
        {"picture": pa.array([_encoded(s, kind="JPEG") for s in range(4)], kind), "y": [3, 1, 1, 0], "id": [9, 8, 7, 6]}
    )
    path = _write(tmp_path / "a.parquet", table)
    points = open_points(_config(path, input="picture", label="y"))
    assert points.keys == [f"a.parquet:{row}" for row in range(4)]
    assert points.label_names == ("0", "1", "2", "3")
    np.testing.assert_array_equal(points.read(np.array([3]))[0], _decoded(_encoded(3, kind="JPEG")))
    assert open_points(_config(path, input="picture", label="y", key="id")).keys == ["9", "8", "7", "6"]


@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.float64()), pa.large_list(pa.int16()), pa.list_(pa.uint8(), 5), pa.list_(pa.float16())],
    ids=str,
)
def test_numeric_lists(tmp_path: Path, kind: pa.DataType) -> None:
    values = RANDOM.integers(0, 200, (10, 5)).astype(kind.value_type.to_pandas_dtype())
    train = _write(tmp_path / "a.parquet", _numbers(pa.array(list(values[:7]), kind)))
    test = _write(tmp_path / "b.parquet", _numbers(pa.array(list(values[7:]), kind)))
    points = open_points(_config(train, test=test, input="x"))
    assert points.input_shape == (5,)
    ids = RANDOM.permutation(10)
    read = points.read(ids)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, values[ids].astype(np.float32))


def test_files_of_a_folder_and_of_a_glob_are_sorted(tmp_path: Path) -> None:
    for name, start in (("b/y.parquet", 4), ("a/x.parquet", 0), ("b/x.parquet", 2)):
        _write(tmp_path / "data" / name, _numbers([[float(start)], [start + 1.0]]))
    _write(tmp_path / "data/c/none.parquet", _numbers(pa.array([], pa.list_(pa.float64())), pa.array([], pa.int64())))
    whole = open_points(_config(str(tmp_path / "data"), input="x"))
    np.testing.assert_array_equal(whole.read(np.arange(6))[:, 0], np.arange(6))
    assert whole.keys[1:4] == ["a/x.parquet:1", "b/x.parquet:0", "b/x.parquet:1"]
    some = open_points(_config(str(tmp_path / "data/*/x*.parquet"), input="x"))
    assert some.keys == ["a/x.parquet:0", "a/x.parquet:1", "b/x.parquet:0", "b/x.parquet:1"]
    np.testing.assert_array_equal(some.read(np.arange(4))[:, 0], np.arange(4))


def test_label_names_in_plain_metadata(tmp_path: Path) -> None:
    table = _numbers([[1.0], [2.0]], [1, 0]).replace_schema_metadata({b"label_names": b"no,yes"})
    assert open_points(_config(_write(tmp_path / "a.parquet", table), input="x")).label_names == ("no", "yes")


def test_row_groups_are_kept_up_to_a_bound(tmp_path: Path, refused) -> None:
    """What is still in memory can be read when the file is gone."""
    values = RANDOM.standard_normal((40, 100))
    path = Path(_write(tmp_path / "a.parquet", _numbers(list(values)), rows=10))
    config = _config(str(path), input="x")
    small = Points(config, open_parquet(config, cache_bytes=2 * 10 * 100 * 8))
    large = open_points(config)
    ids = RANDOM.permutation(40)
    for points in (small, large):
        np.testing.assert_array_equal(points.read(ids), values[ids].astype(np.float32))
    small.read(np.array([25]))  # so that group 2 was used after group 3
    small.read(np.array([5]))
    path.unlink()
    large.read(ids)
    small.read(np.arange(20, 30))
    small.read(np.arange(10))
    for gone in (15, 35):
        refused(lambda gone=gone: small.read(np.array([gone])), path)


def test_fingerprint_depends_on_contents_alone(tmp_path: Path) -> None:
    table = _images(range(8), [0, 1, 2, 0, 1, 2, 0, 1])
    first = open_points(_config(_write(tmp_path / "a/x.parquet", table))).fingerprint()
    # Another place, other row groups, another compression: the same points.
    again = _write(tmp_path / "b/other.parquet", table, rows=8, compression="gzip")
    assert open_points(_config(again)).fingerprint() == first
    others = {
        "bytes": _images([0, 1, 2, 3, 4, 5, 6, 8], [0, 1, 2, 0, 1, 2, 0, 1], [f"p/{seed}.png" for seed in range(8)]),
        "label": _images(range(8), [0, 1, 2, 0, 1, 2, 0, 2]),
        "key": _images(range(8), [0, 1, 2, 0, 1, 2, 0, 1], [f"p/{seed}.png" for seed in range(7)] + ["p/8.png"]),
        "names": table.replace_schema_metadata({b"label_names": b"a,b,c"}),
    }
    found = {open_points(_config(_write(tmp_path / f"{n}.parquet", t))).fingerprint() for n, t in others.items()}
    assert len(found | {first}) == 5
    as_test = _config(_write(tmp_path / "c/x.parquet", table[:7]), test=_write(tmp_path / "c/y.parquet", table[7:]))
    assert open_points(as_test).fingerprint() != first


def test_fingerprint_of_numbers(tmp_path: Path) -> None:
    values = RANDOM.standard_normal((9, 4))
    changed = values.copy()
    changed[8, 3] = np.nextafter(changed[8, 3], 9)
    first, again, other = (
        open_points(_config(_write(tmp_path / name / "x.parquet", _numbers(list(v)), rows=n), input="x")).fingerprint()
        for name, v, n in (("a", values, 2), ("b", values, 9), ("c", changed, 2))
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (pa.table({"x": [[1.0]]}), ["no column 'label'", "'x'", "points.label"]),
        (pa.table({"y": [[1.0]], "label": [0]}), ["no column 'x'", "'y', 'label'", "points.input"]),
        (pa.table({"x": [1.0], "label": [0]}), ["'x'", "double", "points.input"]),
        (pa.table({"x": [["a"]], "label": [0]}), ["'x'", "string"]),
        (pa.table({"x": [{"path": "a"}], "label": [0]}), ["'x'", "struct"]),
        (_numbers([[1.0]], ["a"]), ["'label'", "string", "integers"]),
        (_numbers([[1.0]], [1.5]), ["'label'", "double", "integers"]),
        (_numbers([[1.0]] * 5, [0, 1, 2, 0, None]), ["a.parquet row 4", "null"]),
        (_numbers([[1.0]] * 5, [0, 1, 2, -1, 0]), ["a.parquet row 3", "-1"]),
        (_numbers([[1.0]] * 2, [0, 2**33]), ["a.parquet row 1", str(2**33)]),
        (
            _numbers([[1.0]] * 2, [0, 2]).replace_schema_metadata({b"label_names": b"a,b"}),
            ["a.parquet row 1", "0 to 1"],
        ),
        (_numbers([[1.0]]).replace_schema_metadata({b"huggingface": b"{"}), ["a.parquet", "metadata"]),
        (_numbers([[1.0, 2.0]] * 4 + [[1.0]]), ["a.parquet row 4", "1 value", "2"]),
        (_numbers([[1.0, 2.0]] * 3 + [[1.0]] * 3), ["a.parquet row 3", "1 value", "2"]),
        (_numbers([[], []], None).cast(pa.schema({"x": pa.list_(pa.int8()), "label": pa.int64()})), ["row 0", "empty"]),
        (_numbers([[1.0, 2.0]] * 4 + [None]), ["a.parquet row 4", "null"]),
        (_numbers(pa.array([[1, 2]] * 4 + [None], pa.list_(pa.int8(), 2))), ["a.parquet row 4", "null"]),
        (_numbers([[1.0, 2.0]] * 4 + [[1.0, None]]), ["a.parquet row 4", "null"]),
        (_numbers([[1.0, 2.0]] * 4 + [[1.0, np.nan]]), ["a.parquet row 4", "a.parquet:4", "finite"]),
        (_numbers([[1.0, 2.0]] * 4 + [[1.0, 1e39]]), ["a.parquet row 4", "a.parquet:4", "finite"]),
        (_numbers(pa.array([], pa.list_(pa.int8())), pa.array([], pa.int64())), ["points.train", "no rows"]),
    ],
)
def test_bad_tables(tmp_path: Path, refused, table: pa.Table, words: list[str]) -> None:
    path = _write(tmp_path / "a.parquet", table)
    refused(lambda: open_points(_config(path, input="x")).read(np.arange(len(table))), path, *words)


def test_bad_images(tmp_path: Path, refused) -> None:
    damaged = [_encoded(0), _encoded(1)[:-60], _encoded(2)]
    path = _write(tmp_path / "a.parquet", pa.table({"image": damaged, "label": [0, 1, 2]}), rows=2)
    points = open_points(_config(path))
    points.read(np.array([0, 2]))
    refused(lambda: points.read(np.arange(3)), f"{path} row 1", "damaged")
    path = _write(tmp_path / "b.parquet", pa.table({"image": [_encoded(0), None], "label": [0, 1]}))
    refused(lambda: open_points(_config(path)).read(np.arange(2)), f"{path} row 1", "no image bytes")
    refused(lambda: open_points(_config(path)).fingerprint(), f"{path} row 1", "no image bytes")
    table = pa.concat_tables([_images([0], [0]), _images([1], [0], size=(8, 8))])
    path = _write(tmp_path / "c.parquet", table)
    refused(lambda: open_points(_config(path)).read(np.arange(2)), f"{path} row 1", "8 x 8", "points.crop")


def test_bad_keys(tmp_path: Path, refused) -> None:
    table = _numbers([[1.0], [2.0]]).append_column("key", pa.array(["a", None])).append_column("f", pa.array([0.5, 1]))
    path = _write(tmp_path / "a.parquet", table)
    refused(lambda: open_points(_config(path, input="x", key="key")), f"{path} row 1", "null")
    refused(lambda: open_points(_config(path, input="x", key="f")), path, "'f'", "points.key")
    refused(lambda: open_points(_config(path, input="x", key="g")), path, "'g'", "points.key")


def test_files_that_do_not_go_together(tmp_path: Path, refused) -> None:
    one = _write(tmp_path / "one.parquet", _numbers([[1.0]]).replace_schema_metadata({b"label_names": b"a"}))
    two = _write(tmp_path / "two.parquet", _numbers([[1.0]]).replace_schema_metadata({b"label_names": b"b"}))
    whole = _write(tmp_path / "whole.parquet", _numbers([[1]]))
    wide = _write(tmp_path / "wide.parquet", _numbers([[1.0, 2.0]]))
    refused(lambda: open_points(_config(one, test=two, input="x")), two, "label names", one)
    refused(lambda: open_points(_config(one, test=whole, input="x")), whole, "list of int64", "list of double")
    refused(lambda: open_points(_config(one, test=wide, input="x")).read(np.arange(2)), f"{wide} row 0", "2 values")
    refused(lambda: open_points(_config(one, test=wide, input="x")).fingerprint(), f"{wide} row 0", "2 values")
    refused(lambda: open_points(_config(one, test=one, input="x")), "points.test", one)
    refused(lambda: open_points(_config(str(tmp_path), test=one, input="x")), "points.test", one)


def test_missing_and_damaged_files(tmp_path: Path, refused) -> None:
    path = _write(tmp_path / "a.parquet", _numbers([[float(row)] * 50 for row in range(100)]), rows=50)
    contents = Path(path).read_bytes()
    (tmp_path / "empty").mkdir()
    for missing in ("nowhere.parquet", "empty", "*.nothing"):
        refused(lambda missing=missing: open_points(_config(str(tmp_path / missing))), "points.train", missing)
    for damaged in (b"", b"text", contents[:-1], contents[: len(contents) // 2]):
        Path(path).write_bytes(damaged)
        refused(lambda: open_points(_config(path, input="x")), path)
    Path(path).write_bytes(contents[:40] + bytes(400) + contents[440:])
    refused(lambda: open_points(_config(path, input="x")).read(np.arange(100)), path)


@pytest.mark.skipif(not CIFAR10.is_dir(), reason="CIFAR-10 as Parquet is not there")
def test_cifar10_as_parquet() -> None:
    config = _config(str(CIFAR10 / "train.parquet"), test=str(CIFAR10 / "test.parquet"))
    points = open_points(config)
    assert len(points) == 60000 and points.input_shape == (3, 32, 32)
    assert points.parts.sum() == 10000 and points.parts[:50000].sum() == 0
    assert (np.bincount(points.labels[:50000]) == 5000).all() and (np.bincount(points.labels[50000:]) == 1000).all()
    tables = [pq.read_table(CIFAR10 / f"{part}.parquet") for part in ("train", "test")]
    names = tables[0].schema.metadata[b"label_names"].decode().split(",")
    assert points.label_names == tuple(names)
    ids = np.sort(RANDOM.choice(60000, 60, replace=False))[RANDOM.permutation(60)]
    read = points.read(ids)
    for point_id, pixels in zip(ids.tolist(), read, strict=True):
        row = tables[point_id // 50000].slice(point_id % 50000, 1).to_pylist()[0]
        np.testing.assert_array_equal(pixels, _decoded(row["image"]["bytes"]))
        assert points.labels[point_id] == row["label"]
        assert points.keys[point_id] == row["image"]["path"]
        assert names[row["label"]] in row["image"]["path"]
