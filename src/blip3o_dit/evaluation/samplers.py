"""The protocol of everything that is evaluated, and a trained model behind it; see also `baselines.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from blip3o_dit.flow.solvers import SOLVERS
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel


class Sampler(Protocol):
    """Samples tokens [n, N, C] given conditions [n, L, C_eva], in the units of the data.

    `name` is short and unique, `about` is for people, `is_model` tells models from baselines, `calls` is
    the network calls that one sample takes, and `random` is False when every sample is the best guess.
    """

    @property
    def name(self) -> str: ...

    @property
    def about(self) -> str: ...

    @property
    def is_model(self) -> bool: ...

    @property
    def calls(self) -> int: ...

    @property
    def random(self) -> bool: ...

    def predict_mean(self, eva: Tensor, indices: Sequence[int]) -> Tensor | None:
        """The conditional mean E[x_1 | condition]; None when the sampler has no estimate of it."""

    def sample(self, eva: Tensor, indices: Sequence[int], sample_number: int) -> Tensor:
        """One sample of each condition; those of numbers 0, 1, ... are independent.

        A function of the samples' indices, whatever batch they are in.
        """


@dataclass(frozen=True)
class ModelSampler:
    """A trained `BLIP3oDiTModel` with sampling settings.

    Its mean is the one-call estimate at t = 0, where the network predicts E[x_1 | condition]; a model that
    predicts the noise has none, and neither has a distilled one.
    """

    model: BLIP3oDiTModel
    name: str = "DiT"
    num_inference_steps: int = 50
    solver: str = "euler"
    guidance_scale: float = 1.0
    noise_scale: float | None = None
    seed: int = 0
    is_model: bool = True
    random: bool = True

    @property
    def about(self) -> str:
        guidance = f", guidance {self.guidance_scale:g}" if self.guidance_scale != 1.0 else ""
        scale = self.model.config.flow.noise_scale if self.noise_scale is None else self.noise_scale
        noise = f", noise x {scale:.3g}" if scale != 1.0 else ""
        return f"this model, {self.num_inference_steps} {self.solver} steps{guidance}{noise}"

    @property
    def calls(self) -> int:
        return self.num_inference_steps * SOLVERS[self.solver].calls_per_step

    def predict_mean(self, eva: Tensor, indices: Sequence[int]) -> Tensor | None:
        flow = self.model.config.flow
        if flow.student_steps or not flow.prediction.gives_mean_at_noise:
            return None
        return self.model.predict_mean(eva, seed=self.seed, sample_index=indices).cpu()

    def sample(self, eva: Tensor, indices: Sequence[int], sample_number: int) -> Tensor:
        generated = self.model.generate(
            eva,
            num_inference_steps=self.num_inference_steps,
            solver=self.solver,
            guidance_scale=self.guidance_scale,
            noise_scale=self.noise_scale,
            seed=self.seed,
            sample_index=indices,
            sample_number=sample_number,
        )
        return generated.cpu()

    def with_calls(self, solver: str, calls: int) -> ModelSampler:
        """The same model sampled with so many network calls."""
        return replace(self, solver=solver, num_inference_steps=calls // SOLVERS[solver].calls_per_step)
