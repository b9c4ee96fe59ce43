"""Every metric, once: its key in metrics.json, its column on the page, and the functions that compute it.

To add one, write its function in `metrics/`, a row here and a line in docs/evaluation.md: predictions, scores
and report loop over the rows. `values` takes the inputs of its stage (the classes below) to numbers per
sample, [n] or [n, m]; `estimate` takes these to a value with an interval.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip3o_dit.metrics import conditional, distances
from blip3o_dit.metrics.bootstrap import Bootstrap, Estimate
from blip3o_dit.metrics.downstream import neighbour_agreement, retrieval_ranks
from blip3o_dit.metrics.fidelity import TokenMeasures

NEIGHBOURS = 10
BALL_NEIGHBOURS = 5


@dataclass(frozen=True)
class TokenInputs:
    """A batch of generated tokens beside the reference; `correct` [n] says where the probe is right."""

    tokens: TokenMeasures
    channel_weights: Tensor
    spread: Tensor
    correct: np.ndarray | None


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
    """Two sets of vectors [m, C], standardised, with the squared distances within and between them."""

    reference: Tensor
    generated: Tensor
    within_reference: Tensor
    within_generated: Tensor
    between: Tensor
    bandwidth_square: float
    k: int

    @classmethod
    def of(cls, reference: Tensor, generated: Tensor) -> SetInputs:
        within = distances.squared_distances(reference, reference)
        return cls(
            reference,
            generated,
            within,
            distances.squared_distances(generated, generated),
            distances.squared_distances(reference, generated),
            distances.median_square(within),
            min(BALL_NEIGHBOURS, len(reference) // 2 - 1),
        )

    def subset(self, rows: Tensor) -> SetInputs:
        """The same of some rows, with the bandwidth and k of all."""
        return replace(
            self,
            reference=self.reference[rows],
            generated=self.generated[rows],
            within_reference=self.within_reference[rows][:, rows],
            within_generated=self.within_generated[rows][:, rows],
            between=self.between[rows][:, rows],
        )

    @cached_property
    def precision_recall(self) -> dict[str, float]:
        """Empty for too few vectors."""
        if self.k < 1:
            return {}
        return distances.precision_recall_from_distances(
            self.within_reference, self.within_generated, self.between, k=self.k
        )


@dataclass(frozen=True)
class Context:
    """What an estimate needs beside the values: samples per condition K, and the reference's variance."""

    num_samples: int
    total_variance: float


def mean(values: np.ndarray, bootstrap: Bootstrap, context: Context) -> Estimate:
    return bootstrap.mean(values)


def median(values: np.ndarray, bootstrap: Bootstrap, context: Context) -> Estimate:
    return bootstrap.median(values)


def r2(values: np.ndarray, bootstrap: Bootstrap, context: Context) -> Estimate:
    return bootstrap.function(values, lambda m: 1 - m[..., 0] / m[..., 1])


def spread_error_ratio(values: np.ndarray, bootstrap: Bootstrap, context: Context) -> Estimate:
    return bootstrap.function(values, lambda m: conditional.spread_error_ratio(m[..., 0], m[..., 1]))


