"""A store extracted from a folder of pictures by tiny random towers."""

from __future__ import annotations

from pathlib import Path

from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.extraction.config import ExtractionConfig
from blip3o_dit.extraction.extract import extract


def extracted_store(root: Path) -> EmbeddingStore:
    """`root/store`, of the pictures in `root/images`: 16 tokens."""
    config = ExtractionConfig(
        images=str(root / "images"),
        output=str(root / "store"),
        towers_from_scratch=True,
        seed=3,
        tokens=16,
        workers=0,
        device="cpu",
    )
    store = extract(config, progress=False)
    assert store is not None
    return store
