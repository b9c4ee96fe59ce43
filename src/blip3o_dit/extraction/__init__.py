"""From images to embeddings: listing, decoding, vision towers, pooling, the resumable extraction."""
