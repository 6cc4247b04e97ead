"""Which points a member is trained on."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from leadline.errors import LeadlineError
from leadline.points import TRAIN
from leadline.points.arrays import load_npy

if TYPE_CHECKING:
    from leadline.config import FileSplit, SplitConfig


def training_ids(split: "SplitConfig", parts: NDArray[np.uint8], seed: int) -> NDArray[np.int64]:
    """The ids of a member's training points, int64 [n], ascending; all other points are held out for it.

    parts: [N], 0 for part train and 1 for part test. Random splits draw round(share * n) of the n points of part train
    by the member's seed, so they differ between members of different seeds.
    Raises LeadlineError for a split without points, and for a file of ids that is damaged or does not fit.
    """
    if split.kind == "file":
        return _ids_from_file(split, len(parts), seed)
    ids = np.flatnonzero(parts == TRAIN).astype(np.int64)
    if split.kind == "random":
        ids = np.random.default_rng(seed).permutation(ids)[: round(split.share * len(ids))]
    if not len(ids):
        raise LeadlineError(
            f"split {split.kind}: no points to train on ({np.count_nonzero(parts == TRAIN)} in part train); "
            "give more points or a larger share"
        )
    return np.sort(ids)


def _ids_from_file(split: "FileSplit", n_points: int, seed: int) -> NDArray[np.int64]:
    path = path_of_seed("split", split.path, seed)
    ids = load_npy("split", path)
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iu":
        what = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, np.ndarray) else "several arrays"
        raise LeadlineError(f"split {path}: it holds {what}; give one row of integer ids")
    if not len(ids):
        raise LeadlineError(f"split {path}: it holds no ids; give one at least")
    outside = (ids < 0) | (ids >= n_points)
    if outside.any():
        raise LeadlineError(
            f"split {path}: id {ids[outside.argmax()]} at place {outside.argmax()} is not a point; "
            f"allowed 0 to {n_points - 1}"
        )
    ordered = np.sort(ids.astype(np.int64))
    twice = ordered[1:] == ordered[:-1]
    if twice.any():
        raise LeadlineError(f"split {path}: id {ordered[twice.argmax()]} is there twice; give each point once")
    return ordered


def path_of_seed(what: str, path: str, seed: int) -> Path:
    """A member's own file: `{seed}` in the path (or {seed:03}) stands for its seed. Raises LeadlineError for others."""
    try:
        return Path(path.format(seed=seed))
    except (LookupError, ValueError, AttributeError) as error:
        raise LeadlineError(f"{what} {path}: of all braces only {{seed}} can be filled in; mend the path") from error
