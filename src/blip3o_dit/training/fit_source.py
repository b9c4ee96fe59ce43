"""Fit the ridge regressions that an informed source starts from.

A map is nearer to the samples it was fitted on than to new ones: a flow trained on what it leaves of them
would learn residuals that are too small. So the samples are cut into folds, and in training a sample's mean
is by the map that was fitted without its fold (cross-fitting; Chernozhukov et al., arXiv 1608.00060). What
is generated, and what was not fitted, starts from the map fitted on all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip3o_dit.data.dataset import choose_samples, group_ranks
from blip3o_dit.data.embeddings import Embeddings, TransformedEmbeddings, batches
from blip3o_dit.flow.path import AffineSource
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.layers import without_autocast
from blip3o_dit.ridge import USUAL_PENALTY, Moments, principal_components, search_penalty, source_features
from blip3o_dit.utils.distributed import cores
from blip3o_dit.utils.validation import damage_refused

logger = logging.getLogger(__name__)

FOLDS = 5
FOLDS_FILE = "source_folds.safetensors"

# Of its deviation, as noise, for a channel that ridge predicts exactly: the flow divides by it.
MIN_STD = 0.01

AT_ONCE = 16  # samples


@dataclass
class SourceFolds:
    """The maps of training, in the network's units, one for each fold: fitted on the samples of the others.

    `weight` [K, F, C] and `bias` [K, C], float32; `samples` [n], int64, ascending, and the fold of each,
    `fold` [n], int64.
    """

    weight: Tensor
    bias: Tensor
    samples: Tensor
    fold: Tensor

    def source_distribution(self, model: BLIP3oDiTModel, condition: Tensor, index: list[int]) -> AffineSource:
        """As `model.source_distribution`, by maps that have not seen the samples.

        Args:
            condition: normalised [B, L, C_eva]. index: the B samples' indices in the data.
        """
        source = model.source_distribution(condition)
        folds = self.folds_of(index)
        if source.mean is None or (folds < 0).all():
            return source
        if self.weight.device != condition.device:
            self.weight, self.bias = self.weight.to(condition.device), self.bias.to(condition.device)
        mean = source.mean.clone()
        for fold in np.unique(folds[folds >= 0]).tolist():
            rows = torch.from_numpy(np.flatnonzero(folds == fold)).to(condition.device)
            with without_autocast(condition.device):
                features = model.source_features(condition[rows].float())
                mean[rows] = features @ self.weight[fold] + self.bias[fold]
        return AffineSource(mean, source.std)

    def folds_of(self, index: list[int]) -> np.ndarray:
        """The fold of each of these samples, -1 for those that no map was fitted on."""
        samples, wanted = self.samples.numpy(), np.asarray(index)
        places = np.searchsorted(samples, wanted).clip(max=len(samples) - 1)
        return np.where(samples[places] == wanted, self.fold.numpy()[places], -1)

    def save(self, folder: Path) -> None:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in vars(self).items()}
        save_file(tensors, folder / FOLDS_FILE)


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
    components, size = None, model.config.flow.source_size
    if model.config.flow.source_components:
        components = principal_components(seen, np.sort(chosen), AT_ONCE, size)[1].float()
    rows = _Rows(seen, components, size, chosen[:1])
    parts = [rows.moments(fold) for fold in folds]
    total = rows.moments(chosen[:0])
    for part in parts:
        total.merge(part)

    if len(parts) > 1:
        penalty, without_first = search_penalty(total.without(parts[0]), parts[0])
        final = total.solve(penalty)
        unseen = [without_first, *(total.without(part).solve(penalty) for part in parts[1:])]
    else:
        final = total.solve(USUAL_PENALTY)
        unseen = [final]
    weight, bias = rows.plain(final)
    arguments = {
        "weight": weight,
        "bias": bias,
        "std": _deviation(total, parts, unseen),
        "components": None if components is None else components.cpu(),
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
    )


class _Rows:
    """Features [F] and targets [C] of tokens, about origins near the data: see `Moments`."""

    def __init__(self, seen: Embeddings, components: Tensor | None, size: int, first: np.ndarray) -> None:
        self.seen, self.components, self.size = seen, components, size
        self.origins = [rows.mean(dim=0) for rows in self._read(first)]

    def moments(self, samples: np.ndarray) -> Moments:
        features, targets = self.origins
        sums = Moments(len(features), len(targets), features.device)
        for piece in batches(samples, AT_ONCE):
            found = self._read(piece)
            sums.add(found[0] - features, found[1] - targets)
        return sums

    def plain(self, solution: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """A map (W [F, C], bias [C]) between what is about the origins, as one of the features themselves."""
        (weight, bias), (features, targets) = solution, self.origins
        return weight.float().cpu(), (bias + targets - features @ weight).float().cpu()

    def _read(self, samples: np.ndarray) -> tuple[Tensor, Tensor]:
        eva, clip = self.seen.fetch(samples)
        features = source_features(eva, self.components, self.size)
        return features.flatten(0, 1).double(), clip.flatten(0, 1).double()


def _deviation(total: Moments, parts: list[Moments], unseen: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Root mean square [C] of what each part's map leaves of it, and no less than the flow can divide by."""
    pairs = zip(parts, unseen, strict=True)
    squares = [part.count * part.squared_error(*solution) for part, solution in pairs]
    deviation = (torch.stack(squares).sum(dim=0) / total.count).clamp(min=0).sqrt()
    variance = total.target_squares / total.count - (total.cross[-1] / total.count).square()
    targets = variance.clamp(min=0).sqrt()
    varying = targets[targets > 1e-6 * targets.max()]
    usual = varying.median() if len(varying) else 1.0
    least = MIN_STD * targets.clamp(min=MIN_STD * usual)  # a constant one has none of its own
    return deviation.maximum(least).float().cpu()


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
