"""Matrices of random signs: the random projection of wide embeddings, and what a search for directions begins with."""

import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SEED = 20210617  # of all signs: members, workers and runs share one matrix for each pair of widths
BLOCK = 1 << 24  # signs that are spelt out as float32 at a time, 64 MiB


def project(rows: Tensor, size: int) -> Tensor:
    """Rows, float32 [B, D], times a matrix of random signs / sqrt(size): float32 [B, size].

    A squared distance keeps its mean, with a relative standard deviation of at most sqrt(2 / size) (Achlioptas,
    "Database-friendly random projections", 2003). The signs depend on D and size alone. They are kept as bits, D *
    size / 8 bytes for the process, and spelt out BLOCK at a time.
    """
    width = rows.shape[1]
    packed = packed_signs(width, size, rows.device)
    projected = rows.new_zeros(len(rows), size)
    step = max(1, BLOCK // size)
    for first in range(0, width, step):
        projected.addmm_(rows[:, first : first + step], spell_out(packed[first : first + step], size))
    return projected / math.sqrt(size)


@lru_cache(maxsize=16)
def packed_signs(width: int, size: int, device: torch.device) -> Tensor:
    """Random bits, uint8 [width, size / 8 rounded up], the same on every machine and device.

    Philox counts, so its numbers are integers that no rounding touches, and numpy promises to keep its stream.
    """
    row = -(-size // 8)
    words = np.random.Philox(key=np.array([SEED, width], np.uint64)).random_raw(-(-width * row // 8))
    octets = words.astype("<u8", copy=False).view(np.uint8)[: width * row].reshape(width, row)
    return torch.from_numpy(octets).to(device)


def spell_out(packed: Tensor, size: int) -> Tensor:
    """Bits, uint8 [D, size / 8 rounded up], as signs: float32 [D, size] of 1 and -1."""
    octets = torch.arange(256, device=packed.device)[:, None]
    table = 1.0 - 2.0 * (octets >> torch.arange(8, device=packed.device) & 1)
    return F.embedding(packed.int(), table).flatten(1)[:, :size]
