"""Informed sources: a path that starts around a linear prediction instead of from pure noise.

Conditional flow matching allows any source distribution q_0(x | c) (Tong et al., arXiv 2302.00482). Here
x_0 = R(c) + s eps: R is a ridge regression of the training targets on the conditions, s its residual's
standard deviation per channel. All of it is in the network's (standardised) units.

Since x_0 is R(c) + s eps for every sample, a path from x_0 to x_1 is, in the coordinates
y = (x - R(c)) / s, an ordinary path from pure noise to the standardised residual. So the flow (path, loss,
solver, conversions) works on y and knows nothing of R, and the network is shown x = R(c) + s y.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AffineSource:
    """R(c) [B, N, C] and s [C] of one batch; None and None for pure noise."""

    mean: Tensor | None = None
    std: Tensor | None = None

    def to_flow(self, x: Tensor) -> Tensor:
        """The network's units -> the flow's, y = (x - R(c)) / s."""
        return x if self.mean is None or self.std is None else (x - self.mean) / self.std

    def from_flow(self, y: Tensor) -> Tensor:
        """The flow's units -> the network's, x = R(c) + s y."""
        return y if self.mean is None or self.std is None else self.mean + self.std * y

    def repeat(self, times: int) -> AffineSource:
        """The same batch, so many times one after the other."""
        return AffineSource(None if self.mean is None else self.mean.repeat(times, 1, 1), self.std)
