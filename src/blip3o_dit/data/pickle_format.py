"""The documented pickle of BLIP3-o embeddings: reading it and writing it.

One dict: `eva_blip3o_embeddings` [n, L, C_eva] and `clip_blip3o_embeddings` [n, N, C_clip], NumPy arrays or
torch tensors, and perhaps `captions` and `keys` (n texts each), `labels`, `has_caption` and `config`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blip3o_dit.data.array_embeddings import (
    AS_IT_IS,
    CLIP_NAMES,
    EVA_NAMES,
    HAS_CAPTION,
    Arrangement,
    ArrayEmbeddings,
    raw_from_content,
)
from blip3o_dit.data.embeddings import Embeddings, batches
from blip3o_dit.data.safe_unpickler import load_pickle
from blip3o_dit.utils.atomic import dump_atomically
from blip3o_dit.utils.json_files import short_repr

EVA_KEY, CLIP_KEY = EVA_NAMES[0], CLIP_NAMES[0]

# Values of a pickle's config that a store takes over, at most.
MAX_CONFIG_VALUES = 10_000


class PickledEmbeddings(ArrayEmbeddings):
    """The documented pickle, held in memory as it is (`convert_pickle` makes a store of it).

    Raises:
        FileNotFoundError, ValueError: naming file, key, expectation and finding; `UnsafePickleError`
            (a ValueError) when the file asks for anything but arrays, tensors and plain containers.
    """

    def __init__(self, path: str | Path, arrangement: Arrangement = AS_IT_IS) -> None:
        path = Path(path)
        content = load_pickle(path)
        if not isinstance(content, dict):
            raise ValueError(f"{path}: expected a dict, found a {type(content).__name__}")
        super().__init__(raw_from_content(path, [path], content, in_memory=True), arrangement)
        self.config = content.get("config")


def write_pickle(source: Embeddings, path: str | Path) -> None:
    """Write embeddings as the documented pickle of NumPy arrays, which holds all of them in memory.

    Captions that are not known are written as "", which readers of the documented pickle expect, and marked
    in `has_caption`; labels go into `labels`.
    """
    path = Path(path)
    shapes = [(source.num_tokens, source.condition_dim), (source.num_tokens, source.target_dim)]
    half = getattr(source, "manifest", {}).get("dtype") == "float16"
    dtype = np.float16 if half else np.float32
    eva, clip = (np.empty((source.num_samples, *shape), dtype=dtype) for shape in shapes)
    for rows in batches(range(source.num_samples), 256):
        batch = source.fetch(rows)
        eva[rows.start : rows.stop], clip[rows.start : rows.stop] = (tokens.numpy() for tokens in batch)
    records = source.records()
    captions = [record.get("caption") for record in records]
    labels = [record.get("label") for record in records]
    content = {
        EVA_KEY: eva,
        CLIP_KEY: clip,
        "captions": ["" if caption is None else caption for caption in captions],
        "keys": [record["key"] for record in records],
        "config": getattr(source, "manifest", {}).get("extraction", {}),
        "total_samples": source.num_samples,
    }
    if None in captions:
        content[HAS_CAPTION] = [caption is not None for caption in captions]
    if any(label is not None for label in labels):
        content["labels"] = labels
    path.parent.mkdir(parents=True, exist_ok=True)
    dump_atomically(path, content)


def config_for_json(path: Path, config: Any) -> Any:
    """What JSON can hold of the config, the rest as short text.

    Containers that hold one another many times over would have no end as text.
    """
    left = MAX_CONFIG_VALUES

    def as_json(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > 50:
            raise ValueError(f"{path}: config: expected at most {MAX_CONFIG_VALUES} values, 50 deep")
        if isinstance(value, dict):
            return {
                k if isinstance(k, str) else short_repr(k): as_json(v, depth + 1) for k, v in value.items()
            }
        if isinstance(value, list | tuple):
            return [as_json(v, depth + 1) for v in value]
        if isinstance(value, np.generic | torch.dtype):
            return str(value)[:200]
        small = isinstance(value, int) and abs(value) < 2**63
        finite = isinstance(value, float) and math.isfinite(value)
        return value if value is None or small or finite or isinstance(value, str) else short_repr(value)

    return as_json(config, 0)
