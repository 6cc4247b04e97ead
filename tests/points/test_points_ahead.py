"""Reading ahead gives what reading gives, in order, whatever the threads; errors come at their batch."""

import io
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from leadline.config import Digits, ParquetPoints
from leadline.errors import LeadlineError
from leadline.points import open_points
from leadline.points.ahead import read_ahead
from leadline.points.parquet import _RowGroups

N = 150
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="copies go to a CUDA device")


def encoded(number, size=(40, 30)):
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A configuration of images in several row groups, the last of them damaged."""
    path = tmp_path_factory.mktemp("ahead") / "train.parquet"
    images = [encoded(i) for i in range(N - 1)] + [b"no image"]
    pq.write_table(pa.table({"image": images, "label": np.arange(N) % 3}), path, row_group_size=40)
    return ParquetPoints(source="parquet", train=str(path), input="image", label="label", resize=24, crop=20)


def cut(ids, size):
    return [ids[first : first + size] for first in range(0, len(ids), size)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("size", [7, 50, 1000])
def test_batches_are_those_of_reading(table, threads, size, device):
    points = open_points(table)
    ids = np.random.default_rng(0).permutation(N - 1)
    expected = open_points(table).read(ids)
    batches = list(read_ahead(points, iter(cut(ids, size)), device, threads))
    assert [len(inputs) for _, inputs in batches] == [len(batch) for batch in cut(ids, size)]
    assert np.array_equal(np.concatenate([of_batch for of_batch, _ in batches]), ids)
    assert np.array_equal(torch.cat([inputs for _, inputs in batches]).cpu().numpy(), expected)
    assert all(inputs.dtype == torch.float32 and inputs.device.type == device for _, inputs in batches)


def test_no_batches():
    assert list(read_ahead(open_points(Digits(source="digits")), [], "cpu")) == []


def test_a_damaged_image_is_told_at_its_batch(table):
    reading = read_ahead(open_points(table), cut(np.arange(N), 50), "cpu", 3)
    for first in (0, 50):
        assert next(reading)[0][0] == first
    with pytest.raises(LeadlineError, match=f"train.parquet row {N - 1}: no image"):
        next(reading)


def test_one_batch_is_read_while_another_is_used(table):
    """And not all of them: memory is that of two batches."""
    points, asked, second_is_read = open_points(table), [], threading.Event()
    read = points.read

    def recorded(ids):
        inputs = read(ids)
        asked.extend(ids.tolist())
        if 19 in asked:
            second_is_read.set()
        return inputs

    points.read = recorded
    reading = read_ahead(points, cut(np.arange(100), 10), "cpu")
    next(reading)
    assert second_is_read.wait(60)
    assert sorted(asked) == list(range(20))
    reading.close()


@pytest.fixture
def hurried():
    """Threads take turns far more often than they would."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hurried")
def test_threads_read_a_group_once_while_it_is_kept(tmp_path, monkeypatch):
    pq.write_table(pa.table({"image": [[float(i)] for i in range(64)], "label": [0] * 64}), tmp_path / "a.parquet", 4)
    loads = []
    load = _RowGroups._load
    monkeypatch.setattr(_RowGroups, "_load", lambda self, group: loads.append(group) or load(self, group))
    points = open_points(ParquetPoints(source="parquet", train=str(tmp_path / "a.parquet")))
    ids = np.arange(64)
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda _: points.read(ids), range(8)))
    assert all(np.array_equal(of_one, ids[:, None]) for of_one in read)
    assert sorted(loads) == list(range(16))
