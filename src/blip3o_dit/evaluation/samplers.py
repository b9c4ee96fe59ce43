"""What is evaluated: a model or a baseline, each giving a best guess and samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from blip3o_dit.evaluation.baselines import Baseline, NearestNeighbours, ResidualGaussian
from blip3o_dit.flow.solvers import SOLVERS
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel


class Sampler(Protocol):
    """Something that answers conditions [n, L, C_eva] with tokens [n, N, C], in the units of the data.

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
        """The average answer; None when the method has none of its own."""

    def sample(self, eva: Tensor, indices: Sequence[int], sample_number: int) -> Tensor:
        """One possible answer; draws 0, 1, ... are independent, and named by the samples' indices."""


@dataclass(frozen=True)
class ModelSampler:
    """A trained `BLIP3oDiTModel` with sampling settings.

    Its best guess is the one-call estimate at t = 0, where the network predicts the average answer; a
    model that predicts the noise has none, and neither has a distilled one.
    """

    model: BLIP3oDiTModel
    name: str = "DiT"
    num_inference_steps: int = 50
    solver: str = "euler"
    guidance_scale: float = 1.0
    seed: int = 0
    is_model: bool = True
    random: bool = True

    @property
    def about(self) -> str:
        guidance = f", guidance {self.guidance_scale:g}" if self.guidance_scale != 1.0 else ""
        return f"this model, {self.num_inference_steps} {self.solver} steps{guidance}"

    @property
    def calls(self) -> int:
        return self.num_inference_steps * SOLVERS[self.solver].calls_per_step

    def predict_mean(self, eva: Tensor, indices: Sequence[int]) -> Tensor | None:
        flow = self.model.config.flow
        if flow.fixed_sampling is not None or not flow.prediction.gives_mean_at_noise:
            return None
        return self.model.predict_mean(eva, seed=self.seed, sample_index=indices).cpu()

    def sample(self, eva: Tensor, indices: Sequence[int], sample_number: int) -> Tensor:
        generated = self.model.generate(
            eva,
            num_inference_steps=self.num_inference_steps,
            solver=self.solver,
            guidance_scale=self.guidance_scale,
            seed=self.seed,
            sample_index=indices,
            sample_number=sample_number,
        )
        return generated.cpu()

    def with_calls(self, solver: str, calls: int) -> ModelSampler:
        """The same model sampled with so many network calls."""
        return replace(self, solver=solver, num_inference_steps=calls // SOLVERS[solver].calls_per_step)


@dataclass(frozen=True)
class BaselineMethod:
    """A point prediction, and samples from a Gaussian around it (`residual` None: no randomness)."""

    name: str
    about: str
    baseline: Baseline
    residual: ResidualGaussian | None
    seed: int = 0
    is_model: bool = False
    calls: int = 0

    @property
    def random(self) -> bool:
        return self.residual is not None

    def predict_mean(self, eva: Tensor, indices: Sequence[int]) -> Tensor | None:
        return self.baseline.predict(eva)

    def sample(self, eva: Tensor, indices: Sequence[int], sample_number: int) -> Tensor:
        guess = self.baseline.predict(eva)
        if self.residual is None:
            return guess
        return guess + self.residual.sample(indices, seed=self.seed, sample_number=sample_number)


@dataclass(frozen=True)
class NeighbourMethod:
    """k nearest neighbours: their mean, and one of them at random."""

    baseline: NearestNeighbours
    name: str = "nearest neighbours"
    seed: int = 0
    is_model: bool = False
    calls: int = 0
    random: bool = True

    @property
    def about(self) -> str:
        return (
            f"{self.baseline.k} training samples with the nearest mean condition token, "
            f"among {len(self.baseline.bank)}"
        )

    def predict_mean(self, eva: Tensor, indices: Sequence[int]) -> Tensor | None:
        return self.baseline.predict(eva)

    def sample(self, eva: Tensor, indices: Sequence[int], sample_number: int) -> Tensor:
        return self.baseline.sample(eva, indices, seed=self.seed, sample_number=sample_number)
