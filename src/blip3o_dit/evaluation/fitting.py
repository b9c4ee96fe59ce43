"""Fit the baselines on a training split, ready to be measured."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from blip3o_dit.data.embeddings import Embeddings
from blip3o_dit.evaluation.baselines import (
    Baseline,
    NearestNeighbours,
    PositionMean,
    Procrustes,
    ResidualGaussian,
    TrainingMean,
    split_validation,
)
from blip3o_dit.evaluation.reference import Track
from blip3o_dit.evaluation.regression import NetworkRegression
from blip3o_dit.evaluation.samplers import BaselineMethod, NeighbourMethod, Sampler
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.ridge import NeighbourhoodRidge, TokenRidge


def fit_baselines(
    source: Embeddings,
    train: np.ndarray,
    *,
    std: Tensor,
    most: int,
    seed: int,
    track: Track,
    network: BLIP3oDiTModel | None = None,
    network_steps: int = 0,
) -> list[Sampler]:
    """Every baseline; the Gaussian residuals are those of samples held back from the fit.

    Args:
        train: indices in `source`; at most `most` of them are used.
        std: of the training tokens per channel, [C].
        seed: names the samples that are used and held back, and the draws.
        network, network_steps: also train this model's network by plain regression, for so many steps.
    """
    fit, validation = split_validation(train, most=most, seed=seed)
    both = np.sort(np.concatenate([fit, validation]))

    def gaussian(name: str, about: str, final: Baseline, on_fit: Baseline) -> Sampler:
        residual = None
        if len(validation):
            residual = ResidualGaussian.fit(on_fit, source, validation, scale=std)
        return BaselineMethod(name, about, final, residual, seed=seed)

    def ridge(name: str, about: str, kind: type[TokenRidge] | type[NeighbourhoodRidge]) -> Sampler:
        final, on_fit = kind.fit_twice(source, fit, validation=validation)
        chosen = f"{about}, penalty {final.penalty:g} chosen on {len(validation)} validation samples"
        return gaussian(name, f"{chosen}; Gaussian residual", final, on_fit)

    makers: dict[str, Callable[[], Sampler]] = {
        "training mean": lambda: gaussian(
            "training mean",
            "the training split's mean token; Gaussian residual",
            TrainingMean.fit(source, both),
            TrainingMean.fit(source, fit),
        ),
        "position mean": lambda: gaussian(
            "position mean",
            "the training split's mean token at each position; Gaussian residual",
            PositionMean.fit(source, both),
            PositionMean.fit(source, fit),
        ),
        "ridge": lambda: ridge(
            "ridge", "linear map from each condition token to the token there", TokenRidge
        ),
        "ridge 3x3": lambda: ridge(
            "ridge 3x3", "linear map from the 3x3 condition tokens around each position", NeighbourhoodRidge
        ),
        "procrustes": lambda: gaussian(
            "procrustes",
            "rotation and scale of each condition token; Gaussian residual",
            Procrustes.fit(source, both),
            Procrustes.fit(source, fit),
        ),
        "nearest neighbours": lambda: NeighbourMethod(NearestNeighbours.fit(source, both), seed=seed),
    }
    found = [makers[name]() for name in track(list(makers), "baselines")]
    if network is not None and network_steps:
        regression = NetworkRegression.fit(
            network,
            source,
            fit.tolist(),
            steps=network_steps,
            seed=seed,
            track=lambda steps: track(list(steps), "network regression"),
        )
        about = f"the model's network, least squares, {network_steps} steps; Gaussian residual"
        found.append(gaussian("network regression", about, regression, regression))
    return found
