import gzip
import hashlib
import pickle
import struct
import subprocess
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from leadline.config import TorchvisionPoints
from leadline.points import TEST, TRAIN, open_points
from leadline.points.torchvision_sets import obtain
from leadline.torchvision_import import import_torchvision

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
RANDOM = np.random.default_rng(2)
IMAGES = {
    "train": RANDOM.integers(0, 256, (30, 5, 4), dtype=np.uint8),
    "t10k": RANDOM.integers(0, 256, (7, 5, 4), np.uint8),
}
LABELS = {"train": np.arange(30, dtype=np.uint8) % 10, "t10k": np.arange(7, dtype=np.uint8)}


def _idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def _write_idx(folder: Path, ending: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "t10k"):
        for name, array in (("images-idx3", IMAGES[part]), ("labels-idx1", LABELS[part])):
            data = _idx(array)
            (folder / f"{part}-{name}-ubyte{ending}").write_bytes(gzip.compress(data) if ending else data)
    return folder


def _config(source: str, path: Path | None = None, download: bool = False) -> TorchvisionPoints:
    return TorchvisionPoints(source=source, path=path, download=download)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request goes to a port of this machine where nothing listens."""
    _through_proxy(monkeypatch, "http://127.0.0.1:9")


def _through_proxy(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.setenv("https_proxy", proxy)
    monkeypatch.setattr(urllib.request, "_opener", None)  # urllib looks at proxies once


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(
    ("source", "below"), [("mnist", "."), ("mnist", "MNIST/raw"), ("fashion-mnist", "FashionMNIST/raw")]
)
def test_idx_files(tmp_path: Path, source: str, below: str, ending: str) -> None:
    _write_idx(tmp_path / below, ending)
    points = open_points(_config(source, tmp_path))
    assert points.input_shape == (1, 5, 4)
    assert points.parts.tolist() == [TRAIN] * 30 + [TEST] * 7
    np.testing.assert_array_equal(points.labels, np.concatenate([LABELS["train"], LABELS["t10k"]]))
    expected = np.concatenate([IMAGES["train"], IMAGES["t10k"]]).astype(np.float32)[:, None] / np.float32(255)
    np.testing.assert_array_equal(points.read(np.arange(37)), expected)
    assert points.keys[29:31] == ["train/00029", "test/00000"]


def test_fingerprint_is_of_pixels_not_of_files(tmp_path: Path) -> None:
    plain, packed = _write_idx(tmp_path / "a"), _write_idx(tmp_path / "b/MNIST/raw", ".gz")
    first = open_points(_config("mnist", plain)).fingerprint()
    assert open_points(_config("mnist", packed.parents[1])).fingerprint() == first
    path = plain / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + bytes([IMAGES["t10k"].flat[-1] ^ 1]))
    assert open_points(_config("mnist", plain)).fingerprint() != first


def test_the_usual_folder_is_below_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    refused(lambda: open_points(_config("mnist")), tmp_path / ".cache/leadline/mnist", "points.download")
    _write_idx(tmp_path / ".cache/leadline/mnist", ".gz")
    assert len(open_points(_config("mnist"))) == 37


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not there")
def test_fashion_mnist_of_debian() -> None:
    points = open_points(_config("fashion-mnist"))
    assert len(points) == 70000 and points.input_shape == (1, 28, 28)
    assert points.label_names == tuple(import_torchvision().datasets.FashionMNIST.classes)
    ids = RANDOM.choice(70000, 2000, replace=False)
    read = points.read(ids)
    images, labels = [], []
    for part in ("train", "t10k"):
        with gzip.open(DEBIAN / f"{part}-images-idx3-ubyte.gz") as file:
            magic, count, height, width = struct.unpack(">IIII", file.read(16))
            assert magic == 2051
            images.append(np.frombuffer(file.read(), dtype=np.uint8).reshape(count, height, width))
        with gzip.open(DEBIAN / f"{part}-labels-idx1-ubyte.gz") as file:
            labels.append(np.frombuffer(file.read()[8:], dtype=np.uint8))
    np.testing.assert_array_equal(read[:, 0], np.concatenate(images)[ids] / np.float32(255))
    np.testing.assert_array_equal(points.labels, np.concatenate(labels))
    assert points.parts.tolist() == [TRAIN] * 60000 + [TEST] * 10000


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize("damage", ["empty", "header", "half", "last byte", "one more", "magic"])
def test_a_damaged_idx_file_is_named(tmp_path: Path, refused, ending: str, name: str, damage: str) -> None:
    path = _write_idx(tmp_path, ending) / f"{name}{ending}"
    raw = path.read_bytes()
    data = gzip.decompress(raw) if ending else raw
    broken = {
        "empty": b"",
        "header": data[:6],
        "half": data[: len(data) // 2],
        "last byte": data[:-1],
        "one more": data + b"0",
        "magic": b"\0\0\x0d" + data[3:],
    }[damage]
    path.write_bytes(gzip.compress(broken) if ending else broken)
    refused(lambda: open_points(_config("mnist", tmp_path)), path)
    if ending:
        for packed in (b"", b"no gzip file", raw[:-5], raw[: len(raw) // 2], raw[:12] + b"\xff" + raw[13:]):
            path.write_bytes(packed)
            refused(lambda: open_points(_config("mnist", tmp_path)), path)


def test_idx_files_that_do_not_go_together(tmp_path: Path, refused) -> None:
    config = _config("mnist", _write_idx(tmp_path), download=True)
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(_idx(LABELS["train"][:-1]))
    refused(lambda: open_points(config), labels, "29 labels", "30 images")
    labels.write_bytes(_idx(LABELS["train"] + 1))
    refused(lambda: open_points(config), f"{labels} row 9", "10", "0 to 9")
    labels.unlink()
    refused(lambda: open_points(config), labels, "missing")
    _write_idx(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(_idx(IMAGES["t10k"][:, :4]))
    refused(lambda: open_points(config), "(1, 5, 4)", "(1, 4, 4)")


def _write_cifar(folder: Path, kind: type, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, np.ndarray]:
    """Small files in the layout of kind, whose MD5 sums torchvision is told to expect."""
    images, labels = [], []
    key = "labels" if kind.__name__ == "CIFAR10" else "fine_labels"
    for attribute in ("train_list", "test_list"):
        sums = []
        for name, _ in getattr(kind, attribute):
            images.append(RANDOM.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8))
            labels.append(RANDOM.integers(0, 3, 4))
            data = pickle.dumps({"data": images[-1].reshape(4, -1), key: labels[-1].tolist()})
            (folder / kind.base_folder).mkdir(parents=True, exist_ok=True)
            (folder / kind.base_folder / name).write_bytes(data)
            sums.append([name, hashlib.md5(data).hexdigest()])
        monkeypatch.setattr(kind, attribute, sums)
    meta = pickle.dumps({kind.meta["key"]: ["ape", "bat", "cow"]})
    (folder / kind.base_folder / kind.meta["filename"]).write_bytes(meta)
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": hashlib.md5(meta).hexdigest()})
    return np.concatenate(images), np.concatenate(labels)


@pytest.mark.parametrize(("source", "name"), [("cifar10", "CIFAR10"), ("cifar100", "CIFAR100")])
def test_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused, source: str, name: str) -> None:
    kind = getattr(import_torchvision().datasets, name)
    images, labels = _write_cifar(tmp_path, kind, monkeypatch)
    points = open_points(_config(source, tmp_path))
    np.testing.assert_array_equal(points.read(np.arange(len(points))), images / np.float32(255))
    np.testing.assert_array_equal(points.labels, labels)
    assert points.parts.tolist() == [TRAIN] * (len(images) - 4) + [TEST] * 4
    assert points.label_names == ("ape", "bat", "cow")
    path = tmp_path / kind.base_folder / kind.test_list[0][0]
    path.write_bytes(path.read_bytes() + b"0")
    refused(lambda: open_points(_config(source, tmp_path, download=True)), path, "damaged")
    path.unlink()
    refused(lambda: open_points(_config(source, tmp_path, download=True)), path, "missing")


def test_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused) -> None:
    kind = import_torchvision().datasets.SVHN
    images, splits = {}, dict(kind.split_list)
    for split in ("train", "test"):
        path = tmp_path / f"{split}_32x32.mat"
        images[split] = RANDOM.integers(0, 256, (32, 32, 3, 5), dtype=np.uint8)
        scipy.io.savemat(path, {"X": images[split], "y": np.array([[1], [10], [3], [9], [2]])})
        splits[split] = [splits[split][0], path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(kind, "split_list", splits)
    points = open_points(_config("svhn", tmp_path))
    assert points.labels.tolist() == [1, 0, 3, 9, 2] * 2 and points.label_names == tuple("0123456789")
    assert points.parts.tolist() == [TRAIN] * 5 + [TEST] * 5
    expected = np.concatenate([images["train"], images["test"]], axis=3) / np.float32(255)
    np.testing.assert_array_equal(points.read(np.arange(10)), expected.transpose(3, 2, 0, 1))
    (tmp_path / "test_32x32.mat").write_bytes(b"damaged")
    refused(lambda: open_points(_config("svhn", tmp_path)), tmp_path / "test_32x32.mat", "damaged")


@pytest.mark.parametrize("source", ["fashion-mnist", "mnist", "cifar10", "cifar100", "svhn"])
def test_without_a_network_one_line_says_where_to_put_the_files(
    tmp_path: Path, no_network, refused, source: str
) -> None:
    root = tmp_path / "data"
    refused(lambda: open_points(_config(source, root)), root, "points.download")
    assert not root.exists()
    refused(lambda: open_points(_config(source, root, download=True)), source, "download failed", f"into {root}")
    assert list(root.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path, refused) -> None:
    (tmp_path / "file").touch()
    refused(lambda: open_points(_config("mnist", tmp_path / "file/data", download=True)), tmp_path / "file/data")


class _Junk(BaseHTTPRequestHandler):
    """Answers every request with the same bytes."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"junk")

    def log_message(self, *_: object) -> None:
        pass


