"""Every metric, once: its key in metrics.json, its column on the page, and the functions that compute it.

To add one, write its function in `metrics/`, a row here and a line in docs/evaluation.md: predictions, scores
and report loop over the rows. `values` takes the inputs of its stage (the classes below) to numbers per
sample, [n] or [n, m]; `estimate` takes these to a value with an interval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from blip3o_dit.metrics import conditional, distances
from blip3o_dit.metrics.bootstrap import Bootstrap, Estimate
from blip3o_dit.metrics.downstream import neighbour_agreement, retrieval_ranks
from blip3o_dit.metrics.fidelity import TokenMeasures

NEIGHBOURS = 10
CLASSIFIERS = {"probe": "probe", "prototype": "prototype", "zero_shot": "zero-shot"}
BALL_NEIGHBOURS = 5


@dataclass(frozen=True)
class TokenInputs:
    """A batch of generated tokens beside the reference; `correct` [n] says where a classifier is right."""

    tokens: TokenMeasures
    channel_weights: Tensor
    spread: Tensor
    correct: dict[str, np.ndarray]

    def r2(self) -> Tensor:
        """Residual and spread, [n, 2]: R2 is 1 - the ratio of their means."""
        return torch.stack([self.tokens.squares.sum(dim=1) @ self.channel_weights, self.spread], dim=1)

    def cosine(self) -> Tensor:
        return self.tokens.cosine.mean(dim=1)


@dataclass(frozen=True)
class ConditionInputs:
    """K samples of each condition [K, n, N C] beside the reference [n, N C], standardised; `width` is C."""

    samples: Tensor
    reference: Tensor
    width: int

    @cached_property
    def spread_and_error(self) -> Tensor:
        found = conditional.spread_and_error(self.samples, self.reference)
        return torch.stack([found.spread, found.error], dim=1)

    def energy_score(self) -> Tensor:
        return conditional.energy_score(self.samples, self.reference)

    def token_energy_score(self) -> Tensor:
        samples = self.samples.reshape(len(self.samples), -1, self.width)
        scores = conditional.energy_score(samples, self.reference.reshape(-1, self.width))
        return scores.reshape(len(self.reference), -1).mean(dim=1)


@dataclass(frozen=True)
class GalleryInputs:
    """Pooled vectors of the gallery, generated and reference, [g, C] each."""

    generated: Tensor
    reference: Tensor

    @cached_property
    def ranks(self) -> np.ndarray:
        return retrieval_ranks(self.generated, self.reference).numpy()

    @cached_property
    def reverse_ranks(self) -> np.ndarray:
        return retrieval_ranks(self.reference, self.generated).numpy()

    def neighbour_agreement(self) -> Tensor:
        return neighbour_agreement(self.generated, self.reference, k=min(NEIGHBOURS, len(self.reference) - 1))


@dataclass(frozen=True)
class SetInputs:
    """Two sets of vectors [m, C], standardised.

    `squares` are the squared distances [m, m] within the reference, within the generated, and between them.
    """

    reference: Tensor
    generated: Tensor
    squares: tuple[Tensor, Tensor, Tensor]
    bandwidth_square: float
    k: int

    @classmethod
    def of(cls, reference: Tensor, generated: Tensor) -> SetInputs:
        square = distances.squared_distances
        squares = square(reference, reference), square(generated, generated), square(reference, generated)
        k = min(BALL_NEIGHBOURS, len(reference) // 2 - 1)
        return cls(reference, generated, squares, distances.median_square(squares[0]), k)

    def subset(self, rows: np.ndarray) -> SetInputs:
        """The same of some rows, with the bandwidth and k of all."""
        rr, gg, rg = (square[rows][:, rows] for square in self.squares)
        reference, generated = self.reference[rows], self.generated[rows]
        return replace(self, reference=reference, generated=generated, squares=(rr, gg, rg))

    def frechet(self) -> float:
        return distances.frechet_distance(self.reference, self.generated)

    def mmd(self) -> float:
        return distances.mmd_from_distances(*self.squares, self.bandwidth_square)

    def wasserstein(self) -> float:
        return distances.wasserstein_per_channel(self.reference, self.generated)

    @cached_property
    def balls(self) -> dict[str, float]:
        """Precision, recall, density and coverage; empty for too few vectors."""
        return distances.precision_recall_from_distances(*self.squares, k=self.k) if self.k >= 1 else {}


@dataclass(frozen=True)
class Context:
    """What an estimate needs beside the values: samples per condition K, and the reference's variance."""

    num_samples: int
    total_variance: float


