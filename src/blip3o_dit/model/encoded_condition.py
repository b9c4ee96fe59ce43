"""What generation keeps of a condition between solver steps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only


class KeysValues(NamedTuple):
    """What one layer's cross-attention attends to: [B, G, L, h] each.

    With guidance, another B samples stand before these, which attend to the null condition. Its tokens are
    all the same, so attention to them gives their value [1, G, 1, h], whatever the queries.
    """

    keys: Tensor
    values: Tensor
    null_value: Tensor | None = None


class EncodedCondition(NamedTuple):
    """All that depends on the condition alone: computed once per sample, reused at every solver step.

    `pooled` [B, min(d, 1024)] enters the modulation; `keys_values` holds what each layer attends to.
    With an informed source, `source_mean` [B, N, in_channels] is its mean R(c) in float32, and
    `embedded_source_mean` [B, N, d] what the first layers make of it.
    """

    pooled: Tensor
    keys_values: list[KeysValues]
    source_mean: Tensor | None = None
    embedded_source_mean: Tensor | None = None

    def with_null_condition(self, null: EncodedCondition) -> EncodedCondition:
        """For a batch of the same samples twice, at first with the null condition, encoded as one sample."""
        pairs = zip(self.keys_values, null.keys_values, strict=True)
        return EncodedCondition(
            pooled=torch.cat([null.pooled.expand_as(self.pooled), self.pooled]),
            keys_values=[KeysValues(own.keys, own.values, other.values[:, :, :1]) for own, other in pairs],
            source_mean=_twice(self.source_mean),
            embedded_source_mean=_twice(self.embedded_source_mean),
        )

    def clone(self) -> EncodedCondition:
        """The same in memory of its own."""
        return tree_map_only(Tensor, Tensor.clone, self)

    def tensors(self) -> list[Tensor]:
        """Everything it holds, in a fixed order."""
        return [held for held in tree_leaves(self) if held is not None]


def _twice(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.repeat(2, 1, 1)
