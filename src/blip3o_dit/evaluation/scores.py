"""From a sampler's predictions to scores with intervals.

Every sampler is measured on the same samples, tokens and resamples, so that differences are paired.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip3o_dit.data.embeddings import Embeddings, batches
from blip3o_dit.evaluation.config import EvaluationConfig
from blip3o_dit.evaluation.metric_tables import (
    METRICS,
    TABLES,
    Context,
    GalleryInputs,
    MetricTable,
    SetInputs,
    values_at,
    values_of,
)
from blip3o_dit.evaluation.predictions import Predictions, peak_memory_mib
from blip3o_dit.evaluation.reference import Progress, ReferenceSet, keep_vectors
from blip3o_dit.evaluation.samplers import ModelSampler, Sampler
from blip3o_dit.flow.solvers import SOLVERS
from blip3o_dit.metrics import distances
from blip3o_dit.metrics.bootstrap import MIN_SAMPLES, Estimate, from_half_samples, half_samples
from blip3o_dit.metrics.conditional import energy_score
from blip3o_dit.metrics.fidelity import FidelitySums
from blip3o_dit.utils.distributed import SINGLE_PROCESS, Processes
from blip3o_dit.utils.kept_state import NOTHING_KEPT, KeptState
from blip3o_dit.utils.stateless_random import stateless_choice

SPREAD_BINS = 10


def no_bar(items: Iterable[Any], name: str) -> Iterable[Any]:
    return items


def score(
    predictions: Predictions, reference: ReferenceSet, *, progress: Progress = no_bar
) -> dict[str, Any]:
    """Everything the report says of one sampler, ready for JSON; see docs/evaluation.md."""
    gallery = GalleryInputs(predictions.pooled[reference.gallery], reference.pooled[reference.gallery])
    values = predictions.values | values_at("gallery", gallery)
    sets = {
        "tokens": (reference.tokens, predictions.tokens, reference.token_rows),
        "pooled": (reference.pooled, predictions.pooled, np.arange(len(reference.indices))),
    }
    sampler = predictions.sampler
    context = Context(reference.config.draws if sampler.random else 1, reference.total_variance())
    metrics = {}
    for table in TABLES:
        if table.group in sets:
            what = f"{sampler.name}: distances of {table.group}"
            metrics[table.group] = _set_distances(table, reference, *sets[table.group], progress, what)
        elif table.group != "best_guess" or "best_guess" in predictions.sums:
            metrics[table.group] = _sample_scores(table, values, predictions, reference, context)
    total = reference.position_squares
    varies = total.sum(dim=0) > 0
    r2 = 1 - predictions.position_residuals[:, varies] / total[:, varies].clamp(min=1e-300)
    return {
        "name": sampler.name,
        "about": sampler.about,
        "is_model": sampler.is_model,
        "metrics": metrics,
        "maps": {
            "cosine": (predictions.position_cosines / len(reference.indices)).tolist(),
            "r2": r2.mean(dim=1).tolist(),
        },
        "spread_error": _spread_error(predictions),
        "cost": {
            "network_calls": sampler.calls,
            "milliseconds_per_sample": float(np.median(predictions.batch_milliseconds)),
            "seconds": predictions.seconds,
            "peak_memory_mib": peak_memory_mib(sampler),
        },
    }


def real_vs_real(
    reference: ReferenceSet, source: Embeddings, train: np.ndarray, *, progress: Progress = no_bar
) -> dict[str, Any]:
    """Distances between held-out vectors and as many training ones, both real; `train` in `source`.

    Two independent sets of real vectors: what a perfect sampler without the condition would reach.
    """
    count = min(len(reference.indices), len(train))
    chosen = np.sort(train[stateless_choice(len(train), count, seed=reference.config.seed, stream="floor")])
    kept = reference.token_rows < count
    tokens = torch.empty(len(reference.token_rows), reference.tokens.shape[1])
    pooled = torch.empty(count, reference.tokens.shape[1])
    for piece in batches(range(count), reference.config.batch_size):
        clip = source.fetch(chosen[piece.start : piece.stop])[1]
        keep_vectors(reference, piece, clip, pooled, tokens)
    sets = {
        "tokens": (reference.tokens[kept], tokens[kept], reference.token_rows[kept]),
        "pooled": (reference.pooled[:count], pooled, np.arange(count)),
    }
    tables = [table for table in TABLES if table.group in sets]
    found: dict[str, Any] = {
        table.group: _set_distances(
            table, reference, *sets[table.group], progress, f"true tokens: distances of {table.group}"
        )
        for table in tables
    }
    return found | {"samples": count}


def paired_differences(model: Predictions, other: Predictions, reference: ReferenceSet) -> dict[str, Any]:
    """The model's score less the other's, with paired bootstrap intervals, by the metric's key."""
    return {
        metric.key: metric.paired(a, b, reference.bootstrap(len(a))).to_json()
        for metric in METRICS
        if metric.difference
        and (a := model.values.get(metric.key)) is not None
        and (b := other.values.get(metric.key)) is not None
    }


@torch.no_grad()
def quality_curve(
    sampler: ModelSampler,
    reference: ReferenceSet,
    *,
    progress: Progress,
    processes: Processes = SINGLE_PROCESS,
    kept: KeptState = NOTHING_KEPT,
) -> list[dict[str, Any]]:
    """Quality against network calls for each solver, on some held-out samples chosen by the seed.

    Sampling is shared out over the processes, and the first one gets the curve. A distilled model has one
    point: the steps that it was trained for. Points that were kept are not measured again.
    """
    config, indices = reference.config, _curve_indices(reference)
    pairs = curve_settings(sampler, config)
    there = kept.load() if processes.is_main else None
    points: list[dict[str, Any]] = processes.broadcast([] if there is None else there[1]["points"])
    for solver, count in progress(pairs[len(points) :], f"{sampler.name}: cost curve"):
        points.append(_curve_point(sampler.with_calls(solver, count), reference, indices, processes))
        kept.keep(lambda: ({}, {"points": points}))
    return points


