"""A data set whose best possible flow is known in closed form.

Each sample has one condition c ~ N(0, I), shown on all of its condition tokens, and target tokens
x_1 = A c + b + L z with z ~ N(0, I) of their own. Given x_t and c everything is Gaussian, so the optimal
velocity, its loss (Bayes) and the distribution of x_1 given c have closed forms.

The condition is shared by a sample's tokens on purpose: the network's cross-attention has no positions on
its keys (as BLIP3-o's), so which condition token belongs to which target token must be legible from the
tokens themselves, as it is in a vision tower's but not in independent noise.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blip3o_dit.data.checks import Indices, Record
from blip3o_dit.flow.loss import BLIP3oFlowMatchingLoss
from blip3o_dit.flow.path import AffineSource, ProbabilityPath
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.training.run import train_on


@dataclass
class LinearGaussian:
    """The data set as an `Embeddings`, and what is known about it.

    `matrix` A [C, C_eva], `offset` b [C], `factor` L [C, C].
    """

    num_samples: int = 8192
    num_tokens: int = 16
    condition_dim: int = 8
    target_dim: int = 8
    seed: int = 0
    path: Path = Path("linear-gaussian")

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.matrix = normal(self.target_dim, self.condition_dim) / self.condition_dim**0.5
        self.offset = normal(self.target_dim)
        self.factor = 0.7 * normal(self.target_dim, self.target_dim) / self.target_dim**0.5
        self._eva, self._clip = self.draw(self.num_samples, generator)
        self.shard_starts = np.array([0, self.num_samples])

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """New samples: conditions [count, N, C_eva] and targets [count, N, C]."""
        condition = torch.randn(count, 1, self.condition_dim, generator=generator)
        eva = condition.expand(-1, self.num_tokens, -1)
        noise = torch.randn(count, self.num_tokens, self.target_dim, generator=generator)
        return eva, self.mean(eva) + noise @ self.factor.T

    def mean(self, eva: Tensor) -> Tensor:
        """E[x_1 | c] of each token."""
        return eva @ self.matrix.T + self.offset

    def fetch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        rows = torch.as_tensor(np.asarray(indices))
        return self._eva[rows], self._clip[rows]

    def records(self, indices: Indices | None = None) -> list[Record]:
        return [{"key": str(i)} for i in (range(self.num_samples) if indices is None else indices)]


@dataclass(frozen=True)
class StandardizedAnswer:
    """The closed forms in the flow's units, an affine map of the data's for each condition."""

    data: LinearGaussian
    target_mean: Tensor
    target_std: Tensor
    start: AffineSource = field(default_factory=AffineSource)

    def seen_from(self, start: AffineSource) -> StandardizedAnswer:
        """The same with an informed source, for the conditions of that source."""
        return replace(self, start=start)

    @property
    def covariance(self) -> Tensor:
        """Cov[x_1 | c], [C, C]."""
        factor = self.data.factor / self.target_std[:, None]
        if self.start.std is not None:
            factor = factor / self.start.std[:, None]
        return (factor @ factor.T).double()

    def mean(self, eva: Tensor) -> Tensor:
        """E[x_1 | c] for conditions in the units of the data."""
        return self.start.to_flow((self.data.mean(eva) - self.target_mean) / self.target_std)

    def velocity(self, x_t: Tensor, t: Tensor, eva: Tensor, path: ProbabilityPath) -> Tensor:
        """E[v | x_t, c]: what the best network predicts. [B, N, C], [B], [B, N, C_eva]."""
        t = t.double()
        alpha, sigma = path.alpha(t), path.sigma(t).clamp(min=1e-6)
        mean, gain = self.mean(eva).double(), self._gain(alpha, sigma)
        alpha, sigma = alpha[:, None, None], sigma[:, None, None]
        x_1 = mean + (x_t - alpha * mean) @ gain.mT
        noise = (x_t - alpha * x_1) / sigma
        slopes = path.alpha_derivative(t), path.sigma_derivative(t)
        return (slopes[0][:, None, None] * x_1 + slopes[1][:, None, None] * noise).float()

    def bayes_loss(self, path: ProbabilityPath, points: int = 2000) -> float:
        """E|v - v*|^2 per channel, averaged over t in (0, 1).

        Given x_t, v = alpha' x_1 + sigma' (x_t - alpha x_1) / sigma, so its covariance is that of x_1
        given (x_t, c) times (alpha' - sigma' alpha / sigma)^2.
        """
        t = (torch.arange(points, dtype=torch.float64) + 0.5) / points
        alpha, sigma, covariance = path.alpha(t), path.sigma(t), self.covariance
        left = covariance - alpha[:, None, None] * self._gain(alpha, sigma) @ covariance
        slope = path.alpha_derivative(t) - path.sigma_derivative(t) * alpha / sigma
        per_channel = left.diagonal(dim1=1, dim2=2).mean(dim=1)
        return float((slope**2 * per_channel).mean())

    def _gain(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """d E[x_1 | x_t, c] / d x_t at each of the times: [B] and [B] to [B, C, C]."""
        alpha, sigma, covariance = alpha[:, None, None], sigma[:, None, None], self.covariance
        marginal = alpha**2 * covariance + sigma**2 * torch.eye(len(covariance))
        return alpha * torch.linalg.solve(marginal, covariance.expand_as(marginal)).mT


@dataclass(frozen=True)
class Comparison:
    """A trained network beside the closed forms, on fresh samples.

    `bayes_loss`: closed form, averaged over t. `optimal_loss`: that of the optimal velocity, measured.
    `excess_loss`: E|v_hat - v*|^2 as a share of the gap between the best constant and Bayes.
    `mean_r2`: of the samples' mean per condition against E[x_1 | c]. `trace_ratio`: the trace of the
    samples' covariance given c over the true one.
    """

    bayes_loss: float
    optimal_loss: float
    constant_loss: float
    excess_loss: float
    mean_r2: float
    trace_ratio: float
    seconds: float


def train_and_compare(
    folder: Path,
    *,
    prediction_type: str = "v_prediction",
    source: str = "noise",
    steps: int = 1500,
    num_tokens: int = 16,
    solver_steps: int = 40,
) -> Comparison:
    """Train a tiny DiT (width 64, 1 layer) on 8,192 samples and measure it."""
    data = LinearGaussian(num_tokens=num_tokens)
    config = TrainingConfig(
        output_dir=str(folder),
        model_dim=64,
        num_layers=1,
        num_heads=4,
        max_steps=steps,
        batch_size=128,
        learning_rate=2e-2,
        warmup_steps=50,
        cfg_dropout=0.0,
        ema_decay=0.99,
        eval_split=0.0,
        prediction_type=prediction_type,
        source=source,
        logging_steps=max(1, steps // 5),
        save_steps=steps,
        seed=1,
        device="cpu",
    )
    started = time.monotonic()
    trainer = train_on(data, config)
    seconds = time.monotonic() - started
    assert trainer.ema is not None
    with trainer.ema.applied(trainer.unwrapped_model):
        return _compare(trainer.unwrapped_model.eval(), data, solver_steps, seconds)


def _compare(model: BLIP3oDiTModel, data: LinearGaussian, steps: int, seconds: float) -> Comparison:
    answer = StandardizedAnswer(data, model.target_mean, model.target_std)
    flow = model.config.flow
    path = BLIP3oFlowMatchingLoss.from_config(flow).path
    generator = torch.Generator().manual_seed(9)
    eva, clip = data.draw(1024, generator)
    t = (torch.arange(1024) + 0.5) / 1024
    condition = model.normalize_condition(eva)
    start = model.source_distribution(condition)
    x_1 = start.to_flow(model.normalize_target(clip))
    sample = path.sample(x_1, torch.randn(clip.shape, generator=generator), t)
    with torch.no_grad():
        velocity = model.make_velocity_fn(condition, start)(sample.x_t, t)
    seen = answer.seen_from(start)
    best = seen.velocity(sample.x_t, t, eva, path)
    bayes = seen.bayes_loss(path)
    constant = float((sample.velocity - sample.velocity.mean(dim=(0, 1))).square().mean())
    mean_r2, trace_ratio = _compare_samples(model, answer, steps, generator)
    return Comparison(
        bayes_loss=bayes,
        optimal_loss=float((best - sample.velocity).square().mean()),
        constant_loss=constant,
        excess_loss=float((velocity - best).square().mean()) / (constant - bayes),
        mean_r2=mean_r2,
        trace_ratio=trace_ratio,
        seconds=seconds,
    )


def _compare_samples(
    model: BLIP3oDiTModel, answer: StandardizedAnswer, steps: int, generator: torch.Generator
) -> tuple[float, float]:
    """256 tokens of each of sixteen conditions; tokens are independent given the condition."""
    eva, _ = answer.data.draw(16, generator)
    repeats = 256 // answer.data.num_tokens
    conditions = eva.repeat_interleave(repeats, dim=0)
    generated = model.generate(conditions, num_inference_steps=steps, solver="euler", seed=3)
    x_1 = ((generated - model.target_mean) / model.target_std).reshape(16, -1, answer.data.target_dim)
    expected = answer.mean(eva)[:, 0]
    error = (x_1.mean(dim=1) - expected).square().sum()
    spread = (expected - expected.mean(dim=0)).square().sum()
    covariance = torch.stack([torch.cov(tokens.T) for tokens in x_1]).mean(dim=0)
    return float(1 - error / spread), float(covariance.trace() / answer.covariance.trace())
