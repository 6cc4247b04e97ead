"""Inputs that lie in one array, in memory or mapped from a file, and arrays that a configuration names."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leadline.errors import LeadlineError

_BLOCK_BYTES = 1 << 24


def load_npy(what: str, path: Path) -> Any:
    """What lies in a user's .npy file: an array, or several. what: who names it, for the error.

    Raises LeadlineError for a file that cannot be read as numbers.
    """
    try:
        with path.open("rb") as file:
            return np.load(file, allow_pickle=False)
    except OSError as error:
        raise LeadlineError(f"{what} {path}: {error.strerror or 'damaged'}; give an integer .npy file") from error
    except Exception as error:  # numpy raises many kinds for a damaged file
        raise LeadlineError(f"{what} {path}: not a .npy file of numbers; write one with numpy.save") from error


class ArrayInputs:
    """Rows of an array [rows, ...]; uint8 [rows, C, H, W] where `full_scale` says that they are images.

    `rows` int64 [N] gives the row of each point, where the order of points is not that of rows.
    """

    def __init__(
        self, name: str, values: NDArray[Any], *, full_scale: int | None, rows: NDArray[np.int64] | None = None
    ) -> None:
        self.full_scale = full_scale
        self._name = name
        self._values = values
        self._rows = np.arange(len(values)) if rows is None else rows

    def read(self, ids: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[Any]]]:
        for position, row in enumerate(self._rows[ids].tolist()):
            yield position, self._values[row]

    def where(self, point_id: int) -> str:
        return f"{self._name} row {self._rows[point_id]}"

    def content(self) -> Iterator[bytes]:
        dtype = self._values.dtype.newbyteorder("<")
        yield f"{dtype.str} {self._values.shape[1:]}".encode()
        block = max(1, _BLOCK_BYTES // max(1, self._values[:1].nbytes))
        for start in range(0, len(self._rows), block):
            yield self._values[self._rows[start : start + block]].astype(dtype).tobytes()
