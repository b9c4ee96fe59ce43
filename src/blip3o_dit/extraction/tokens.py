"""Tokens of a batch of images: from both towers, pooled, in the dtype of the store; errors in one line."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from blip3o_dit.data.checks import non_finite_samples
from blip3o_dit.data.manifest import DTYPES
from blip3o_dit.data.pooling import pool_tokens
from blip3o_dit.data.shard_writer import to_disk
from blip3o_dit.extraction.config import ExtractionConfig
from blip3o_dit.extraction.encoders import VisionEncoder
from blip3o_dit.extraction.skipping import NO_FIT
from blip3o_dit.extraction.vision_towers import load_encoder, local_files, tiny_encoder
from blip3o_dit.utils.json_files import one_line, printable

logger = logging.getLogger(__name__)

# By side, "eva" and "clip"
Towers = dict[str, VisionEncoder]


def load_towers(config: ExtractionConfig, device: torch.device) -> Towers:
    """Both towers on the device. Raises ValueError for tokens that their grids do not pool into."""
    dtype = DTYPES[config.dtype]
    if config.towers_from_scratch:
        logger.warning("towers from scratch: tiny and random, their tokens mean nothing")
        towers = {side: tiny_encoder(side, seed=config.seed) for side in ("eva", "clip")}
    else:
        towers = {}
        for side in ("eva", "clip"):
            name, revision = getattr(config, side), getattr(config, f"{side}_revision")
            away = " (from the hub)" if local_files(name, revision) is None else ""
            logger.info("loading the %s tower %s%s", side, printable(name), away)
            with _one_line(f"{side} tower {name}", config.dtype):
                towers[side] = load_encoder(
                    name,
                    dtype=dtype,
                    revision=revision,
                    preprocessing=getattr(config, f"{side}_preprocessing"),
                    size=getattr(config, f"{side}_size"),
                )
    for side, tower in towers.items():
        pool_tokens(torch.empty(1, tower.grid**2, 1), config.tokens)  # refuses before any work is done
        with _one_line(f"{side} tower {tower.name}", config.dtype):
            tower.to(device, dtype).eval().requires_grad_(False)
    return towers


@torch.inference_mode()
def tower_tokens(
    tower: VisionEncoder, side: str, pixels: Tensor, config: ExtractionConfig, device: torch.device
) -> dict[str, Tensor]:
    """uint8 pixels [B, 3, size, size] -> float32 tokens [B, tokens, width] on the CPU, by the side's name.

    What `config.keep` names is beside them, [B, C] each, as `eva_pooled`, `clip_class`, ...
    """
    what = f"{side} tower {tower.name}, {len(pixels)} pictures of {tower.preprocessing.size} pixels"
    with _one_line(what, config.dtype, len(pixels)):
        normalized = tower.preprocessing.normalize(pixels.to(device))
        normalized = normalized.to(DTYPES[config.dtype])
        # [B, grid * grid, C] and, if asked for, vectors [B, C]
        grid, vectors = tower.with_vectors(normalized) if config.keep else (tower(normalized), {})
    expected = [len(pixels), tower.grid**2, tower.width]
    if list(grid.shape) != expected:
        raise ValueError(f"{what}: expected tokens of shape {expected}, found {list(grid.shape)}")
    missing = [kind for kind in config.keep if kind not in vectors]
    if missing:
        raise ValueError(f"{what}: --keep: expected one of {list(vectors)}, which it has, found {missing[0]}")
    kept = {f"{side}_{kind}": vectors[kind].float().cpu() for kind in config.keep}
    return {side: pool_tokens(grid.float(), config.tokens).cpu(), **kept}


def storable(where: Path, tokens: dict[str, Tensor], dtype: str) -> tuple[dict[str, Tensor], dict[int, str]]:
    """Tokens by side, [B, tokens, width], in the dtype of the store.

    Returns those that it holds, and by row the reason why it does not hold an image's.
    """
    reasons: dict[int, str] = {}
    for side, values in tokens.items():
        for row in non_finite_samples(values).tolist():
            reasons[row] = f"{NO_FIT}: {side}: NaN or infinity; --dtype float32 has the most range"
    count = len(next(iter(tokens.values())))
    try:
        if not reasons:
            return {side: to_disk(where, values, side, dtype) for side, values in tokens.items()}, {}
    except ValueError:
        pass  # which of them?
    for row in range(count):
        for side, values in tokens.items():
            try:
                to_disk(where, values[row : row + 1], side, dtype)
            except ValueError as error:
                reasons.setdefault(row, f"{NO_FIT}: {one_line(error).removeprefix(f'{where}: ')}")
    kept = [row for row in range(count) if row not in reasons]
    return {side: to_disk(where, values[kept], side, dtype) for side, values in tokens.items()}, reasons


@contextmanager
def _one_line(what: str, dtype: str, batch_size: int = 1) -> Iterator[None]:
    """A model's and torch's own errors as a ValueError that says what to do."""
    try:
        yield
    except (RuntimeError, MemoryError, AttributeError, TypeError, LookupError) as error:
        found = one_line(error)
        short = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in found
        smaller = [f"--batch_size {batch_size // 2}"] * (batch_size > 1) + ["--dtype bfloat16"] * (
            dtype == "float32"
        )
        advice = (
            f"out of memory; try {' or '.join(smaller) or 'another --device'}"
            if short
            else "it cannot be run so"
        )
        raise ValueError(f"{what} in {dtype}: {advice}: {found}") from error