def r2(means: np.ndarray, context: Context) -> np.ndarray:
    return 1 - means[..., 0] / means[..., 1]


def spread_error_ratio(means: np.ndarray, context: Context) -> np.ndarray:
    return conditional.spread_error_ratio(means[..., 0], means[..., 1])


def diversity(means: np.ndarray, context: Context) -> np.ndarray:
    return conditional.diversity(means[..., 0], **vars(context))


def mean_difference(a: np.ndarray, b: np.ndarray, bootstrap: Bootstrap) -> Estimate:
    return bootstrap.mean(a - b)


def r2_difference(a: np.ndarray, b: np.ndarray, bootstrap: Bootstrap) -> Estimate:
    """Both have the spread of the reference, the second column, in common."""
    stacked = np.column_stack([a, b[:, 0]])
    return bootstrap.function(stacked, lambda m: (m[..., 2] - m[..., 0]) / m[..., 1])


@dataclass(frozen=True)
class Metric:
    """One metric.

    Args:
        group, name: its place in metrics.json.
        label: its column on the page; "" for none.
        better: "up", "down", "one" or "none": which values are good.
        values: inputs of the stage -> numbers per sample, or a number for sets; None where there are none.
            Without `values` it is over all tokens at once (`FidelitySums`), without an interval.
        of_means: what is estimated, from the means of the numbers per sample, by default their first;
            "median" of the numbers instead. Sets are resampled by halves.
        limits: lowest and highest end of a set distance's interval.
        difference: label of the paired difference between samplers, "" for none; `paired` estimates it.
        stage: what `values` gets: "sample" and "best_guess" `TokenInputs`, "conditional" `ConditionInputs`,
            "gallery" `GalleryInputs`, "sets" `SetInputs`.
    """

    group: str
    name: str
    label: str
    better: str
    values: Callable[[Any], Any] | None
    of_means: Callable[[np.ndarray, Context], np.ndarray] | Literal["median"] = lambda means, _: means[..., 0]
    limits: tuple[float, float] = (0.0, np.inf)
    difference: str = ""
    paired: Callable[[np.ndarray, np.ndarray, Bootstrap], Estimate] = mean_difference
    stage: str = ""

    @property
    def key(self) -> str:
        return f"{self.group}.{self.name}"

    def estimate(self, values: np.ndarray, bootstrap: Bootstrap, context: Context) -> Estimate:
        """Value and interval of the numbers per sample."""
        of_means = self.of_means
        if of_means == "median":
            return bootstrap.median(values)
        return bootstrap.function(values.reshape(len(values), -1), lambda means: of_means(means, context))


@dataclass(frozen=True)
class MetricTable:
    """The metrics of one group; `note` is for people, with fields for the "data" of metrics.json."""

    title: str
    note: str
    metrics: tuple[Metric, ...]

    @property
    def group(self) -> str:
        return self.metrics[0].group


def _fidelity(group: str, variant: str) -> tuple[Metric, ...]:
    row, cosine = partial(Metric, group, stage=group), "token cosine"
    return (
        row("r2", "R2", "up", TokenInputs.r2, r2, difference=f"R2, {variant}", paired=r2_difference),
        row("cosine_similarity_mean", cosine, "up", TokenInputs.cosine, difference=f"{cosine}, {variant}"),
        row("cosine_similarity_std", "", "none", None),
        row("pooled_cosine_similarity_mean", "pooled cosine", "up", lambda x: x.tokens.pooled_cosine),
        row("l2_distance_mean", "L2 distance", "down", lambda x: x.tokens.distance.mean(dim=1)),
        row("l2_distance_std", "", "none", None),
        row("norm_ratio_mean", "norm ratio", "one", lambda x: x.tokens.norm_ratio.mean(dim=1)),
    )


def _conditional() -> tuple[Metric, ...]:
    row, energy = partial(Metric, "conditional", stage="conditional"), "energy score"
    per_token = ConditionInputs.token_energy_score
    return (
        row("energy_score", energy, "down", ConditionInputs.energy_score, difference=energy),
        row("token_energy_score", "per token", "down", per_token, difference=f"{energy} per token"),
        row("spread_error_ratio", "spread / error", "one", lambda x: x.spread_and_error, spread_error_ratio),
        row("diversity", "diversity", "none", lambda x: x.spread_and_error, diversity),
    )


