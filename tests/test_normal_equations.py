"""Penalties of groups of features, and how they are chosen."""

from __future__ import annotations

import pytest
import torch

from blip3o_dit.normal_equations import (
    GroupPenalties,
    Moments,
    _PenaltyError,
    search_penalties,
    search_penalty,
)


def test_a_group_that_tells_nothing_gets_a_penalty_of_its_own() -> None:
    """Five features of the answer, 60 of noise, few rows: one penalty cannot serve both."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(420, 65, generator=generator)
    targets = features[:, :5] @ torch.randn(5, 3, generator=generator) + torch.randn(
        420, 3, generator=generator
    )
    few, unseen, truth = Moments(65, 3), Moments(65, 3), Moments(65, 3)
    for moments, part in ((few, slice(80)), (unseen, slice(80, 120)), (truth, slice(120, None))):
        moments.add(features[part], targets[part])
    found, (weight, bias) = search_penalties(few, unseen, (5, 60))
    assert found.sizes == (5, 60) and found.penalties[1] > 30 * found.penalties[0]
    one = few.solve(search_penalty(few, unseen)[0])
    errors = [float(truth.squared_error(*solution).mean()) for solution in ((weight, bias), one)]
    assert errors[0] < 0.8 * errors[1]
    torch.testing.assert_close(few.solve(found)[0], weight)


def test_the_gradient_that_penalties_follow_is_that_of_the_error() -> None:
    generator = torch.Generator().manual_seed(0)
    moments, unseen = Moments(7, 4), Moments(7, 4)
    for each in (moments, unseen):
        features = torch.randn(30, 7, generator=generator, dtype=torch.float64)
        targets = features[:, :4] + torch.randn(30, 4, generator=generator, dtype=torch.float64)
        each.add(features, targets * torch.tensor([1.0, 9.0, 0.1, 0.0]))
    error = _PenaltyError(moments, unseen, (2, 4, 1))
    powers = torch.tensor([-1.0, 0.5, 0.0], dtype=torch.float64)
    value, gradient = error(powers)
    weight, bias = moments.solve(GroupPenalties(tuple((10.0**powers).tolist()), (2, 4, 1)))
    variance = unseen.squared_error(torch.zeros_like(weight), unseen.centred()[3])
    expected = unseen.squared_error(weight, bias)[:3] / variance[:3]
    assert value == pytest.approx(float(expected.mean()))
    for group in range(3):
        step = 1e-4 * torch.eye(3, dtype=torch.float64)[group]
        slope = (error(powers + step)[0] - error(powers - step)[0]) / 2e-4
        assert float(gradient[group]) == pytest.approx(slope, rel=1e-5)


def test_a_direction_that_few_samples_hardly_show_is_not_free() -> None:
    """A feature of a millionth of the others' deviation is as good as none in units of their variance."""
    features, targets = torch.randn(30, 4).double(), torch.randn(30, 2).double()
    features[:, 3] *= 1e-6
    moments = Moments(4, 2)
    moments.add(features, targets)
    alone, together = (
        moments.solve(penalty)[0][3].abs().max() for penalty in (1e-3, GroupPenalties((1e-3,), (4,)))
    )
    assert alone > 1e4 and together < 1e-2


def test_one_group_of_equal_variance_is_one_penalty() -> None:
    features, targets = torch.randn(60, 8).double(), torch.randn(60, 2).double()
    moments = Moments(8, 2)
    features = (features - features.mean(dim=0)) / features.std(dim=0, correction=0)
    moments.add(features, targets)
    expected, found = (moments.solve(penalty) for penalty in (0.1, GroupPenalties((0.1,), (8,))))
    torch.testing.assert_close(found, expected)