def test_a_download_of_other_bytes_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused
) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Junk) as server:
        threading.Thread(target=server.serve_forever).start()
        _through_proxy(monkeypatch, f"http://127.0.0.1:{server.server_port}")
        try:
            refused(lambda: open_points(_config("fashion-mnist", tmp_path, download=True)), tmp_path, "download failed")
        finally:
            server.shutdown()
    assert list(tmp_path.iterdir()) == []


def test_a_download_is_put_in_place_when_it_is_whole(tmp_path: Path, refused) -> None:
    config = _config("mnist", tmp_path, download=True)

    def fetch_all(folder: Path) -> None:
        assert folder != tmp_path
        _write_idx(folder / "MNIST/raw")
        (folder / "rest.tar.gz").touch()

    def fetch_some(folder: Path) -> None:
        _write_idx(folder)
        raise OSError("connection lost")

    refused(lambda: obtain(config, tmp_path, ["a"], fetch_some, "a"), "connection lost", tmp_path)
    assert list(tmp_path.iterdir()) == []
    files = [str(path.relative_to(tmp_path / "made")) for path in _write_idx(tmp_path / "made/MNIST/raw").iterdir()]
    obtain(config, tmp_path / "data", files, fetch_all, "the files")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["MNIST"]
    assert len(open_points(_config("mnist", tmp_path / "data"))) == 37


def test_torchvision_works_beside_any_torch() -> None:
    """In a fresh process, also after somebody else's import has failed."""
    script = """
import torch
try:
    import torchvision
except RuntimeError as error:
    assert "torchvision::nms" in str(error)
from leadline.torchvision_import import import_torchvision
torchvision = import_torchvision()
assert import_torchvision() is torchvision
assert torchvision.models.squeezenet1_1(num_classes=3).eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
assert torchvision.transforms.functional.resize(torch.zeros(3, 8, 6), 3).shape == (3, 4, 3)
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
