"""Exponential moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.loading import EMA_FILE, EMA_VARIANT
from blip3o_dit.training.fsdp import own_part, shard_like, sharded_parameters, whole_tensors
from blip3o_dit.utils.validation import damage_refused

# An update takes in several steps only while they are at most this share of what the average spans.
SHARE_OF_SPAN = 1 / 20


def as_float32(name: str, parameter: Tensor) -> Tensor:
    return parameter.float()


class ExponentialMovingAverage:
    """theta_ema <- d_n theta_ema + (1 - d_n) theta, with d_n = min(decay, (1 + n) / (10 + n)).

    The warm-up lets short runs forget their initialisation: after n updates the average spans about the
    last n / 9 of them until `decay` takes over. Kept in float32 on the model's device, and sharded as it is.

    With `every` above 1 it is brought up to date after some steps only, by the weights there and the product
    of the decays since the last time. Which steps these are depends on n alone: see `is_due`. In between,
    evaluations and checkpoints have the average of the last such step.
    """

    def __init__(self, model: BLIP3oDiTModel, decay: float, every: int = 1) -> None:
        self.decay, self.every = decay, every
        self.weights = {n: p.detach().clone().float() for n, p in model.named_parameters()}

    def lay_out_like(self, model: BLIP3oDiTModel) -> None:
        """Follow the model's weights to where they are now; of sharded ones each process keeps its part."""
        for name, parameter in sharded_parameters(model).items():
            self.weights[name] = shard_like(self.weights[name], parameter)

    def is_due(self, step: int) -> bool:
        """Whether the average changes after this optimizer step: at the multiples of `every`, or of so many
        steps as are a twentieth of what it spans then, which is every step up to the 349th."""
        span = 1.0 / (1.0 - self._decay(step))
        return step % max(1, min(self.every, int(SHARE_OF_SPAN * span))) == 0

    def _decay(self, step: int) -> float:
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(
        self,
        model: BLIP3oDiTModel,
        num_updates: int,
        exact: Callable[[str, Tensor], Tensor] = as_float32,
    ) -> None:
        """Fold in the weights after optimizer step number `num_updates`, counted from 1, if it is due.

        `exact` gives the float32 value of a weight in another dtype.
        """
        if not self.is_due(num_updates):
            return
        last = next(step for step in range(num_updates - 1, -1, -1) if self.is_due(step))
        share = 1.0 - math.prod(self._decay(step) for step in range(last + 1, num_updates + 1))
        current = sharded_parameters(model)
        averages = [own_part(self.weights[name]) for name in current]
        values = [own_part(parameter.detach()) for parameter in current.values()]
        if all(value.dtype == torch.float32 for value in values):
            torch._foreach_lerp_(averages, values, share)
            return
        for name, average, value in zip(current, averages, values, strict=True):  # one float32 copy at a time
            average.lerp_(exact(name, value), share)

    @torch.no_grad()
    def copy_into(self, model: BLIP3oDiTModel) -> None:
        """Give the model the averaged weights."""
        for name, parameter in sharded_parameters(model).items():
            parameter.copy_(self.weights[name])

    @contextmanager
    def applied(self, model: BLIP3oDiTModel) -> Iterator[None]:
        """Inside, the model has the averaged weights; afterwards its own again, bit for bit.

        Float32 weights change places with their averages, one at a time; of others, which cannot hold an
        average, a copy is kept.
        """
        parameters = sharded_parameters(model).items()
        own = {name: p.detach().clone() for name, p in parameters if p.dtype != torch.float32}
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model, own)

    @torch.no_grad()
    def _exchange(self, model: BLIP3oDiTModel, own: Mapping[str, Tensor] | None = None) -> None:
        """Float32 weights and averages change places; other weights become their averages, or `own`."""
        for name, parameter in sharded_parameters(model).items():
            average = self.weights[name]
            if parameter.dtype == torch.float32:
                kept = parameter.detach().clone()
                parameter.copy_(average)
                average.copy_(kept)
            else:
                parameter.copy_(average if own is None else own[name])

    def save(
        self,
        model: BLIP3oDiTModel,
        folder: str | Path,
        *,
        write: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Write `model.ema.safetensors`: averaged weights, and the model's statistics.

        All processes must call it, and one of them with `write`: parts of weights are put together. An
        average in another dtype than float32 cannot be continued from exactly.
        """
        averaged = whole_tensors(self.weights, keep=write)
        if not write:
            return
        state = model.state_dict() | {name: value.to(dtype) for name, value in averaged.items()}
        model.save_pretrained(folder, state_dict=state, variant=EMA_VARIANT)

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote. Raises ValueError when the file is missing or does not fit."""
        file = Path(folder) / EMA_FILE
        if not file.is_file():
            raise ValueError(f"{file}: expected averaged weights to resume from, found none")
        with damage_refused(file):
            saved = load_file(file)
        for name, average in self.weights.items():
            if name not in saved or saved[name].shape != average.shape:
                raise ValueError(f"{file}: {name}: expected shape {list(average.shape)}")
            average.copy_(shard_like(saved[name], average))
