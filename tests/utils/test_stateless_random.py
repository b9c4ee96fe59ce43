"""Draws by name: the same whatever the order, the batch or the process; different for different names."""

from __future__ import annotations

import math
from hashlib import blake2b
from typing import Any

import numpy as np
import pytest
import torch

from blip3o_dit.utils.stateless_random import (
    StatelessOrder,
    stateless_normal,
    stateless_permutation,
    stateless_uniform,
)
from tests.utils.test_philox import reference_philox


def test_rows_do_not_depend_on_the_batch_they_are_drawn_in() -> None:
    together = stateless_normal([5, 9, 2], (4, 3), seed=1, stream="a")
    alone = stateless_normal([9], (4, 3), seed=1, stream="a")
    assert torch.equal(together[1], alone[0])
    times = stateless_uniform([5, 9, 2], seed=1, stream="t")
    assert times[2] == stateless_uniform([2], seed=1, stream="t")[0]


def test_every_part_of_the_name_matters() -> None:
    base = stateless_normal([3], (64,), seed=1, stream="a")
    others = [
        stateless_normal([4], (64,), seed=1, stream="a"),
        stateless_normal([3], (64,), seed=2, stream="a"),
        stateless_normal([3], (64,), seed=1, stream="b"),
        stateless_normal([3], (64,), seed=1, stream="a", counter=1),
    ]
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([base[0], other[0]]))[0, 1])) < 0.4


def test_process_state_does_not_matter() -> None:
    torch.manual_seed(0)
    first = stateless_normal([1], (8,), seed=1, stream="a")
    torch.manual_seed(99)
    torch.randn(10)
    assert torch.equal(first, stateless_normal([1], (8,), seed=1, stream="a"))


def test_distributions() -> None:
    normal = stateless_normal(range(200), (500,), seed=0, stream="n").flatten()
    assert abs(float(normal.mean())) < 0.01
    assert abs(float(normal.std()) - 1) < 0.01
    assert float(normal.abs().max()) > 3.5
    uniform = stateless_uniform(range(4000), seed=0, stream="u")
    counts = torch.histc(uniform, bins=10, min=0, max=1)
    assert counts.min() > 320
    assert counts.max() < 480


def test_permutation_holds_each_index_once_and_changes_with_the_pass() -> None:
    first = stateless_permutation(50, seed=0, stream="order")
    assert sorted(first.tolist()) == list(range(50))
    again = stateless_permutation(50, seed=0, stream="order")
    other = stateless_permutation(50, seed=0, stream="order", counter=1)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_rows_do_not_depend_on_how_many_are_drawn_at_once() -> None:
    """Four rows of 2^13 blocks at a time; the fifth comes alone."""
    shape, settings = (64, 512), dict(seed=3, stream="noise", repeats=[0, 1, 0, 0, 2])
    together = stateless_normal([4, 4, 1, 9, 4], shape, **settings)
    for row, (index, repeat) in enumerate([(4, 0), (4, 1), (1, 0), (9, 0), (4, 2)]):
        alone = stateless_normal([index], shape, seed=3, stream="noise", repeats=[repeat])
        assert torch.equal(together[row], alone[0])
    assert len({tuple(row.flatten()[:4].tolist()) for row in together}) == 5


def test_a_longer_row_begins_with_the_shorter() -> None:
    short, long = (stateless_normal([4, 2], (n,), seed=3, stream="a") for n in (3, 70))
    assert torch.equal(short, long[:, :3])
    assert stateless_normal([4], (2, 0), seed=3, stream="a").shape == (1, 2, 0)


@pytest.mark.parametrize(("index", "counter", "repeat"), [(5, 0, 0), (2**40 + 3, 7, 2), (-1, 0, 0)])
def test_numbers_are_philoxs(index: int, counter: int, repeat: int) -> None:
    """Key and counter as documented, and Box and Muller's transform, in plain Python."""
    digest = blake2b(repr((1, "a", counter)).encode(), digest_size=8).digest()
    key = tuple(int.from_bytes(digest[at : at + 4], "little") for at in (0, 4))
    numbers: list[float] = []
    for position in range(3):
        words = reference_philox((position, index % 2**32, index // 2**32 % 2**32, repeat), key)
        for radius, angle in (words[:2], words[2:]):
            r, phi = math.sqrt(-2 * math.log((radius + 1) / 2**32)), 2 * math.pi * angle / 2**32
            numbers += [r * math.cos(phi), r * math.sin(phi)]
    settings: dict[str, Any] = dict(seed=1, stream="a", counter=counter, repeats=[repeat])
    found = stateless_normal([index], (11,), **settings)[0]
    assert np.abs(found.numpy() - numbers[:11]).max() < 4e-6
    first = reference_philox((0, index % 2**32, index // 2**32 % 2**32, repeat), key)[0]
    assert float(stateless_uniform([index], **settings)) == (first >> 8) / 2**24


@pytest.mark.parametrize("n", [1, 2, 3, 5, 17, 1000, 4096, 10_007])
def test_a_stateless_order_holds_each_index_once(n: int) -> None:
    order = StatelessOrder(n, seed=3, stream="a")
    found = order.at(np.arange(n))
    assert np.array_equal(np.sort(found), np.arange(n))
    places = np.arange(n)[::-3]
    assert np.array_equal(order.at(places), found[places])


def test_a_stateless_order_follows_its_name_and_has_no_structure() -> None:
    n, places = 99_999_999, np.arange(200_000)
    found = StatelessOrder(n, seed=3, stream="a").at(places)
    assert found[:3].tolist() == [32052649, 14667183, 96896021]  # in every version
    for other in (dict(seed=4, stream="a"), dict(seed=3, stream="b"), dict(seed=3, stream="a", counter=1)):
        assert (StatelessOrder(n, **other).at(places) == found).mean() < 1e-4
    assert len(np.unique(found)) == len(places) and 0 <= found.min() < found.max() < n
    assert abs(np.corrcoef(found, places)[0, 1]) < 0.01
    assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 0.01
    assert (np.diff(found) == 1).mean() < 1e-4
    counts = np.bincount(found * 100 // n, minlength=100)  # 2,000 expected in each hundredth
    assert ((counts - 2000) ** 2 / 2000).sum() < 150
    # Of a random permutation half of the pairs are in order.
    assert abs((found[1::2] > found[::2]).mean() - 0.5) < 0.01
