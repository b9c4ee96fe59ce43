"""The held-out reference samples, read once, in bounded memory.

What is kept per sample is a handful of numbers and one pooled vector; tokens are kept for a fixed number
of them only (`distribution_samples`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip3o_dit.data.checks import non_finite_samples
from blip3o_dit.data.embeddings import Embeddings, batches
from blip3o_dit.evaluation.config import EvaluationConfig
from blip3o_dit.metrics.bootstrap import Bootstrap, Estimate
from blip3o_dit.metrics.downstream import LinearProbe, NearestClass
from blip3o_dit.utils.json_files import short_repr
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
    # Of mean tokens: "prototype", "zero_shot"
    nearest: dict[str, NearestClass] = field(default_factory=dict)
    # Of the true tokens, by classifier, "probe" among them
    accuracies: dict[str, Estimate] = field(default_factory=dict)

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
        (probe_features(clip), clip.mean(dim=1))
        for piece in progress(list(batches(chosen, config.batch_size)), "linear probe")
        for clip in [source.fetch(piece)[1]]
    ]
    reference.labels = [str(label) for label in labels]
    known = [str(label) for label in train_labels]
    probed, pooled = (torch.cat(side) for side in zip(*features, strict=True))
    reference.probe = LinearProbe(probed, known)
    reference.nearest["prototype"] = NearestClass.of_samples(pooled, known)
    _measure_true_tokens(reference)


def add_class_names(reference: ReferenceSet, texts: ClassTexts) -> None:
    """Classify by texts too, zero-shot: the class whose text is nearest to the mean token, by cosine.

    Raises:
        ValueError: for samples without a label, labels that no line of the class names is for, and texts of
            another width than the tokens.
    """
    labels = [record.get("label") for record in reference.source.records(reference.indices)]
    if any(label is None for label in labels):
        raise ValueError(
            f"class_names: expected a label of every sample, found one without in {reference.source.path}"
        )
    width = reference.pooled.shape[1]
    if texts.vectors.shape[1] != width:
        raise ValueError(f"clip: expected texts {width} wide, as the tokens, found {texts.vectors.shape[1]}")
    reference.labels = [str(label) for label in labels]
    names = texts.labels_among(set(reference.labels))
    reference.nearest["zero_shot"] = NearestClass(names, texts.vectors, torch.zeros(width))
    _measure_true_tokens(reference)


@dataclass(frozen=True)
class ClassTexts:
    """What classes are called, K lines, and the vectors of a text about each, [K, C]."""

    lines: list[str]
    vectors: Tensor

    def labels_among(self, labels: set[str]) -> list[str]:
        """The label of each line: the line itself, or its number from 0. Raises ValueError for others."""
        numbers = [str(number) for number in range(len(self.lines))]
        for known in (self.lines, numbers):
            if labels <= set(known):
                return known
        unknown = labels - set(self.lines)
        other = min(unknown - set(numbers) or unknown)
        raise ValueError(
            f"class_names: expected a line for each label, its own text or its number from 0, of "
            f"{len(self.lines)} lines, found no line for the label {short_repr(other)}"
        )


def _measure_true_tokens(reference: ReferenceSet) -> None:
    """Accuracies of the classifiers on the tokens that are measured against."""
    source, found = reference.source, []
    for piece in reference.batches():
        found.append(is_right(reference, source.fetch(reference.indices[piece.start : piece.stop])[1], piece))
    for name in found[0]:
        numbers = np.concatenate([right[name] for right in found])
        reference.accuracies[name] = reference.bootstrap(len(numbers)).mean(numbers)


def probe_features(clip: Tensor) -> Tensor:
    """The probe's features of tokens [n, N, C]: all numbers, or the mean token when they are too many."""
    flat = clip.flatten(1)
    return flat if flat.shape[1] <= MAX_PROBE_FEATURES else clip.mean(dim=1)


def is_right(reference: ReferenceSet, clip: Tensor, piece: range) -> dict[str, np.ndarray]:
    """1.0 where a classifier tells the label of the rows in `piece` from tokens [n, N, C], else 0.0; by the
    classifier's name, of those that there are."""
    predicted = {name: nearest.predict(clip.mean(dim=1)) for name, nearest in reference.nearest.items()}
    if reference.probe is not None:
        predicted["probe"] = reference.probe.predict(probe_features(clip))
    expected = (reference.labels or [])[piece.start : piece.stop]
    return {
        name: np.array([a == b for a, b in zip(labels, expected, strict=True)], dtype=float)
        for name, labels in predicted.items()
    }


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
