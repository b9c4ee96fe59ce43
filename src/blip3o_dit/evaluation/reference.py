"""The held-out reference samples, read once, in bounded memory.

What is kept per sample is a handful of numbers and one pooled vector; tokens are kept for a fixed number
of them only (`distribution_samples`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip3o_dit.data.checks import non_finite_samples
from blip3o_dit.data.embeddings import Embeddings, batches
from blip3o_dit.evaluation.config import EvaluationConfig
from blip3o_dit.metrics.bootstrap import Bootstrap, Estimate
from blip3o_dit.metrics.downstream import LinearProbe
from blip3o_dit.utils.stateless_random import stateless_choice, stateless_permutation

# Wraps an iterable for a progress bar of that name.
Progress = Callable[[Iterable[Any], str], Iterable[Any]]

MAX_PROBE_FEATURES = 4096


@dataclass
class ReferenceSet:
    """The held-out samples, and the choices that are the same for every sampler.

    `indices` [n] in the source. `mean`, `std` [C] of the training tokens. `pooled` [n, C] mean tokens.
    `token_rows`, `token_positions` [m] say which tokens are kept, `tokens` [m, C] are these.
    `position_squares` [N, C]: q_kc = sum_n (x_nkc - m_c)^2. `spread` [n]:
    spread_n = sum_c sum_k (x_nkc - m_c)^2 / S_c with S_c = sum_k q_kc. `drawn` [n] marks the samples that get
    several generated ones. `gallery` [g] are the rows that retrieval is among.
    """

    source: Embeddings
    indices: np.ndarray
    mean: Tensor
    std: Tensor
    config: EvaluationConfig
    pooled: Tensor
    token_rows: np.ndarray
    token_positions: np.ndarray
    tokens: Tensor
    position_squares: Tensor
    spread: Tensor
    drawn: np.ndarray
    gallery: np.ndarray
    labels: list[str] | None = None
    probe: LinearProbe | None = None
    probe_accuracy: Estimate | None = None

    @property
    def channel_weights(self) -> Tensor:
        """1 / sum of (x - mean)^2 per channel, [C]; 0 for a channel that does not vary."""
        squares = self.position_squares.sum(dim=0)
        return torch.where(squares > 0, 1 / squares.clamp(min=1e-300), 0.0)

    def standardize(self, vectors: Tensor) -> Tensor:
        """[..., C] in units of a training channel's standard deviation."""
        return (vectors.float() - self.mean) / self.std

    def total_variance(self) -> float:
        """Mean variance of a standardised coordinate of the kept tokens."""
        return float(self.standardize(self.tokens).var(dim=0, correction=0).mean())

    def bootstrap(self, count: int) -> Bootstrap:
        """Resamples of `count` samples, the same for every sampler."""
        return Bootstrap(count, replicates=self.config.bootstrap, seed=self.config.seed)

    def batches(self) -> list[range]:
        """Rows of one batch after another."""
        return list(batches(range(len(self.indices)), self.config.batch_size))


def collect_reference(
    source: Embeddings,
    indices: np.ndarray,
    *,
    mean: Tensor,
    std: Tensor,
    config: EvaluationConfig,
    progress: Progress,
) -> ReferenceSet:
    """Read the held-out samples once.

    Raises:
        ValueError: for fewer than two samples, and for NaN or infinity, naming the sample.
    """
    if len(indices) < 2:
        raise ValueError(f"{source.path}: expected at least 2 samples to evaluate, found {len(indices)}")
    count, tokens, width = len(indices), source.num_tokens, source.target_dim
    rows, positions = _choose_tokens(count, tokens, config)
    drawn = stateless_choice(count, config.draw_samples, seed=config.seed, stream="drawn samples")
    reference = ReferenceSet(
        source,
        np.asarray(indices),
        mean.float().cpu(),
        std.float().cpu(),
        config,
        pooled=torch.empty(count, width),
        token_rows=rows,
        token_positions=positions,
        tokens=torch.empty(len(rows), width),
        position_squares=torch.zeros(tokens, width, dtype=torch.float64),
        spread=torch.empty(0),
        drawn=np.isin(np.arange(count), drawn),
        gallery=stateless_choice(count, config.gallery_samples, seed=config.seed, stream="gallery samples"),
    )
    squares = torch.empty(count, width)
    for piece in progress(reference.batches(), "true tokens"):
        eva, clip = source.fetch(reference.indices[piece.start : piece.stop])
        for side, values in (("eva", eva), ("clip", clip)):
            check_finite(f"{source.path}: {side}", values, reference.indices[piece.start : piece.stop])
        distance = (clip.double() - reference.mean.double()).square_()
        reference.position_squares += distance.sum(dim=0)
        squares[piece.start : piece.stop] = distance.sum(dim=1)
        keep_vectors(reference, piece, clip, reference.pooled, reference.tokens)
    weights = reference.channel_weights
    reference.spread = torch.cat([rows.double() @ weights for rows in squares.split(1024)])
    return reference


