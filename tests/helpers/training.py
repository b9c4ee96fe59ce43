"""Small trainings for tests, on the stores of `stores.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from blip3o_dit.data.dataset import EmbeddingDataset, split_samples
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.training.arguments import training_arguments
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.training.run import train
from blip3o_dit.training.trainer import BLIP3oTrainer

# Of 48 samples 40 to train on: 5 steps an epoch.
TWO_EPOCHS: dict[str, Any] = dict(
    model_dim=32,
    num_epochs=2,
    eval_batch_size=8,
    learning_rate=1e-3,
    eval_split=1 / 6,
    logging_steps=2,
    eval_steps=5,
    save_steps=5,
    eval_samples=4,
)


def tiny_training(data: Path, output: Path, **changes: Any) -> TrainingConfig:
    """One narrow block on the CPU; what is neither here nor in `changes` is the default."""
    settings: dict[str, Any] = dict(
        embeddings_path=str(data),
        output_dir=str(output),
        model_dim=16,
        num_layers=1,
        num_heads=2,
        batch_size=8,
        eval_inference_steps=2,
        warmup_steps=0,
        num_workers=0,
        device="cpu",
    )
    return TrainingConfig(**(settings | changes))


def config_for(store: EmbeddingStore, output: Path, **changes: Any) -> TrainingConfig:
    """Two epochs with everything on: evaluation, checkpoints, averages."""
    return tiny_training(store.path, output, **(TWO_EPOCHS | changes))


def make_trainer(store: EmbeddingStore, output: Path, **changes: Any) -> BLIP3oTrainer:
    """The trainer of `config_for` on a model whose statistics were not fitted."""
    config = config_for(store, output, **changes)
    split = split_samples(store, eval_split=config.eval_split, seed=config.seed)
    torch.manual_seed(0)
    model = BLIP3oDiTModel(config.model(num_tokens=9, condition_dim=12, target_dim=8))
    return BLIP3oTrainer(
        model,
        training_arguments(config, evaluate=True),
        config=config,
        train_dataset=EmbeddingDataset(store, split.train),
        eval_dataset=EmbeddingDataset(store, split.eval),
    )


def train_model(store: EmbeddingStore, output: Path, **changes: Any) -> Path:
    """The folder of a model that took four steps."""
    settings = dict(max_steps=4, eval_split=0.4, eval_samples=2)
    return train(tiny_training(store.path, output, **(settings | changes)))


def same_files(a: Path, b: Path, *names: str) -> bool:
    """Whether files of these names are equal in two folders."""
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts are equal to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
