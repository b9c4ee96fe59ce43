"""blip3o-dit: CLIP tokens from EVA-CLIP tokens, by flow matching with BLIP3-o's diffusion transformer.

The public names are imported when first used, so that importing the package stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from blip3o_dit.utils.logging import quiet_torchao

__version__ = "0.1.0"

_HOMES = {
    "BLIP3oDiTConfig": "blip3o_dit.model.config",
    "FlowMatchingConfig": "blip3o_dit.flow.config",
    "TrainingConfig": "blip3o_dit.training.config",
    "BLIP3oDiTModel": "blip3o_dit.model.blip3o_dit",
    "BLIP3oFlowMatchingLoss": "blip3o_dit.flow.loss",
    "BLIP3oInference": "blip3o_dit.inference.pipeline",
    "BLIP3oTrainer": "blip3o_dit.training.trainer",
    "EmbeddingStore": "blip3o_dit.data.store",
    "StoreWriter": "blip3o_dit.data.store",
    "open_embeddings": "blip3o_dit.data.embeddings",
    "push_to_hub": "blip3o_dit.publish",
    "convert_pickle": "blip3o_dit.data.convert",
}

__all__ = ["__version__", *_HOMES]

quiet_torchao()  # which transformers imports, by whichever module of ours comes first


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'blip3o_dit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
