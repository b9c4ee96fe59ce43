"""The fused RMSNorm: torch's numbers and torch's gradients, times a weight and a modulation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blip3o_dit.model.norms import LayerNorm, RMSNorm, _ScaledRMSNorm

WIDTH = 6


def norm(eps: float = 1e-5) -> RMSNorm:
    layer = RMSNorm(WIDTH, eps=eps).double()
    with torch.no_grad():
        layer.weight.normal_()
    return layer


@pytest.mark.parametrize("modulated", [False, True])
def test_the_norm_is_torchs_times_weight_and_modulation(modulated: bool) -> None:
    layer, x = norm(), torch.randn(3, 4, WIDTH, dtype=torch.float64)
    modulation = torch.randn(3, 1, WIDTH, dtype=torch.float64) if modulated else None
    plain = F.rms_norm(x, (WIDTH,), layer.weight, 1e-5)
    expected = plain if modulation is None else plain * modulation
    torch.testing.assert_close(layer(x, modulation), expected)
    narrow = layer(x.bfloat16(), None if modulation is None else modulation.bfloat16())
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.double(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("shape", [(WIDTH,), (3, 1, WIDTH)])
def test_gradients_are_those_of_finite_differences(shape: tuple[int, ...]) -> None:
    x = torch.randn(3, 4, WIDTH, dtype=torch.float64, requires_grad=True)
    factor = torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    def scaled(x: Tensor, factor: Tensor) -> Tensor:
        return _ScaledRMSNorm.apply(x, factor, 0.1)  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(scaled, (x, factor))


def test_a_token_of_zeros_stays_zero_with_finite_gradients() -> None:
    layer, x = norm().float(), torch.zeros(1, 2, WIDTH, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    assert not out.any()
    assert x.grad is not None and x.grad.isfinite().all()
    assert layer.weight.grad is not None and not layer.weight.grad.any()


def test_memory_of_the_input_and_of_its_gradient_is_left_alone() -> None:
    layer = norm()
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    before, pull = x.detach().clone(), torch.randn(2, 3, WIDTH, dtype=torch.float64)
    pulled = pull.clone()
    layer(x).backward(pull)
    assert torch.equal(x, before) and torch.equal(pull, pulled)


def test_layer_norm_follows_its_input() -> None:
    layer, x = LayerNorm(WIDTH), torch.randn(2, WIDTH)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x), F.layer_norm(x, (WIDTH,), layer.weight, layer.bias, layer.eps))
