"""Evaluate methods on held-out samples: one pass over the truth, one over each method, bounded memory.

What is kept per sample is a handful of numbers and one pooled vector; tokens are kept for a fixed number
of them only (`distribution_samples`). Every method sees the same samples, tokens and resamples, so that
differences are paired.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip3o_dit.data.store import EmbeddingSource, batches
from blip3o_dit.evaluation import distribution
from blip3o_dit.evaluation.intervals import FEWEST, Bootstrap, Estimate, from_half_samples, half_samples
from blip3o_dit.evaluation.methods import Method, ModelMethod
from blip3o_dit.evaluation.metrics import (
    FidelitySums,
    LinearProbe,
    TokenMeasures,
    diversity,
    energy_score,
    neighbour_agreement,
    retrieval_ranks,
    spread_and_error,
    spread_error_ratio,
)
from blip3o_dit.flow.solvers import CALLS_PER_STEP
from blip3o_dit.randomness import named_permutation

Track = Callable[[Iterable[Any], str], Iterable[Any]]

MOST_PROBE_FEATURES = 4096
NEIGHBOURS = 10
BALL_NEIGHBOURS = 5
SPREAD_BINS = 10


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How much is measured.

    Args:
        batch_size: samples at a time.
        draws: samples per condition for energy score, spread and diversity.
        draw_samples: held-out samples that get them; all others get one.
        distribution_samples: most vectors on each side of a distribution distance.
        probe_samples: most training samples that the linear probe is fitted on.
        bootstrap, half_samples: resamples for intervals, of means and of distribution distances.
        seed: names every choice.
    """

    batch_size: int = 32
    draws: int = 4
    draw_samples: int = 1000
    distribution_samples: int = 2048
    probe_samples: int = 5000
    bootstrap: int = 1000
    half_samples: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "draws": 2, "draw_samples": 2, "distribution_samples": 2}
        least |= {"probe_samples": 2, "bootstrap": 2, "half_samples": 2}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"{name}: expected at least {lowest}, found {getattr(self, name)}")


@dataclass
class Truth:
    """The held-out samples as every method is measured against them.

    `indices` [n] in the source. `mean`, `std` [C] of the training tokens. `pooled` [n, C] mean tokens.
    `token_rows`, `token_positions` [m] say which tokens are kept, `tokens` [m, C] are these.
    `position_squares` [N, C]: sums of (x - mean)^2; `spread` [n]: each sample's, as a share of its channel's
    sum, summed over the channels. `drawn` [n] marks the samples that get several draws.
    """

    source: EmbeddingSource
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


def gather_truth(
    source: EmbeddingSource,
    indices: np.ndarray,
    *,
    mean: Tensor,
    std: Tensor,
    settings: EvaluationSettings,
    track: Track,
) -> Truth:
    """Read the held-out samples once.

    Raises:
        ValueError: for fewer than two samples, and for NaN or infinity, naming the sample.
    """
    if len(indices) < 2:
        raise ValueError(f"{source.path}: expected at least 2 samples to evaluate, found {len(indices)}")
    count, tokens, width = len(indices), source.num_tokens, source.target_dim
    rows, positions = _choose_tokens(count, tokens, settings)
    truth = Truth(
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
    )
    squares = torch.empty(count, width)
    for piece in track(list(batches(range(count), settings.batch_size)), "true tokens"):
        eva, clip = source.fetch(truth.indices[piece.start : piece.stop])
        for side, values in (("eva", eva), ("clip", clip)):
            _check_finite(f"{source.path}: {side}", values, truth.indices[piece.start : piece.stop])
        distance = (clip.double() - truth.mean.double()).square_()
        truth.position_squares += distance.sum(dim=0)
        squares[piece.start : piece.stop] = distance.sum(dim=1)
        _keep(truth, piece, clip, truth.pooled, truth.tokens)
    truth.spread = torch.cat([rows.double() @ truth.channel_weights for rows in squares.split(1024)])
    return truth


def fit_probe(truth: Truth, train: np.ndarray, track: Track) -> None:
    """Fit the linear probe on true training tokens, when every record has a label (at least two kinds)."""
    labels = [record.get("label") for record in truth.source.records(truth.indices)]
    if any(label is None for label in labels):
        return
    order = named_permutation(len(train), seed=truth.settings.seed, stream="probe samples")
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
        _correct(truth, truth.source.fetch(truth.indices[piece.start : piece.stop])[1], piece)
        for piece in batches(range(len(truth.indices)), truth.settings.batch_size)
    ]
    bootstrap = Bootstrap(len(truth.indices), replicates=truth.settings.bootstrap, seed=truth.settings.seed)
    truth.probe_accuracy = bootstrap.mean(np.concatenate(right))


