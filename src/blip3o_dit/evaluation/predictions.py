"""A sampler's predictions for the held-out samples, reduced to what the scores need, in bounded memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip3o_dit.evaluation.metric_tables import ConditionInputs, TokenInputs, values_at
from blip3o_dit.evaluation.reference import (
    Progress,
    ReferenceSet,
    check_finite,
    is_right,
    keep_vectors,
)
from blip3o_dit.evaluation.samplers import ModelSampler, Sampler
from blip3o_dit.metrics.conditional import spread_and_error
from blip3o_dit.metrics.fidelity import FidelitySums
from blip3o_dit.utils.distributed import SINGLE_PROCESS, Processes
from blip3o_dit.utils.kept_state import NOTHING_KEPT, KeptState

_TENSORS = ("pooled", "tokens", "position_residuals", "position_cosines")
_COLUMNS = ("values", "bins")


@dataclass
class Predictions:
    """One sampler's predictions, reduced to what the scores need.

    `sums`: variant ("sample", "best_guess") -> sums over all tokens. `values`: metric key -> numbers per
    sample, [n] or [n, m], of the held-out samples or of those with several samples. `bins`: of the latter,
    what `spread_error` sorts and shows. `pooled`, `tokens`: as in `ReferenceSet`, generated.
    """

    sampler: Sampler
    sums: dict[str, FidelitySums]
    pooled: Tensor
    tokens: Tensor
    position_residuals: Tensor
    position_cosines: Tensor
    values: dict[str, np.ndarray] = field(default_factory=dict)
    bins: dict[str, np.ndarray] = field(default_factory=dict)
    seconds: float = 0.0
    batch_milliseconds: list[float] = field(default_factory=list)

    @classmethod
    def none_yet(cls, sampler: Sampler, reference: ReferenceSet) -> Predictions:
        width = reference.tokens.shape[1]
        return cls(
            sampler,
            sums={},
            pooled=torch.empty_like(reference.pooled),
            tokens=torch.empty_like(reference.tokens),
            position_residuals=torch.zeros(reference.source.num_tokens, width, dtype=torch.float64),
            position_cosines=torch.zeros(reference.source.num_tokens, dtype=torch.float64),
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All of it, to be kept."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        tensors |= {f"sums.{name}": sums.state for name, sums in self.sums.items()}
        for group in _COLUMNS:
            columns = getattr(self, group).items()
            tensors |= {f"{group}.{name}": torch.from_numpy(values) for name, values in columns}
        return tensors, {"seconds": self.seconds, "batch_milliseconds": self.batch_milliseconds}

    def go_on(self, kept: KeptState, reference: ReferenceSet) -> int:
        """Take in what was kept; returns how many batches that are."""
        found = kept.load()
        if found is None:
            return 0
        tensors, about = found
        for name in _TENSORS:
            setattr(self, name, tensors.pop(name))
        for name, values in tensors.items():
            group, _, key = name.partition(".")
            if group == "sums":
                self.sums[key] = FidelitySums(reference.mean)
                self.sums[key].state = values
            else:
                getattr(self, group)[key] = values.numpy()
        self.seconds, self.batch_milliseconds = about["seconds"], about["batch_milliseconds"]
        return len(self.batch_milliseconds)


@dataclass(frozen=True)
class PredictedBatch:
    """A sampler's predictions for one batch, all that takes the network; the seconds of the first samples.

    `clip` are the reference tokens, `generated` and `best_guess` the predictions, [n, N, C] each; `further`
    are further samples of the `rows` that get several.
    """

    clip: Tensor
    generated: Tensor
    best_guess: Tensor | None
    rows: np.ndarray
    further: list[Tensor]
    seconds: float


@torch.no_grad()
def predict_batch(sampler: Sampler, reference: ReferenceSet, piece: range) -> PredictedBatch:
    """A sampler's predictions for the held-out samples in `piece`."""
    indices = reference.indices[piece.start : piece.stop]
    eva, clip = reference.source.fetch(indices)
    started = time.perf_counter()
    generated = sampler.sample(eva, indices.tolist(), 0)
    seconds = time.perf_counter() - started
    best_guess = sampler.predict_mean(eva, indices.tolist())
    rows = np.flatnonzero(reference.drawn[piece.start : piece.stop])
    numbers = range(1, reference.config.draws if sampler.random and len(rows) else 1)
    further = [sampler.sample(eva[rows], indices[rows].tolist(), number) for number in numbers]
    return PredictedBatch(clip, generated, best_guess, rows, further, seconds)


