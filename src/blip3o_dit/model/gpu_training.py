"""A block's arithmetic between its products as Triton kernels, for training on a GPU in 16-bit numbers.

Launched operation by operation, norms, modulation, rotation and SwiGLU took 108 of the 234 ms of a step of
the default network at batch 128 on an H100, its products 83 ms (docs/speed.md). Each function here is one
pass over the activations forward and one backward, which keeps its inputs and computes the rest again.
Inside they compute in float32: results differ from `transformer.py`'s by rounding.

A block that something else was done to (hooks, adapters, sharded weights, torch.compile) is computed as
everywhere else.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from blip3o_dit.model import triton_training
from blip3o_dit.model.cpu_kernels import NextDiTBlock, is_hooked, joint_product
from blip3o_dit.model.gpu_kernels import add_and_norm, gated, is_plain
from blip3o_dit.model.layers import LayerNorm, RMSNorm
from blip3o_dit.model.transformer import attend

# Rows that a program of a backward pass serves, as measured on an H100.
ROWS, LAYER_NORM_ROWS = 16, 8
FACTOR_TILE = (16, 16)  # samples and channels that a program of `_factor_gradients` sums at a time

Rope = tuple[Tensor, Tensor]


def can_run(block: NextDiTBlock, condition: Tensor) -> bool:
    """Whether `run_block` serves this block, given such a condition."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if condition.dtype not in (torch.bfloat16, torch.float16):
        return False
    return is_plain(block) and not is_hooked(block.norm1_context) and not is_hooked(block.attn2.norm_k)


def run_block(block: Any, x: Tensor, condition: Tensor, temb: Tensor, rope: Rope) -> Tensor:
    """As `NextDiTBlock.forward`: x [B, N, d], condition [B, L, d], temb [B, min(d, 1024)] -> [B, N, d]."""
    scale_msa, gate_msa, scale_mlp, gate_mlp = block._modulate(temb).chunk(4, dim=-1)  # [B, d] each
    dtype = condition.dtype
    x, h = norm(x, block.norm1.norm, scale_msa, dtype)
    branch = block.attn2.to_out[0](_attend(block, h, condition, rope))
    x, h = add_norm(x, branch, (block.norm2, gate_msa), (block.ffn_norm1, scale_mlp), dtype)
    (group,) = block.feed_forward.joint_layers()
    branch = block.feed_forward.linear_2(swiglu(*joint_product(h, group)))
    return add(x, branch, (block.ffn_norm2, gate_mlp))


def _attend(block: Any, h: Tensor, condition: Tensor, rope: Rope) -> Tensor:
    """Self-attention plus gated cross-attention, before their output projection: [B, N, d] -> [B, N, d]."""
    own, cross = block.attn1, block.attn2
    q, k, v, cross_q = block.project(h, h)
    _, condition = norm(condition, block.norm1_context, None, condition.dtype)
    cross_k, cross_v = block.project_condition(condition)
    size = own.head_dim
    mixed = attend(
        own.split_heads(layer_norm(q, own.norm_q, size, rope)),
        own.split_heads(layer_norm(k, own.norm_k, size, rope)),
        own.values(v),
    )
    crossed = attend(
        cross.split_heads(layer_norm(cross_q, cross.norm_q, size, rope)),
        cross.split_heads(layer_norm(cross_k, cross.norm_k, size)),
        cross.values(cross_v),
    )
    return gated_sum(mixed.transpose(1, 2), crossed.transpose(1, 2), block.gate).flatten(2)


