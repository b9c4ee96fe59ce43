"""The blocks' arithmetic between their products as Triton kernels, for inference on a GPU in 16-bit numbers.

There every pass over the activations takes time that products could have used. Between a layer's products are
five kernels: two add a branch to the residual stream and norm the sum for the next product; one takes the
statistics of queries and keys; one norms, rotates and attends, to tokens and condition at once; one gates the
feed-forward's halves. Inside they compute in float32: results differ from `transformer.py`'s by rounding.

Few rows leave a GPU waiting for weights and launches. There three products are kernels of our own as well:
one leaves the statistics, two leave summands that the next kernel adds.

A network that something else was done to (hooks, adapters, sharded weights, torch.compile), or whose samples
have more than 256 tokens, is computed layer by layer as everywhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from blip3o_dit.model import triton_kernels as kernels
from blip3o_dit.model.cpu_kernels import (
    FeedForward,
    NextDiTBlock,
    are_packed,
    can_be_joined,
    is_hooked,
    joined_weights,
    joint_product,
)
from blip3o_dit.model.encoded_condition import KeysValues, Modulations

MAX_TOKENS = 256  # whose scores [64, 256] a program holds
QUERIES = 64  # that a program attends for
FEW_QUERIES = 16  # the same where there would be fewer programs than
FEW_PROGRAMS = 256

FEW_ROWS = 64  # for which these products are made by kernels of our own
# Columns, depth, stages of a program of `product_with_sums`, and below
JOINT = (64, 128, 4)
# columns, splits, depth, stages of one of `split_product`, as measured on an H100 (docs/speed.md).
SPLIT = {"to_out": (64, 4, 64, 5), "linear_2": (32, 4, 64, 6)}


def can_run(blocks: Sequence[Any], x: Tensor, keys_values: Sequence[KeysValues], dtype: torch.dtype) -> bool:
    """Whether `run_blocks` serves these blocks and inputs."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    if max(x.shape[1], keys_values[0].keys.shape[2]) > MAX_TOKENS:
        return False
    return all(is_plain(block) for block in blocks)


def is_plain(block: Any) -> bool:
    """A block that computes what the kernels compute for it."""
    if type(block) is not NextDiTBlock or type(block.feed_forward) is not FeedForward:
        return False
    if block._compiled_call_impl is not None:
        return False
    products: list[Any] = [*block.joint_layers()[0], *block.feed_forward.joint_layers()[0]]
    products += [block.attn2.to_out[0], block.feed_forward.linear_2]
    inner = (block, block.attn1, block.attn2, block.feed_forward, block.norm1, block.norm1.norm, block.norm2)
    norms = (block.ffn_norm1, block.ffn_norm2, block.attn1.norm_q, block.attn1.norm_k, block.attn2.norm_q)
    return can_be_joined(products) and not any(is_hooked(module) for module in (*inner, *norms))


def run_blocks(
    blocks: Sequence[Any],
    x: Tensor,
    keys_values: Sequence[KeysValues],
    modulations: Modulations,
    rope: tuple[Tensor, Tensor],
) -> Tensor:
    """The residual stream [B, N, d] through all blocks."""
    x = x.contiguous()
    parts = [joint.chunk(4, dim=-1) for joint in modulations.blocks]  # [B, d] each
    dtype = parts[0][0].dtype
    for i, (block, own, (scale_msa, gate_msa, scale_mlp, gate_mlp)) in enumerate(
        zip(blocks, keys_values, parts, strict=True)
    ):
        if i == 0:
            _, h = add_and_norm(x, norm=(block.norm1.norm, scale_msa), dtype=dtype)
        mixed = attend(block, h, own, rope)  # [B, N, d]
        branch = product(mixed, block.attn2.to_out[0], "to_out")
        x, h = add_and_norm(
            x, branch, (block.norm2, gate_msa), norm=(block.ffn_norm1, scale_mlp), dtype=dtype
        )
        branch = product(swiglu(block.feed_forward, h), block.feed_forward.linear_2, "linear_2")
        following = (blocks[i + 1].norm1.norm, parts[i + 1][0]) if i + 1 < len(blocks) else None
        x, h = add_and_norm(x, branch, (block.ffn_norm2, gate_mlp), norm=following, dtype=dtype)
    return x