def curve_settings(sampler: ModelSampler, config: EvaluationConfig) -> list[tuple[str, int]]:
    """Solver and network calls of each point of a model's curve."""
    flow = sampler.model.config.flow
    if flow.fixed_sampling is not None:
        return [flow.fixed_sampling]
    return [
        (name, count)
        for name, solver in SOLVERS.items()
        for count in config.curve_calls
        if count >= solver.calls_per_step and count % solver.calls_per_step == 0
        if name == "euler" or not flow.student_steps
    ]


@torch.no_grad()
def curve_energy_score(sampler: Sampler, reference: ReferenceSet) -> dict[str, Any]:
    """Any sampler's energy score on the samples of the curve, from as many draws."""
    values = []
    for piece in batches(_curve_indices(reference), reference.config.batch_size):
        eva, clip = reference.source.fetch(piece)
        samples = torch.stack([sampler.sample(eva, piece.tolist(), number) for number in range(2)])
        flat = reference.standardize(samples).flatten(2), reference.standardize(clip).flatten(1)
        values.append(energy_score(*flat).numpy())
    found = np.concatenate(values)
    return reference.bootstrap(len(found)).mean(found).to_json()


def _curve_indices(reference: ReferenceSet) -> np.ndarray:
    count, config = reference.config.curve_samples, reference.config
    chosen = stateless_choice(len(reference.indices), count, seed=config.seed, stream="curve samples")
    return reference.indices[chosen]


def _curve_point(
    sampler: ModelSampler, reference: ReferenceSet, indices: np.ndarray, processes: Processes
) -> dict[str, Any]:
    sums = FidelitySums(reference.mean)
    energy_scores, pooled, seconds = [], [], 0.0

    def sample_twice(piece: np.ndarray) -> tuple[Tensor, Tensor, float]:
        eva, clip = reference.source.fetch(piece)
        started = time.perf_counter()
        samples = torch.stack([sampler.sample(eva, piece.tolist(), number) for number in range(2)])
        return samples, clip, time.perf_counter() - started

    pieces = batches(indices, reference.config.batch_size)
    for _, (samples, clip, taken) in processes.map_in_order(pieces, sample_twice):
        seconds += taken
        sums.add(samples[0], clip)
        flat = reference.standardize(samples).flatten(2), reference.standardize(clip).flatten(1)
        energy_scores.append(energy_score(*flat).numpy())
        pooled.append(torch.stack([samples[0].mean(dim=1), clip.mean(dim=1)]))
    if not processes.is_main:
        return {}
    generated, real = (reference.standardize(vectors) for vectors in torch.cat(pooled, dim=1))
    values = np.concatenate(energy_scores)
    return {
        "solver": sampler.solver,
        "network_calls": sampler.calls,
        "energy_score": reference.bootstrap(len(values)).mean(values).to_json(),
        "r2": sums.result()["r2"],
        "frechet": distances.frechet_distance(real, generated),
        "milliseconds_per_sample": 1000 * seconds / (2 * len(indices)),
    }


def _sample_scores(
    table: MetricTable,
    values: dict[str, Any],
    predictions: Predictions,
    reference: ReferenceSet,
    context: Context,
) -> dict[str, Any]:
    """Scores of the metrics that have a value per sample; those without one come from the sums."""
    found = {}
    for metric in table.metrics:
        if metric.values is None:
            found[metric.name] = Estimate(predictions.sums[table.group].result()[metric.name]).to_json()
        elif metric.key in values:
            numbers = np.asarray(values[metric.key], dtype=float)
            estimate = metric.estimate(numbers, reference.bootstrap(len(numbers)), context)
            found[metric.name] = estimate.to_json()
    return found


def _set_distances(
    table: MetricTable,
    reference: ReferenceSet,
    real: Tensor,
    generated: Tensor,
    owners: np.ndarray,
    progress: Progress,
    what: str,
) -> dict[str, Any]:
    """Distances between two sets of vectors; halves of the owning samples give the intervals."""
    config = reference.config
    if len(real) > config.distribution_samples:  # only pooled vectors, one of each sample
        count = config.distribution_samples
        kept = stateless_choice(len(real), count, seed=config.seed, stream="pooled samples")
        real, generated, owners = real[kept], generated[kept], owners[kept]
    whole = SetInputs.of(reference.standardize(real).double(), reference.standardize(generated).double())
    samples = np.unique(owners)
    halves = half_samples(len(samples), replicates=config.half_samples, seed=config.seed)
    values = values_of(table.metrics, whole)
    replicates = [
        values_of(table.metrics, whole.subset(np.flatnonzero(np.isin(owners, samples[half]))))
        for half in (progress(halves, what) if len(samples) >= MIN_SAMPLES else ())
    ]
    return {
        metric.name: from_half_samples(
            value, np.array([replicate[metric.key] for replicate in replicates]), limits=metric.limits
        ).to_json()
        for metric in table.metrics
        if (value := values[metric.key]) is not None
    }


def _spread_error(predictions: Predictions) -> list[dict[str, float]]:
    """Conditions binned by their predicted spread: root mean squares of spread and error in each bin."""
    spread, error = predictions.bins["spread"], predictions.bins["error"]
    order = np.argsort(predictions.bins["order"], kind="stable")
    return [
        {
            "spread": float(np.sqrt(spread[rows].mean())),
            "error": float(np.sqrt(error[rows].mean())),
            "samples": len(rows),
        }
        for rows in np.array_split(order, min(SPREAD_BINS, len(order)))
    ]
