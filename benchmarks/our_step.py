"""One training step of ours, as the Trainer takes it, for timing; it needs nothing but the package."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import device
from blip3o_dit.data.checks import Indices, Record
from blip3o_dit.data.dataset import EmbeddingDataset
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.training.arguments import training_arguments
from blip3o_dit.training.config import PAPER_RECIPE, TrainingConfig
from blip3o_dit.training.lengths import with_lengths
from blip3o_dit.training.trainer import BLIP3oTrainer


@dataclass(frozen=True)
class RandomEmbeddings:
    """A source of noise in memory, the same whoever asks; by default 256 samples at full widths."""

    num_tokens: int = 64
    condition_dim: int = 1280
    target_dim: int = 768
    num_samples: int = 256
    path: Path = Path("random embeddings")

    @cached_property
    def tokens(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        shape, widths = (self.num_samples, self.num_tokens), (self.condition_dim, self.target_dim)
        eva, clip = (torch.randn(*shape, width, generator=generator) for width in widths)
        return eva, clip

    @property
    def shard_starts(self) -> np.ndarray:
        return np.array([0, self.num_samples])

    def fetch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        eva, clip = self.tokens
        chosen = torch.as_tensor(indices)
        return eva[chosen], clip[chosen]

    def records(self, indices: Indices | None = None) -> list[Record]:
        return [{"key": str(i)} for i in (range(self.num_samples) if indices is None else indices)]


def our_step(
    model: BLIP3oDiTModel, inputs: dict[str, Any], bf16: bool, **settings: Any
) -> Callable[[], None]:
    """Draws, loss, monitor, backward, clipping, AdamW and averaged weights, by the Trainer's own methods.

    The model is prepared as the Trainer does it: autocast is in what accelerate makes of it. What the
    products see is checked once, when the step is made.

    Raises:
        ValueError: when the products see another dtype than the precision says.
    """
    config = TrainingConfig(
        **{
            "output_dir": tempfile.mkdtemp(),
            "bf16": bf16,
            "cfg_dropout": 0.0,
            "device": "cuda" if device().type == "cuda" else "cpu",
            **PAPER_RECIPE,
            "ema_decay": TrainingConfig.ema_decay,
            "batch_size": len(inputs["index"]),
            **settings,
        }
    )
    model.dit.gradient_checkpointing = config.gradient_checkpointing or config.selective_checkpointing
    dataset = EmbeddingDataset(_like(model), torch.arange(256).numpy())
    config = with_lengths(config, len(dataset))
    arguments = training_arguments(config, evaluate=False)
    trainer = BLIP3oTrainer(model, arguments, config=config, train_dataset=dataset)
    prepared, trainer.optimizer = trainer.accelerator.prepare(model, trainer.create_optimizer())
    prepared.train()
    trainer.state.global_step = 10_000  # averaged weights at their full span

    def gradients() -> None:
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(prepared, trainer._prepare_inputs(inputs))
        trainer.accelerator.backward(loss)

    def step() -> None:
        gradients()
        trainer._clip_grad_norm(prepared)
        trainer.on_pre_optimizer_step()
        trainer.optimizer.step()
        trainer.on_optimizer_step()
        trainer.optimizer.zero_grad()
        trainer.state.global_step += 1  # each step checks the one before
        trainer.on_step_end()

    if not config.compile:
        _check_products(gradients, torch.bfloat16 if bf16 else torch.float32)
        trainer.optimizer.zero_grad()
    trainer.record_passes()  # what is replayed cannot be checked
    return step


def random_batch(model: BLIP3oDiTModel, size: int) -> dict[str, Any]:
    """What a training step takes: `size` samples, where the model is."""
    batch = EmbeddingDataset(_like(model), torch.arange(256).numpy()).__getitems__(range(size))
    return {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _like(model: BLIP3oDiTModel) -> RandomEmbeddings:
    return RandomEmbeddings(*model.config.data_sizes)


class ProductDtypes(TorchDispatchMode):
    """Counts the operations of matrix products by the dtype they are taken in."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left, right = args[-2:]
            self.operations[right.dtype] += left.numel() * right.shape[-1]
        return func(*args, **(kwargs or {}))


def _check_products(function: Callable[[], None], expected: torch.dtype) -> None:
    """All but the last layer, which is float32 in every precision (see `model/layers.py`)."""
    with ProductDtypes() as products:
        function()
    share = products.operations[expected] / products.operations.total()
    if share < 0.5 or set(products.operations) - {expected, torch.float32}:
        raise ValueError(f"products: expected them in {expected}, found {dict(products.operations)}")
