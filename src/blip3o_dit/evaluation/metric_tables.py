"""The metrics by name, as tables, cards and documentation show them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """`group` and `name` are its place in metrics.json; `better` is "up", "down" or "one"."""

    group: str
    name: str
    label: str
    better: str


@dataclass(frozen=True)
class MetricTable:
    """`note` is for people, with fields for the "data" of metrics.json."""

    title: str
    note: str
    metrics: tuple[Metric, ...]


def _rows(group: str, *rows: tuple[str, str, str]) -> tuple[Metric, ...]:
    return tuple(Metric(group, *row) for row in rows)


_FIDELITY = (
    ("r2", "R2", "up"),
    ("cosine_similarity_mean", "token cosine", "up"),
    ("pooled_cosine_similarity_mean", "pooled cosine", "up"),
    ("l2_distance_mean", "L2 distance", "down"),
    ("norm_ratio_mean", "norm ratio", "one"),
)
_DISTANCES = (
    ("frechet", "Frechet", "down"),
    ("mmd", "MMD", "down"),
    ("wasserstein", "Wasserstein-1", "down"),
    ("precision", "precision", "up"),
    ("recall", "recall", "up"),
    ("density", "density", "one"),
    ("coverage", "coverage", "up"),
)

TABLES = (
    MetricTable(
        "Several samples of one condition",
        "The energy score is the figure to choose a sampler by: on average nothing scores below the true "
        "conditional distribution, so neither blurring nor noise can win. Spread over error is 1 for a "
        "calibrated sampler and below 1 for an over-confident one. Diversity is the distance of two samples "
        "of one condition beside that of two unrelated true ones.",
        _rows(
            "conditional",
            ("energy_score", "energy score", "down"),
            ("token_energy_score", "per token", "down"),
            ("spread_error_ratio", "spread / error", "one"),
            ("diversity", "diversity", "none"),
        ),
    ),
    MetricTable(
        "The best guess",
        "One answer per condition, the average one: the model's one-call estimate, a baseline's prediction. "
        "R2 and cosine reward averages, so only averages are compared here.",
        _rows("best_guess", *_FIDELITY),
    ),
    MetricTable(
        "One sample",
        "One draw per condition against the one true answer. An honest sampler scores below its own best "
        "guess here: it also reproduces what the condition leaves open.",
        _rows("sample", *_FIDELITY),
    ),
    MetricTable(
        "Use",
        "Does a sample do the true tokens' work? Retrieval ranks the true pooled vector among those of "
        "{gallery_samples} held-out samples by cosine, reverse the other way round; neighbours in common "
        "compares the ten nearest true vectors there; the probe is a linear classifier fitted on true "
        "training tokens.",
        _rows(
            "use",
            ("recall_at_1", "recall@1", "up"),
            ("recall_at_5", "recall@5", "up"),
            ("recall_at_10", "recall@10", "up"),
            ("median_rank", "median rank", "down"),
            ("reverse_recall_at_1", "reverse recall@1", "up"),
            ("reverse_median_rank", "reverse median rank", "down"),
            ("neighbour_agreement", "neighbours in common", "up"),
            ("probe_accuracy", "probe accuracy", "up"),
        ),
    ),
    MetricTable(
        "Distribution of tokens",
        "Distances between sets, blind to which answer belongs to which condition. The floor compares true "
        "with true: two independent sets of equal size. A method that knows the condition can lie below it.",
        _rows("tokens", *_DISTANCES),
    ),
    MetricTable(
        "Distribution of pooled vectors",
        "The same for the mean token of each sample.",
        _rows("pooled", *_DISTANCES),
    ),
)
