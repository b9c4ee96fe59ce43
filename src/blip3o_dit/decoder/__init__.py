"""A small decoder that turns target tokens into pictures; see docs/pixels.md.

The public names are imported when first used, so that flags need no library.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "DecoderConfig": "config",
    "DecoderTrainingConfig": "config",
    "TokenDecoder": "network",
    "decode_embeddings": "decode",
    "load_decoder": "folder",
    "train_decoder": "training",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
