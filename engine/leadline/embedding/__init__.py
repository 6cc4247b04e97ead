"""Points to embeddings at each probe, a batch at a time; reduced, where that is asked for, before they leave."""

from leadline.embedding.extract import (
    Embedded,
    batch_logits,
    embed_batch,
    embed_input,
    embed_resident,
    fit_directions,
    forward_pass,
)
from leadline.embedding.in_full import EmbeddedRows
from leadline.embedding.outputs import Outputs

__all__ = [
    "Embedded",
    "EmbeddedRows",
    "Outputs",
    "batch_logits",
    "embed_batch",
    "embed_input",
    "embed_resident",
    "fit_directions",
    "forward_pass",
]