@torch.no_grad()
def collect_predictions(
    sampler: Sampler,
    reference: ReferenceSet,
    progress: Progress,
    processes: Processes = SINGLE_PROCESS,
    *,
    kept: KeptState = NOTHING_KEPT,
    first: Callable[[float], None] | None = None,
) -> Predictions:
    """Predict every held-out sample; the processes share out the sampling, and the first one gets all.

    Args:
        kept: where a stopped evaluation left its predictions, and this one keeps them.
        first: called once with the seconds that a sample of the first batch took.

    Raises:
        ValueError: for NaN or infinity among the predictions, naming sampler and sample.
    """
    predictions = Predictions.none_yet(sampler, reference)
    done = processes.broadcast(predictions.go_on(kept, reference) if processes.is_main else 0)
    pieces = progress(reference.batches()[done:], sampler.name)
    for piece, batch in processes.map_in_order(pieces, partial(predict_batch, sampler, reference)):
        if first is not None:
            first(batch.seconds / len(piece))
            first = None
        _add(predictions, reference, piece, batch)
        kept.keep(predictions.state)
    kept.keep(predictions.state, last=True)
    return predictions


def peak_memory_mib(sampler: Sampler | None = None) -> float:
    """Peak of the GPU's allocations for a model on one, else of the process so far."""
    if isinstance(sampler, ModelSampler) and sampler.model.device.type == "cuda":
        return torch.cuda.max_memory_allocated(sampler.model.device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _add(predictions: Predictions, reference: ReferenceSet, piece: range, batch: PredictedBatch) -> None:
    """Take in one batch."""
    name, indices = predictions.sampler.name, reference.indices[piece.start : piece.stop]
    predictions.seconds += batch.seconds
    predictions.batch_milliseconds.append(1000 * batch.seconds / len(indices))
    check_finite(f"{name}: generated tokens", batch.generated, indices)
    keep_vectors(reference, piece, batch.generated, predictions.pooled, predictions.tokens)
    inputs = _add_tokens(predictions, reference, piece, "sample", batch.generated, batch.clip)
    predictions.position_cosines += inputs.tokens.cosine.sum(dim=0)
    predictions.position_residuals += inputs.tokens.squares.sum(dim=0)
    if batch.best_guess is not None:
        check_finite(f"{name}: best guess", batch.best_guess, indices)
        _add_tokens(predictions, reference, piece, "best_guess", batch.best_guess, batch.clip)
    _add_conditional(predictions, reference, piece, batch)


def _add_tokens(
    predictions: Predictions,
    reference: ReferenceSet,
    piece: range,
    variant: str,
    generated: Tensor,
    clip: Tensor,
) -> TokenInputs:
    """Fidelity of one batch, in sums and per sample."""
    sums = predictions.sums.setdefault(variant, FidelitySums(reference.mean))
    inputs = TokenInputs(
        sums.add(generated, clip),
        reference.channel_weights,
        reference.spread[piece.start : piece.stop],
        is_right(reference, generated, piece) if variant == "sample" else {},
    )
    rows, count = slice(piece.start, piece.stop), len(reference.indices)
    _fill(predictions.values, rows, count, values_at(variant, inputs))
    return inputs


def _add_conditional(
    predictions: Predictions, reference: ReferenceSet, piece: range, batch: PredictedBatch
) -> None:
    """Scores of several samples together, for the conditions that got them."""
    rows = batch.rows
    if not len(rows):
        return
    samples = reference.standardize(torch.stack([batch.generated[rows], *batch.further])).flatten(2)
    clip = reference.standardize(batch.clip[rows]).flatten(1)
    inputs = ConditionInputs(samples, clip, width=batch.clip.shape[2])
    first = int(reference.drawn[: piece.start].sum())
    place, count = slice(first, first + len(rows)), int(reference.drawn.sum())
    _fill(predictions.values, place, count, values_at("conditional", inputs))
    _fill(predictions.bins, place, count, _bin_columns(inputs.samples, inputs.reference))


def _bin_columns(samples: Tensor, reference: Tensor) -> dict[str, Tensor]:
    """Spread to sort conditions by, and spread and error to show, from different samples.

    From the same ones, a bin of small spread would be one of samples that happen to lie close together.
    """
    half = len(samples) // 2
    shown, sorted_by = (samples[half:], samples[:half]) if half >= 2 else (samples, samples)
    found = spread_and_error(shown, reference)
    order = spread_and_error(sorted_by, reference).spread
    return {"order": order, "spread": found.spread, "error": found.error}


def _fill(columns: dict[str, np.ndarray], rows: slice, count: int, values: Mapping[str, Any]) -> None:
    """Put values of some of `count` samples into whole columns; None is left out.

    They are allocated at once: thousands of small arrays that outlive the batch's large ones would keep the
    memory between them from being used again.
    """
    for name, found in values.items():
        if found is not None:
            array = np.asarray(found)
            columns.setdefault(name, np.empty((count, *array.shape[1:])))[rows] = array
