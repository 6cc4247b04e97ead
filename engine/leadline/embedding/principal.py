"""Principal directions of embeddings, from a sample that streams by and is never held."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from leadline.embedding.signs import packed_signs, spell_out
from leadline.errors import LeadlineError

EXTRA = 16  # directions that are sought beside those that are kept, without which the last ones would come slowly
ITERATIONS = 4
PASSES = ITERATIONS + 2  # of the sample: its mean, the iterations, and the scatter
COPIES = 4  # matrices [D, M + EXTRA] that a search holds at most

# One pass over the sample: for each batch, the embeddings of every layer, float32 [B, D].
Pass = Callable[[], Iterator[Sequence[Tensor]]]


@dataclass(frozen=True)
class Directions:
    """The sample's mean, float32 [D], and its M directions of largest variance, float32 [D, M], orthonormal columns."""

    mean: Tensor
    matrix: Tensor


def search_bytes(width: int, size: int) -> int:
    """Bytes that a search for so many directions takes, beside one batch."""
    return 4 * COPIES * width * min(size + EXTRA, width)


def principal_directions(sample: Pass, sizes: Sequence[int]) -> list[Directions]:
    """The directions of several layers, so many of each, by subspace iteration from random signs.

    (Halko, Martinsson, Tropp, "Finding structure with randomness", 2011, section 4.5.) The sample passes by
    PASSES times; memory does not depend on its size: `search_bytes` for each layer.
    """
    means = _means(sample)
    bases = [_signs(len(mean), size, mean.device) for mean, size in zip(means, sizes, strict=True)]
    for _ in range(ITERATIONS):
        products = [torch.zeros_like(basis) for basis in bases]
        for batch in sample():
            for rows, mean, basis, product in zip(batch, means, bases, products, strict=True):
                centred = rows - mean
                product.addmm_(centred.T, centred @ basis)
        bases = [torch.linalg.qr(product).Q for product in products]
    scatters = [basis.new_zeros(basis.shape[1], basis.shape[1], dtype=torch.float64) for basis in bases]
    for batch in sample():
        for rows, mean, basis, scatter in zip(batch, means, bases, scatters, strict=True):
            scores = ((rows - mean) @ basis).double()
            scatter.addmm_(scores.T, scores)
    # Within the span that was found, the directions are the eigenvectors of the scatter; eigh gives the largest last.
    return [
        Directions(mean, basis @ torch.linalg.eigh(scatter).eigenvectors.flip(1)[:, :size].float())
        for mean, basis, scatter, size in zip(means, bases, scatters, sizes, strict=True)
    ]


def _means(sample: Pass) -> list[Tensor]:
    """Means by layer, float32 [D], added in float64."""
    totals: list[Tensor] = []
    n = 0
    for batch in sample():
        sums = [rows.sum(0, dtype=torch.float64) for rows in batch]
        totals = [total + new for total, new in zip(totals, sums, strict=True)] if totals else sums
        n += len(batch[0])
    return [(total / n).float() for total in totals]


def _signs(width: int, size: int, device: torch.device) -> Tensor:
    rank = min(size + EXTRA, width)
    return spell_out(packed_signs(width, rank, device), rank)


def save_directions(directions: Mapping[int, Directions], path: Path) -> None:
    """Write directions by probe as safetensors: float32 tensors `<probe>.mean` [D] and `<probe>.matrix` [D, M]."""
    tensors = {}
    for probe, found in directions.items():
        tensors[f"{probe}.mean"] = found.mean.cpu()
        tensors[f"{probe}.matrix"] = found.matrix.contiguous().cpu()
    save_file(tensors, path)


def load_directions(path: Path, device: torch.device) -> dict[int, Directions]:
    """What `save_directions` wrote. Raises LeadlineError where the file is missing or damaged."""
    try:
        tensors = load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise LeadlineError(f"{path}: missing or damaged ({error}); restore the file") from None
    probes = {int(name.partition(".")[0]) for name in tensors}
    return {probe: Directions(tensors[f"{probe}.mean"], tensors[f"{probe}.matrix"]) for probe in probes}