def _right(classifier: str, inputs: TokenInputs) -> np.ndarray | None:
    return inputs.correct.get(classifier)


def _downstream() -> tuple[Metric, ...]:
    row = partial(Metric, "use", stage="gallery")
    return (
        row("recall_at_1", "recall@1", "up", lambda x: x.ranks <= 1),
        row("recall_at_5", "recall@5", "up", lambda x: x.ranks <= 5),
        row("recall_at_10", "recall@10", "up", lambda x: x.ranks <= 10),
        row("median_rank", "median rank", "down", lambda x: x.ranks, "median"),
        row("reverse_recall_at_1", "reverse recall@1", "up", lambda x: x.reverse_ranks <= 1),
        row("reverse_recall_at_5", "", "up", lambda x: x.reverse_ranks <= 5),
        row("reverse_recall_at_10", "", "up", lambda x: x.reverse_ranks <= 10),
        row("reverse_median_rank", "reverse median rank", "down", lambda x: x.reverse_ranks, "median"),
        row("neighbour_agreement", "neighbours in common", "up", GalleryInputs.neighbour_agreement),
        *[
            row(f"{name}_accuracy", f"{label} accuracy", "up", partial(_right, name), stage="sample")
            for name, label in CLASSIFIERS.items()
        ],
    )


def _distances(group: str) -> tuple[Metric, ...]:
    row = partial(Metric, group, stage="sets")
    return (
        row("frechet", "Frechet", "down", SetInputs.frechet),
        row("mmd", "MMD", "down", SetInputs.mmd, limits=(-np.inf, np.inf)),
        row("wasserstein", "Wasserstein-1", "down", SetInputs.wasserstein),
        row("precision", "precision", "up", lambda x: x.balls.get("precision"), limits=(0.0, 1.0)),
        row("recall", "recall", "up", lambda x: x.balls.get("recall"), limits=(0.0, 1.0)),
        row("density", "density", "one", lambda x: x.balls.get("density")),
        row("coverage", "coverage", "up", lambda x: x.balls.get("coverage"), limits=(0.0, 1.0)),
    )


TABLES = (
    MetricTable(
        "Several samples of one condition",
        "The energy score is the figure to choose a sampler by: on average nothing scores below the true "
        "conditional distribution, so neither blurring nor noise can win. Spread over error is 1 for a "
        "calibrated sampler and below 1 for an over-confident one. Diversity is the distance of two samples "
        "of one condition beside that of two unrelated true ones.",
        _conditional(),
    ),
    MetricTable(
        "The best guess",
        "One answer per condition, the average one: the model's one-call estimate, a baseline's prediction. "
        "R2 and cosine reward averages, so only averages are compared here.",
        _fidelity("best_guess", "best guess"),
    ),
    MetricTable(
        "One sample",
        "One draw per condition against the one true answer. An honest sampler scores below its own best "
        "guess here: it also reproduces what the condition leaves open.",
        _fidelity("sample", "one sample"),
    ),
    MetricTable(
        "Use",
        "Does a sample do the true tokens' work? Retrieval ranks the true pooled vector among those of "
        "{gallery_samples} held-out samples by cosine, reverse the other way round; neighbours in common "
        "compares the ten nearest true vectors there; the probe is a linear classifier fitted on true "
        "training tokens; prototype and zero-shot take the class whose mean true vector, or text, is nearest "
        "to the mean token.",
        _downstream(),
    ),
    MetricTable(
        "Distribution of tokens",
        "Distances between sets, blind to which answer belongs to which condition. The floor compares true "
        "with true: two independent sets of equal size. A method that knows the condition can lie below it.",
        _distances("tokens"),
    ),
    MetricTable(
        "Distribution of pooled vectors",
        "The same for the mean token of each sample.",
        _distances("pooled"),
    ),
)
METRICS = tuple(metric for table in TABLES for metric in table.metrics)


def values_at(stage: str, inputs: Any) -> dict[str, Any]:
    """Key -> values of all metrics that are computed at this stage."""
    return values_of((metric for metric in METRICS if metric.stage == stage), inputs)


def values_of(metrics: Iterable[Metric], inputs: Any) -> dict[str, Any]:
    """Key -> values of these metrics, None where there are none."""
    return {metric.key: metric.values(inputs) for metric in metrics if metric.values}
