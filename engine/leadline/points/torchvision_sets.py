"""Data sets that torchvision knows: Fashion-MNIST, MNIST, CIFAR-10, CIFAR-100, SVHN."""

import http.client
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from leadline.errors import LeadlineError, one_line
from leadline.points.arrays import ArrayInputs
from leadline.points.idx import read_idx
from leadline.points.source import TEST, TRAIN, Source, checked_labels, numbered_keys, two_parts
from leadline.torchvision_import import import_torchvision

if TYPE_CHECKING:
    from leadline.config import TorchvisionPoints

_CACHE = Path("~/.cache/leadline")
_DIGITS = tuple("0123456789")
_FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_DOWNLOAD_FAILURES = (OSError, RuntimeError, EOFError, zlib.error, tarfile.TarError, http.client.HTTPException)


@dataclass(frozen=True)
class _IdxSet:
    """A data set in IDX files: torchvision's class and the folder of the system's package, where there is one."""

    torchvision_class: str
    label_names: tuple[str, ...]
    system_folder: Path | None


_IDX_SETS = {
    "fashion-mnist": _IdxSet("FashionMNIST", _FASHION, Path("/usr/share/datasets/fashion-mnist")),
    "mnist": _IdxSet("MNIST", _DIGITS, None),
}
_IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def open_torchvision(config: "TorchvisionPoints") -> Source:
    """Images uint8 [N, C, H, W] in memory: C is 1 for Fashion-MNIST and MNIST, 3 for CIFAR and SVHN.

    The files are looked for in config.path, by default in ~/.cache/leadline/<name>, for Fashion-MNIST first where the
    Debian package has them; they are downloaded where there are none and config.download is true. IDX files lie in the
    folder itself or as torchvision puts them, gzipped or not; the others as torchvision puts them, and are read only
    if they are, byte for byte, what torchvision expects. Raises LeadlineError that names a file that is missing or
    damaged, or says where to put the files that could not be downloaded.
    """
    root = (config.path or _CACHE / config.source).expanduser()
    if config.source in _IDX_SETS:
        return _open_idx(config, _IDX_SETS[config.source], root)
    datasets = import_torchvision().datasets
    if config.source == "svhn":
        return _open_svhn(config, datasets.SVHN, root)
    return _open_cifar(config, datasets.CIFAR10 if config.source == "cifar10" else datasets.CIFAR100, root)


def _open_idx(config: "TorchvisionPoints", idx_set: _IdxSet, root: Path) -> Source:
    raw = Path(idx_set.torchvision_class, "raw")
    folders = [root, root / raw]
    if config.path is None and idx_set.system_folder is not None:
        folders.insert(0, idx_set.system_folder)
    folder = next((folder for folder in folders if any(_idx_file(folder, name) for name in _IDX_FILES)), None)
    if folder is None:
        files = [str(raw / name) for name in _IDX_FILES]
        obtain(
            config,
            root,
            files,
            lambda folder: getattr(import_torchvision().datasets, idx_set.torchvision_class)(folder, download=True),
            f"{', '.join(_IDX_FILES)}, gzipped or not,",
        )
        folder = root / raw
    train, test = (_idx_part(folder, part) for part in ("train", "t10k"))
    return _source(config.source, train, test, idx_set.label_names)


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _idx_part(folder: Path, part: str) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Images [n, 1, H, W] and labels [n] of one part."""
    images_path, labels_path = (_idx_file(folder, name) for name in _IDX_FILES if name.startswith(part))
    if images_path is None or labels_path is None:
        what = "images-idx3-ubyte" if images_path is None else "labels-idx1-ubyte"
        raise LeadlineError(f"{folder / part}-{what}: missing, also as .gz; put the file beside the others")
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if len(images) != len(labels) or not len(images):
        raise LeadlineError(f"{labels_path}: {len(labels)} labels for {len(images)} images; replace the files")
    return images[:, None], checked_labels(labels, 10, lambda row: f"{labels_path} row {row}")


def _open_cifar(config: "TorchvisionPoints", kind: Any, root: Path) -> Source:
    listed = [*kind.train_list, *kind.test_list, [kind.meta["filename"], kind.meta["md5"]]]
    sums = {f"{kind.base_folder}/{name}": md5 for name, md5 in listed}
    _find(config, root, sums, lambda folder: kind(folder, download=True), f"{kind.base_folder} from {kind.url}")
    parts = [kind(root, train=train) for train in (True, False)]
    train, test = ((part.data.transpose(0, 3, 1, 2), np.array(part.targets, dtype=np.int32)) for part in parts)
    return _source(config.source, train, test, tuple(parts[0].classes))


def _open_svhn(config: "TorchvisionPoints", kind: Any, root: Path) -> Source:
    sums = {kind.split_list[split][1]: kind.split_list[split][2] for split in ("train", "test")}

    def fetch(folder: Path) -> None:
        for split in ("train", "test"):
            kind(folder, split=split, download=True)

    _find(config, root, sums, fetch, " and ".join(kind.split_list[split][0] for split in ("train", "test")))
    parts = [kind(root, split=split) for split in ("train", "test")]
    train, test = ((part.data, part.labels.astype(np.int32)) for part in parts)
    return _source(config.source, train, test, _DIGITS)


def _source(
    name: str,
    train: tuple[NDArray[np.uint8], NDArray[np.int32]],
    test: tuple[NDArray[np.uint8], NDArray[np.int32]],
    label_names: tuple[str, ...],
) -> Source:
    n_train, n_test = len(train[1]), len(test[1])
    if train[0].shape[1:] != test[0].shape[1:]:
        raise LeadlineError(
            f"{name}: training images are {train[0].shape[1:]}, test images {test[0].shape[1:]}; give files of one set"
        )
    return Source(
        inputs=ArrayInputs(name, np.concatenate([train[0], test[0]]), full_scale=255),
        labels=np.concatenate([train[1], test[1]]),
        parts=two_parts(n_train, n_test),
        keys=numbered_keys(TRAIN, np.arange(n_train)) + numbered_keys(TEST, np.arange(n_test)),
        label_names=label_names,
    )


def _find(
    config: "TorchvisionPoints", root: Path, sums: dict[str, str], fetch: Callable[[Path], object], what: str
) -> None:
    """See to it that all files are in `root` with their MD5 sums; some of these files are unpickled by torchvision."""
    if not any((root / file).is_file() for file in sums):
        obtain(config, root, list(sums), fetch, what)
    integrity = import_torchvision().datasets.utils.check_integrity
    for file, md5 in sums.items():
        if not (root / file).is_file():
            raise LeadlineError(f"{root / file}: missing; put it beside the others")
        if not integrity(root / file, md5):
            raise LeadlineError(f"{root / file}: damaged, its MD5 sum is not {md5}; replace the file")


def obtain(
    config: "TorchvisionPoints", root: Path, files: list[str], fetch: Callable[[Path], object], what: str
) -> None:
    """Have `fetch` put `files` into a folder of its own, then move them to `root`, so that there are whole ones only.

    Raises LeadlineError, which says where to put `what`, if config.download is false or the download fails.
    """
    if not config.download:
        raise LeadlineError(
            f"points.path: {config.source} is not in {root}; put {what} there or set points.download to true"
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as folder:
            fetch(Path(folder))
            for file in files:
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                Path(folder, file).replace(root / file)
    except _DOWNLOAD_FAILURES as error:
        raise LeadlineError(
            f"{config.source}: download failed ({one_line(error)}); put {what} into {root}, or set points.path to the "
            "folder that has the files"
        ) from None