def norm(x: Tensor, module: RMSNorm, scale: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [B, N, d] itself, and its RMSNorm times weight (1 + scale [B, d]) in `dtype`.

    What else reads x takes the x that is returned: its gradient is then added where the norm's is made.
    """
    if scale is None:
        scale = module.weight.new_zeros(1, x.shape[-1]).expand(len(x), -1)
    return _AddAndNorm.apply(x, None, None, None, 0.0, module.weight, scale, module.eps, dtype)


def add_norm(
    x: Tensor,
    branch: Tensor,
    gate: tuple[RMSNorm, Tensor],
    then: tuple[RMSNorm, Tensor],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """x + rms(branch) weight tanh(gate [B, d]), and what `norm` makes of that sum."""
    (gate_norm, gates), (next_norm, scale) = gate, then
    return _AddAndNorm.apply(
        x, branch, gate_norm.weight, gates, gate_norm.eps, next_norm.weight, scale, next_norm.eps, dtype
    )


def add(x: Tensor, branch: Tensor, gate: tuple[RMSNorm, Tensor]) -> Tensor:
    """x + rms(branch) weight tanh(gate [B, d])."""
    gate_norm, gates = gate
    total, _ = _AddAndNorm.apply(x, branch, gate_norm.weight, gates, gate_norm.eps, None, None, 0.0, x.dtype)
    return total


class _Norm(NamedTuple):
    weight: Tensor
    eps: float


class _AddAndNorm(torch.autograd.Function):
    """`add_norm`, without its first half for no branch, without its second for no weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        gate_weight: Tensor | None,
        gate: Tensor | None,
        gate_eps: float,
        weight: Tensor | None,
        scale: Tensor | None,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        of_branch = None if gate_weight is None or gate is None else (_Norm(gate_weight, gate_eps), gate)
        of_sum = None if weight is None or scale is None else (_Norm(weight, eps), scale)
        total, normed = add_and_norm(x.contiguous(), branch, of_branch, norm=of_sum, dtype=dtype)
        ctx.save_for_backward(None if weight is None else total, branch, gate_weight, gate, weight, scale)
        ctx.eps, ctx.gate_eps = eps, gate_eps
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_total: Tensor | None, to_normed: Tensor | None) -> tuple[Any, ...]:
        total, branch, gate_weight, gate, weight, scale = ctx.saved_tensors
        like = branch if total is None else total
        batch, tokens, width = like.shape
        to_total, to_normed = (None if held is None else held.contiguous() for held in (to_total, to_normed))
        to_x = to_total if weight is None else torch.empty_like(total)
        to_branch = None if branch is None else torch.empty_like(branch)
        pieces = triton.cdiv(tokens, ROWS)
        of_norm, of_gate = (
            None if held is None else like.new_empty(batch, pieces, width, dtype=torch.float32)
            for held in (weight, branch)
        )
        pointers = (to_total, to_normed, total, weight, scale, branch, gate_weight, gate)
        results = (to_x, to_branch, of_norm, of_gate)
        # Where there is no tensor its pointer is not used.
        given = [like if held is None else held for held in (*pointers, *results)]
        triton_training.add_and_norm_backward[(batch, pieces)](
            *given,
            0 if scale is None else scale.stride(0),
            0 if gate is None else gate.stride(0),
            tokens,
            width,
            ctx.eps,
            ctx.gate_eps,
            TOTAL=to_total is not None,
            ADD=branch is not None,
            NORM=weight is not None,
            ROWS=ROWS,
            BLOCK=triton.next_power_of_2(width),
            num_warps=8,
        )
        to_gate, to_gate_weight = _factor_gradients(of_gate, gate_weight, gate, is_gate=True)
        to_scale, to_weight = _factor_gradients(of_norm, weight, scale, is_gate=False)
        return to_x, to_branch, to_gate_weight, to_gate, None, to_weight, to_scale, None, None


