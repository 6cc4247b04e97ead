"""Points to embeddings at each probe, a batch at a time."""

from leadline.embedding.extract import Embedded, embed_batch
from leadline.embedding.outputs import Outputs

__all__ = ["Embedded", "Outputs", "embed_batch"]
