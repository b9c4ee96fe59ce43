"""Stateless random numbers: each is a function of (seed, stream, counter, sample index), of nothing else.

So they do not change with the number of processes, the batch size, data-loader workers, an evaluation in
between, or a restart. The tuple is hashed to the 128-bit key of a counter-based generator (Philox; Salmon et
al. 2011), always on the CPU: every device sees the same numbers. `stream` says what the numbers are for, so
that two uses of one seed are independent; `counter` is an epoch or a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor


def stateless_generator(*key_parts: int | str) -> np.random.Generator:
    """A generator whose whole sequence is a function of these parts."""
    plain = tuple(part if isinstance(part, str) else int(part) for part in key_parts)  # numpy's ints as well
    digest = blake2b(repr(plain).encode(), digest_size=16).digest()
    key = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def stateless_seed(*key_parts: int | str) -> int:
    """A seed for a generator that is not ours, in [0, 2^63)."""
    return int(stateless_generator(*key_parts).integers(2**63))


def stateless_normal(
    indices: Sequence[int],
    shape: Sequence[int],
    *,
    seed: int,
    stream: str,
    counter: int = 0,
    repeats: Sequence[int] | None = None,
    threads: int = 1,
) -> Tensor:
    """N(0, 1) of shape [len(indices), *shape], float32, on the CPU; row i belongs to sample indices[i].

    `repeats` says how often each sample came before in the epoch: 0 for all by default. With more threads
    rows are drawn side by side; the numbers are the same.
    """
    out = np.empty((len(indices), *shape), dtype=np.float32)

    def draw(row: np.ndarray, sample: tuple[int, ...]) -> None:
        stateless_generator(seed, stream, counter, *sample).standard_normal(out=row, dtype=np.float32)

    keys = list(_sample_keys(indices, repeats))
    if min(threads, len(keys)) > 1:
        with ThreadPoolExecutor(min(threads, len(keys))) as pool:
            list(pool.map(draw, out, keys))
    else:
        for row, sample in zip(out, keys, strict=True):
            draw(row, sample)
    return torch.from_numpy(out)


def stateless_uniform(
    indices: Sequence[int],
    *,
    seed: int,
    stream: str,
    counter: int = 0,
    repeats: Sequence[int] | None = None,
) -> Tensor:
    """U[0, 1) of shape [len(indices)], float32, on the CPU; entry i belongs to sample indices[i]."""
    draws = [
        stateless_generator(seed, stream, counter, *sample).random(dtype=np.float32)
        for sample in _sample_keys(indices, repeats)
    ]
    return torch.tensor(draws, dtype=torch.float32)


def _sample_keys(indices: Sequence[int], repeats: Sequence[int] | None) -> Iterator[tuple[int, ...]]:
    """A sample's part of the key: its index, and which repetition in the epoch it is unless the first."""
    for index, repeat in zip(indices, repeats or [0] * len(indices), strict=True):
        yield (int(index), int(repeat)) if repeat else (int(index),)


def stateless_permutation(n: int, *, seed: int, stream: str, counter: int = 0) -> np.ndarray:
    """A permutation of 0..n-1, int64."""
    return stateless_generator(seed, stream, counter).permutation(n)


def stateless_choice(n: int, count: int, *, seed: int, stream: str) -> np.ndarray:
    """`count` of 0..n-1 without repetition, or all if there are fewer; ascending, int64."""
    return np.sort(stateless_permutation(n, seed=seed, stream=stream)[:count])
