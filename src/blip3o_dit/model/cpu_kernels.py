"""Faster stand-ins for the layers of `transformer.py`, with the same parameters, names and results.

`use_cpu_kernels(model)` puts them in. They serve a GPU as well, but a CPU most:

* Several weights that multiply the same input (queries, keys, values; the two halves of SwiGLU) become one
  product, without gradients, when they lie one behind another in memory; `pack_weights` puts them there. A
  weight that was moved since is multiplied by itself again. With gradients one joint product would have to be
  cut apart, and its gradients joined again: the products are taken one by one, and the gradients to their
  input are added up inside the products.
* What generation computes before its first call is one product for all layers at once: their modulations, and
  on a GPU, for few rows, the condition's keys and values.
* bfloat16 weights on a processor without bfloat16 arithmetic: the product is taken in float32, from a copy of
  the weight that is made for it and dropped, which is several times faster than emulating bfloat16 and
  keeps half the memory.
* A few rows on a CPU: w x^T instead of x w^T, the same numbers in another order in memory. For 64 rows that
  is up to 1.4 times as fast, for 256 and 512 up to 1.2 times, for 2048 no longer (docs/speed.md).
* Quantised weights (`quantization.py`): their numbers are widened in pieces that the processor's cache holds,
  so that memory is read for one byte each, and the product is multiplied by the rows' scales.
* RMSNorm as one autograd function, as torch has no fused kernel for it on a CPU.

Layers that something else was done to (hooks, LoRA, another library's tensors) are called one by one.
torch.compile sees the plain network but for the joint products, which it would not find by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip3o_dit.model import layers, stacked_layers, transformer
from blip3o_dit.model.encoded_condition import KeysValues, Modulations
from blip3o_dit.model.transformer import BlockModulation
from blip3o_dit.utils.validation import triton_works

# Rows of a condition whose keys and values a GPU computes for all layers at once: each layer has its own copy
# of them, normed.
MAX_STACKED_ROWS = 512

# Where w x^T is faster than x w^T: at most so many rows of x, and at least so many columns.
MAX_ROWS, MIN_COLUMNS = 512, 1024
WIDENED_AT_ONCE = 2**19  # numbers of a quantised weight: 2 MiB in float32


def use_cpu_kernels(model: nn.Module) -> None:
    """Have the model's layers compute by this module's code; to be called again when weights were moved.

    Only modules of exactly the plain classes are changed: a subclass of them (what FSDP's `fully_shard` makes
    of a block, an adapter's layer) has a meaning of its own.
    """
    for module in model.modules():
        module.__class__ = STAND_INS.get(type(module), type(module))
        if isinstance(module, NextDiT | NextDiTBlock | FeedForward):
            for group in module.joint_layers():
                if all(type(layer) in (layers.Linear, Linear) for layer in group):
                    pack_weights([layer.weight for layer in group])
                    pack_weights([layer.bias for layer in group if layer.bias is not None])
                    pack_weights([layer.scale for layer in group if layer.scale is not None])


def make_plain(model: nn.Module) -> None:
    """Undo `use_cpu_kernels`: the plain layers, each weight in memory of its own."""
    plain = {stand_in: layer for layer, stand_in in STAND_INS.items()}
    for module in model.modules():
        module.__class__ = plain.get(type(module), type(module))
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


class Linear(layers.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not _is_plain(self.weight):
            return super().forward(x)
        must_widen = self.weight.dtype.itemsize < x.dtype.itemsize
        must_narrow = x.is_cuda and self.weight.dtype.itemsize > x.dtype.itemsize and x.dtype.itemsize == 2
        if not must_widen and not must_narrow and not _transposed_gemm_is_faster(x):
            return super().forward(x)
        if self.scale is not None:
            if _needs_grad(x):
                return super().forward(x)
            out = quantized_product(x, self.weight, self.scale)
        elif _needs_grad(x, self.weight):
            (out,) = _MultiLinear.apply(x, self.weight)
        else:
            out = _packed_product(x, [self.weight])
        return (out if self.bias is None else out + self.bias.to(x.dtype)).contiguous()


class RMSNorm(layers.RMSNorm):
    def normalize(self, x: Tensor, factor: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype.itemsize >= 4 and not torch.compiler.is_compiling():
            return _ScaledRMSNorm.apply(x, factor, self.eps)
        return super().normalize(x, factor)


class NextDiT(transformer.NextDiT):
    def joint_layers(self) -> list[list[layers.Linear]]:
        """Groups of layers of all blocks: those of modulations, and of the condition's keys and values.

        Each block's part of the latter is its own group.
        """
        of_blocks = [block.norm1.linear for block in self.blocks]
        attentions = [block.attn2 for block in self.blocks]
        return [
            [*of_blocks, self.norm_out.linear_1],
            [layer for attention in attentions for layer in (attention.to_k, attention.to_v)],
        ]

    def modulate(self, temb: Tensor) -> Tensor:
        group, _ = self.joint_layers()
        if not _can_be_stacked(group, temb.dtype):
            return super().modulate(temb)
        x, weights = F.silu(temb), [layer.weight for layer in group]
        bias = joined_weights([layer.bias for layer in group])
        if _transposed_gemm_is_faster(x):
            return _packed_product(x, weights).add_(bias).contiguous()
        return F.linear(x, joined_weights(weights), bias)

    def encode(self, condition: Tensor) -> list[KeysValues]:
        _, group = self.joint_layers()
        norms = [norm for block in self.blocks for norm in (block.norm1_context, block.attn2.norm_k)]
        stacked = _stacking_is_faster(condition) and _can_be_stacked(group, condition.dtype)
        if not stacked or any(map(is_hooked, norms)):
            return super().encode(condition)
        return stacked_layers.keys_values(
            self.blocks, joined_weights([layer.weight for layer in group]), condition
        )

    def run_blocks(
        self,
        x: Tensor,
        keys_values: Sequence[KeysValues],
        modulations: Modulations,
        rope: tuple[Tensor, Tensor],
    ) -> Tensor:
        if x.is_cuda and triton_works():
            from blip3o_dit.model import gpu_kernels  # needs triton, and this module

            if gpu_kernels.can_run(self.blocks, x, keys_values, self.compute_dtype):
                return gpu_kernels.run_blocks(self.blocks, x, keys_values, modulations, rope)
        return super().run_blocks(x, keys_values, modulations, rope)


class NextDiTBlock(transformer.NextDiTBlock):
    def forward(
        self,
        x: Tensor,
        condition: Tensor | KeysValues,
        temb: Tensor | BlockModulation,
        rope: tuple[Tensor, Tensor],
    ) -> Tensor:
        if x.is_cuda and isinstance(condition, Tensor) and isinstance(temb, Tensor) and triton_works():
            from blip3o_dit.model import gpu_training  # needs triton, and this module

            if gpu_training.can_run(self, condition):
                return gpu_training.run_block(self, x, condition, temb, rope)
        return super().forward(x, condition, temb, rope)

    def joint_layers(self) -> list[list[layers.Linear]]:
        """Groups of layers that are given the same input."""
        own, cross = self.attn1, self.attn2
        return [[own.to_q, own.to_k, own.to_v, cross.to_q], [cross.to_k, cross.to_v]]

    def project(self, h: Tensor, cross_h: Tensor) -> tuple[Tensor, ...]:
        group, _ = self.joint_layers()
        if not can_be_joined(group):
            return super().project(h, cross_h)
        if cross_h is h:
            return joint_product(h, group)
        return *joint_product(h, group[:-1]), *joint_product(cross_h, group[-1:])

    def project_condition(self, condition: Tensor) -> tuple[Tensor, ...]:
        _, group = self.joint_layers()
        if not can_be_joined(group):
            return super().project_condition(condition)
        return joint_product(condition, group)


class FeedForward(transformer.FeedForward):
    def joint_layers(self) -> list[list[layers.Linear]]:
        """Groups of layers that are given the same input."""
        return [[self.linear_1, self.linear_3]]

    def forward(self, x: Tensor) -> Tensor:
        (group,) = self.joint_layers()
        if not can_be_joined(group):
            return super().forward(x)
        gate, up = joint_product(x, group, any_layout=True)
        gate = F.silu(gate)
        # Autograd keeps the product's factors; without it their memory can be used again.
        return self.linear_2(gate * up if torch.is_grad_enabled() else gate.mul_(up))


STAND_INS: dict[type[nn.Module], type[nn.Module]] = {
    layers.Linear: Linear,
    layers.RMSNorm: RMSNorm,
    transformer.NextDiT: NextDiT,
    transformer.NextDiTBlock: NextDiTBlock,
    transformer.FeedForward: FeedForward,
}


def pack_weights(weights: Sequence[Tensor]) -> None:
    """Move the weights [n_i, k] to one piece of memory, one behind another; values and names stay.

    Weights that are sharded over processes stay where they are, and are multiplied one by one; so do those
    that differ in their dtypes or devices.
    """
    if (
        not weights
        or any(weight.is_meta or not _is_plain(weight) for weight in weights)
        or len({(weight.dtype, weight.device) for weight in weights}) > 1
        or are_packed(weights)
    ):
        return
    joined = weights[0].new_empty(sum(map(len, weights)), *weights[0].shape[1:])
    # One after the other, so that what each leaves behind is free before the next is copied.
    for weight, place in zip(weights, joined.split([len(weight) for weight in weights]), strict=True):
        weight.data = place.copy_(weight.detach())


def joint_product(
    x: Tensor, group: Sequence[layers.Linear], *, any_layout: bool = False
) -> tuple[Tensor, ...]:
    """`multi_linear` of layers that `can_be_joined`, whose weights may be quantised."""
    weights = [layer.weight for layer in group]
    scales = [layer.scale for layer in group if layer.scale is not None]
    if not scales:
        return multi_linear(x, weights, any_layout=any_layout)
    if are_packed(weights) and are_packed(scales):
        joint = quantized_product(x, joined_weights(weights), joined_weights(scales))
        parts = joint.split([len(weight) for weight in weights], dim=-1)
    else:
        parts = tuple(map(quantized_product, [x] * len(weights), weights, scales))
    return parts if any_layout or x.is_cuda else tuple(part.contiguous() for part in parts)


def multi_linear(x: Tensor, weights: Sequence[Tensor], *, any_layout: bool = False) -> tuple[Tensor, ...]:
    """x [..., k] and weights [n_i, k] -> x w_i^T [..., n_i] for each.

    `any_layout` may return column-major results; pass True only if elementwise operations follow.
    """
    if torch.compiler.is_compiling():
        return _traced_products(x, weights)
    if _needs_grad(x, *weights):
        return _MultiLinear.apply(x, *weights)
    if are_packed(weights):
        parts = _packed_product(x, weights).split([len(weight) for weight in weights], dim=-1)
    else:
        parts = tuple(_packed_product(x, [weight]) for weight in weights)
    if any_layout or not _transposed_gemm_is_faster(x):
        return parts
    return tuple(part.contiguous() for part in parts)


def can_be_joined(group: Sequence[nn.Module]) -> bool:
    """Whether a call of each layer would run `Linear.forward` on a plain weight and nothing else.

    Quantised ones are joined where no gradients are wanted, and not for torch.compile.
    """
    alone = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return all(
        type(layer) is Linear
        and _is_plain(layer.weight)
        and (layer.scale is None or not alone)
        and not is_hooked(layer)
        for layer in group
    )


def _can_be_stacked(group: Sequence[layers.Linear], dtype: torch.dtype) -> bool:
    """Whether a group of all blocks is one product of inputs in `dtype`: without gradients, casts, scales."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not can_be_joined(group):
        return False
    if any(layer.scale is not None or layer.weight.dtype != dtype for layer in group):
        return False
    biases = [layer.bias for layer in group if layer.bias is not None]
    return are_packed([layer.weight for layer in group]) and (not biases or are_packed(biases))


def _stacking_is_faster(condition: Tensor) -> bool:
    """Launches are what few rows take on a GPU."""
    return condition.is_cuda and condition.numel() <= MAX_STACKED_ROWS * condition.shape[-1]


def _traced_products(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`multi_linear` for torch.compile, which does not know where weights lie.

    Weights that are cast are written anew anyway, so they are written one behind another. Others would be
    copied for it: with gradients they are multiplied one by one.
    """
    sizes = [len(weight) for weight in weights]
    if not torch.is_grad_enabled():
        return traced_product(x, list(weights)).split(sizes, dim=-1)
    if weights[0].dtype == x.dtype:
        return tuple(F.linear(x, weight) for weight in weights)
    return F.linear(x, torch.cat([weight.to(x.dtype) for weight in weights])).split(sizes, dim=-1)


@torch.library.custom_op("blip3o_dit::joint_product", mutates_args=())
def traced_product(x: Tensor, weights: list[Tensor]) -> Tensor:
    """x [..., k] and weights [n_i, k] -> [..., sum of n_i]; where the weights lie is seen when it is run."""
    if are_packed(weights):
        return _packed_product(x, weights).contiguous()
    return torch.cat([_packed_product(x, [weight]) for weight in weights], dim=-1)


@traced_product.register_fake
def _(x: Tensor, weights: list[Tensor]) -> Tensor:
    return x.new_empty(*x.shape[:-1], sum(len(weight) for weight in weights))


def _is_plain(weight: Tensor) -> bool:
    """No tensor subclass, as sharded weights are."""
    return type(weight) in (Tensor, nn.Parameter)


def is_hooked(layer: nn.Module) -> bool:
    before, after = layer._forward_pre_hooks, layer._forward_hooks
    backward = layer._backward_pre_hooks or layer._backward_hooks
    return bool(before or after or backward or "forward" in vars(layer))  # accelerate replaces `forward`


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _packed_product(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """x [..., k] times weights [n_i, k] that are packed -> [..., sum of n_i] in any layout; no gradients."""
    weight = _cast(joined_weights(weights), x.dtype)
    if not _transposed_gemm_is_faster(x):
        return F.linear(x, weight)
    rows = x.reshape(-1, x.shape[-1])
    return (weight @ rows.t()).t().unflatten(0, x.shape[:-1])


def quantized_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [..., k], a quantised weight [n, k], its rows' scales [n] -> [..., n] in any layout; no gradients."""
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) <= MAX_ROWS and x.dtype == torch.bfloat16 and x.is_cuda and triton_works():
        from blip3o_dit.model import gpu_kernels  # needs triton, and this module

        return gpu_kernels.quantized_product(rows, weight, scale).unflatten(0, x.shape[:-1])
    if len(rows) > MAX_ROWS or not x.is_cpu:
        return F.linear(x, _cast(weight, x.dtype)).mul_(scale)
    out = torch.empty(len(weight), len(rows), dtype=x.dtype, device=x.device)
    at_once = max(1, WIDENED_AT_ONCE // x.shape[-1])
    for some, wide in zip(weight.split(at_once), out.split(at_once), strict=True):
        torch.mm(_cast(some, x.dtype), rows.t(), out=wide)
    return out.mul_(scale[:, None]).t().unflatten(0, x.shape[:-1])


def _transposed_gemm_is_faster(x: Tensor) -> bool:
    """Whether w x^T is the faster product: what the BLAS makes of a wide weight and few rows."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_grad_enabled():
        return False
    return x.shape[-1] >= MIN_COLUMNS and x.numel() <= MAX_ROWS * x.shape[-1]


def are_packed(weights: Sequence[Tensor]) -> bool:
    """Rows of one block of memory, in this order and without gaps."""
    first = weights[0]
    end = first.data_ptr()
    for weight in weights:
        if weight.is_meta or weight.data_ptr() != end or not weight.is_contiguous():
            return False
        if weight.dtype != first.dtype or _storage(weight) != _storage(first):
            return False
        end += weight.nbytes
    return True


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def joined_weights(weights: Sequence[Tensor]) -> Tensor:
    """Packed weights, as the one matrix they are."""
    first = weights[0].detach()
    rows = sum(len(weight) for weight in weights)
    return first if len(weights) == 1 else first.as_strided((rows, *first.shape[1:]), first.stride())


_scratch = threading.local()


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in another dtype; on the CPU in memory that the thread's next call overwrites.

    Asking the system for fresh memory would cost as much as the copy.
    """
    if weight.dtype == dtype or weight.device.type != "cpu":
        return weight.to(dtype)
    buffer = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.dtype != dtype or buffer.numel() < weight.numel():
        buffer = _scratch.buffer = torch.empty(weight.numel(), dtype=dtype)
    return buffer[: weight.numel()].view(weight.shape).copy_(weight)


class _MultiLinear(torch.autograd.Function):
    """x times each weight, in x's dtype: results and gradients in memory of their own.

    The gradients to x are added up inside their products. A copy of a weight in x's dtype is kept for the
    backward pass only if it is the narrower one.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        out, kept = [], []
        for weight in weights:
            narrow = x.dtype.itemsize < weight.dtype.itemsize
            used = weight.to(x.dtype) if narrow else _cast(weight, x.dtype)
            out.append(F.linear(x, used))
            kept.append(used if narrow else weight)
        ctx.save_for_backward(x, *kept)
        ctx.dtypes = [weight.dtype for weight in weights]
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        x_needs_grad, *weight_needs_grad = ctx.needs_input_grad
        rows, to_x = x.flatten(0, -2), None
        to_weights: list[Tensor | None] = [None] * len(weights)
        for i, (gradient, weight, dtype) in enumerate(zip(gradients, weights, ctx.dtypes, strict=True)):
            gradient = gradient.flatten(0, -2)
            if weight_needs_grad[i]:
                to_weights[i] = _outer(gradient, rows, dtype)
            if x_needs_grad:
                used = _cast(weight, gradient.dtype)
                to_x = gradient @ used if to_x is None else to_x.addmm_(gradient, used)
        return (None if to_x is None else to_x.view(x.shape), *to_weights)


def _outer(gradient: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient^T rows in `dtype`, which a GPU's product can be written in without rounding it before."""
    if gradient.is_cuda and dtype == torch.float32 and gradient.dtype.itemsize == 2:
        return torch.mm(gradient.t(), rows, out_dtype=dtype)
    return (gradient.t() @ rows).to(dtype)


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
