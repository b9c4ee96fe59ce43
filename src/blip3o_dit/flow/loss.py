"""The flow matching loss. It samples nothing: every random number is in the `PathSample` it is given."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from blip3o_dit.flow.config import FlowMatchingConfig
from blip3o_dit.flow.path import PathSample, make_path


@dataclass(frozen=True)
class LossOutput:
    """Scalars, float32: `loss` = `flow_matching_loss` + regularization_weight * `regularization_loss`."""

    loss: Tensor
    flow_matching_loss: Tensor
    regularization_loss: Tensor


class BLIP3oFlowMatchingLoss:
    """Mean squared error between a network's prediction and what it should have predicted.

    Its form is that of the prediction type: see `flow/predictions.py`. The arguments are those of
    `FlowMatchingConfig`.

    The regularisation penalises the mean square of the raw network output. It pulls predictions towards
    zero, so any weight above zero biases the samples; 0 is the default and the recommendation.

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
        self.prediction_type, self.prediction = config.prediction_type, config.prediction
        self.regularization_weight = config.regularization_weight

    @classmethod
    def from_config(cls, config: FlowMatchingConfig) -> BLIP3oFlowMatchingLoss:
        """The loss of a configuration; its `path` is the path that sampling must follow."""
        names = ("sigma_min", "sigma_max", "prediction_type", "regularization_weight", "schedule_type")
        return cls(**{name: getattr(config, name) for name in names})

    def sample_path(self, x_1: Tensor, noise: Tensor, t: Tensor) -> PathSample:
        """Put data and noise [B, ...] on the path at t [B]: what network and loss share."""
        return self.path.sample(x_1, noise, t)

    def __call__(self, prediction: Tensor, sample: PathSample) -> LossOutput:
        """prediction [B, ...] made from `sample.x_t` and `sample.t` -> scalar losses."""
        if prediction.shape != sample.x_t.shape:
            raise ValueError(
                f"prediction has shape {tuple(prediction.shape)}, x_t has {tuple(sample.x_t.shape)}"
            )
        prediction = prediction.float()
        flow_matching_loss = self.prediction.loss(prediction, sample, self.path)
        # With no weight it is a figure only: no pass backward through it.
        penalised = prediction if self.regularization_weight else prediction.detach()
        regularization_loss = penalised.square().mean()
        return LossOutput(
            loss=flow_matching_loss + self.regularization_weight * regularization_loss,
            flow_matching_loss=flow_matching_loss,
            regularization_loss=regularization_loss,
        )
