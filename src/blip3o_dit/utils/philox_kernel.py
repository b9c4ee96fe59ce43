"""`philox` as one Triton kernel: on a GPU its 120 operations would each be launched alone."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512


def philox_words(key: Tensor, samples: Tensor, positions: int) -> Tensor:
    """The words of `philox`, int64 in [0, 2^32), [4, b, positions] in the order 0, 2, 1, 3.

    `key` holds two words, one behind the other or further apart; a counter is its position, then its sample's
    three words `samples` [3, b].
    """
    count = samples.shape[1]
    out = torch.empty(4, count, positions, dtype=torch.int64, device=samples.device)
    with torch.cuda.device_of(samples):
        _philox_words[(count, triton.cdiv(positions, BLOCK))](
            key, key.stride(0), samples, *samples.stride(), out, out.stride(0), positions, BLOCK=BLOCK
        )
    return out


@triton.jit
def _philox_words(
    key_ptr,
    key_stride,
    samples_ptr,
    word_stride,
    sample_stride,
    out_ptr,
    out_stride,
    positions,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    words_ptr = samples_ptr + sample * sample_stride
    none = tl.zeros([BLOCK], tl.uint32)
    word_0, word_1, word_2, word_3 = tl.philox_impl(
        position.to(tl.uint32),
        tl.load(words_ptr).to(tl.uint32) + none,
        tl.load(words_ptr + word_stride).to(tl.uint32) + none,
        tl.load(words_ptr + 2 * word_stride).to(tl.uint32) + none,
        tl.load(key_ptr).to(tl.uint32) + none,
        tl.load(key_ptr + key_stride).to(tl.uint32) + none,
        10,
    )
    place = out_ptr + sample * positions + position
    inside = position < positions
    tl.store(place, word_0.to(tl.int64), mask=inside)
    tl.store(place + out_stride, word_2.to(tl.int64), mask=inside)
    tl.store(place + 2 * out_stride, word_1.to(tl.int64), mask=inside)
    tl.store(place + 3 * out_stride, word_3.to(tl.int64), mask=inside)