def probe_features(clip: Tensor) -> Tensor:
    """What the probe sees of tokens [n, N, C]: all of them, or their mean when there are too many numbers."""
    flat = clip.flatten(1)
    return flat if flat.shape[1] <= MOST_PROBE_FEATURES else clip.mean(dim=1)


def true_floor(truth: Truth, source: EmbeddingSource, train: np.ndarray) -> dict[str, Any]:
    """Distances between held-out true vectors and as many true training ones, `train` in `source`.

    Two independent sets of true vectors: what a perfect sampler without the condition would reach.
    """
    count = min(len(truth.indices), len(train))
    order = named_permutation(len(train), seed=truth.settings.seed, stream="floor")
    chosen = np.sort(train[order[:count]])
    kept = truth.token_rows < count
    other = torch.empty(len(truth.token_rows), truth.tokens.shape[1])
    pooled = torch.empty(count, truth.tokens.shape[1])
    for piece in batches(range(count), truth.settings.batch_size):
        clip = source.fetch(chosen[piece.start : piece.stop])[1]
        _keep(truth, piece, clip, pooled, other)
    return {
        "tokens": _distances(truth, truth.tokens[kept], other[kept], truth.token_rows[kept]),
        "pooled": _distances(truth, truth.pooled[:count], pooled, np.arange(count)),
        "samples": count,
    }


@dataclass
class Answers:
    """One method's answers, reduced to what the figures need; rows are the held-out samples."""

    method: Method
    sums: dict[str, FidelitySums]
    columns: dict[str, np.ndarray]
    pooled: Tensor
    tokens: Tensor
    position_residuals: Tensor
    position_cosines: Tensor
    conditional: dict[str, np.ndarray] = field(default_factory=dict)
    seconds: float = 0.0
    batch_milliseconds: list[float] = field(default_factory=list)


@torch.no_grad()
def collect_answers(method: Method, truth: Truth, track: Track) -> Answers:
    """Ask a method about every held-out sample.

    Raises:
        ValueError: for NaN or infinity among the answers, naming method and sample.
    """
    width = truth.tokens.shape[1]
    answers = Answers(
        method,
        sums={},
        columns={},
        pooled=torch.empty_like(truth.pooled),
        tokens=torch.empty_like(truth.tokens),
        position_residuals=torch.zeros(truth.source.num_tokens, width, dtype=torch.float64),
        position_cosines=torch.zeros(truth.source.num_tokens, dtype=torch.float64),
    )
    for piece in track(list(batches(range(len(truth.indices)), truth.settings.batch_size)), method.name):
        indices = truth.indices[piece.start : piece.stop]
        eva, clip = truth.source.fetch(indices)
        started = time.perf_counter()
        generated = method.sample(eva, indices.tolist(), 0)
        seconds = time.perf_counter() - started
        answers.seconds += seconds
        answers.batch_milliseconds.append(1000 * seconds / len(indices))
        _check_finite(f"{method.name}: generated tokens", generated, indices)
        _keep(truth, piece, generated, answers.pooled, answers.tokens)
        tokens = _measure(answers, truth, piece, "sample", generated, clip)
        answers.position_cosines += tokens.cosine.sum(dim=0)
        answers.position_residuals += tokens.squares.sum(dim=0)
        guess = method.best_guess(eva, indices.tolist())
        if guess is not None:
            _check_finite(f"{method.name}: best guess", guess, indices)
            _measure(answers, truth, piece, "best_guess", guess, clip)
        if truth.probe is not None:
            rows, count = slice(piece.start, piece.stop), len(truth.indices)
            _fill(answers.columns, rows, count, {"correct": _correct(truth, generated, piece)})
        _draw_more(answers, truth, piece, eva, clip, generated)
    return answers


def describe(answers: Answers, truth: Truth) -> dict[str, Any]:
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


def without_vectors(answers: Answers) -> Answers:
    """The same without pooled vectors and tokens, which only `describe` needs."""
    return replace(answers, pooled=torch.empty(0), tokens=torch.empty(0))


# Metrics whose paired differences are reported: group, name, and where the per-sample values are.
PAIRED = (
    ("sample", "r2"),
    ("sample", "cosine_similarity_mean"),
    ("best_guess", "r2"),
    ("best_guess", "cosine_similarity_mean"),
    ("conditional", "energy_score"),
    ("conditional", "token_energy_score"),
)