def add_and_norm(
    x: Tensor,
    branch: Tensor | None = None,
    gate: tuple[Any, Tensor] | None = None,
    *,
    norm: tuple[Any, Tensor] | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """x + rms(branch) weight tanh(gate), and its RMSNorm times weight (1 + scale).

    x [B, N, d], in any dtype; `branch` [B, N, d], or its summands [S, B, N, d], with its (RMSNorm, gate
    [B, d]), or none; `norm`: (RMSNorm, scale [B, d]), or none. Returns the sum, x itself without a branch,
    and what is normed, in `dtype`, or nothing.
    """
    batch, tokens, width = x.shape
    total = x if branch is None else torch.empty_like(x)
    normed = torch.empty(x.shape if norm else 0, dtype=dtype, device=x.device)
    gate_norm, gates = gate or (None, x)
    next_norm, scales = norm or (None, x)
    kernels.add_and_norm[(batch * tokens,)](
        x,
        x if branch is None else branch.contiguous(),
        x if gate_norm is None else gate_norm.weight,
        gates,
        gates.stride(0),
        total,
        x if next_norm is None else next_norm.weight,
        scales,
        scales.stride(0),
        normed,
        tokens,
        width,
        0.0 if gate_norm is None else gate_norm.eps,
        0.0 if next_norm is None else next_norm.eps,
        PARTS=0 if branch is None else branch.numel() // x.numel(),
        NORM=norm is not None,
        BLOCK=triton.next_power_of_2(width),
        num_warps=8,
    )
    return total, normed


def attend(block: NextDiTBlock, h: Tensor, keys_values: KeysValues, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Self-attention plus gated cross-attention, before their output projection: [B, N, d] -> [B, N, d]."""
    batch, tokens, width = h.shape
    keys, values, null_value = keys_values
    without = 0 if null_value is None else batch // 2  # samples that attend to the null condition, the first
    own, cross = block.attn1, block.attn2
    found = None if without else project_few(block, h)
    if found is None:
        q, k, v, cross_q = block.project(h, h[without:] if without else h)  # the same one is one product
        statistics = _statistics(block, q, k, cross_q, without * tokens)
    else:
        (q, k, v, cross_q), statistics = found
    heads, groups, size = width // own.head_dim, k.shape[-1] // own.head_dim, own.head_dim
    out = torch.empty_like(h)
    cos, sin = rope  # [N, h / 2] each
    null = values if null_value is None else null_value.contiguous()
    condition_tokens = keys.shape[2]
    queries = FEW_QUERIES if batch * heads < FEW_PROGRAMS else QUERIES
    kernels.attend[(batch * heads, triton.cdiv(tokens, queries))](
        q,
        k,
        v,
        cross_q,
        q.stride(1),
        k.stride(1),
        v.stride(1),
        cross_q.stride(1),
        statistics,
        own.norm_q.weight,
        own.norm_q.bias,
        own.norm_k.weight,
        own.norm_k.bias,
        cross.norm_q.weight,
        cross.norm_q.bias,
        keys,
        values,
        *keys.stride()[:3],
        *values.stride()[:3],
        null,
        block.gate,
        cos,
        sin,
        out,
        without,
        tokens,
        condition_tokens,
        heads,
        heads // groups,
        size**-0.5,
        own.norm_q.eps,
        own.norm_k.eps,
        cross.norm_q.eps,
        TILES=0 if found is None else triton.next_power_of_2(triton.cdiv(width, JOINT[0])),
        TILE=JOINT[0],
        HEAD=size,
        WIDE=max(32, triton.next_power_of_2(size)),  # halves of 16 are the least that is multiplied
        QUERIES=queries,
        TOKENS=max(16, triton.next_power_of_2(tokens)),
        CONDITION=max(16, triton.next_power_of_2(condition_tokens)),
        num_warps=4,
    )
    return out


def project_few(block: NextDiTBlock, h: Tensor) -> tuple[tuple[Tensor, ...], Tensor] | None:
    """Of few rows what `block.project(h, h)` returns, with each row's sums over tiles of these numbers and of
    their squares [tiles, B N, 2]; None where that is made in two steps.

    A variance from sums of squares in float32 is exact to 1e-7 of the squared mean: enough unless a row's
    mean is hundreds of its deviations.
    """
    group, _ = block.joint_layers()
    weights = [layer.weight for layer in group]
    columns, depth, stages = JOINT
    batch, tokens, width = h.shape
    rows, sizes = batch * tokens, [len(weight) for weight in weights]
    fits = all(size % columns == 0 for size in sizes) and width % depth == 0 and rows <= FEW_ROWS
    if not fits or weights[0].dtype != h.dtype or not are_packed(weights):
        return None
    out = torch.empty(batch, tokens, sum(sizes), dtype=h.dtype, device=h.device)
    sums = torch.empty(sum(sizes) // columns, rows, 2, dtype=torch.float32, device=h.device)
    kernels.product_with_sums[(sum(sizes) // columns,)](
        h.contiguous(),
        joined_weights(weights),
        out,
        sums,
        rows,
        sum(sizes),
        WIDTH=width,
        ROWS=max(16, triton.next_power_of_2(rows)),
        COLUMNS=columns,
        DEPTH=depth,
        num_warps=4,
        num_stages=stages,
    )
    return out.split(sizes, dim=-1), sums


def _statistics(block: Any, q: Tensor, k: Tensor, cross_q: Tensor, first_cross_row: int) -> Tensor:
    """Mean and 1 / deviation of every row of the three: [B N, 6]."""
    own, cross = block.attn1, block.attn2
    batch, tokens, width = q.shape
    statistics = torch.empty(batch * tokens, 6, dtype=torch.float32, device=q.device)
    kernels.norm_statistics[(batch * tokens, 3)](
        q,
        k,
        cross_q,
        q.stride(1),
        k.stride(1),
        cross_q.stride(1),
        statistics,
        first_cross_row,
        width,
        k.shape[-1],
        own.norm_q.eps,
        own.norm_k.eps,
        cross.norm_q.eps,
        BLOCK=triton.next_power_of_2(width),
        num_warps=8,
    )
    return statistics


def product(x: Tensor, layer: Any, name: str) -> Tensor:
    """layer(x) [B, N, d], without a bias; of few rows as summands [S, B, N, d], which are added when read."""
    columns, splits, depth, stages = SPLIT[name]
    rows, (width, inner) = x.shape[0] * x.shape[1], layer.weight.shape
    if rows > FEW_ROWS or inner % (splits * depth) or layer.weight.dtype != x.dtype:
        return layer(x)
    out = torch.empty(splits, *x.shape[:-1], width, dtype=torch.float32, device=x.device)
    kernels.split_product[(triton.cdiv(width, columns), splits)](
        x.contiguous(),
        layer.weight,
        out,
        rows,
        width,
        WIDTH=inner,
        SPLITS=splits,
        ROWS=max(16, triton.next_power_of_2(rows)),
        COLUMNS=columns,
        DEPTH=depth,
        num_warps=4,
        num_stages=stages,
    )
    return out


def swiglu(feed_forward: FeedForward, h: Tensor) -> Tensor:
    """silu(linear_1 h) * linear_3 h: [B, N, d] -> [B, N, inner]."""
    (group,) = feed_forward.joint_layers()
    return gated(*joint_product(h, group, any_layout=True))


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up: [B, N, inner] twice, each a part of rows that may be longer -> [B, N, inner]."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    inner, block = gate.shape[-1], 1024
    rows = gate.shape[0] * gate.shape[1]
    kernels.swiglu[(rows, triton.cdiv(inner, block))](
        gate, up, out, gate.stride(1), up.stride(1), inner, BLOCK=block, num_warps=4
    )
    return out


def quantized_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [m, k], a quantised weight [n, k] and its rows' scales [n] -> [m, n].

    The weight is widened on the chip: memory is read for one byte a number, which takes the time of few rows.
    """
    x = x.contiguous()
    (rows, width), columns = x.shape, len(weight)
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    tile = 64 if columns >= 4096 else 32  # programs for all of a GPU's processors
    kernels.quantized_product[(triton.cdiv(columns, tile), triton.cdiv(rows, QUERIES))](
        x,
        weight,
        scale,
        out,
        rows,
        columns,
        WIDTH=width,
        ROWS=min(QUERIES, max(16, triton.next_power_of_2(rows))),
        COLUMNS=tile,
        DEPTH=128,
        num_warps=4,
        num_stages=4,
    )
    return out
