"""Philox4x32-10, a counter-based random number generator, in integer operations of torch.

Block n of 128 random bits is a function of a 64-bit key and the counter n alone, the same on every device and
in any order (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_2 = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10


def round_keys(key: tuple[int, int]) -> list[tuple[int, int]]:
    """The two words that each round takes, of a key of two words."""
    first, second = key
    return [
        ((first + n * _KEY_STEPS[0]) & _MASK, (second + n * _KEY_STEPS[1]) & _MASK) for n in range(ROUNDS)
    ]


def philox(counter: Sequence[Tensor], keys: Sequence[tuple[int | Tensor, int | Tensor]]) -> list[Tensor]:
    """Four random words a counter of four words; words are int64 in [0, 2^32), of one shape.

    The counter's memory is written over. `keys` are the rounds' (`round_keys`), as numbers or tensors.
    """
    word_0, word_1, word_2, word_3 = counter
    product_0, product_2 = torch.empty_like(word_0), torch.empty_like(word_2)
    for key_0, key_1 in keys:
        # 64 bits wrap into the sign; what the shift then fills the upper half with, the mask removes.
        torch.mul(word_0, _MULTIPLIER_0, out=product_0)
        torch.mul(word_2, _MULTIPLIER_2, out=product_2)
        torch.bitwise_right_shift(product_2, 32, out=word_0)
        torch.bitwise_right_shift(product_0, 32, out=word_2)
        word_0.bitwise_xor_(word_1).bitwise_xor_(key_0).bitwise_and_(_MASK)
        word_2.bitwise_xor_(word_3).bitwise_xor_(key_1).bitwise_and_(_MASK)
        word_1, product_2 = product_2.bitwise_and_(_MASK), word_1
        word_3, product_0 = product_0.bitwise_and_(_MASK), word_3
    return [word_0, word_1, word_2, word_3]


def normal_pairs(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent N(0, 1) of each two random words in [0, 2^32), float32 (Box and Muller, 1958).

    Logarithm, sine and cosine differ between devices in their last bits, all else is rounded alike: each is
    within 4e-6 of the exact transform of the same rounded uniform number. The radius is at most 6.7.
    """
    # (word + 1) / 2^32 lies in (0, 1]: its logarithm is finite.
    r = radius.float().add_(1.0).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    phi = angle.float().mul_(2.0 * math.pi / 2**32)
    return torch.cos(phi).mul_(r), phi.sin_().mul_(r)
