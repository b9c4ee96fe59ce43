"""What a method answers for the held-out samples, reduced to what the figures need, in bounded memory."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip3o_dit.data.embeddings import batches
from blip3o_dit.evaluation.reference import (
    ReferenceSet,
    Track,
    check_finite,
    keep_vectors,
    probe_is_right,
)
from blip3o_dit.evaluation.samplers import ModelSampler, Sampler
from blip3o_dit.metrics.fidelity import (
    FidelitySums,
    TokenMeasures,
    energy_score,
    spread_and_error,
)
from blip3o_dit.utils.distributed import SINGLE_PROCESS, Processes


@dataclass
class Predictions:
    """One method's answers, reduced to what the figures need; rows are the held-out samples."""

    method: Sampler
    sums: dict[str, FidelitySums]
    columns: dict[str, np.ndarray]
    pooled: Tensor
    tokens: Tensor
    position_residuals: Tensor
    position_cosines: Tensor
    conditional: dict[str, np.ndarray] = field(default_factory=dict)
    seconds: float = 0.0
    batch_milliseconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Batch:
    """What a method answers for one batch: all that takes the network, and the seconds of a first sample.

    `clip` are the true tokens, `generated` and `guess` the answers, [n, N, C] each; `draws` are further
    samples of the `rows` that get several.
    """

    clip: Tensor
    generated: Tensor
    guess: Tensor | None
    rows: np.ndarray
    draws: list[Tensor]
    seconds: float


@torch.no_grad()
def predict_batch(method: Sampler, truth: ReferenceSet, piece: range) -> Batch:
    """A method's answers for the held-out samples in `piece`."""
    indices = truth.indices[piece.start : piece.stop]
    eva, clip = truth.source.fetch(indices)
    started = time.perf_counter()
    generated = method.sample(eva, indices.tolist(), 0)
    seconds = time.perf_counter() - started
    guess = method.predict_mean(eva, indices.tolist())
    rows = np.flatnonzero(truth.drawn[piece.start : piece.stop])
    further = range(1, truth.settings.draws if method.random and len(rows) else 1)
    draws = [method.sample(eva[rows], indices[rows].tolist(), sample_number) for sample_number in further]
    return Batch(clip, generated, guess, rows, draws, seconds)


@torch.no_grad()
def collect_predictions(
    method: Sampler, truth: ReferenceSet, track: Track, processes: Processes = SINGLE_PROCESS
) -> Predictions:
    """Ask a method about every held-out sample.

    Args:
        processes: share out the asking; the answers come together on the first one.

    Raises:
        ValueError: for NaN or infinity among the answers, naming method and sample.
    """
    width = truth.tokens.shape[1]
    answers = Predictions(
        method,
        sums={},
        columns={},
        pooled=torch.empty_like(truth.pooled),
        tokens=torch.empty_like(truth.tokens),
        position_residuals=torch.zeros(truth.source.num_tokens, width, dtype=torch.float64),
        position_cosines=torch.zeros(truth.source.num_tokens, dtype=torch.float64),
    )
    pieces = track(list(batches(range(len(truth.indices)), truth.settings.batch_size)), method.name)
    for piece, found in processes.map_in_order(pieces, partial(predict_batch, method, truth)):
        indices, generated = truth.indices[piece.start : piece.stop], found.generated
        answers.seconds += found.seconds
        answers.batch_milliseconds.append(1000 * found.seconds / len(indices))
        check_finite(f"{method.name}: generated tokens", generated, indices)
        keep_vectors(truth, piece, generated, answers.pooled, answers.tokens)
        tokens = _measure(answers, truth, piece, "sample", generated, found.clip)
        answers.position_cosines += tokens.cosine.sum(dim=0)
        answers.position_residuals += tokens.squares.sum(dim=0)
        if found.guess is not None:
            check_finite(f"{method.name}: best guess", found.guess, indices)
            _measure(answers, truth, piece, "best_guess", found.guess, found.clip)
        if truth.probe is not None:
            rows, count = slice(piece.start, piece.stop), len(truth.indices)
            _fill(answers.columns, rows, count, {"correct": probe_is_right(truth, generated, piece)})
        _measure_draws(answers, truth, piece, found)
    return answers


