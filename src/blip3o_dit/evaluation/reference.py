"""The held-out samples as every method is measured against them: read once, in bounded memory.

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
from blip3o_dit.metrics.bootstrap import Bootstrap, Estimate
from blip3o_dit.metrics.fidelity import (
    LinearProbe,
)
from blip3o_dit.utils.stateless_random import stateless_permutation

Track = Callable[[Iterable[Any], str], Iterable[Any]]
MAX_PROBE_FEATURES = 4096


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How much is measured.

    Args:
        batch_size: samples at a time.
        draws: samples per condition for energy score, spread and diversity.
        draw_samples: held-out samples that get them; all others get one.
        distribution_samples: most vectors on each side of a distribution distance.
        gallery_samples: most samples that look for each other in retrieval and neighbour agreement, whose
            cost is their square. 5,000 is usual (the test split of COCO, arXiv 1504.00325).
        probe_samples: most training samples that the linear probe is fitted on.
        bootstrap, half_samples: resamples for intervals, of means and of distribution distances.
        seed: names every choice.
    """

    batch_size: int = 32
    draws: int = 4
    draw_samples: int = 1000
    distribution_samples: int = 2048
    gallery_samples: int = 5000
    probe_samples: int = 5000
    bootstrap: int = 1000
    half_samples: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "draws": 2, "draw_samples": 2, "distribution_samples": 2}
        least |= {"gallery_samples": 2, "probe_samples": 2, "bootstrap": 2, "half_samples": 2}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"{name}: expected at least {lowest}, found {getattr(self, name)}")


@dataclass
class ReferenceSet:
    """The held-out samples as every method is measured against them.

    `indices` [n] in the source. `mean`, `std` [C] of the training tokens. `pooled` [n, C] mean tokens.
    `token_rows`, `token_positions` [m] say which tokens are kept, `tokens` [m, C] are these.
    `position_squares` [N, C]: sums of (x - mean)^2; `spread` [n]: each sample's, as a share of its channel's
    sum, summed over the channels. `drawn` [n] marks the samples that get several draws. `gallery` [g] are
    the rows that retrieval is among.
    """

    source: Embeddings
    indices: np.ndarray
    mean: Tensor
    std: Tensor
    settings: EvaluationSettings
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


def collect_reference(
    source: Embeddings,
    indices: np.ndarray,
    *,
    mean: Tensor,
    std: Tensor,
    settings: EvaluationSettings,
    track: Track,
) -> ReferenceSet:
    """Read the held-out samples once.

    Raises:
        ValueError: for fewer than two samples, and for NaN or infinity, naming the sample.
    """
    if len(indices) < 2:
        raise ValueError(f"{source.path}: expected at least 2 samples to evaluate, found {len(indices)}")
    count, tokens, width = len(indices), source.num_tokens, source.target_dim
    rows, positions = _choose_tokens(count, tokens, settings)
    truth = ReferenceSet(
        source,
        np.asarray(indices),
        mean.float().cpu(),
        std.float().cpu(),
        settings,
        pooled=torch.empty(count, width),
        token_rows=rows,
        token_positions=positions,
        tokens=torch.empty(len(rows), width),
        position_squares=torch.zeros(tokens, width, dtype=torch.float64),
        spread=torch.empty(0),
        drawn=_choose_drawn(count, settings),
        gallery=_choose_gallery(count, settings),
    )
    squares = torch.empty(count, width)
    for piece in track(list(batches(range(count), settings.batch_size)), "true tokens"):
        eva, clip = source.fetch(truth.indices[piece.start : piece.stop])
        for side, values in (("eva", eva), ("clip", clip)):
            check_finite(f"{source.path}: {side}", values, truth.indices[piece.start : piece.stop])
        distance = (clip.double() - truth.mean.double()).square_()
        truth.position_squares += distance.sum(dim=0)
        squares[piece.start : piece.stop] = distance.sum(dim=1)
        keep_vectors(truth, piece, clip, truth.pooled, truth.tokens)
    truth.spread = torch.cat([rows.double() @ truth.channel_weights for rows in squares.split(1024)])
    return truth


