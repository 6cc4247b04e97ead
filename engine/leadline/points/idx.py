"""IDX, the format of MNIST's files: big-endian sizes, then bytes."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from leadline.errors import LeadlineError, one_line

_UNSIGNED_BYTE = 0x08


def read_idx(path: Path, rank: int) -> NDArray[np.uint8]:
    """The uint8 array of `rank` dimensions in an IDX file, gzipped where its name ends in .gz.

    Raises LeadlineError that names the file where it cannot be read or unpacked, or where its magic number, its
    sizes and its length do not agree.
    """
    raw = _unpacked(path)
    header = 4 + 4 * rank
    magic = bytes([0, 0, _UNSIGNED_BYTE, rank])
    if raw[:4] != magic:
        raise LeadlineError(
            f"{path}: begins with {raw[:4].hex() or 'nothing'}, an IDX file of {rank} dimensions with {magic.hex()}; "
            "replace the file"
        )
    if len(raw) < header:
        raise LeadlineError(f"{path}: ends within its header, after {len(raw)} bytes; replace the file")
    shape = struct.unpack_from(f">{rank}I", raw, 4)
    expected = header + math.prod(shape)
    if len(raw) != expected:
        what = "truncated" if len(raw) < expected else "too long"
        raise LeadlineError(f"{path}: {what}, {len(raw)} bytes where its sizes make {expected}; replace the file")
    return np.frombuffer(raw, dtype=np.uint8, offset=header).reshape(shape)


def _unpacked(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise LeadlineError(f"{path}: cannot be read ({one_line(error)}); replace the file") from None
