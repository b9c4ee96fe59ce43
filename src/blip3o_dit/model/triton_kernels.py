"""The Triton kernels of `gpu_kernels.py`: a program is one row of d numbers, or 64 queries of one head."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def add_and_norm(
    x_ptr,
    branch_ptr,
    gate_weight_ptr,
    gate_ptr,
    gate_stride,
    total_ptr,
    weight_ptr,
    scale_ptr,
    scale_stride,
    normed_ptr,
    tokens,
    width,
    branch_eps,
    eps,
    PARTS: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The branch is the sum of PARTS tensors, one behind another; there is none for 0."""
    row = tl.program_id(0).to(tl.int64)
    sample = row // tokens
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        branch = tl.zeros((BLOCK,), dtype=tl.float32)
        for part in tl.static_range(PARTS):
            place = (part * tl.num_programs(0) + row) * width + column
            branch += tl.load(branch_ptr + place, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + sample * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(gate_weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
        factor = weight * tanh(gate)
        x += branch * tl.rsqrt(tl.sum(branch * branch, axis=0) / width + branch_eps) * factor
        tl.store(total_ptr + row * width + column, x.to(total_ptr.dtype.element_ty), mask=inside)
    if NORM:
        scale = tl.load(scale_ptr + sample * scale_stride + column, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
        normed = x * tl.rsqrt(tl.sum(x * x, axis=0) / width + eps) * weight * (1.0 + scale)
        tl.store(normed_ptr + row * width + column, normed.to(normed_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _row_statistics(ptr, width, eps, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    inside = column < width
    values = tl.load(ptr + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values, axis=0) / width
    centred = tl.where(inside, values - mean, 0.0)
    return mean, tl.rsqrt(tl.sum(centred * centred, axis=0) / width + eps)


@triton.jit
def _store_statistics(ptr, mean, deviation):
    tl.store(ptr, mean)
    tl.store(ptr + 1, deviation)


@triton.jit
def norm_statistics(
    q_ptr,
    k_ptr,
    cross_ptr,
    q_stride,
    k_stride,
    cross_stride,
    out_ptr,
    first_cross_row,
    width,
    kv_width,
    q_eps,
    k_eps,
    cross_eps,
    BLOCK: tl.constexpr,
):
    """Mean and 1 / deviation of a row of queries, keys or the cross-attention's queries."""
    row, which = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if which == 0:
        mean, deviation = _row_statistics(q_ptr + row * q_stride, width, q_eps, BLOCK)
        _store_statistics(out_ptr + row * 6, mean, deviation)
    elif which == 1:
        mean, deviation = _row_statistics(k_ptr + row * k_stride, kv_width, k_eps, BLOCK)
        _store_statistics(out_ptr + row * 6 + 2, mean, deviation)
    elif row >= first_cross_row:
        cross_row = row - first_cross_row
        mean, deviation = _row_statistics(cross_ptr + cross_row * cross_stride, width, cross_eps, BLOCK)
        _store_statistics(out_ptr + row * 6 + 4, mean, deviation)


@triton.jit
def _pairs(x):
    """[rows, h] -> its even and its odd channels, [rows, h / 2] each."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def _statistics(ptr, rows, inside, first, tiles, all_rows, width, eps, TILES: tl.constexpr):
    """Mean and 1 / deviation of these rows: number `first` of what `norm_statistics` found, or made of the
    sums over `tiles` tiles from the first one on that `product_with_sums` left."""
    if TILES == 0:
        mean = tl.load(ptr + rows * 6 + first, mask=inside, other=0.0)
        deviation = tl.load(ptr + rows * 6 + first + 1, mask=inside, other=0.0)
    else:
        tile = tl.arange(0, TILES)
        place = ((first + tile)[None, :] * all_rows + rows[:, None]) * 2
        mask = inside[:, None] & (tile < tiles)[None, :]
        mean = tl.sum(tl.load(ptr + place, mask=mask, other=0.0), axis=1) / width
        square = tl.sum(tl.load(ptr + place + 1, mask=mask, other=0.0), axis=1) / width
        deviation = tl.rsqrt(tl.maximum(square - mean * mean, 0.0) + eps)
    return mean, deviation


@triton.jit
def _normed_and_rotated(
    ptr,
    rows,
    stride,
    inside,
    mean,
    deviation,
    weight_ptr,
    bias_ptr,
    channel,
    in_head,
    cos,
    sin,
    dtype: tl.constexpr,
):
    """One head's LayerNorm and rotation: the even and the odd channels [rows, h / 2]. All begin at its first
    channel."""
    mask = inside[:, None] & in_head[None, :]
    x = tl.load(ptr + rows[:, None] * stride + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + channel, mask=in_head, other=0.0).to(tl.float32)[None, :]
    bias = tl.load(bias_ptr + channel, mask=in_head, other=0.0).to(tl.float32)[None, :]
    even, odd = _pairs((x - mean[:, None]) * deviation[:, None] * weight + bias)
    return (even * cos - odd * sin).to(dtype), (even * sin + odd * cos).to(dtype)


@triton.jit
def _softmax_values(scores, inside, values):
    """softmax(scores [queries, keys]) values [keys, h], of the keys that are inside."""
    scores = tl.where(inside[None, :], scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    total = tl.sum(weights, axis=1)[:, None]
    return tl.dot(weights.to(values.dtype), values) / total


@triton.jit
def attend(
    q_ptr,
    k_ptr,
    v_ptr,
    cross_ptr,
    q_stride,
    k_stride,
    v_stride,
    cross_stride,
    statistics_ptr,
    q_weight_ptr,
    q_bias_ptr,
    k_weight_ptr,
    k_bias_ptr,
    cross_weight_ptr,
    cross_bias_ptr,
    keys_ptr,
    values_ptr,
    keys_sample,
    keys_group,
    keys_token,
    values_sample,
    values_group,
    values_token,
    null_ptr,
    gate_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    without,
    tokens,
    condition_tokens,
    heads,
    heads_per_group,
    factor,
    q_eps,
    k_eps,
    cross_eps,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    HEAD: tl.constexpr,
    WIDE: tl.constexpr,
    QUERIES: tl.constexpr,
    TOKENS: tl.constexpr,
    CONDITION: tl.constexpr,
):
    """The first `without` samples attend to the null condition, which gives its value whatever the query.

    Rotation turns pairs of channels, and a dot product does not care for their order: even and odd channels
    stay apart.
    """
    sample = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    group = head // heads_per_group
    query = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    token, condition_token = tl.arange(0, TOKENS), tl.arange(0, CONDITION)
    pair, channel = tl.arange(0, WIDE // 2), tl.arange(0, WIDE)
    in_queries, in_tokens = query < tokens, token < tokens
    in_pairs, in_head = pair < HEAD // 2, channel < HEAD
    first = sample * tokens  # this sample's first row
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    all_rows = (tl.num_programs(0) // heads) * tokens
    width = heads * HEAD
    kv_width = width // heads_per_group
    q_tiles, k_tiles = width // TILE, kv_width // TILE

    turn = query[:, None] * (HEAD // 2) + pair[None, :]
    cos = tl.load(cos_ptr + turn, mask=in_queries[:, None] & in_pairs[None, :], other=0.0)
    sin = tl.load(sin_ptr + turn, mask=in_queries[:, None] & in_pairs[None, :], other=0.0)
    mean, deviation = _statistics(
        statistics_ptr, first + query, in_queries, 0, q_tiles, all_rows, width, q_eps, TILES
    )
    even, odd = _normed_and_rotated(
        q_ptr + head * HEAD, first + query, q_stride, in_queries, mean, deviation,
        q_weight_ptr + head * HEAD, q_bias_ptr + head * HEAD, channel, in_head, cos, sin, dtype,
    )  # fmt: skip
    turn = token[:, None] * (HEAD // 2) + pair[None, :]
    k_cos = tl.load(cos_ptr + turn, mask=in_tokens[:, None] & in_pairs[None, :], other=0.0)
    k_sin = tl.load(sin_ptr + turn, mask=in_tokens[:, None] & in_pairs[None, :], other=0.0)
    k_first = 2 if TILES == 0 else q_tiles
    mean, deviation = _statistics(
        statistics_ptr, first + token, in_tokens, k_first, k_tiles, all_rows, kv_width, k_eps, TILES
    )
    k_even, k_odd = _normed_and_rotated(
        k_ptr + group * HEAD, first + token, k_stride, in_tokens, mean, deviation,
        k_weight_ptr + group * HEAD, k_bias_ptr + group * HEAD, channel, in_head, k_cos, k_sin, dtype,
    )  # fmt: skip
    values = tl.load(
        v_ptr + (first + token)[:, None] * v_stride + (group * HEAD + channel)[None, :],
        mask=in_tokens[:, None] & in_head[None, :],
        other=0.0,
    )
    scores = (tl.dot(even, tl.trans(k_even)) + tl.dot(odd, tl.trans(k_odd))) * factor
    out = _softmax_values(scores, in_tokens, values)

    gate = tanh(tl.load(gate_ptr + head).to(tl.float32))
    if sample < without:
        null = tl.load(null_ptr + group * HEAD + channel, mask=in_head, other=0.0).to(tl.float32)
        out += gate * null[None, :]
    else:
        cross_sample = sample - without
        cross_first = 4 if TILES == 0 else q_tiles + 2 * k_tiles
        cross_mean, cross_deviation = _statistics(
            statistics_ptr, first + query, in_queries, cross_first, q_tiles, all_rows, width, cross_eps, TILES
        )
        even, odd = _normed_and_rotated(
            cross_ptr + head * HEAD, cross_sample * tokens + query, cross_stride, in_queries,
            cross_mean, cross_deviation, cross_weight_ptr + head * HEAD, cross_bias_ptr + head * HEAD,
            channel, in_head, cos, sin, dtype,
        )  # fmt: skip
        in_condition = condition_token < condition_tokens
        both = in_condition[:, None] & in_head[None, :]
        keys = keys_ptr + cross_sample * keys_sample + group * keys_group
        keys = tl.load(keys + condition_token[:, None] * keys_token + channel[None, :], mask=both, other=0.0)
        k_even, k_odd = _pairs(keys)
        values = values_ptr + cross_sample * values_sample + group * values_group
        values = tl.load(
            values + condition_token[:, None] * values_token + channel[None, :],
            mask=both,
            other=0.0,
        )
        scores = (tl.dot(even, tl.trans(k_even)) + tl.dot(odd, tl.trans(k_odd))) * factor
        out += gate * _softmax_values(scores, in_condition, values)

    tl.store(
        out_ptr + (first + query)[:, None] * (heads * HEAD) + (head * HEAD + channel)[None, :],
        out.to(dtype),
        mask=in_queries[:, None] & in_head[None, :],
    )


@triton.jit
def swiglu(gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, inner, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < inner
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * inner + column, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def product_with_sums(
    x_ptr,
    weight_ptr,
    out_ptr,
    sums_ptr,
    rows,
    columns,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """x [rows, WIDTH] times a weight [columns, WIDTH], and of each row's numbers in a tile of COLUMNS the sum
    and that of squares: [columns / COLUMNS, rows, 2]. COLUMNS divides columns, DEPTH divides WIDTH."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    in_rows = row < rows
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, WIDTH, DEPTH):
        k = start + tl.arange(0, DEPTH)
        x = tl.load(x_ptr + row[:, None] * WIDTH + k[None, :], mask=in_rows[:, None], other=0.0)
        total = tl.dot(x, tl.load(weight_ptr + column[None, :] * WIDTH + k[:, None]), total)
    tl.store(
        out_ptr + row[:, None] * columns + column[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=in_rows[:, None],
    )
    place = sums_ptr + (tl.program_id(0) * rows + row) * 2
    tl.store(place, tl.sum(total, axis=1), mask=in_rows)
    tl.store(place + 1, tl.sum(total * total, axis=1), mask=in_rows)


@triton.jit
def split_product(
    x_ptr,
    weight_ptr,
    out_ptr,
    rows,
    columns,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """x [rows, WIDTH] times a weight [columns, WIDTH], as the sum of SPLITS tensors [rows, columns]: for few
    rows there would else be fewer programs than a GPU has processors."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row, part = tl.arange(0, ROWS), tl.program_id(1)
    in_columns, in_rows = column < columns, row < rows
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, WIDTH // SPLITS, DEPTH):
        k = part * (WIDTH // SPLITS) + start + tl.arange(0, DEPTH)
        x = tl.load(x_ptr + row[:, None] * WIDTH + k[None, :], mask=in_rows[:, None], other=0.0)
        place = weight_ptr + column[None, :] * WIDTH + k[:, None]
        total = tl.dot(x, tl.load(place, mask=in_columns[None, :], other=0.0), total)
    place = out_ptr + (part * rows + row[:, None]) * columns + column[None, :]
    tl.store(place, total.to(out_ptr.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


@triton.jit
def quantized_product(
    x_ptr,
    weight_ptr,
    scale_ptr,
    out_ptr,
    rows,
    columns,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """ROWS rows of x [rows, WIDTH] times COLUMNS rows of a weight [columns, WIDTH], each times its scale."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    in_columns, in_rows = column < columns, row < rows
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, WIDTH, DEPTH):
        k = start + tl.arange(0, DEPTH)
        inside = k < WIDTH
        x_mask, weight_mask = in_rows[:, None] & inside[None, :], in_columns[None, :] & inside[:, None]
        x = tl.load(x_ptr + row[:, None] * WIDTH + k[None, :], mask=x_mask, other=0.0)
        weight = tl.load(weight_ptr + column[None, :] * WIDTH + k[:, None], mask=weight_mask, other=0.0)
        total = tl.dot(x, weight.to(x.dtype), total)
    total *= tl.load(scale_ptr + column, mask=in_columns, other=0.0)[None, :]
    place = out_ptr + row[:, None] * columns + column[None, :]
    tl.store(place, total.to(out_ptr.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])
