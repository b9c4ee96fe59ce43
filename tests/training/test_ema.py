"""Averaged weights that are brought up to date after some steps only. (How they change places: see
`test_speed_and_memory.py`.)"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from blip3o_dit.training.ema import ExponentialMovingAverage


def averages(weights: list[float], *, decay: float, every: int) -> list[float]:
    """The average of one weight after each step; the weight is 1 before the first one."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)
    average = ExponentialMovingAverage(model, decay, every)  # type: ignore[arg-type]
    average.weights = {name: value.double() for name, value in average.weights.items()}
    found = []
    for step, weight in enumerate(weights, start=1):
        nn.init.constant_(model.weight, weight)
        average.update(model, step, lambda _, value: value)  # type: ignore[arg-type]
        found.append(average.weights["weight"].item())
    return found


@pytest.mark.parametrize("every", [1, 2, 7, 10])
def test_no_decay_is_lost_or_counted_twice(every: int) -> None:
    """What is left of the first weight is the product of the decays, wherever the average is up to date."""
    decays = [min(0.999, (1 + n) / (10 + n)) for n in range(1, 2501)]
    found = averages([0.0] * 2500, decay=0.999, every=every)
    steps = [*range(1, 350), 1400, 2100, 2380, 2450]  # the last ones are multiples of 10, or of 7
    for step in [n for n in steps if n < 350 or n % every == 0]:
        assert found[step - 1] == pytest.approx(math.prod(decays[:step]), rel=1e-9, abs=0), step
    changed = sum(a != b for a, b in zip(found[-100:], found[-101:-1], strict=True))
    assert changed == pytest.approx(100 / every, abs=1)


def test_a_weight_that_moves_steadily_is_averaged_within_half_an_interval() -> None:
    weights = [float(n) for n in range(1, 6001)]
    each, tenth = (averages(weights, decay=0.998, every=every) for every in (1, 10))
    assert each[:349] == tenth[:349]  # short runs
    for step in (1000, 3000, 6000):
        ahead = tenth[step - 1] - each[step - 1]
        assert 0 < ahead < 4.5 + 1e-6  # of the 499 steps that the average is behind
    assert tenth[-1] - each[-1] == pytest.approx(4.5, rel=0.01)


def test_the_interval_is_a_twentieth_of_the_span_at_most() -> None:
    model = nn.Linear(1, 1)
    short = ExponentialMovingAverage(model, 0.95, every=10)  # type: ignore[arg-type]
    assert all(short.is_due(step) for step in range(1, 5000))
    long = ExponentialMovingAverage(model, 0.999, every=10)  # type: ignore[arg-type]
    assert [step for step in range(9991, 10_021) if long.is_due(step)] == [10_000, 10_010, 10_020]
    assert torch.equal(long.weights["weight"], model.weight)