def _factor_gradients(
    partial: Tensor | None, weight: Tensor, modulation: Tensor, *, is_gate: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Partial sums [B, pieces, d] of the gradient to a factor -> to its modulation [B, d] and weight [d]."""
    if partial is None:
        return None, None
    batch, pieces, width = partial.shape
    to_modulation = torch.empty(modulation.shape, dtype=modulation.dtype, device=partial.device)
    to_weight = torch.empty_like(weight)
    samples, channels = FACTOR_TILE
    triton_training.factor_gradients[(triton.cdiv(width, channels),)](
        partial,
        weight,
        modulation,
        modulation.stride(0),
        to_modulation,
        to_weight,
        batch,
        width,
        GATE=is_gate,
        PIECES=pieces,
        TIMES=triton.cdiv(batch, samples),
        SAMPLES=samples,
        BLOCK=channels,
        num_warps=8,
    )
    return to_modulation, to_weight


def layer_norm(x: Tensor, module: LayerNorm, head: int, rope: Rope | None = None) -> Tensor:
    """LayerNorm of [B, N, H h], each head's pairs of channels rotated when `rope` [N, h / 2] is given."""
    return _LayerNorm.apply(x, module.weight, module.bias, module.eps, head, *(rope or (None, None)))


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        head: int,
        cos: Tensor | None,
        sin: Tensor | None,
    ) -> Tensor:
        x = x.contiguous()
        _, tokens, width = x.shape
        out = torch.empty_like(x)
        ctx.constants = {"ROTATE": cos is not None, "HALF": head // 2, "BLOCK": triton.next_power_of_2(width)}
        triton_training.layer_norm_rotate[(x.numel() // width,)](
            x,
            weight,
            bias,
            x if cos is None else cos,
            x if sin is None else sin,
            out,
            tokens,
            width,
            eps,
            **ctx.constants,
            num_warps=8,
        )
        ctx.save_for_backward(x, weight, bias, cos, sin)
        ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_out: Tensor) -> tuple[Any, ...]:
        x, weight, bias, cos, sin = ctx.saved_tensors
        _, tokens, width = x.shape
        rows = x.numel() // width
        programs = triton.cdiv(rows, LAYER_NORM_ROWS)
        to_x = torch.empty_like(x)
        partial = x.new_empty(programs, 2, width, dtype=torch.float32)
        triton_training.layer_norm_rotate_backward[(programs,)](
            to_out.contiguous(),
            x,
            weight,
            x if cos is None else cos,
            x if sin is None else sin,
            to_x,
            partial,
            rows,
            tokens,
            width,
            ctx.eps,
            **ctx.constants,
            ROWS=LAYER_NORM_ROWS,
            num_warps=4,
        )
        to_weight, to_bias = partial.sum(dim=0).unbind()
        return to_x, to_weight.to(weight.dtype), to_bias.to(bias.dtype), None, None, None, None


def gated_sum(own: Tensor, cross: Tensor, gate: Tensor) -> Tensor:
    """own + tanh(gate [H]) cross: [B, N, H, h] twice -> [B, N, H, h]."""
    return _GatedSum.apply(own.contiguous(), cross.contiguous(), gate)


class _GatedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, cross: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(cross, gate)
        return torch.addcmul(own, cross, gate.tanh().to(cross.dtype).unsqueeze(-1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_out: Tensor) -> tuple[Any, ...]:
        cross, gate = ctx.saved_tensors
        *_, heads, size = cross.shape
        width = heads * size
        rows = cross.numel() // width
        programs = triton.cdiv(rows, ROWS)
        to_out, to_cross = to_out.contiguous(), torch.empty_like(cross)
        partial = cross.new_empty(programs, width, dtype=torch.float32)
        triton_training.gated_sum_backward[(programs,)](
            to_out,
            cross,
            gate,
            to_cross,
            partial,
            rows,
            width,
            HEAD=size,
            ROWS=ROWS,
            BLOCK=triton.next_power_of_2(width),
            num_warps=8,
        )
        to_gate = partial.sum(dim=0).view(heads, size).sum(dim=-1) * (1 - gate.float().tanh() ** 2)
        return to_out, to_cross, to_gate.to(gate.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of the same shape."""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return gated(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_out: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        to_gate, to_up = torch.empty_like(gate), torch.empty_like(up)
        block = 2048
        triton_training.swiglu_backward[(triton.cdiv(gate.numel(), block),)](
            to_out.contiguous(), gate, up, to_gate, to_up, gate.numel(), BLOCK=block, num_warps=8
        )
        return to_gate, to_up