def paired_differences(model: Answers, other: Answers, settings: EvaluationSettings) -> dict[str, Any]:
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
    method: ModelMethod, truth: Truth, *, calls: Sequence[int], samples: int, track: Track
) -> list[dict[str, Any]]:
    """Quality against network calls for each solver, on the first held-out samples of a named order."""
    order = named_permutation(len(truth.indices), seed=truth.settings.seed, stream="curve samples")
    indices = truth.indices[np.sort(order[:samples])]
    pairs = [
        (solver, count)
        for solver, per_step in CALLS_PER_STEP.items()
        for count in calls
        if count >= per_step and count % per_step == 0
    ]
    return [
        _curve_point(method.with_calls(solver, count), truth, indices, solver)
        for solver, count in track(pairs, f"{method.name}: network calls")
    ]


def peak_memory_mib(method: Method | None = None) -> float:
    """Peak of the GPU's allocations for a model on one, else of the process so far."""
    if isinstance(method, ModelMethod) and method.model.device.type == "cuda":
        return torch.cuda.max_memory_allocated(method.model.device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _curve_point(method: ModelMethod, truth: Truth, indices: np.ndarray, solver: str) -> dict[str, Any]:
    sums = FidelitySums(truth.mean)
    scores, pooled, seconds = [], [], 0.0
    for piece in batches(indices, truth.settings.batch_size):
        eva, clip = truth.source.fetch(piece)
        started = time.perf_counter()
        draws = torch.stack([method.sample(eva, piece.tolist(), draw) for draw in range(2)])
        seconds += time.perf_counter() - started
        sums.add(draws[0], clip)
        scores.append(energy_score(*_flat(truth, draws, clip)).numpy())
        pooled.append(torch.stack([draws[0].mean(dim=1), clip.mean(dim=1)]))
    generated, true = (truth.standardize(vectors) for vectors in torch.cat(pooled, dim=1))
    values = np.concatenate(scores)
    bootstrap = Bootstrap(len(values), replicates=truth.settings.bootstrap, seed=truth.settings.seed)
    return {
        "solver": solver,
        "network_calls": method.calls,
        "energy_score": bootstrap.mean(values).to_json(),
        "r2": sums.result()["r2"],
        "frechet": distribution.frechet_distance(true, generated),
        "milliseconds_per_sample": 1000 * seconds / (2 * len(indices)),
    }


def _fill(columns: dict[str, np.ndarray], rows: slice, count: int, values: dict[str, Any]) -> None:
    """Put values of some of `count` samples into whole columns.

    They are allocated at once: thousands of small arrays that outlive the batch's large ones would keep the
    memory between them from being used again.
    """
    for name, found in values.items():
        columns.setdefault(name, np.empty(count))[rows] = found


def _choose_tokens(count: int, tokens: int, settings: EvaluationSettings) -> tuple[np.ndarray, np.ndarray]:
    """Which (sample, position) pairs are kept: spread evenly over the samples, named by the seed."""
    wanted = min(settings.distribution_samples, count * tokens)
    rounds = []
    for number in range(-(-wanted // count)):  # one token of each sample, then another one, ...
        rows = named_permutation(count, seed=settings.seed, stream="token samples", pass_index=number)
        shift = named_permutation(count, seed=settings.seed, stream="token positions")[rows] + number
        rounds.append(np.stack([rows, shift % tokens]))
    rows, positions = np.concatenate(rounds, axis=1)[:, :wanted]
    order = np.lexsort((positions, rows))
    return rows[order], positions[order]


def _choose_drawn(count: int, settings: EvaluationSettings) -> np.ndarray:
    drawn = np.zeros(count, dtype=bool)
    drawn[named_permutation(count, seed=settings.seed, stream="drawn samples")[: settings.draw_samples]] = (
        True
    )
    return drawn


def _keep(truth: Truth, piece: range, clip: Tensor, pooled: Tensor, tokens: Tensor) -> None:
    """Store the pooled vectors and the chosen tokens of the rows in `piece`."""
    pooled[piece.start : piece.stop] = clip.mean(dim=1)
    low, high = np.searchsorted(truth.token_rows, [piece.start, piece.stop])
    rows = torch.from_numpy(truth.token_rows[low:high] - piece.start)
    tokens[low:high] = clip[rows, torch.from_numpy(truth.token_positions[low:high])]


def _measure(
    answers: Answers, truth: Truth, piece: range, variant: str, generated: Tensor, clip: Tensor
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


def _draw_more(
    answers: Answers, truth: Truth, piece: range, eva: Tensor, clip: Tensor, generated: Tensor
) -> None:
    """Further draws for the samples that get them, and what they say together."""
    rows = np.flatnonzero(truth.drawn[piece.start : piece.stop])
    if not len(rows):
        return
    indices = truth.indices[piece.start : piece.stop][rows].tolist()
    draws = [generated[rows]]
    if answers.method.random:
        draws += [answers.method.sample(eva[rows], indices, draw) for draw in range(1, truth.settings.draws)]
    flat, true = _flat(truth, torch.stack(draws), clip[rows])
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


def _flat(truth: Truth, draws: Tensor, clip: Tensor) -> tuple[Tensor, Tensor]:
    """Standardised and flattened: [K, n, N C] and [n, N C]."""
    return truth.standardize(draws).flatten(2), truth.standardize(clip).flatten(1)


def _fidelity(answers: Answers, variant: str, bootstrap: Bootstrap) -> dict[str, Any]:
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


def _use(answers: Answers, truth: Truth, bootstrap: Bootstrap) -> dict[str, Any]:
    found: dict[str, Any] = {}
    directions = (("", answers.pooled, truth.pooled), ("reverse_", truth.pooled, answers.pooled))
    for prefix, queries, gallery in directions:
        ranks = retrieval_ranks(queries, gallery).numpy()
        for most in (1, 5, 10):
            found[f"{prefix}recall_at_{most}"] = bootstrap.mean((ranks <= most).astype(float)).to_json()
        found[f"{prefix}median_rank"] = bootstrap.median(ranks).to_json()
    k = min(NEIGHBOURS, len(truth.indices) - 1)
    agreement = neighbour_agreement(answers.pooled, truth.pooled, k=k).numpy()
    found["neighbour_agreement"] = bootstrap.mean(agreement).to_json()
    if "correct" in answers.columns:
        found["probe_accuracy"] = bootstrap.mean(answers.columns["correct"]).to_json()
    return found


def _conditional(answers: Answers, truth: Truth) -> dict[str, Any]:
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


def _spread_error(answers: Answers) -> list[dict[str, float]]:
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


def _distances(truth: Truth, true: Tensor, other: Tensor, owners: np.ndarray) -> dict[str, Any]:
    """All distances between two sets of vectors; halves of the owning samples give the intervals."""
    settings = truth.settings
    if len(true) > settings.distribution_samples:  # only pooled vectors, one of each sample
        order = named_permutation(len(true), seed=settings.seed, stream="pooled samples")
        kept = np.sort(order[: settings.distribution_samples])
        true, other, owners = true[kept], other[kept], owners[kept]
    a, b = truth.standardize(true).double(), truth.standardize(other).double()
    squares = tuple(distribution.squared_distances(*pair) for pair in ((a, a), (b, b), (a, b)))
    bandwidth = distribution.median_square(squares[0])
    k = min(BALL_NEIGHBOURS, len(a) // 2 - 1)

    def figures(rows: Tensor | None) -> dict[str, float]:
        x, y = (a, b) if rows is None else (a[rows], b[rows])
        aa, bb, ab = squares if rows is None else (s[rows][:, rows] for s in squares)
        found = {
            "frechet": distribution.frechet_distance(x, y),
            "mmd": distribution.mmd_from_distances(aa, bb, ab, bandwidth),
            "wasserstein": distribution.wasserstein_per_channel(x, y),
        }
        return found | (distribution.precision_recall_from_distances(aa, bb, ab, k=k) if k >= 1 else {})

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


def _paired_columns(answers: Answers, group: str, name: str) -> Any:
    if group == "conditional":
        return answers.conditional[name]
    if group not in answers.sums:
        return None
    if name == "r2":
        return np.column_stack([answers.columns[f"{group}.{c}"] for c in ("residual", "spread")])
    return answers.columns[f"{group}.{name}"]


def _correct(truth: Truth, clip: Tensor, piece: range) -> np.ndarray:
    assert truth.probe is not None and truth.labels is not None
    found = truth.probe.predict(probe_features(clip))
    wanted = truth.labels[piece.start : piece.stop]
    return np.array([a == b for a, b in zip(found, wanted, strict=True)], dtype=float)


def _check_finite(what: str, values: Tensor, indices: np.ndarray) -> None:
    finite = torch.isfinite(values).flatten(1).all(dim=1)
    if not finite.all():
        first = int(indices[int(torch.nonzero(~finite)[0])])
        raise ValueError(f"{what}: expected finite numbers, found NaN or infinity in sample {first}")
