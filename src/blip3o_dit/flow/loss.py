"""The flow matching loss. It draws nothing: every random number is in the `PathSample` it is given."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from blip3o_dit.flow.config import FlowMatchingConfig
from blip3o_dit.flow.path import PathSample, make_path, preconditioning, velocity_scale


@dataclass(frozen=True)
class LossOutput:
    """Scalars, float32: `loss` = `flow_matching_loss` + regularization_weight * `regularization_loss`."""

    loss: Tensor
    flow_matching_loss: Tensor
    regularization_loss: Tensor


class BLIP3oFlowMatchingLoss:
    """Mean squared error between a network's prediction and what it should have predicted.

    * `v_prediction`: |v_hat - (alpha' x_1 + sigma' eps)|^2 (Lipman et al., arXiv 2210.02747, equation 9).
    * `epsilon`: |eps_hat - eps|^2.
    * `sample`: the error of the velocity that x_hat implies, w(t)^2 |x_hat - x_1|^2 with w = 1 / (1 - t) on
      the linear path, 1 - t kept at or above 0.05 (JiT, arXiv 2511.13720).
    * `preconditioned`: |c_skip x_t + c_out F - v|^2, the error of the velocity (`convert_prediction`).

    The regularisation penalises the mean square of the raw network output. It pulls predictions towards
    zero, so any weight above zero biases the samples; 0 is the default and the recommendation.

    Args:
        sigma_min, sigma_max: noise at t = 1 and t = 0, see `ProbabilityPath`.
        prediction_type: what the network predicts, one of `PREDICTION_TYPES`.
        regularization_weight: weight of the penalty above, >= 0.
        schedule_type: "linear" or "cosine".

    Raises:
        ValueError: for an unknown name or a value out of range.
    """

    def __init__(
        self,
        *,
        sigma_min: float = 1e-4,
        sigma_max: float = 1.0,
        prediction_type: str = "v_prediction",
        regularization_weight: float = 0.0,
        schedule_type: str = "linear",
    ) -> None:
        config = FlowMatchingConfig(
            schedule_type=schedule_type,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            prediction_type=prediction_type,
            regularization_weight=regularization_weight,
        )
        self.path = make_path(config)
        self.prediction_type = config.prediction_type
        self.regularization_weight = config.regularization_weight

    @classmethod
    def from_config(cls, config: FlowMatchingConfig) -> BLIP3oFlowMatchingLoss:
        """The loss of a configuration; its `path` is the path that sampling must follow."""
        return cls(
            sigma_min=config.sigma_min,
            sigma_max=config.sigma_max,
            prediction_type=config.prediction_type,
            regularization_weight=config.regularization_weight,
            schedule_type=config.schedule_type,
        )

    def sample_path(self, x_1: Tensor, noise: Tensor, t: Tensor) -> PathSample:
        """Put data and noise [B, ...] on the path at t [B]: the draw that network and loss share."""
        return self.path.sample(x_1, noise, t)

    def __call__(self, prediction: Tensor, sample: PathSample) -> LossOutput:
        """prediction [B, ...] made from `sample.x_t` and `sample.t` -> scalar losses."""
        if prediction.shape != sample.x_t.shape:
            raise ValueError(
                f"prediction has shape {tuple(prediction.shape)}, x_t has {tuple(sample.x_t.shape)}"
            )
        prediction = prediction.float()
        flow_matching_loss = self._flow_matching_loss(prediction, sample)
        regularization_loss = prediction.square().mean()
        return LossOutput(
            loss=flow_matching_loss + self.regularization_weight * regularization_loss,
            flow_matching_loss=flow_matching_loss,
            regularization_loss=regularization_loss,
        )

    def _flow_matching_loss(self, prediction: Tensor, sample: PathSample) -> Tensor:
        if self.prediction_type == "v_prediction":
            return (prediction - sample.velocity).square().mean()
        if self.prediction_type == "epsilon":
            return (prediction - sample.noise).square().mean()
        if self.prediction_type == "preconditioned":
            skip, out = preconditioning(sample.t.reshape(-1, *[1] * (sample.x_t.ndim - 1)), self.path)
            return (skip * sample.x_t + out * prediction - sample.velocity).square().mean()
        weight = velocity_scale(sample.t, self.path).square()
        return (weight * (prediction - sample.x_1).square().flatten(1).mean(dim=1)).mean()
