"""Philox against the published answers and plain integers; normal numbers against float64."""

from __future__ import annotations

import math
import random

import pytest
import torch

from blip3o_dit.utils.philox import normal_pairs, philox, round_keys

# Random123's kat_vectors, "philox4x32 10": counter, key, answer.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def reference_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """One block as the paper's section 3 describes it, in Python's integers."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        high_0, low_0 = divmod(0xD2511F53 * a, 2**32)
        high_2, low_2 = divmod(0xCD9E8D57 * c, 2**32)
        a, b, c, d = high_2 ^ b ^ k, low_2, high_0 ^ d ^ m, low_0
        k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
    return a, b, c, d


def words(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


def drawn(counters: list[tuple[int, ...]], key: tuple[int, ...]) -> list[tuple[int, ...]]:
    (key_0, key_1) = key
    found = philox(
        [torch.tensor(column) for column in zip(*counters, strict=True)], round_keys((key_0, key_1))
    )
    return list(zip(*(word.tolist() for word in found), strict=True))


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_published_answers(counter: str, key: str, answer: str) -> None:
    assert drawn([words(counter)], words(key)) == [words(answer)]
    assert reference_philox(words(counter), words(key)) == words(answer)


def test_any_counter_and_key() -> None:
    numbers = random.Random(0)
    key = (numbers.getrandbits(32), numbers.getrandbits(32))
    counters = [tuple(numbers.getrandbits(32) for _ in range(4)) for _ in range(300)]
    assert drawn(counters, key) == [reference_philox(counter, key) for counter in counters]


def test_normal_numbers_are_finite_and_as_exact_as_promised() -> None:
    ends = torch.tensor([0, 1, 2**31, 2**32 - 129, 2**32 - 1])
    generator = torch.Generator().manual_seed(0)
    radius, angle = torch.randint(2**32, (2, 200_000), generator=generator)
    radius, angle = torch.cat([ends.repeat(5), radius]), torch.cat([ends.repeat_interleave(5), angle])
    uniform = (radius.float() + 1) / 2**32  # rounded, alike everywhere
    assert uniform.min() > 0 and uniform.max() == 1
    r = torch.sqrt(-2 * torch.log(uniform.double()))
    phi = angle.double() * (2 * math.pi / 2**32)
    for found, exact in zip(normal_pairs(radius, angle), (r * phi.cos(), r * phi.sin()), strict=True):
        assert found.dtype == torch.float32 and found.isfinite().all()
        assert float((found - exact).abs().max()) < 4e-6
