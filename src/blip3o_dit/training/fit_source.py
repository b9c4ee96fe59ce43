"""Fit the ridge regressions that an informed source starts from, and how far from them if that is predicted.

A map is nearer to the samples it was fitted on than to new ones: a flow trained on what it leaves of them
would learn residuals that are too small. So the samples are cut into folds, and in training a sample's mean
is by the map that was fitted without its fold (cross-fitting; Chernozhukov et al., arXiv 1608.00060), and so
is its spread. What is generated, and what was not fitted, starts from the maps fitted on all of them.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from blip3o_dit.data.dataset import choose_samples, group_ranks
from blip3o_dit.data.embeddings import Embeddings, TransformedEmbeddings, batches
from blip3o_dit.flow.path import AffineSource
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.layers import without_autocast
from blip3o_dit.normal_equations import (
    USUAL_PENALTY,
    GroupPenalties,
    Moments,
    search_penalties,
    search_penalty,
)
from blip3o_dit.ridge import (
    SPREAD_BOUNDS,
    context_sizes,
    principal_components,
    relative_spread,
    source_features,
    spread_features,
)
from blip3o_dit.training.background import PutTensors
from blip3o_dit.utils.distributed import cores
from blip3o_dit.utils.validation import damage_refused

logger = logging.getLogger(__name__)

FOLDS = 5
FOLDS_FILE = "source_folds.safetensors"

# Of its deviation, as noise, for a channel that ridge predicts exactly: the flow divides by it.
MIN_STD = 0.01

# Of a squared residual over its channel's mean one, where its logarithm is taken; and how far the mean of
# log chi^2 with one degree of freedom, that of normal residuals, is below zero.
LEAST_SQUARE = 1e-4
LOG_CHI_SQUARE = 1.2704

AT_ONCE = 16  # samples

Solution = tuple[Tensor, Tensor]


@dataclass
class SourceFolds:
    """The maps of training, in the network's units, one for each fold: fitted on the samples of the others.

    `weight` [K, F, C] and `bias` [K, C], float32; `samples` [n], int64, ascending, and the fold of each,
    `fold` [n], int64; `spread` [K, 2 C + 1, C], float32, of a source that predicts it.
    """

    weight: Tensor
    bias: Tensor
    samples: Tensor
    fold: Tensor
    spread: Tensor | None = None

    def source_distribution(self, model: BLIP3oDiTModel, condition: Tensor, index: list[int]) -> AffineSource:
        """As `model.source_distribution`, by maps that have not seen the samples.

        Args:
            condition: normalised [B, L, C_eva]. index: the B samples' indices in the data.
        """
        source = model.source_distribution(condition)
        folds = self.folds_of(index)
        if source.mean is None or (folds < 0).all():
            return source
        self._move(condition.device)
        for fold in np.unique(folds[folds >= 0]).tolist():
            rows = torch.from_numpy(np.flatnonzero(folds == fold)).to(condition.device)
            with without_autocast(condition.device):
                features = model.source_features(condition[rows].float())
                mean = features @ self.weight[fold] + self.bias[fold]
                source.mean[rows] = mean
                if self.spread is not None and source.std is not None:
                    source.std[rows] = model.source_std * relative_spread(mean, self.spread[fold])
        return source

    def _move(self, device: torch.device) -> None:
        if self.weight.device != device:
            self.weight, self.bias = self.weight.to(device), self.bias.to(device)
            self.spread = None if self.spread is None else self.spread.to(device)

    def folds_of(self, index: list[int]) -> np.ndarray:
        """The fold of each of these samples, -1 for those that no map was fitted on."""
        samples, wanted = self.samples.numpy(), np.asarray(index)
        places = np.searchsorted(samples, wanted).clip(max=len(samples) - 1)
        return np.where(samples[places] == wanted, self.fold.numpy()[places], -1)

    def save(self, folder: Path, put: PutTensors) -> None:
        put({name: tensor for name, tensor in vars(self).items() if tensor is not None}, folder / FOLDS_FILE)


def load_folds(folder: Path, model: BLIP3oDiTModel) -> SourceFolds | None:
    """What `SourceFolds.save` wrote into a checkpoint; None for noise, for a student, whose paths start where
    its teacher's do, or if it was written without.

    Raises:
        ValueError: when the file is damaged or does not fit the model.
    """
    file = folder / FOLDS_FILE
    if model.config.flow.source == "noise" or model.config.flow.student_steps:
        return None
    if not file.is_file():
        logger.info("%s: no %s: it was trained, and goes on, with one map for all", folder, FOLDS_FILE)
        return None
    with damage_refused(file, "tensors"):
        found = load_file(file)
    folds, samples = (len(found.get(name, ())) for name in ("weight", "samples"))
    expected = {
        "weight": (torch.float32, [folds, *model.source_weight.shape]),
        "bias": (torch.float32, [folds, *model.source_bias.shape]),
        "samples": (torch.int64, [samples]),
        "fold": (torch.int64, [samples]),
    }
    if model.config.flow.predicts_spread:
        expected["spread"] = (torch.float32, [folds, *model.source_spread.shape])
    if {name: (tensor.dtype, list(tensor.shape)) for name, tensor in found.items()} != expected:
        raise ValueError(f"{file}: expected {expected}, found tensors of other names, types or shapes")
    given = found["fold"]
    if (
        not samples
        or int(given.min()) < 0
        or int(given.max()) >= folds
        or bool((found["samples"].diff() < 1).any())
    ):
        raise ValueError(f"{file}: expected ascending samples, each in one of {folds} folds")
    return SourceFolds(**found)


@torch.no_grad()
def fit_source(
    model: BLIP3oDiTModel,
    source: Embeddings,
    train: np.ndarray,
    *,
    max_samples: int,
    seed: int,
    groups: np.ndarray | None = None,
    device: torch.device | None = None,
    count: Callable[[int], None] = lambda samples: None,
) -> tuple[dict[str, Tensor | None], SourceFolds | None]:
    """The arguments of `BLIP3oDiTModel.set_source`, and the maps of training (None for a single sample).

    Fitted on at most `max_samples` training samples in float64, on a GPU if `device` is one. The first fold
    chooses the penalty. The deviation is that of what the folds' maps leave of the samples that they have
    not seen. Samples of the same number in `groups` [n of the data] are in one fold: a map that saw one crop
    of a picture is nearer to its other crops than to held-out pictures. `count` is told how many samples
    were read.
    """
    device = device if device is not None and device.type == "cuda" else torch.device("cpu")

    def condition(eva: Tensor) -> Tensor:
        count(len(eva))
        return model.normalize_condition(eva).to(device)

    seen = TransformedEmbeddings(
        source,
        condition,
        lambda clip: model.normalize_target(clip).to(device),
    )
    chosen = choose_samples(train, max_samples=max_samples, seed=seed)
    numbers = group_ranks(chosen, groups) % FOLDS
    folds = [np.sort(chosen[numbers == fold]) for fold in range(numbers.max() + 1)]
    components, flow = None, model.config.flow
    if kept := flow.source_components:
        ordered = flow.sees_context
        components = principal_components(seen, np.sort(chosen), AT_ONCE, kept, ordered=ordered)[1].float()
    rows = _Rows(seen, lambda eva: source_features(eva, components, flow.sees_context), chosen[:1])
    parts = [rows.moments(fold) for fold in folds]
    total = _merged(parts)

    sizes = context_sizes(source.condition_dim, kept, source.num_tokens) if flow.sees_context else None
    final, unseen = _cross_fitted(total, parts, sizes)
    weight, bias = rows.plain(final)
    deviation = _deviation(total, parts, unseen)
    spread, spreads = None, None
    if model.config.flow.predicts_spread:
        spread, spreads = _fit_spread(rows, folds, unseen, deviation)
    arguments = {
        "weight": weight,
        "bias": bias,
        "std": deviation.float().cpu(),
        "components": None if components is None else components.cpu(),
        "spread": spread,
    }
    if len(parts) == 1:
        return arguments, None
    weights, biases = zip(*(rows.plain(solution) for solution in unseen), strict=True)
    order = np.argsort(chosen)
    return arguments, SourceFolds(
        weight=torch.stack(weights),
        bias=torch.stack(biases),
        samples=torch.from_numpy(chosen[order]),
        fold=torch.from_numpy(numbers[order]),
        spread=spreads,
    )


class _Rows:
    """Features [F] and targets [C] of tokens, about origins near the data: see `Moments`."""

    def __init__(self, seen: Embeddings, features: Callable[[Tensor], Tensor], first: np.ndarray) -> None:
        self.seen, self.features = seen, features
        self.origins = [rows.mean(dim=0) for rows in self._read(first)]

    def moments(self, samples: np.ndarray) -> Moments:
        features, targets = self.origins
        sums = Moments(len(features), len(targets), features.device)
        for piece in batches(samples, AT_ONCE):
            found = self._read(piece)
            sums.add(found[0] - features, found[1] - targets)
        return sums

    def residuals(self, samples: np.ndarray, solution: Solution) -> Iterator[tuple[Tensor, Tensor]]:
        """What a map between what is about the origins says of these samples, and what it leaves of them."""
        (weight, bias), (features, targets) = solution, self.origins
        for piece in batches(samples, AT_ONCE):
            found = self._read(piece)
            guess = (found[0] - features) @ weight + bias + targets
            yield guess, found[1] - guess

    def plain(self, solution: Solution) -> Solution:
        """A map (W [F, C], bias [C]) between what is about the origins, as one of the features themselves."""
        (weight, bias), (features, targets) = solution, self.origins
        return weight.float().cpu(), (bias + targets - features @ weight).float().cpu()

    def _read(self, samples: np.ndarray) -> tuple[Tensor, Tensor]:
        eva, clip = self.seen.fetch(samples)
        return self.features(eva).flatten(0, 1).double(), clip.flatten(0, 1).double()


def _merged(parts: list[Moments]) -> Moments:
    total = copy.deepcopy(parts[0])
    for part in parts[1:]:
        total.merge(part)
    return total


def _cross_fitted(
    total: Moments, parts: list[Moments], sizes: tuple[int, ...] | None = None
) -> tuple[Solution, list[Solution]]:
    """The map of all parts, and for each the one of the others; of a single one the same.

    The first part chooses the penalty, and one for each group of features where their `sizes` are given.
    """
    penalty: float | GroupPenalties
    if len(parts) == 1:
        usual = None if sizes is None else GroupPenalties((USUAL_PENALTY,) * len(sizes), sizes)
        final = total.solve(usual or USUAL_PENALTY)
        return final, [final]
    rest = total.without(parts[0])
    if sizes is None:
        penalty, without_first = search_penalty(rest, parts[0])
    else:
        penalty, without_first = search_penalties(rest, parts[0], sizes)
    others = [total.without(part).solve(penalty) for part in parts[1:]]
    return total.solve(penalty), [without_first, *others]


def _fit_spread(
    rows: _Rows, folds: list[np.ndarray], maps: list[Solution], deviation: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights of `relative_spread` for all [2 C + 1, C], and for each fold those fitted without it [K, ...].

    A regression of the logarithm of squared residuals, which the folds' maps leave of what they have not
    seen; then one number for each channel, with which the mean square of residual over spread is 1.
    """

    def pieces(fold: int) -> Iterator[tuple[Tensor, Tensor]]:
        for guess, residual in rows.residuals(folds[fold], maps[fold]):
            yield guess, residual / deviation

    parts = []
    for fold in range(len(folds)):
        parts.append(Moments(2 * len(deviation), len(deviation), deviation.device))
        for guess, residual in pieces(fold):
            parts[-1].add(spread_features(guess), residual.square().clamp(min=LEAST_SQUARE).log())
    total = _merged(parts)
    final, unseen = _cross_fitted(total, parts)
    # Half of a variance's logarithm is the deviation's.
    weights = [torch.cat([w, (b + LOG_CHI_SQUARE)[None]]) / 2 for w, b in (final, *unseen)]
    squares = torch.zeros_like(deviation)
    for fold, weight in enumerate(weights[1:]):
        for guess, residual in pieces(fold):
            squares += (residual / relative_spread(guess, weight)).square().sum(dim=0)
    left = (squares / total.count).sqrt().clamp(min=SPREAD_BOUNDS[0]).log()
    for weight in weights:
        weight[-1] += left
    of_all, *of_folds = (weight.float().cpu() for weight in weights)
    return of_all, torch.stack(of_folds)


def _deviation(total: Moments, parts: list[Moments], unseen: list[Solution]) -> Tensor:
    """Root mean square [C] of what each part's map leaves of it, and no less than the flow can divide by."""
    pairs = zip(parts, unseen, strict=True)
    squares = [part.count * part.squared_error(*solution) for part, solution in pairs]
    deviation = (torch.stack(squares).sum(dim=0) / total.count).clamp(min=0).sqrt()
    variance = total.target_squares / total.count - (total.cross[-1] / total.count).square()
    targets = variance.clamp(min=0).sqrt()
    varying = targets[targets > 1e-6 * targets.max()]
    usual = varying.median() if len(varying) else 1.0
    least = MIN_STD * targets.clamp(min=MIN_STD * usual)  # a constant one has none of its own
    return deviation.maximum(least)


@contextmanager
def threads_of_all(processes: int) -> Iterator[None]:
    """Inside, one of `processes` that share a machine computes with all its cores: the others wait."""
    own = torch.get_num_threads()
    if processes > 1:
        torch.set_num_threads(max(own, cores()))
    try:
        yield
    finally:
        torch.set_num_threads(own)
