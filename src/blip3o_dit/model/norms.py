"""Norms whose parameters follow the input's dtype, and RMSNorm together with what it is multiplied by."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """RMSNorm, times its weight, times a modulation if there is one.

    Weight and modulation are multiplied first: they are small, x is not.
    """

    eps: float

    def forward(self, x: Tensor, modulation: Tensor | None = None) -> Tensor:
        """x [B, N, d], modulation [B, 1, d] -> [B, N, d] in the modulation's dtype, or x's without one."""
        dtype = x.dtype if modulation is None else modulation.dtype
        factor = self.weight.to(dtype)
        factor = (factor if modulation is None else factor * modulation).to(x.dtype)
        if x.device.type == "cpu" and x.dtype.itemsize >= 4 and not torch.compiler.is_compiling():
            return _ScaledRMSNorm.apply(x, factor, self.eps).to(dtype)
        return (F.rms_norm(x, self.normalized_shape, None, self.eps) * factor).to(dtype)


class LayerNorm(nn.LayerNorm):
    """LayerNorm whose weight and bias follow the input's dtype: float32 weights meet narrower activations in
    training, and torch's fused kernel takes one dtype only."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class _ScaledRMSNorm(torch.autograd.Function):
    """x / rms(x) times a factor [d] or [B, 1, d], for a CPU, where torch has no fused kernel for it.

    y_k = r x_k f_k with r = (mean_k x_k^2 + eps)^(-1/2), so that with the gradient g to y
    dL/dx_k = r g_k f_k - x_k (r^3 / d) sum_j g_j x_j f_j, and dL/df_k sums r g_k x_k over the tokens.
    It is bound by memory: four writes of x's size there and back, instead of about fourteen.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, eps: float) -> Tensor:
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        r = squares.div_(x.shape[-1]).add_(eps).rsqrt_()  # [B, N, 1]
        ctx.save_for_backward(x, factor, r)
        return (x * r).mul_(factor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        x, factor, r = ctx.saved_tensors
        products = gradient * x
        if factor.ndim == 1:
            to_factor = r.flatten() @ products.flatten(0, -2)  # [d]
            along_x = (products @ factor).unsqueeze(-1)  # [B, N, 1]
        else:
            to_factor = r.transpose(-1, -2) @ products  # [B, 1, d]
            along_x = products @ factor.transpose(-1, -2)  # [B, N, 1]
        along_x *= r.pow(3).div_(x.shape[-1])
        torch.mul(gradient, factor, out=products)
        return products.mul_(r).addcmul_(x, along_x, value=-1.0), to_factor, None
