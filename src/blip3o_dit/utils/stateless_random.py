"""Stateless random numbers: each is a function of (seed, stream, counter, sample index), of nothing else.

So they do not change with the number of processes, the batch size, data-loader workers, an evaluation in
between, or a restart. `stream` says what the numbers are for, so that two uses of one seed are independent;
`counter` is an epoch or a step.

Normal and uniform numbers come from Philox4x32-10 (`philox.py`) on the device that needs them: (seed, stream,
counter) is hashed to its key; sample, repetition and position are its counter. Orders and choices come from
NumPy's generators on the CPU, with all parts of the name in the key.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from blip3o_dit.utils.philox import ROUNDS, normal_pairs, philox, round_keys
from blip3o_dit.utils.validation import triton_works

# Of the numbers that a name stands for; a run that goes on with others says so.
DRAWS_VERSION = 2
_WORD = 0xFFFFFFFF


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
    device: torch.device | str = "cpu",
) -> Tensor:
    """N(0, 1) of shape [len(indices), *shape], float32, on `device`; row i belongs to sample indices[i].

    The same numbers on every device to rounding (see `normal_pairs`), and to the last bit on one.

    Args:
        repeats: how often each sample came before in the epoch: 0 for all by default.
    """
    names = draw_names(indices, seed=seed, stream=stream, counter=counter, repeats=repeats)
    return normal_of(names.to(device, non_blocking=True), shape)


def draw_names(
    indices: Sequence[int],
    *,
    seed: int,
    stream: str,
    counter: int = 0,
    repeats: Sequence[int] | None = None,
) -> Tensor:
    """What `normal_of` makes the numbers of these samples of, [words, len(indices)] int64 on the CPU.

    The words are Philox's keys, round by round and the same for all samples, and three of its counter.
    """
    keys = [word for pair in round_keys(_philox_key(seed, stream, counter)) for word in pair]
    samples = _sample_words(indices, repeats)
    return torch.cat([torch.tensor(keys)[:, None].expand(-1, samples.shape[1]), samples])


def normal_of(names: Tensor, shape: Sequence[int], *, one_kernel: bool = False) -> Tensor:
    """N(0, 1) of shape [samples, *shape], float32, where the names are; nothing is asked of a GPU.

    With `one_kernel` a GPU is launched once for all rounds, if Triton can: the words are the same.
    The names may be read again later, by a CUDA graph: no word of them is a number here.
    """
    samples, count, device = names[2 * ROUNDS :], math.prod(shape), names.device
    out = torch.empty(samples.shape[1], count, device=device)
    if not out.numel():
        return out.view(len(out), *shape)
    normals_of = _normals_by_kernel if one_kernel and names.is_cuda and triton_works() else _normals
    # Blocks of four numbers: on a CPU so many that their words stay in its caches.
    blocks = 2**15 if device.type == "cpu" else 2**20
    positions = -(-count // 4)
    at_once = max(1, blocks // positions)
    for rows, sample in zip(out.split(at_once), samples.split(at_once, dim=1), strict=True):
        normals = normals_of(names[: 2 * ROUNDS, 0], sample, positions)  # [b, positions, 4]
        rows.copy_(normals.flatten(1)[:, :count])
    return out.view(len(out), *shape)


def _normals(keys: Tensor, sample: Tensor, positions: int) -> Tensor:
    """Keys of the rounds [2 ROUNDS], words of the counter [3, b] -> normal numbers [b, positions, 4]."""
    words = keys.unbind()
    position = torch.arange(positions, device=keys.device).repeat(sample.shape[1], 1)
    repeated = (word[:, None].repeat(1, positions) for word in sample)
    drawn = philox([position, *repeated], list(zip(words[::2], words[1::2], strict=True)))
    return torch.stack([*normal_pairs(*drawn[:2]), *normal_pairs(*drawn[2:])], dim=-1)


def _normals_by_kernel(keys: Tensor, sample: Tensor, positions: int) -> Tensor:
    """The same numbers by a tenth of the launches."""
    from blip3o_dit.utils.philox_kernel import philox_words  # needs triton

    drawn = philox_words(keys, sample, positions)  # the first round's keys are Philox's own
    pairs = torch.stack(normal_pairs(drawn[:2], drawn[2:]), dim=-1)  # [2, b, positions, 2]
    return pairs.permute(1, 2, 0, 3).flatten(2)


def stateless_uniform(
    indices: Sequence[int],
    *,
    seed: int,
    stream: str,
    counter: int = 0,
    repeats: Sequence[int] | None = None,
) -> Tensor:
    """U[0, 1) of shape [len(indices)], float32, on the CPU; entry i belongs to sample indices[i]."""
    sample = _sample_words(indices, repeats)
    keys = round_keys(_philox_key(seed, stream, counter))
    words = philox([torch.zeros_like(sample[0]), *sample], keys)
    return (words[0] >> 8) * 2.0**-24


def _philox_key(seed: int, stream: str, counter: int) -> tuple[int, int]:
    digest = blake2b(repr((int(seed), stream, int(counter))).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _sample_words(indices: Sequence[int], repeats: Sequence[int] | None) -> Tensor:
    """A sample's words of Philox's counter, [3, B]: its index's lower and upper half, and its repetition."""
    plain = [int(index) for index in indices]
    words = [[index & _WORD for index in plain], [index >> 32 & _WORD for index in plain]]
    return torch.tensor([*words, [0] * len(plain) if repeats is None else list(map(int, repeats))])


def stateless_permutation(n: int, *, seed: int, stream: str, counter: int = 0) -> np.ndarray:
    """A permutation of 0..n-1, int64."""
    return stateless_generator(seed, stream, counter).permutation(n)


class StatelessOrder:
    """A permutation of 0..n-1 that is computed where it is asked for: no array of n numbers is made.

    A Feistel network on pairs (L, R) of digits below a = ceil(sqrt n), number L a + R, whose round functions
    are tables of random numbers (Luby and Rackoff, 1988); what falls on n or above goes through it again
    (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """

    ROUNDS = 8

    def __init__(self, n: int, *, seed: int, stream: str, counter: int = 0) -> None:
        self.n = n
        self._digits = math.isqrt(max(0, n - 1)) + 1
        tables = stateless_generator(seed, stream, counter)
        self._tables = tables.integers(self._digits, size=(self.ROUNDS, self._digits), dtype=np.int64)

    def at(self, places: np.ndarray) -> np.ndarray:
        """What stands at these places in [0, n); int64."""
        found = self._network(np.asarray(places, dtype=np.int64))
        beyond = np.flatnonzero(found >= self.n)
        while len(beyond):
            found[beyond] = self._network(found[beyond])
            beyond = beyond[found[beyond] >= self.n]
        return found

    def _network(self, numbers: np.ndarray) -> np.ndarray:
        left, right = np.divmod(numbers, self._digits)
        for table in self._tables:
            total = left + table[right]
            left, right = right, np.where(total < self._digits, total, total - self._digits)
        return left * self._digits + right


def stateless_choice(n: int, count: int, *, seed: int, stream: str) -> np.ndarray:
    """`count` of 0..n-1 without repetition, or all if there are fewer; ascending, int64."""
    return np.sort(stateless_permutation(n, seed=seed, stream=stream)[:count])
