"""Fit the ridge regression that an informed source starts from."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from blip3o_dit.data.source import TransformedEmbeddings
from blip3o_dit.data.statistics import ChannelAccumulator
from blip3o_dit.data.store import EmbeddingSource, batches
from blip3o_dit.evaluation.baselines import NeighbourhoodRidge, TokenRidge, split_validation
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel

# A channel that ridge predicts exactly still gets this much noise: the flow divides by it.
LEAST_DEVIATION = 0.01


def fit_source(
    model: BLIP3oDiTModel, source: EmbeddingSource, train: np.ndarray, *, most: int, seed: int
) -> dict[str, Tensor | None]:
    """The arguments of `BLIP3oDiTModel.set_source`, from at most `most` training samples.

    A tenth of them chooses the penalty and gives the residual's deviation, without having been fitted.
    """
    seen = TransformedEmbeddings(source, model.normalize_condition, model.normalize_target)
    fit, validation = split_validation(train, most=most, seed=seed)
    components = None
    final: TokenRidge | NeighbourhoodRidge
    before: TokenRidge | NeighbourhoodRidge
    if model.config.flow.source == "ridge_3x3":
        zero = torch.zeros(source.condition_dim)
        final, before = NeighbourhoodRidge.fit_twice(seen, fit, validation=validation, mean=zero)
        bias, components = final.bias, final.components
    else:
        final, before = TokenRidge.fit_twice(seen, fit, validation=validation)
        bias = final.bias - final.origin @ final.weight
    residuals = ChannelAccumulator(source.target_dim)
    for piece in batches(validation if len(validation) else fit, 64):
        eva, clip = seen.fetch(piece)
        residuals.add(clip - before.predict(eva))
    deviation = (residuals.squares / residuals.count + residuals.mean.square()).sqrt()
    std = deviation.clamp(min=LEAST_DEVIATION).float()
    return {"weight": final.weight, "bias": bias, "std": std, "components": components}
