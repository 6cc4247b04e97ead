"""Embeddings by layer, to be measured on: those of a stored run's member, or .npy files in a folder of a user's."""

import tempfile
import tokenize
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from leadline.embedding.reductions import stored_width
from leadline.errors import LeadlineError, one_line
from leadline.knn.arrays import Array, copied
from leadline.knn.exact import refuse_non_finite
from leadline.query import open_run
from leadline.store.tables import read_table
from leadline.stored_member import StoredMember, stored_points

LABELS, PREDICTIONS, TRAINING = "labels", "predictions", "training"
K = 30
READ = 64 << 20  # bytes of a file that are checked at once


@dataclass(frozen=True)
class Layers:
    """N points at several layers, of which one at a time is read.

    title: what they are of, for people; about: the same for a record. names, widths: of the layers, in order. labels:
    int [N]; bank_ids: int64, ascending, the points that vote; predictions: int [N], the network's own classes, or None.
    k and leave_one_out: as the run has them. rows(i): a context in which the embeddings of layer i, real [N, width],
    are there, mapped and not read.
    """

    title: str
    about: dict[str, Any]
    names: list[str]
    widths: list[int]
    labels: Array
    bank_ids: Array
    predictions: Array | None
    k: int
    leave_one_out: bool
    rows: Callable[[int], AbstractContextManager[Array]]

    @property
    def own(self) -> Array | None:
        """int64 [N]: the bank row that each point must not count among its neighbours, -1 for none."""
        if not self.leave_one_out:
            return None
        own = np.full(len(self.labels), -1)
        own[self.bank_ids] = np.arange(len(self.bank_ids))
        return own


def open_layers(path: Path, member: str | None = None, device: str = "cpu") -> Layers:
    """The layers of a member of a finished run, by default its first, or of a folder of embeddings.

    A run's embeddings are scratch and gone when it is done. So a member's are made again from its stored weights, with
    the run's reductions and in its batches, on the device, one layer at a time in a temporary file.

    A folder of embeddings holds labels.npy, integers [N], and for each layer a file NAME.npy, float32 or float64
    [N, ...]; layers are in the order of their sorted names. Where it holds predictions.npy, integers [N], depths can be
    told; training.npy, bool [N], says which points are the bank: by default all are.

    Raises LeadlineError for what is neither, a run that is not finished or whose data have changed, an unknown member,
    and files of a folder that do not do; `rows` does so for values that are not finite.
    """
    if (path / "run.json").is_file():
        return _of_run(path, member, device)
    if not (path / f"{LABELS}.npy").is_file():
        raise LeadlineError(
            f"{path}: neither a run (run.json) nor a folder of embeddings ({LABELS}.npy) is here; give one of them"
        )
    if member is not None:
        raise LeadlineError(f"--member: {path} is a folder of embeddings, which has no members; leave it out")
    return _of_folder(path)


def _of_run(path: Path, name: str | None, device: str) -> Layers:
    run = open_run(path)
    if run.manifest["status"] != "complete":
        raise LeadlineError(f"{path}: the run is not finished; finish it with the command that began it")
    name = name or str(run.sql("SELECT min(member) FROM members")[0][0].as_py())
    member = StoredMember(run.directory, run.manifest, name, device)
    points = stored_points(run.directory, run.manifest)
    depths = read_table(run.directory.member_table("depths", name))

    @contextmanager
    def rows(layer: int) -> Iterator[Array]:
        with tempfile.TemporaryDirectory(prefix="leadline-") as folder:
            file = Path(folder) / "layer.npy"
            member.write_layer(layer, points, file)
            yield np.load(file, mmap_mode="r", allow_pickle=False)

    return Layers(
        title=f"{run.manifest['name']} {name}",
        about={"name": run.manifest["name"], "fingerprint": run.manifest["fingerprint"], "member": name},
        names=[probe.name for probe in member.probes],
        widths=[stored_width(probe) for probe in member.probes],
        labels=depths["label"].to_numpy(),
        bank_ids=np.flatnonzero(depths["in_training"].to_numpy()),
        predictions=depths["prediction"].to_numpy(),
        k=member.config.k,
        leave_one_out=member.config.leave_one_out,
        rows=rows,
    )


def _of_folder(path: Path) -> Layers:
    labels = _classes(path, LABELS, None)
    n = len(labels)
    predictions = _classes(path, PREDICTIONS, n) if (path / f"{PREDICTIONS}.npy").is_file() else None
    bank_ids = np.arange(n)
    if (path / f"{TRAINING}.npy").is_file():
        inside = _mapped(path, TRAINING)
        if inside.dtype != bool or inside.shape != (n,):
            raise LeadlineError(
                f"{path / TRAINING}.npy: {inside.dtype} of shape {inside.shape}; give bool of shape ({n},)"
            )
        bank_ids = np.flatnonzero(inside)
    names = sorted({file.stem for file in path.glob("*.npy")} - {LABELS, PREDICTIONS, TRAINING})
    if not names:
        raise LeadlineError(f"{path}: no layer is here; give NAME.npy, float32 [{n}, width], for each")
    layers = [_layer(path, name, n) for name in names]

    @contextmanager
    def rows(layer: int) -> Iterator[Array]:
        values = _layer(path, names[layer], n)
        step = max(1, READ // (values[:1].nbytes or 1))
        for first in range(0, n, step):
            refuse_non_finite(copied(values, slice(first, first + step)), first, f"{path / names[layer]}.npy: point")
        yield values

    return Layers(
        title=path.resolve().name,
        about={"name": path.resolve().name},
        names=names,
        widths=[values.shape[1] for values in layers],
        labels=labels,
        bank_ids=bank_ids,
        predictions=predictions,
        k=K,
        leave_one_out=True,
        rows=rows,
    )


def _layer(path: Path, name: str, n: int) -> Array:
    values = _mapped(path, name)
    if values.dtype not in (np.float32, np.float64) or values.ndim < 2 or len(values) != n or not values.size:
        raise LeadlineError(
            f"{path / name}.npy: {values.dtype} of shape {values.shape}; give float32 or float64 [{n}, width], a row "
            "for each label"
        )
    return values.reshape(n, -1)


def _classes(path: Path, name: str, n: int | None) -> Array:
    values = _mapped(path, name)
    if values.dtype.kind not in "iu" or values.ndim != 1 or len(values) != (n or len(values)) or not len(values):
        raise LeadlineError(
            f"{path / name}.npy: {values.dtype} of shape {values.shape}; give integers [{n or 'N'}], one a point"
        )
    bad = np.flatnonzero((values < 0) | (values >= 2**31))
    if len(bad):
        raise LeadlineError(f"{path / name}.npy: point {bad[0]} has {values[bad[0]]}, allowed 0 to {2**31 - 1}")
    return np.asarray(values, np.int64)


def _mapped(path: Path, name: str) -> Array:
    try:
        return np.lib.format.open_memmap(path / f"{name}.npy", mode="r")  # no pickles: objects are refused
    except (OSError, ValueError, OverflowError, tokenize.TokenError) as error:
        raise LeadlineError(
            f"{path / name}.npy: cannot be read as an .npy file ({one_line(error)}); replace the file"
        ) from None
