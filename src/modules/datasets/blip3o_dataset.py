"""Data sets, under the documented path."""

from blip3o_dit.data.dataset import EmbeddingDataset, split_samples, test_blip3o_dataset
from blip3o_dit.data.embeddings import open_embeddings

__all__ = ["EmbeddingDataset", "open_embeddings", "split_samples", "test_blip3o_dataset"]
