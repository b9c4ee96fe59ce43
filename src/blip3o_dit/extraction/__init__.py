"""From pictures to embeddings: sources, decoding, vision towers, pooling, the engine."""
