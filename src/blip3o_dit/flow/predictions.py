"""What a network may predict on a path. A new type is one class and one entry of `PREDICTIONS` here.

x_t and a prediction determine x_1 and eps, and these determine everything else. Reading the data off a
predicted noise divides by alpha (zero at t = 0), reading the noise off predicted data divides by sigma
(almost zero at t = 1): both divisors are kept at or above a small number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blip3o_dit.flow.path import PathSample, ProbabilityPath, expand_times
from blip3o_dit.utils.validation import check_name

if TYPE_CHECKING:
    from torch import Tensor

# The least alpha or sigma / sigma_max that is divided by; the value is JiT's (arXiv 2511.13720).
MIN_SCALE = 0.05


@dataclass(frozen=True)
class Position:
    """Where a prediction is made: x_t [B, ...] and its times [B, 1, ...] on a path, float32.

    `end`: the times [B, 1, ...] at which a distilled model's steps end.
    """

    x_t: Tensor
    t: Tensor
    path: ProbabilityPath
    min_scale: float = MIN_SCALE
    end: Tensor | None = None


class Prediction(ABC):
    """One type. Predictions, x_1 and eps are [B, ...] and float32."""

    # Whether a prediction at t = 0, where x_t is noise alone, says what the data is on average.
    gives_mean_at_noise = True

    @abstractmethod
    def to_endpoints(self, prediction: Tensor, at: Position) -> tuple[Tensor, Tensor]:
        """(x_1, eps) from the prediction and x_t = alpha x_1 + sigma eps."""

    @abstractmethod
    def from_endpoints(self, x_1: Tensor, noise: Tensor, at: Position) -> Tensor:
        """What this type says of x_1 and eps."""

    def to_velocity(self, prediction: Tensor, at: Position) -> Tensor:
        """The velocity that the prediction implies."""
        return at.path.velocity(*self.to_endpoints(prediction, at), at.t)

    @abstractmethod
    def loss(self, prediction: Tensor, sample: PathSample, path: ProbabilityPath) -> Tensor:
        """The flow matching loss of a batch, a scalar."""


class VelocityPrediction(Prediction):
    """v = alpha' x_1 + sigma' eps; the loss is |v_hat - v|^2 (arXiv 2210.02747, equation 9)."""

    def to_endpoints(self, prediction: Tensor, at: Position) -> tuple[Tensor, Tensor]:
        path, t, x_t = at.path, at.t, at.x_t
        x_1 = (path.sigma_derivative(t) * x_t - path.sigma(t) * prediction) / path.determinant(t)
        noise = (path.alpha(t) * prediction - path.alpha_derivative(t) * x_t) / path.determinant(t)
        return x_1, noise

    def from_endpoints(self, x_1: Tensor, noise: Tensor, at: Position) -> Tensor:
        return at.path.velocity(x_1, noise, at.t)

    def loss(self, prediction: Tensor, sample: PathSample, path: ProbabilityPath) -> Tensor:
        return (prediction - sample.velocity).square().mean()


class NoisePrediction(Prediction):
    """eps; the loss is |eps_hat - eps|^2."""

    gives_mean_at_noise = False

    def to_endpoints(self, prediction: Tensor, at: Position) -> tuple[Tensor, Tensor]:
        x_1 = (at.x_t - at.path.sigma(at.t) * prediction) / at.path.alpha(at.t).clamp(min=at.min_scale)
        return x_1, prediction

    def from_endpoints(self, x_1: Tensor, noise: Tensor, at: Position) -> Tensor:
        return noise

    def loss(self, prediction: Tensor, sample: PathSample, path: ProbabilityPath) -> Tensor:
        return (prediction - sample.noise).square().mean()


class DataPrediction(Prediction):
    """x_1; the loss is the error of the velocity that x_hat implies, w(t)^2 |x_hat - x_1|^2.

    On the linear path w = 1 / (1 - t), 1 - t kept at or above 0.05 (JiT, arXiv 2511.13720).
    """

    def to_endpoints(self, prediction: Tensor, at: Position) -> tuple[Tensor, Tensor]:
        sigma = at.path.sigma(at.t).clamp(min=at.min_scale * at.path.sigma_max)
        return prediction, (at.x_t - at.path.alpha(at.t) * prediction) / sigma

    def from_endpoints(self, x_1: Tensor, noise: Tensor, at: Position) -> Tensor:
        return x_1

    def loss(self, prediction: Tensor, sample: PathSample, path: ProbabilityPath) -> Tensor:
        weight = velocity_scale(sample.t, path).square()
        return (weight * (prediction - sample.x_1).square().flatten(1).mean(dim=1)).mean()


class PreconditionedPrediction(VelocityPrediction):
    """F in v = c_skip(t) x_t + c_out(t) F; the loss is |c_skip x_t + c_out F - v|^2.

    c_skip x_t is the best linear prediction of v and c_out the deviation of what it leaves, for x_1 ~ N(0, I)
    independent of the condition. A network that puts out zero then samples that Gaussian exactly, and F has
    unit variance at all times. It is EDM's preconditioning (Karras et al., arXiv 2206.00364, appendix B.6)
    written for a velocity.
    """

    def to_velocity(self, prediction: Tensor, at: Position) -> Tensor:
        skip, out = preconditioning(at.t, at.path, at.end)
        return skip * at.x_t + out * prediction

    def to_endpoints(self, prediction: Tensor, at: Position) -> tuple[Tensor, Tensor]:
        return super().to_endpoints(self.to_velocity(prediction, at), at)

    def from_endpoints(self, x_1: Tensor, noise: Tensor, at: Position) -> Tensor:
        skip, out = preconditioning(at.t, at.path, at.end)
        return (at.path.velocity(x_1, noise, at.t) - skip * at.x_t) / out

    def loss(self, prediction: Tensor, sample: PathSample, path: ProbabilityPath) -> Tensor:
        at = Position(sample.x_t, expand_times(sample.t, sample.x_t), path)
        return super().loss(self.to_velocity(prediction, at), sample, path)


PREDICTIONS: dict[str, Prediction] = {
    "v_prediction": VelocityPrediction(),
    "epsilon": NoisePrediction(),
    "sample": DataPrediction(),
    "preconditioned": PreconditionedPrediction(),
}


def convert_prediction(
    prediction: Tensor,
    x_t: Tensor,
    t: Tensor,
    path: ProbabilityPath,
    *,
    from_type: str,
    to_type: str,
    min_scale: float = MIN_SCALE,
    end: Tensor | None = None,
) -> Tensor:
    """Turn any type of `PREDICTIONS` [B, ...] into any other, given x_t [B, ...] and t [B]; float32.

    `min_scale` is the least divisor, see above. For a distilled model `end` [B] are the times at which its
    steps end, and its velocity is the average one over a step.

    Raises:
        ValueError: for an unknown prediction type.
    """
    check_name("from_type", from_type, tuple(PREDICTIONS))
    check_name("to_type", to_type, tuple(PREDICTIONS))
    prediction, x_t = prediction.float(), x_t.float()
    if from_type == to_type:
        return prediction
    ends = None if end is None else expand_times(end.float(), x_t)
    at = Position(x_t, expand_times(t.float(), x_t), path, min_scale, ends)
    if to_type == "v_prediction":
        return PREDICTIONS[from_type].to_velocity(prediction, at)
    return PREDICTIONS[to_type].from_endpoints(*PREDICTIONS[from_type].to_endpoints(prediction, at), at)


def preconditioning(t: Tensor, path: ProbabilityPath, end: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) of "preconditioned": regression of v on x_t for x_1 ~ N(0, I), and its residual's std.

    c_skip = (alpha alpha' + sigma sigma') / (alpha^2 + sigma^2),
    c_out = |alpha sigma' - alpha' sigma| / (alpha^2 + sigma^2)^(1/2).

    For a distilled model c_skip x_t is the average velocity of the same Gaussian up to the end t' of its
    step, ((var(t') / var(t))^(1/2) - 1) / (t' - t) with var = alpha^2 + sigma^2: a network that puts out
    zero still samples that Gaussian exactly, in however few steps.
    """
    alpha, sigma = path.alpha(t), path.sigma(t)
    variance = alpha.square() + sigma.square()
    out = -path.determinant(t) / variance.sqrt()
    if end is None:
        return (alpha * path.alpha_derivative(t) + sigma * path.sigma_derivative(t)) / variance, out
    ratio = ((path.alpha(end).square() + path.sigma(end).square()) / variance).sqrt()
    return (ratio - 1.0) / (end - t).clamp(min=1e-6), out


def velocity_scale(t: Tensor, path: ProbabilityPath, min_scale: float = MIN_SCALE) -> Tensor:
    """|dv/dx_1| at fixed x_t: the factor between an error in x_1 and the error of the velocity it implies.

    v = (sigma' x_t + (alpha' sigma - alpha sigma') x_1) / sigma, so for the linear path with sigma_min = 0
    the factor is 1 / (1 - t), kept finite as JiT does (arXiv 2511.13720).
    """
    sigma = path.sigma(t).clamp(min=min_scale * path.sigma_max)
    return -path.determinant(t) / sigma
