"""Points to embeddings at each probe, in memory or as shards on disk."""

from leadline.embedding.extract import Embedded, embed_batch
from leadline.embedding.outputs import Outputs
from leadline.embedding.shards import ShardedRows

__all__ = ["Embedded", "Outputs", "ShardedRows", "embed_batch"]
