"""From a method's answers to the figures of the report, with intervals.

Every method sees the same samples, tokens and resamples, so that differences are paired.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip3o_dit.data.embeddings import Embeddings, batches
from blip3o_dit.evaluation.predictions import Predictions, peak_memory_mib, standardized_and_flat
from blip3o_dit.evaluation.reference import (
    EvaluationSettings,
    ReferenceSet,
    Track,
    keep_vectors,
)
from blip3o_dit.evaluation.samplers import ModelSampler
from blip3o_dit.flow.solvers import SOLVERS
from blip3o_dit.metrics import distances
from blip3o_dit.metrics.bootstrap import FEWEST, Bootstrap, Estimate, from_half_samples, half_samples
from blip3o_dit.metrics.fidelity import (
    FidelitySums,
    diversity,
    energy_score,
    neighbour_agreement,
    retrieval_ranks,
    spread_error_ratio,
)
from blip3o_dit.utils.distributed import SINGLE_PROCESS, Processes
from blip3o_dit.utils.stateless_random import stateless_permutation

NEIGHBOURS = 10
BALL_NEIGHBOURS = 5
SPREAD_BINS = 10


def score(answers: Predictions, truth: ReferenceSet) -> dict[str, Any]:
    """Everything the report says of one method, ready for JSON; see docs/evaluation.md."""
    settings = truth.settings
    bootstrap = Bootstrap(len(truth.indices), replicates=settings.bootstrap, seed=settings.seed)
    metrics: dict[str, Any] = {variant: _fidelity(answers, variant, bootstrap) for variant in answers.sums}
    metrics["use"] = _use(answers, truth, bootstrap)
    metrics["tokens"] = _distances(truth, truth.tokens, answers.tokens, truth.token_rows)
    metrics["pooled"] = _distances(truth, truth.pooled, answers.pooled, np.arange(len(truth.indices)))
    metrics["conditional"] = _conditional(answers, truth)
    side = truth.position_squares
    varies = side.sum(dim=0) > 0
    r2 = 1 - answers.position_residuals[:, varies] / side[:, varies].clamp(min=1e-300)
    method = answers.method
    return {
        "name": method.name,
        "about": method.about,
        "is_model": method.is_model,
        "metrics": metrics,
        "maps": {
            "cosine": (answers.position_cosines / len(truth.indices)).tolist(),
            "r2": r2.mean(dim=1).tolist(),
        },
        "spread_error": _spread_error(answers),
        "cost": {
            "network_calls": method.calls,
            "milliseconds_per_sample": float(np.median(answers.batch_milliseconds)),
            "seconds": answers.seconds,
            "peak_memory_mib": peak_memory_mib(method),
        },
    }


def real_vs_real(truth: ReferenceSet, source: Embeddings, train: np.ndarray) -> dict[str, Any]:
    """Distances between held-out true vectors and as many true training ones, `train` in `source`.

    Two independent sets of true vectors: what a perfect sampler without the condition would reach.
    """
    count = min(len(truth.indices), len(train))
    order = stateless_permutation(len(train), seed=truth.settings.seed, stream="floor")
    chosen = np.sort(train[order[:count]])
    kept = truth.token_rows < count
    other = torch.empty(len(truth.token_rows), truth.tokens.shape[1])
    pooled = torch.empty(count, truth.tokens.shape[1])
    for piece in batches(range(count), truth.settings.batch_size):
        clip = source.fetch(chosen[piece.start : piece.stop])[1]
        keep_vectors(truth, piece, clip, pooled, other)
    return {
        "tokens": _distances(truth, truth.tokens[kept], other[kept], truth.token_rows[kept]),
        "pooled": _distances(truth, truth.pooled[:count], pooled, np.arange(count)),
        "samples": count,
    }


# Metrics whose paired differences are reported: group, name, and where the per-sample values are.
PAIRED = (
    ("sample", "r2"),
    ("sample", "cosine_similarity_mean"),
    ("best_guess", "r2"),
    ("best_guess", "cosine_similarity_mean"),
    ("conditional", "energy_score"),
    ("conditional", "token_energy_score"),
)


def paired_differences(
    model: Predictions, other: Predictions, settings: EvaluationSettings
) -> dict[str, Any]:
    """The model's figure less the other's, with paired bootstrap intervals, by "group.name"."""
    found = {}
    for group, name in PAIRED:
        columns = [_paired_columns(answers, group, name) for answers in (model, other)]
        if columns[0] is None or columns[1] is None:
            continue
        bootstrap = Bootstrap(len(columns[0]), replicates=settings.bootstrap, seed=settings.seed)
        if name == "r2":
            stacked = np.column_stack([columns[0], columns[1][:, 0]])
            estimate = bootstrap.function(stacked, lambda m: (m[..., 2] - m[..., 0]) / m[..., 1])
        else:
            estimate = bootstrap.mean(columns[0] - columns[1])
        found[f"{group}.{name}"] = estimate.to_json()
    return found


@torch.no_grad()
def quality_curve(
    method: ModelSampler,
    truth: ReferenceSet,
    *,
    calls: Sequence[int],
    samples: int,
    track: Track,
    processes: Processes = SINGLE_PROCESS,
) -> list[dict[str, Any]]:
    """Quality against network calls for each solver, on the first held-out samples of a named order.

    Sampling is shared out over the processes, and the first one gets the curve. A distilled model has one
    point: the steps that it was taught.
    """
    order = stateless_permutation(len(truth.indices), seed=truth.settings.seed, stream="curve samples")
    indices = truth.indices[np.sort(order[:samples])]
    pairs = [
        (name, count)
        for name, solver in SOLVERS.items()
        for count in calls
        if count >= solver.calls_per_step and count % solver.calls_per_step == 0
    ]
    fixed = method.model.config.flow.fixed_sampling
    if fixed is not None:
        pairs = [fixed]
    return [
        _curve_point(method.with_calls(solver, count), truth, indices, solver, processes)
        for solver, count in track(pairs, f"{method.name}: network calls")
    ]


def _curve_point(
    method: ModelSampler, truth: ReferenceSet, indices: np.ndarray, solver: str, processes: Processes
) -> dict[str, Any]:
    sums = FidelitySums(truth.mean)
    scores, pooled, seconds = [], [], 0.0

    def draw_twice(piece: np.ndarray) -> tuple[Tensor, Tensor, float]:
        eva, clip = truth.source.fetch(piece)
        started = time.perf_counter()
        draws = torch.stack([method.sample(eva, piece.tolist(), sample_number) for sample_number in range(2)])
        return draws, clip, time.perf_counter() - started

    for _, (draws, clip, taken) in processes.map_in_order(
        batches(indices, truth.settings.batch_size), draw_twice
    ):
        seconds += taken
        sums.add(draws[0], clip)
        scores.append(energy_score(*standardized_and_flat(truth, draws, clip)).numpy())
        pooled.append(torch.stack([draws[0].mean(dim=1), clip.mean(dim=1)]))
    if not processes.is_main:
        return {}
    generated, true = (truth.standardize(vectors) for vectors in torch.cat(pooled, dim=1))
    values = np.concatenate(scores)
    bootstrap = Bootstrap(len(values), replicates=truth.settings.bootstrap, seed=truth.settings.seed)
    return {
        "solver": solver,
        "network_calls": method.calls,
        "energy_score": bootstrap.mean(values).to_json(),
        "r2": sums.result()["r2"],
        "frechet": distances.frechet_distance(true, generated),
        "milliseconds_per_sample": 1000 * seconds / (2 * len(indices)),
    }


def _fidelity(answers: Predictions, variant: str, bootstrap: Bootstrap) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in answers.sums[variant].result().items():
        key = f"{variant}.{name}"
        if name == "r2":
            columns = np.column_stack([answers.columns[f"{variant}.{c}"] for c in ("residual", "spread")])
            found[name] = bootstrap.function(columns, lambda m: 1 - m[..., 0] / m[..., 1]).to_json()
        elif key in answers.columns:
            found[name] = bootstrap.mean(answers.columns[key]).to_json()
        else:
            found[name] = Estimate(value).to_json()
    return found


def _use(answers: Predictions, truth: ReferenceSet, bootstrap: Bootstrap) -> dict[str, Any]:
    found: dict[str, Any] = {}
    among = Bootstrap(len(truth.gallery), replicates=bootstrap.replicates, seed=bootstrap.seed)
    generated, true = answers.pooled[truth.gallery], truth.pooled[truth.gallery]
    for prefix, queries, gallery in (("", generated, true), ("reverse_", true, generated)):
        ranks = retrieval_ranks(queries, gallery).numpy()
        for most in (1, 5, 10):
            found[f"{prefix}recall_at_{most}"] = among.mean((ranks <= most).astype(float)).to_json()
        found[f"{prefix}median_rank"] = among.median(ranks).to_json()
    agreement = neighbour_agreement(generated, true, k=min(NEIGHBOURS, len(true) - 1)).numpy()
    found["neighbour_agreement"] = among.mean(agreement).to_json()
    if "correct" in answers.columns:
        found["probe_accuracy"] = bootstrap.mean(answers.columns["correct"]).to_json()
    return found


def _conditional(answers: Predictions, truth: ReferenceSet) -> dict[str, Any]:
    columns = answers.conditional
    count = len(columns["energy_score"])
    bootstrap = Bootstrap(count, replicates=truth.settings.bootstrap, seed=truth.settings.seed)
    found = {name: bootstrap.mean(columns[name]).to_json() for name in ("energy_score", "token_energy_score")}
    both = np.column_stack([columns["spread"], columns["error"]])
    draws = truth.settings.draws if answers.method.random else 1
    variance = truth.total_variance()
    found["spread_error_ratio"] = bootstrap.function(
        both, lambda m: spread_error_ratio(m[..., 0], m[..., 1])
    ).to_json()
    found["diversity"] = bootstrap.function(
        both, lambda m: diversity(m[..., 0], num_draws=draws, total_variance=variance)
    ).to_json()
    return found


def _spread_error(answers: Predictions) -> list[dict[str, float]]:
    """Samples binned by their predicted spread: root mean squares of spread and error in each bin."""
    names = ("bin_order", "bin_spread", "bin_error")
    sorted_by, spread, error = (answers.conditional[name] for name in names)
    order = np.argsort(sorted_by, kind="stable")
    return [
        {
            "spread": float(np.sqrt(spread[rows].mean())),
            "error": float(np.sqrt(error[rows].mean())),
            "samples": len(rows),
        }
        for rows in np.array_split(order, min(SPREAD_BINS, len(order)))
    ]


def _distances(truth: ReferenceSet, true: Tensor, other: Tensor, owners: np.ndarray) -> dict[str, Any]:
    """All distances between two sets of vectors; halves of the owning samples give the intervals."""
    settings = truth.settings
    if len(true) > settings.distribution_samples:  # only pooled vectors, one of each sample
        order = stateless_permutation(len(true), seed=settings.seed, stream="pooled samples")
        kept = np.sort(order[: settings.distribution_samples])
        true, other, owners = true[kept], other[kept], owners[kept]
    a, b = truth.standardize(true).double(), truth.standardize(other).double()
    squares = tuple(distances.squared_distances(*pair) for pair in ((a, a), (b, b), (a, b)))
    bandwidth = distances.median_square(squares[0])
    k = min(BALL_NEIGHBOURS, len(a) // 2 - 1)

    def figures(rows: Tensor | None) -> dict[str, float]:
        x, y = (a, b) if rows is None else (a[rows], b[rows])
        aa, bb, ab = squares if rows is None else (s[rows][:, rows] for s in squares)
        found = {
            "frechet": distances.frechet_distance(x, y),
            "mmd": distances.mmd_from_distances(aa, bb, ab, bandwidth),
            "wasserstein": distances.wasserstein_per_channel(x, y),
        }
        return found | (distances.precision_recall_from_distances(aa, bb, ab, k=k) if k >= 1 else {})

    samples = np.unique(owners)
    halves = half_samples(len(samples), replicates=settings.half_samples, seed=settings.seed)
    replicates = [
        figures(torch.from_numpy(np.flatnonzero(np.isin(owners, samples[half]))))
        for half in (halves if len(samples) >= FEWEST else ())
    ]
    lowest = {"mmd": -np.inf}
    highest = {"precision": 1.0, "recall": 1.0, "coverage": 1.0}
    return {
        name: from_half_samples(
            value,
            np.array([replicate[name] for replicate in replicates]),
            lowest=lowest.get(name, 0.0),
            highest=highest.get(name, np.inf),
        ).to_json()
        for name, value in figures(None).items()
    }


def _paired_columns(answers: Predictions, group: str, name: str) -> Any:
    if group == "conditional":
        return answers.conditional[name]
    if group not in answers.sums:
        return None
    if name == "r2":
        return np.column_stack([answers.columns[f"{group}.{c}"] for c in ("residual", "spread")])
    return answers.columns[f"{group}.{name}"]
