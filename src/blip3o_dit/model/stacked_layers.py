"""What is computed for all layers at once where launches would take longer than the arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from blip3o_dit.model.encoded_condition import KeysValues
from blip3o_dit.model.transformer import NextDiTBlock


def keys_values(blocks: Sequence[NextDiTBlock], weight: Tensor, condition: Tensor) -> list[KeysValues]:
    """`NextDiTBlock.encode` of every block: condition [B, L, d] -> keys and values [B, G, L, h] each.

    `weight` [layers 2 G h, d] holds all blocks' `attn2.to_k` and `attn2.to_v`, in turns.
    Keys are normed in float32 at least, as `LayerNorm` does inside.
    """
    dtype, (batch, _, width) = condition.dtype, condition.shape
    attentions = [block.attn2 for block in blocks]
    context_norms, key_norms = [block.norm1_context for block in blocks], [a.norm_k for a in attentions]
    gains = torch.stack([norm.weight for norm in context_norms]).to(dtype).unsqueeze(1)  # [layers, 1, d]
    rows = F.rms_norm(condition.flatten(0, 1), (width,), None, context_norms[0].eps)
    product = torch.bmm(rows * gains, weight.view(len(blocks), -1, width).mT)  # [layers, B L, 2 G h]
    keys, values = product.chunk(2, dim=-1)
    wide = torch.promote_types(dtype, torch.float32)
    affine = torch.stack([p for norm in key_norms for p in (norm.weight, norm.bias)]).to(wide)
    scale, shift = affine.unflatten(0, (-1, 2)).unsqueeze(2).unbind(1)  # [layers, 1, G h] each
    normed = F.layer_norm(keys.to(wide), keys.shape[-1:], eps=key_norms[0].eps)
    split = [
        x.unflatten(1, (batch, -1)).unflatten(-1, (-1, attentions[0].head_dim)).transpose(2, 3)
        for x in (torch.addcmul(shift, normed, scale).to(dtype), values)
    ]  # [layers, B, G, L, h] each
    return [KeysValues(*own) for own in zip(*split, strict=True)]