def fit_probe(reference: ReferenceSet, train: np.ndarray, progress: Progress) -> None:
    """Fit the linear probe on real training tokens, when every record has a label (at least two classes)."""
    source, config = reference.source, reference.config
    labels = [record.get("label") for record in source.records(reference.indices)]
    if any(label is None for label in labels):
        return
    rows = stateless_choice(len(train), config.probe_samples, seed=config.seed, stream="probe samples")
    chosen = np.sort(train[rows])
    train_labels = [record.get("label") for record in source.records(chosen)]
    if any(label is None for label in train_labels) or len(set(train_labels)) < 2:
        return
    features = [
        probe_features(source.fetch(piece)[1])
        for piece in progress(list(batches(chosen, config.batch_size)), "linear probe")
    ]
    reference.labels = [str(label) for label in labels]
    reference.probe = LinearProbe(torch.cat(features), [str(label) for label in train_labels])
    correct = [
        probe_is_correct(reference, source.fetch(reference.indices[piece.start : piece.stop])[1], piece)
        for piece in reference.batches()
    ]
    reference.probe_accuracy = reference.bootstrap(len(labels)).mean(np.concatenate(correct))


def probe_features(clip: Tensor) -> Tensor:
    """The probe's features of tokens [n, N, C]: all numbers, or the mean token when they are too many."""
    flat = clip.flatten(1)
    return flat if flat.shape[1] <= MAX_PROBE_FEATURES else clip.mean(dim=1)


def probe_is_correct(reference: ReferenceSet, clip: Tensor, piece: range) -> np.ndarray:
    """1.0 where the probe tells the label of the rows in `piece` from tokens [n, N, C], else 0.0."""
    assert reference.probe is not None and reference.labels is not None
    predicted = reference.probe.predict(probe_features(clip))
    expected = reference.labels[piece.start : piece.stop]
    return np.array([a == b for a, b in zip(predicted, expected, strict=True)], dtype=float)


def check_finite(what: str, values: Tensor, indices: np.ndarray) -> None:
    bad = non_finite_samples(values)
    if len(bad):
        first = int(indices[int(bad[0])])
        raise ValueError(f"{what}: expected finite numbers, found NaN or infinity in sample {first}")


def keep_vectors(reference: ReferenceSet, piece: range, clip: Tensor, pooled: Tensor, tokens: Tensor) -> None:
    """Store the pooled vectors and the chosen tokens of the rows in `piece`."""
    pooled[piece.start : piece.stop] = clip.mean(dim=1)
    low, high = np.searchsorted(reference.token_rows, [piece.start, piece.stop])
    rows = torch.from_numpy(reference.token_rows[low:high] - piece.start)
    tokens[low:high] = clip[rows, torch.from_numpy(reference.token_positions[low:high])]


def _choose_tokens(count: int, tokens: int, config: EvaluationConfig) -> tuple[np.ndarray, np.ndarray]:
    """Which (sample, position) pairs are kept: spread evenly over the samples, chosen by the seed."""
    wanted = min(config.distribution_samples, count * tokens)
    rounds = []
    for number in range(-(-wanted // count)):  # one token of each sample, then another one, ...
        rows = stateless_permutation(count, seed=config.seed, stream="token samples", counter=number)
        shift = stateless_permutation(count, seed=config.seed, stream="token positions")[rows] + number
        rounds.append(np.stack([rows, shift % tokens]))
    rows, positions = np.concatenate(rounds, axis=1)[:, :wanted]
    order = np.lexsort((positions, rows))
    return rows[order], positions[order]
