"""The model's own network, trained by plain regression: what the flow is worth beside the mean alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from blip3o_dit.data.embeddings import Embeddings
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.utils.stateless_random import stateless_generator


@dataclass(frozen=True)
class NetworkRegression:
    """The network with x_t = 0 at t = 0, its output read as x_1 and fitted by least squares."""

    model: BLIP3oDiTModel

    @classmethod
    def fit(
        cls,
        like: BLIP3oDiTModel,
        source: Embeddings,
        indices: Sequence[int],
        *,
        steps: int,
        batch_size: int = 32,
        learning_rate: float = 1e-3,
        seed: int = 0,
        track: Callable[[Iterable[int]], Iterable[int]] | None = None,
    ) -> NetworkRegression:
        """AdamW, linear warm-up over a twentieth of the steps, then a cosine to zero.

        Args:
            like: gives the sizes and the data's statistics; it is not changed.
            track: wraps the iterable of steps, for a progress bar.
        """
        torch.manual_seed(seed)
        model = BLIP3oDiTModel(like.config)
        model.to(torch.device(like.device))  # type: ignore[arg-type]
        model.set_statistics(
            condition=(like.condition_mean, like.condition_std), target=(like.target_mean, like.target_std)
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
        schedule = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 20), steps)
        generator = stateless_generator(seed, "regression batches")
        model.train()
        for _ in track(range(steps)) if track else range(steps):
            eva, clip = source.fetch(generator.choice(indices, size=min(batch_size, len(indices))))
            x_1 = model.normalize_target(clip.to(model.device))
            loss = (_output(model, eva) - x_1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        return cls(model.eval())

    @torch.no_grad()
    def predict(self, eva: Tensor) -> Tensor:
        """[n, L, C_eva] -> [n, N, C]."""
        return self.model.denormalize_target(_output(self.model, eva)).cpu()


def _output(model: BLIP3oDiTModel, eva: Tensor) -> Tensor:
    condition = model.normalize_condition(eva.to(model.device))
    x_t = condition.new_zeros(len(eva), model.config.num_tokens, model.config.in_channels)
    return model(x_t, x_t.new_zeros(len(eva)), condition)
