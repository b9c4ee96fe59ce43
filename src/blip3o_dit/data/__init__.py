"""Embeddings at rest: the store, the documented pickle, splits and statistics."""