def without_vectors(answers: Predictions) -> Predictions:
    """The same without pooled vectors and tokens, which only `describe` needs."""
    return replace(answers, pooled=torch.empty(0), tokens=torch.empty(0))


def peak_memory_mib(method: Sampler | None = None) -> float:
    """Peak of the GPU's allocations for a model on one, else of the process so far."""
    if isinstance(method, ModelSampler) and method.model.device.type == "cuda":
        return torch.cuda.max_memory_allocated(method.model.device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _measure(
    answers: Predictions, truth: ReferenceSet, piece: range, variant: str, generated: Tensor, clip: Tensor
) -> TokenMeasures:
    """Fidelity of one batch, streamed and per sample."""
    sums = answers.sums.setdefault(variant, FidelitySums(truth.mean))
    found = sums.add(generated, clip)
    columns = {
        "cosine_similarity_mean": found.cosine.mean(dim=1),
        "pooled_cosine_similarity_mean": found.pooled_cosine,
        "l2_distance_mean": found.distance.mean(dim=1),
        "norm_ratio_mean": found.norm_ratio.mean(dim=1),
        "residual": found.squares.sum(dim=1) @ truth.channel_weights,
        "spread": truth.spread[piece.start : piece.stop],
    }
    values = {f"{variant}.{name}": column.numpy() for name, column in columns.items()}
    _fill(answers.columns, slice(piece.start, piece.stop), len(truth.indices), values)
    return found


def _measure_draws(answers: Predictions, truth: ReferenceSet, piece: range, found: Batch) -> None:
    """What several draws say together, for the samples that got them."""
    rows, clip = found.rows, found.clip
    if not len(rows):
        return
    draws = [found.generated[rows], *found.draws]
    flat, true = standardized_and_flat(truth, torch.stack(draws), clip[rows])
    by_token = (len(draws), -1, clip.shape[2])
    together = spread_and_error(flat, true)
    tokens = energy_score(flat.reshape(by_token), true.reshape(by_token[1:]))
    values = {
        "energy_score": energy_score(flat, true),
        "token_energy_score": tokens.reshape(len(rows), -1).mean(dim=1),
        "spread": together.spread,
        "error": together.error,
        **_bin_columns(flat, true),
    }
    first = int(truth.drawn[: piece.start].sum())
    place = slice(first, first + len(rows))
    count = int(truth.drawn.sum())
    _fill(answers.conditional, place, count, {name: found.numpy() for name, found in values.items()})


def _bin_columns(draws: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Spread to sort samples by, and spread and error to show, from different draws.

    From the same draws, a bin of small spread would be one of draws that happen to lie close together.
    """
    half = len(draws) // 2
    shown, sorted_by = (draws[half:], draws[:half]) if half >= 2 else (draws, draws)
    found = spread_and_error(shown, truth)
    order = spread_and_error(sorted_by, truth).spread
    return {"bin_order": order, "bin_spread": found.spread, "bin_error": found.error}


def standardized_and_flat(truth: ReferenceSet, draws: Tensor, clip: Tensor) -> tuple[Tensor, Tensor]:
    """Standardised and flattened: [K, n, N C] and [n, N C]."""
    return truth.standardize(draws).flatten(2), truth.standardize(clip).flatten(1)


def _fill(columns: dict[str, np.ndarray], rows: slice, count: int, values: dict[str, Any]) -> None:
    """Put values of some of `count` samples into whole columns.

    They are allocated at once: thousands of small arrays that outlive the batch's large ones would keep the
    memory between them from being used again.
    """
    for name, found in values.items():
        columns.setdefault(name, np.empty(count))[rows] = found
