"""What generation keeps of a condition between solver steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class KeysValues(NamedTuple):
    """What one layer's cross-attention attends to: [B, G, L, h] each.

    With guidance, another B samples stand before these, which attend to the null condition. Its tokens are
    all the same, so attention to them gives their value [1, G, 1, h], whatever the queries.
    """

    keys: Tensor
    values: Tensor
    null_value: Tensor | None = None


class Modulations(NamedTuple):
    """What time and condition make of the network: scales and gates of each block, the last layer's scale.

    [..., 4 d] for each block, and [..., d].
    """

    blocks: Sequence[Tensor]
    output: Tensor

    @classmethod
    def of_joint(cls, joint: Tensor, width: int) -> Modulations:
        """Of all of them side by side [..., layers 4 d + d], d = `width`."""
        *blocks, output = joint.split(4 * width, dim=-1)
        return cls(blocks, output)


class TimedModulations(NamedTuple):
    """The modulations of all samples at the times of all network calls, side by side in one tensor.

    `times` [K], `joint` [K, B, layers 4 d + d], `width` d.
    """

    times: Tensor
    joint: Tensor
    width: int

    def at(self, t: Tensor) -> Modulations:
        """Those of one network call, all of whose samples are at time t [B], one of `times`.

        The nearest of them, found where they are: asking a GPU for it would stall every call.
        """
        if len(self.times) == 1:
            return Modulations.of_joint(self.joint[0], self.width)
        nearest = (self.times - t[:1]).abs().argmin(dim=0, keepdim=True)
        joint = self.joint.index_select(0, nearest).squeeze(0)  # [B, layers 4 d + d]
        return Modulations.of_joint(joint, self.width)

    def with_null_condition(self, null: TimedModulations) -> TimedModulations:
        """For the same samples twice, at first with the null condition, of which there is one sample."""
        return self._replace(joint=torch.cat([null.joint.expand_as(self.joint), self.joint], dim=1))


class EncodedCondition(NamedTuple):
    """All that depends on the condition alone, or on nothing: computed once, reused at every solver step.

    `pooled` [B, min(d, 1024)] enters the modulations, which are there as well if the times of all calls were
    known; `keys_values` holds what each layer attends to, `rope` the rotary tables [N, h / 2].
    With an informed source, `source_mean` [B, N, in_channels] is its mean R(c) in float32, and
    `embedded_source_mean` [B, N, d] what the first layers make of it.
    """

    pooled: Tensor
    keys_values: list[KeysValues]
    rope: tuple[Tensor, Tensor]
    source_mean: Tensor | None = None
    embedded_source_mean: Tensor | None = None
    modulations: TimedModulations | None = None

    def with_null_condition(self, null: EncodedCondition) -> EncodedCondition:
        """For a batch of the same samples twice, at first with the null condition, encoded as one sample."""
        pairs = zip(self.keys_values, null.keys_values, strict=True)
        return EncodedCondition(
            pooled=torch.cat([null.pooled.expand_as(self.pooled), self.pooled]),
            keys_values=[KeysValues(own.keys, own.values, other.values[:, :, :1]) for own, other in pairs],
            rope=self.rope,
            source_mean=_twice(self.source_mean),
            embedded_source_mean=_twice(self.embedded_source_mean),
            modulations=self._both_modulations(null),
        )

    def _both_modulations(self, null: EncodedCondition) -> TimedModulations | None:
        if self.modulations is None or null.modulations is None:
            return None
        return self.modulations.with_null_condition(null.modulations)


def _twice(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.repeat(2, 1, 1)
