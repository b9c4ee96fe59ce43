"""What a training step says about itself, without waiting for the device between two log lines."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from blip3o_dit.flow.loss import BLIP3oFlowMatchingLoss, LossOutput
from blip3o_dit.flow.path import PathSample, convert_prediction
from blip3o_dit.flow.source import AffineSource


class TrainingMetrics:
    """Sums of step quantities, on the device of the step.

    * `flow_matching_loss`, `regularization_loss`: the parts of the loss.
    * `cosine_similarity`, `l2_distance`: per token, between the data x_1 and the estimate of it that one
      network call makes from x_t; in the network's (standardised) units.
    * `snr_db`: 10 log10 (|v|^2 / |v_hat - v|^2), the velocity over the error of its prediction.
    * `output_norm`: root mean square of the raw network output.
    """

    names = (
        *("flow_matching_loss", "regularization_loss"),
        *("cosine_similarity", "l2_distance", "velocity_power", "velocity_error", "output_power"),
    )

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._count = 0

    @torch.no_grad()
    def add(
        self,
        loss_fn: BLIP3oFlowMatchingLoss,
        sample: PathSample,
        flow_source: AffineSource,
        prediction: Tensor,
        output: LossOutput,
    ) -> None:
        """Take in one step; prediction [B, N, C]."""
        prediction = prediction.detach().float()
        source, path = loss_fn.prediction_type, loss_fn.path
        x_1, velocity = (
            convert_prediction(prediction, sample.x_t, sample.t, path, from_type=source, to_type=target)
            for target in ("sample", "v_prediction")
        )
        estimate, truth = flow_source.from_flow(x_1), flow_source.from_flow(sample.x_1)
        values = torch.stack(
            [
                output.flow_matching_loss.detach(),
                output.regularization_loss.detach(),
                F.cosine_similarity(estimate, truth, dim=-1).mean(),
                (estimate - truth).norm(dim=-1).mean(),
                sample.velocity.square().mean(),
                (velocity - sample.velocity).square().mean(),
                prediction.square().mean(),
            ]
        )
        self._sums = values if self._sums is None else self._sums + values
        self._count += 1

    @property
    def state(self) -> tuple[list[float], int] | None:
        """Sums and count, for a checkpoint."""
        return None if self._sums is None else (self._sums.tolist(), self._count)

    def restore(self, state: tuple[list[float], int] | None, device: torch.device) -> None:
        """Continue from `state`."""
        self._sums, self._count = None, 0
        if state is not None:
            self._sums, self._count = torch.tensor(state[0], device=device), state[1]

    def pop(self) -> Tensor | None:
        """Means since the last call, [len(names)], or None when there was no step."""
        if self._sums is None:
            return None
        means = self._sums / self._count
        self._sums, self._count = None, 0
        return means

    @classmethod
    def describe(cls, means: Tensor) -> dict[str, float]:
        """Means, perhaps averaged over processes -> what is logged."""
        values = dict(zip(cls.names, means.double().cpu(), strict=True))
        power, error = values.pop("velocity_power"), values.pop("velocity_error")
        output_power = values.pop("output_power")
        logged = {name: float(value) for name, value in values.items()}
        logged["snr_db"] = float(10.0 * torch.log10(power / error))
        logged["output_norm"] = float(output_power.sqrt())
        return logged
