"""Points to embeddings: batches through networks, in eval mode, float32."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from leadline.embedding.outputs import Array, Outputs, summarise_logits
from leadline.errors import LeadlineError
from leadline.members.probes import Probe, read_probes


@dataclass(frozen=True)
class Embedded:
    """A batch of B points in one member: embeddings, float32 [B, width] a probe, and what its logits say."""

    embeddings: list[Array]
    outputs: Outputs


def embed_batch(
    model: torch.nn.Module, probes: Sequence[Probe], inputs: torch.Tensor, first_point: int, member: str
) -> Embedded:
    """Run one batch (inputs [B, ...], on the model's device) and bring its embeddings to the CPU.

    Raises LeadlineError that names the member, the probe and the point where an embedding or a logit is not finite;
    first_point is the id of the batch's first point.
    """
    with _float32_products():
        embeddings, logits = read_probes(model, probes, inputs)
    arrays = [values.cpu().numpy() for values in embeddings]
    # The logits come first in the list: a softmax that is not finite is their doing.
    named = [("logits", logits.cpu().numpy()), *zip((p.name for p in probes), arrays, strict=True)]
    for name, values in named:
        finite = np.isfinite(values).all(axis=1)
        if not finite.all():
            point = first_point + int(np.flatnonzero(~finite)[0])
            raise LeadlineError(
                f"member {member}, probe {name}: not finite at point {point}; its weights or that input are broken"
            )
    return Embedded(arrays, summarise_logits(named[0][1]))


@contextmanager
def _float32_products() -> Iterator[None]:
    """Full float32 on GPUs: TF32 would make embeddings depend on the device's generation."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions
