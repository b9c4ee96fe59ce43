"""Checks of samples before they are stored or trained on; errors name the file, expectation and finding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from blip3o_dit.utils.json_files import short_repr

Indices = Sequence[int] | np.ndarray
AnyIndices = TypeVar("AnyIndices", bound=Indices)

# What is known of a sample beside its tokens: "key" (str), and perhaps "caption", "label", ...
Record = dict[str, Any]


def check_pair(
    where: Path,
    eva: Tensor,
    clip: Tensor,
    records: Sequence[Record],
    *,
    expected: tuple[int, int, int] | None = None,
    offset: int = 0,
) -> None:
    """Refuse samples that cannot be trained on, naming file, field, expectation and finding.

    Args:
        expected: (tokens, condition width, target width), when they are fixed already.
        offset: index of the first of these samples, for the message.
    """
    for name, tokens in (("eva", eva), ("clip", clip)):
        check_rank(where, name, tokens.shape)
    check_counts(where, len(eva), len(clip), len(records))
    check_token_counts(where, eva.shape, clip.shape)
    if expected is not None:
        found = (clip.shape[1], eva.shape[2], clip.shape[2])
        if found != expected:
            raise ValueError(f"{where}: expected (tokens, eva width, clip width) {expected}, found {found}")
    for name, tokens in (("eva", eva), ("clip", clip)):
        bad = non_finite_samples(tokens)
        if len(bad):
            first = int(bad[0])
            raise ValueError(
                f"{where}: {name}: NaN or infinity in {len(bad)} samples, "
                f"first in sample {offset + first} (key {short_repr(records[first].get('key'))})"
            )
    for row, record in enumerate(records):
        check_record(where, offset + row, record)


def non_finite_samples(tokens: Tensor) -> Tensor:
    """Which of the samples [B, ...] hold NaN or infinity: their rows, ascending."""
    return torch.nonzero(~torch.isfinite(tokens).flatten(1).all(dim=1)).flatten()


def check_record(where: Path, sample: int, record: Any) -> None:
    """Refuse what is no record: an object with a string key, and a caption that is text if there is one."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: sample {sample}: expected an object, found {short_repr(record)}")
    key, caption = record.get("key"), record.get("caption")
    if not isinstance(key, str):
        raise ValueError(f"{where}: sample {sample}: expected a string key, found {short_repr(key)}")
    if caption is not None and not isinstance(caption, str):
        raise ValueError(f"{where}: sample {sample}: expected text as caption, found {short_repr(caption)}")


def check_counts(where: Path, eva: int, clip: int, records: int) -> None:
    if not eva == clip == records:
        raise ValueError(f"{where}: expected equal counts, found {eva} eva, {clip} clip, {records} records")


def check_rank(where: Path, name: str, shape: Sequence[int]) -> None:
    """Refuse (ValueError) what is not [samples, tokens, width], and say what other layouts become it."""
    if len(shape) == 3 and shape[2] >= 1:
        return
    hint = ""
    if len(shape) == 2:
        hint = " (one vector a sample? as [:, None] it is one token)"
    elif len(shape) == 4 and shape[2] == shape[3]:
        hint = " (a grid, channels first? it takes .reshape(n, C, -1).swapaxes(1, 2))"
    elif len(shape) == 4 and shape[1] == shape[2]:
        hint = " (a grid, channels last? it takes .reshape(n, -1, C))"
    raise ValueError(
        f"{where}: {name}: expected rank 3 [samples, tokens, width], found shape {list(shape)}{hint}"
    )


def check_token_counts(where: Path, eva: Sequence[int], clip: Sequence[int]) -> None:
    """Refuse (ValueError) shapes [n, L, C_eva] and [n, N, C] unless L is N, a square."""
    hint = ""
    for _, tokens, width in (eva, clip):
        if not is_square(tokens) and is_square(tokens - 1):
            hint = f" ({tokens - 1} and a class token? `blip3o-dit convert --drop_class_token` drops it)"
        elif not is_square(tokens) and is_square(width):
            hint = f" (of width {width}: transposed? it takes .swapaxes(1, 2))"
        if hint:
            break
    if eva[1] != clip[1]:
        if is_square(eva[1]) and is_square(clip[1]):
            least = min(eva[1], clip[1])
            hint = f" (`blip3o-dit convert --pool {least}` makes it {least} on both sides)"
        raise ValueError(f"{where}: expected as many eva as clip tokens, found {eva[1]} and {clip[1]}{hint}")
    check_square(where, clip[1], hint)


def is_square(number: int) -> bool:
    return number >= 1 and math.isqrt(number) ** 2 == number


def check_square(where: Path, num_tokens: int, hint: str = "") -> None:
    if not is_square(num_tokens):
        raise ValueError(
            f"{where}: expected a square number of tokens (an n x n grid), found {num_tokens}{hint}"
        )


def check_indices(where: Path, indices: Indices, num_samples: int) -> None:
    """Raises IndexError unless all indices are in 0..num_samples-1."""
    wanted = np.asarray(indices, dtype=np.int64)
    if len(wanted) and not (wanted.min() >= 0 and wanted.max() < num_samples):
        raise IndexError(
            f"{where}: expected indices in 0..{num_samples - 1}, found {wanted.min()}..{wanted.max()}"
        )
