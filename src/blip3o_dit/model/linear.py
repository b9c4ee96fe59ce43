"""Matrix products of this network: several weights in one product, and weights narrower than the arithmetic.

* Products of the same input (queries, keys, values; the two halves of SwiGLU) become one, without gradients,
  when their weights lie one behind another in memory. `lay_together` puts them there; names and state dict do
  not change, and a weight that was moved since is simply multiplied by itself again. With gradients one joint
  product would have to be cut apart, and its gradients laid together again: they are taken one by one.
* bfloat16 weights on a processor without bfloat16 arithmetic: the product is taken in float32, from a copy of
  the weight that is made for it and dropped, which is several times faster than emulating bfloat16 and
  keeps half the memory.
* A few rows on a CPU: w x^T instead of x w^T, the same numbers in another order in memory. For 64 rows that
  is up to 1.4 times as fast, for 256 and 512 up to 1.2 times, for 2048 no longer (docs/speed.md).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """`nn.Linear` that computes in its input's dtype, whatever its weights are stored in."""

    def forward(self, x: Tensor) -> Tensor:
        return _product(x, [self.weight], self.bias).contiguous()


def products(x: Tensor, weights: Sequence[Tensor], *, any_layout: bool = False) -> tuple[Tensor, ...]:
    """x [..., k] and weights [n_i, k] -> x w_i^T [..., n_i] for each.

    With `any_layout` the results may lie in memory column by column, for what follows element by element.
    """
    if _learning(weights) and not torch.compiler.is_compiling():
        return _Products.apply(x, *weights)
    if torch.compiler.is_compiling() or not _lie_together(weights):
        parts = tuple(_product(x, [weight]) for weight in weights)
    else:
        parts = _product(x, weights).split([len(weight) for weight in weights], dim=-1)
    if any_layout or not _from_the_left(x):
        return parts
    return tuple(part.contiguous() for part in parts)


def _product(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
    """x [..., k] times weights [n_i, k] that lie together, plus `bias` -> [..., sum of n_i] in any layout."""
    dtype, learning = x.dtype, _learning(weights)
    one = (
        len(weights) == 1 and weights[0].dtype.itemsize >= dtype.itemsize
    )  # not worth a copy that is dropped
    if torch.compiler.is_compiling() or (one and (learning or not _from_the_left(x))):
        return F.linear(x, weights[0].to(dtype), None if bias is None else bias.to(dtype))
    if learning:
        (out,) = _Products.apply(x, *weights)
    elif _from_the_left(x):
        flat = x.reshape(-1, x.shape[-1])
        out = (_cast(_joined(weights), dtype) @ flat.t()).t().unflatten(0, x.shape[:-1])
    else:
        out = F.linear(x, _cast(_joined(weights), dtype))
    return out if bias is None else out + bias.to(dtype)


def _learning(weights: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)


FEW_ROWS, MANY_COLUMNS = 512, 1024


def _from_the_left(x: Tensor) -> bool:
    """Whether w x^T is the faster product: what the BLAS makes of a wide weight and few rows."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.compiler.is_compiling():
        return False
    return x.shape[-1] >= MANY_COLUMNS and x.numel() <= FEW_ROWS * x.shape[-1] and not torch.is_grad_enabled()


def lay_together(weights: Sequence[Tensor]) -> None:
    """Move the weights [n_i, k] to one piece of memory, one behind another; values and names stay.

    Weights that are sharded over processes stay where they are, and are multiplied one by one.
    """
    if any(weight.is_meta or type(weight.data) is not Tensor for weight in weights) or _lie_together(weights):
        return
    joined = torch.cat([weight.detach() for weight in weights])
    start = 0
    for weight in weights:
        weight.data = joined[start : start + len(weight)]
        start += len(weight)


class _Products(torch.autograd.Function):
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
        rows, to_x, to_weights = x.flatten(0, -2), None, []
        for gradient, weight, dtype in zip(gradients, weights, ctx.dtypes, strict=True):
            gradient = gradient.flatten(0, -2)
            to_weights.append((gradient.t() @ rows).to(dtype))
            if ctx.needs_input_grad[0]:
                used = _cast(weight, gradient.dtype)
                to_x = gradient @ used if to_x is None else to_x.addmm_(gradient, used)
        return (None if to_x is None else to_x.view(x.shape), *to_weights)


def _lie_together(weights: Sequence[Tensor]) -> bool:
    """Rows of one block of memory, in this order and without gaps."""
    first = weights[0]
    end = first.data_ptr()
    for weight in weights:
        if weight.is_meta or weight.data_ptr() != end or not weight.is_contiguous():
            return False
        if weight.dtype != first.dtype or weight.untyped_storage().data_ptr() != _storage(first):
            return False
        end += weight.nbytes
    return True


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _joined(weights: Sequence[Tensor]) -> Tensor:
    """Weights that lie together, as the one matrix they are."""
    first = weights[0].detach()
    rows = sum(len(weight) for weight in weights)
    return first if len(weights) == 1 else first.as_strided((rows, first.shape[1]), first.stride())


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
