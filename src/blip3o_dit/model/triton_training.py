"""The Triton kernels of `gpu_training.py`: a program is one row of d numbers, or some rows of one sample.

What is summed over rows leaves each program as one row of partial sums, which are added in a fixed order:
gradients are the same at every run.
"""

import triton
import triton.language as tl

from blip3o_dit.model.triton_kernels import tanh


@triton.jit
def _norm_backward(gradient, normed, deviation, width):
    """Through x / rms(x): the gradient to x, given the one to its result."""
    along = tl.sum(gradient * normed, axis=0) / width
    return deviation * (gradient - normed * along)


@triton.jit
def add_and_norm_backward(
    to_total_ptr,
    to_normed_ptr,
    total_ptr,
    weight_ptr,
    scale_ptr,
    branch_ptr,
    gate_weight_ptr,
    gate_ptr,
    to_x_ptr,
    to_branch_ptr,
    of_norm_ptr,
    of_gate_ptr,
    scale_stride,
    gate_stride,
    tokens,
    width,
    eps,
    branch_eps,
    TOTAL: tl.constexpr,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows of one sample. `of_norm`, `of_gate`: the rows' sums of the gradients to the factors that the
    normed numbers were multiplied by. Without TOTAL the sum itself was not used."""
    sample, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < width
    of_norm = tl.zeros((BLOCK,), dtype=tl.float32)
    of_gate = tl.zeros((BLOCK,), dtype=tl.float32)
    if NORM:
        scale = tl.load(scale_ptr + sample * scale_stride + column, mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32) * (1.0 + scale)
    if ADD:
        gate = tl.load(gate_ptr + sample * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
        gate_weight = tl.load(gate_weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
        gate_factor = gate_weight * tanh(gate)
    for i in range(ROWS):
        token = piece * ROWS + i
        mask = inside & (token < tokens)
        place = (sample * tokens + token) * width + column
        gradient = tl.zeros((BLOCK,), dtype=tl.float32)
        if TOTAL:
            gradient += tl.load(to_total_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if NORM:
            x = tl.load(total_ptr + place, mask=mask, other=0.0).to(tl.float32)
            to_normed = tl.load(to_normed_ptr + place, mask=mask, other=0.0).to(tl.float32)
            deviation = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
            of_norm += to_normed * x * deviation
            gradient += _norm_backward(to_normed * factor, x * deviation, deviation, width)
            tl.store(to_x_ptr + place, gradient.to(to_x_ptr.dtype.element_ty), mask=mask)
        if ADD:
            branch = tl.load(branch_ptr + place, mask=mask, other=0.0).to(tl.float32)
            deviation = tl.rsqrt(tl.sum(branch * branch, axis=0) / width + branch_eps)
            of_gate += gradient * branch * deviation
            to_branch = _norm_backward(gradient * gate_factor, branch * deviation, deviation, width)
            tl.store(to_branch_ptr + place, to_branch.to(to_branch_ptr.dtype.element_ty), mask=mask)
    place = (sample * tl.num_programs(1) + piece) * width + column
    if NORM:
        tl.store(of_norm_ptr + place, of_norm, mask=inside)
    if ADD:
        tl.store(of_gate_ptr + place, of_gate, mask=inside)


@triton.jit
def factor_gradients(
    partial_ptr,
    weight_ptr,
    modulation_ptr,
    modulation_stride,
    to_modulation_ptr,
    to_weight_ptr,
    samples,
    width,
    GATE: tl.constexpr,
    PIECES: tl.constexpr,
    TIMES: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Partial sums [samples, PIECES, width] of the gradient to weight (1 + m), or weight tanh(m) of a GATE:
    the gradients to m [samples, width] and to the weight [width]."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    to_weight = tl.zeros((SAMPLES, BLOCK), dtype=tl.float32)
    for i in range(TIMES):
        sample = i * SAMPLES + tl.arange(0, SAMPLES)
        mask = (sample < samples)[:, None] & inside[None, :]
        own = tl.zeros((SAMPLES, BLOCK), dtype=tl.float32)
        for piece in tl.static_range(PIECES):
            place = (sample[:, None] * PIECES + piece) * width + column[None, :]
            own += tl.load(partial_ptr + place, mask=mask, other=0.0)
        place = sample[:, None] * modulation_stride + column[None, :]
        modulation = tl.load(modulation_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if GATE:
            gate = tanh(modulation)
            to_weight += own * gate
            to_modulation = own * weight[None, :] * (1.0 - gate * gate)
        else:
            to_weight += own * (1.0 + modulation)
            to_modulation = own * weight[None, :]
        place = sample[:, None] * width + column[None, :]
        to_modulation = to_modulation.to(to_modulation_ptr.dtype.element_ty)
        tl.store(to_modulation_ptr + place, to_modulation, mask=mask)
    to_weight = tl.sum(to_weight, axis=0)
    tl.store(to_weight_ptr + column, to_weight.to(to_weight_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _turned(x, cos_ptr, sin_ptr, token, width, back, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Adjacent pairs of a row's channels, turned by its token's angles; by minus these if `back` is -1."""
    even, odd = tl.split(tl.reshape(x, (BLOCK // 2, 2)))
    pair = tl.arange(0, BLOCK // 2)
    inside = pair < width // 2
    cos = tl.load(cos_ptr + token * HALF + pair % HALF, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + token * HALF + pair % HALF, mask=inside, other=0.0) * back
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (BLOCK,))


@triton.jit
def _centred(ptr, mask, width, eps):
    """A row's (x - mean) / deviation, and 1 / deviation."""
    x = tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
    x = tl.where(mask, x - tl.sum(x, axis=0) / width, 0.0)
    deviation = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    return x * deviation, deviation


@triton.jit
def layer_norm_rotate(
    x_ptr,
    weight_ptr,
    bias_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    tokens,
    width,
    eps,
    ROTATE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    normed, _ = _centred(x_ptr + row * width + column, inside, width, eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    out = normed * weight + bias
    if ROTATE:
        out = _turned(out, cos_ptr, sin_ptr, row % tokens, width, 1.0, HALF, BLOCK)
    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def layer_norm_rotate_backward(
    to_out_ptr,
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    to_x_ptr,
    partial_ptr,
    rows,
    tokens,
    width,
    eps,
    ROTATE: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`partial` [programs, 2, width]: the rows' sums of the gradients to weight and bias."""
    column = tl.arange(0, BLOCK)
    inside = column < width
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    to_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    to_bias = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        mask = inside & (row < rows)
        gradient = tl.load(to_out_ptr + row * width + column, mask=mask, other=0.0).to(tl.float32)
        if ROTATE:
            gradient = _turned(gradient, cos_ptr, sin_ptr, row % tokens, width, -1.0, HALF, BLOCK)
        normed, deviation = _centred(x_ptr + row * width + column, mask, width, eps)
        to_weight += gradient * normed
        to_bias += gradient
        gradient *= weight
        centred = gradient - tl.sum(gradient, axis=0) / width
        to_x = deviation * (centred - normed * (tl.sum(gradient * normed, axis=0) / width))
        tl.store(to_x_ptr + row * width + column, to_x.to(to_x_ptr.dtype.element_ty), mask=mask)
    place = tl.program_id(0).to(tl.int64) * 2 * width + column
    tl.store(partial_ptr + place, to_weight, mask=inside)
    tl.store(partial_ptr + place + width, to_bias, mask=inside)


@triton.jit
def gated_sum_backward(
    to_out_ptr,
    cross_ptr,
    gate_ptr,
    to_cross_ptr,
    partial_ptr,
    rows,
    width,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`partial` [programs, width]: the rows' sums of gradient times cross."""
    column = tl.arange(0, BLOCK)
    inside = column < width
    gate = tanh(tl.load(gate_ptr + column // HEAD, mask=inside, other=0.0).to(tl.float32))
    to_gate = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        mask = inside & (row < rows)
        gradient = tl.load(to_out_ptr + row * width + column, mask=mask, other=0.0).to(tl.float32)
        to_gate += gradient * tl.load(cross_ptr + row * width + column, mask=mask, other=0.0).to(tl.float32)
        to_cross = (gradient * gate).to(to_cross_ptr.dtype.element_ty)
        tl.store(to_cross_ptr + row * width + column, to_cross, mask=mask)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * width + column, to_gate, mask=inside)


@triton.jit
def swiglu_backward(to_out_ptr, gate_ptr, up_ptr, to_gate_ptr, to_up_ptr, numel, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < numel
    gradient = tl.load(to_out_ptr + place, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + place, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    to_gate = gradient * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(to_gate_ptr + place, to_gate.to(to_gate_ptr.dtype.element_ty), mask=inside)
    to_up = gradient * gate * sigmoid
    tl.store(to_up_ptr + place, to_up.to(to_up_ptr.dtype.element_ty), mask=inside)
