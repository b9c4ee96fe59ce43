"""Fit the baselines on a training split, ready to be measured."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from blip3o_dit.data.store import EmbeddingSource
from blip3o_dit.evaluation.baselines import (
    Baseline,
    NearestNeighbours,
    NeighbourhoodRidge,
    PositionMean,
    Procrustes,
    ResidualGaussian,
    TokenRidge,
    TrainingMean,
    split_validation,
)
from blip3o_dit.evaluation.methods import BaselineMethod, Method, NeighbourMethod
from blip3o_dit.evaluation.regression import NetworkRegression
from blip3o_dit.evaluation.truth import Track
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel


def fit_baselines(
    source: EmbeddingSource, train: np.ndarray, *, std: Tensor, most: int, seed: int, track: Track
) -> list[Method]:
    """Every baseline; the Gaussian residuals are those of samples held back from the fit.

    Args:
        train: indices in `source`; at most `most` of them are used.
        std: of the training tokens per channel, [C].
        seed: names the samples that are used and held back, and the draws.
    """
    fit, validation = split_validation(train, most=most, seed=seed)
    both = np.sort(np.concatenate([fit, validation]))

    def gaussian(name: str, about: str, final: Baseline, on_fit: Baseline) -> Method:
        return _with_residual(name, about, final, on_fit, source, validation, std, seed)

    def ridge(name: str, about: str, kind: type[TokenRidge] | type[NeighbourhoodRidge]) -> Method:
        final, on_fit = kind.fit_twice(source, fit, validation=validation)
        chosen = f"{about}, penalty {final.penalty:g} chosen on {len(validation)} validation samples"
        return gaussian(name, f"{chosen}; Gaussian residual", final, on_fit)

    makers: dict[str, Callable[[], Method]] = {
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
    return [makers[name]() for name in track(list(makers), "baselines")]


def fit_network(
    like: BLIP3oDiTModel,
    source: EmbeddingSource,
    train: np.ndarray,
    *,
    steps: int,
    std: Tensor,
    most: int,
    seed: int,
    track: Track,
) -> Method:
    """The network of `like`, trained by plain regression on the same samples as the other baselines."""
    fit, validation = split_validation(train, most=most, seed=seed)
    network = NetworkRegression.fit(
        like,
        source,
        fit.tolist(),
        steps=steps,
        seed=seed,
        track=lambda counted: track(list(counted), "network regression"),
    )
    about = f"the model's network, least squares, {steps} steps; Gaussian residual"
    return _with_residual("network regression", about, network, network, source, validation, std, seed)


def _with_residual(
    name: str,
    about: str,
    final: Baseline,
    on_fit: Baseline,
    source: EmbeddingSource,
    validation: np.ndarray,
    std: Tensor,
    seed: int,
) -> Method:
    """`final` as a sampler, with what `on_fit` leaves of the validation samples, if there are any."""
    residual = None
    if len(validation):
        residual = ResidualGaussian.fit(on_fit, source, validation, scale=std)
    return BaselineMethod(name, about, final, residual, seed=seed)