def diversity(values: np.ndarray, bootstrap: Bootstrap, context: Context) -> Estimate:
    return bootstrap.function(
        values,
        lambda m: conditional.diversity(
            m[..., 0], num_samples=context.num_samples, total_variance=context.total_variance
        ),
    )


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
        stage: what `values` gets: "sample" and "best_guess" `TokenInputs`, "conditional" `ConditionInputs`,
            "gallery" `GalleryInputs`, "sets" `SetInputs`.
        estimate: the value and interval of the numbers per sample; sets are resampled by halves.
        limits: lowest and highest end of a set distance's interval.
        difference: label of the paired difference between samplers; "" for none.
        estimate_difference: its value and interval.
    """

    group: str
    name: str
    label: str
    better: str
    values: Callable[[Any], Any] | None
    stage: str
    estimate: Callable[[np.ndarray, Bootstrap, Context], Estimate] = mean
    limits: tuple[float, float] = (0.0, np.inf)
    difference: str = ""
    estimate_difference: Callable[[np.ndarray, np.ndarray, Bootstrap], Estimate] = mean_difference

    @property
    def key(self) -> str:
        return f"{self.group}.{self.name}"


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
    def row(name: str, label: str, better: str, values: Any, **options: Any) -> Metric:
        return Metric(group, name, label, better, values, group, **options)

    return (
        row(
            "r2",
            "R2",
            "up",
            lambda x: torch.stack([x.tokens.squares.sum(dim=1) @ x.channel_weights, x.spread], dim=1),
            estimate=r2,
            difference=f"R2, {variant}",
            estimate_difference=r2_difference,
        ),
        row(
            "cosine_similarity_mean",
            "token cosine",
            "up",
            lambda x: x.tokens.cosine.mean(dim=1),
            difference=f"token cosine, {variant}",
        ),
        row("cosine_similarity_std", "", "none", None),
        row("pooled_cosine_similarity_mean", "pooled cosine", "up", lambda x: x.tokens.pooled_cosine),
        row("l2_distance_mean", "L2 distance", "down", lambda x: x.tokens.distance.mean(dim=1)),
        row("l2_distance_std", "", "none", None),
        row("norm_ratio_mean", "norm ratio", "one", lambda x: x.tokens.norm_ratio.mean(dim=1)),
    )


def _conditional(name: str, label: str, better: str, values: Any, **options: Any) -> Metric:
    return Metric("conditional", name, label, better, values, "conditional", **options)


def _downstream(name: str, label: str, better: str, values: Any, **options: Any) -> Metric:
    return Metric("use", name, label, better, values, "gallery", **options)


def _distances(group: str) -> tuple[Metric, ...]:
    def row(name: str, label: str, better: str, values: Any, limits: tuple[float, float]) -> Metric:
        return Metric(group, name, label, better, values, "sets", limits=limits)

    def share(name: str, better: str, highest: float) -> Metric:
        return row(name, name, better, lambda x: x.precision_recall.get(name), (0.0, highest))

    return (
        row(
            "frechet",
            "Frechet",
            "down",
            lambda x: distances.frechet_distance(x.reference, x.generated),
            (0.0, np.inf),
        ),
        row(
            "mmd",
            "MMD",
            "down",
            lambda x: distances.mmd_from_distances(
                x.within_reference, x.within_generated, x.between, x.bandwidth_square
            ),
            (-np.inf, np.inf),
        ),
        row(
            "wasserstein",
            "Wasserstein-1",
            "down",
            lambda x: distances.wasserstein_per_channel(x.reference, x.generated),
            (0.0, np.inf),
        ),
        share("precision", "up", 1.0),
        share("recall", "up", 1.0),
        share("density", "one", np.inf),
        share("coverage", "up", 1.0),
    )


TABLES = (
    MetricTable(
        "Several samples of one condition",
        "The energy score is the figure to choose a sampler by: on average nothing scores below the true "
        "conditional distribution, so neither blurring nor noise can win. Spread over error is 1 for a "
        "calibrated sampler and below 1 for an over-confident one. Diversity is the distance of two samples "
        "of one condition beside that of two unrelated true ones.",
        (
            _conditional(
                "energy_score",
                "energy score",
                "down",
                lambda x: conditional.energy_score(x.samples, x.reference),
                difference="energy score",
            ),
            _conditional(
                "token_energy_score",
                "per token",
                "down",
                lambda x: x.token_energy_score(),
                difference="energy score per token",
            ),
            _conditional(
                "spread_error_ratio",
                "spread / error",
                "one",
                lambda x: x.spread_and_error,
                estimate=spread_error_ratio,
            ),
            _conditional("diversity", "diversity", "none", lambda x: x.spread_and_error, estimate=diversity),
        ),
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
        "training tokens.",
        (
            _downstream("recall_at_1", "recall@1", "up", lambda x: x.ranks <= 1),
            _downstream("recall_at_5", "recall@5", "up", lambda x: x.ranks <= 5),
            _downstream("recall_at_10", "recall@10", "up", lambda x: x.ranks <= 10),
            _downstream("median_rank", "median rank", "down", lambda x: x.ranks, estimate=median),
            _downstream("reverse_recall_at_1", "reverse recall@1", "up", lambda x: x.reverse_ranks <= 1),
            _downstream("reverse_recall_at_5", "", "up", lambda x: x.reverse_ranks <= 5),
            _downstream("reverse_recall_at_10", "", "up", lambda x: x.reverse_ranks <= 10),
            _downstream(
                "reverse_median_rank",
                "reverse median rank",
                "down",
                lambda x: x.reverse_ranks,
                estimate=median,
            ),
            _downstream(
                "neighbour_agreement", "neighbours in common", "up", lambda x: x.neighbour_agreement()
            ),
            Metric("use", "probe_accuracy", "probe accuracy", "up", lambda x: x.correct, "sample"),
        ),
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
    return {
        metric.key: metric.values(inputs) for metric in METRICS if metric.stage == stage and metric.values
    }