def fit_probe(truth: ReferenceSet, train: np.ndarray, track: Track) -> None:
    """Fit the linear probe on true training tokens, when every record has a label (at least two kinds)."""
    labels = [record.get("label") for record in truth.source.records(truth.indices)]
    if any(label is None for label in labels):
        return
    order = stateless_permutation(len(train), seed=truth.settings.seed, stream="probe samples")
    chosen = np.sort(train[order[: truth.settings.probe_samples]])
    train_labels = [record.get("label") for record in truth.source.records(chosen)]
    if any(label is None for label in train_labels) or len(set(train_labels)) < 2:
        return
    features = [
        probe_features(truth.source.fetch(piece)[1])
        for piece in track(list(batches(chosen, truth.settings.batch_size)), "linear probe")
    ]
    truth.labels = [str(label) for label in labels]
    truth.probe = LinearProbe(torch.cat(features), [str(label) for label in train_labels])
    right = [
        probe_is_right(truth, truth.source.fetch(truth.indices[piece.start : piece.stop])[1], piece)
        for piece in batches(range(len(truth.indices)), truth.settings.batch_size)
    ]
    bootstrap = Bootstrap(len(truth.indices), replicates=truth.settings.bootstrap, seed=truth.settings.seed)
    truth.probe_accuracy = bootstrap.mean(np.concatenate(right))


def probe_features(clip: Tensor) -> Tensor:
    """What the probe sees of tokens [n, N, C]: all of them, or their mean when there are too many numbers."""
    flat = clip.flatten(1)
    return flat if flat.shape[1] <= MAX_PROBE_FEATURES else clip.mean(dim=1)


def probe_is_right(truth: ReferenceSet, clip: Tensor, piece: range) -> np.ndarray:
    assert truth.probe is not None and truth.labels is not None
    found = truth.probe.predict(probe_features(clip))
    wanted = truth.labels[piece.start : piece.stop]
    return np.array([a == b for a, b in zip(found, wanted, strict=True)], dtype=float)


def check_finite(what: str, values: Tensor, indices: np.ndarray) -> None:
    bad = non_finite_samples(values)
    if len(bad):
        first = int(indices[int(bad[0])])
        raise ValueError(f"{what}: expected finite numbers, found NaN or infinity in sample {first}")


def keep_vectors(truth: ReferenceSet, piece: range, clip: Tensor, pooled: Tensor, tokens: Tensor) -> None:
    """Store the pooled vectors and the chosen tokens of the rows in `piece`."""
    pooled[piece.start : piece.stop] = clip.mean(dim=1)
    low, high = np.searchsorted(truth.token_rows, [piece.start, piece.stop])
    rows = torch.from_numpy(truth.token_rows[low:high] - piece.start)
    tokens[low:high] = clip[rows, torch.from_numpy(truth.token_positions[low:high])]


def _choose_tokens(count: int, tokens: int, settings: EvaluationSettings) -> tuple[np.ndarray, np.ndarray]:
    """Which (sample, position) pairs are kept: spread evenly over the samples, named by the seed."""
    wanted = min(settings.distribution_samples, count * tokens)
    rounds = []
    for number in range(-(-wanted // count)):  # one token of each sample, then another one, ...
        rows = stateless_permutation(count, seed=settings.seed, stream="token samples", counter=number)
        shift = stateless_permutation(count, seed=settings.seed, stream="token positions")[rows] + number
        rounds.append(np.stack([rows, shift % tokens]))
    rows, positions = np.concatenate(rounds, axis=1)[:, :wanted]
    order = np.lexsort((positions, rows))
    return rows[order], positions[order]


def _choose_drawn(count: int, settings: EvaluationSettings) -> np.ndarray:
    drawn = np.zeros(count, dtype=bool)
    drawn[
        stateless_permutation(count, seed=settings.seed, stream="drawn samples")[: settings.draw_samples]
    ] = True
    return drawn


def _choose_gallery(count: int, settings: EvaluationSettings) -> np.ndarray:
    order = stateless_permutation(count, seed=settings.seed, stream="gallery samples")
    return np.sort(order[: settings.gallery_samples])
