"""Draws by name: the same whatever the order, the batch or the process; different for different names."""

from __future__ import annotations

import numpy as np
import torch

from blip3o_dit.utils.stateless_random import stateless_normal, stateless_permutation, stateless_uniform


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


def test_threads_draw_the_same_numbers() -> None:
    settings = dict(seed=3, stream="noise", repeats=[0, 1, 0, 0, 2])
    alone = stateless_normal([4, 4, 1, 9, 4], (3, 2), **settings)
    assert torch.equal(stateless_normal([4, 4, 1, 9, 4], (3, 2), **settings, threads=3), alone)
    assert len({tuple(row.flatten().tolist()) for row in alone}) == 5
