"""How long a run stands still for a checkpoint that it waits for, and for one that is written meanwhile.

A training of tiny batches, whose steps are short beside its checkpoints; only its own loop is timed. The
first checkpoint of a run also takes the memory for the copies, unless a thread had the time to.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.measure import Row, device, synchronize
from blip3o_dit.data.embeddings import open_embeddings
from blip3o_dit.data.store import StoreWriter
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.training.disk import checkpoint_bytes
from blip3o_dit.training.memory import GIB
from blip3o_dit.training.run import build_trainer
from blip3o_dit.training.trainer import BLIP3oTrainer

TOKENS, CONDITION, TARGET = 4, 64, 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--every", type=int, default=12, help="steps between two checkpoints")
    parser.add_argument("--folder", type=Path, help="on the disk that counts (default: a temporary folder)")


def run(arguments: argparse.Namespace) -> list[Row]:
    asked = dict(width=arguments.width, layers=arguments.layers, folder=arguments.folder)
    return [
        measured(goes_on, saves=arguments.saves, every=arguments.every, **asked) for goes_on in (False, True)
    ]


def measured(
    goes_on: bool, *, width: int, layers: int, saves: int, every: int, folder: Path | None = None
) -> Row:
    """One run with so many checkpoints. `goes_on`: while they are written."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        sizes = dict(width=width, layers=layers, steps=saves * every, every=every)
        trainer = _trainer(Path(temporary), goes_on, **sizes)
        watch = _Watch(trainer)
        trainer.train()
        size = checkpoint_bytes(trainer.config, trainer.unwrapped_model.config)
        parameters = trainer.unwrapped_model.num_parameters()
    return {
        "checkpoints": "written meanwhile" if goes_on else "waited for",
        "million parameters": parameters / 1e6,
        "GiB each": size / GIB,
        "first stands still s": watch.delays[0],
        "later stand still s": statistics.median(watch.delays[1:]),
        "until whole s": statistics.median(watch.until_whole[:-1]),  # the last one has no steps beside it
        "step s": statistics.median(watch.steps),
        "step beside a write s": statistics.median(watch.steps_beside) if watch.steps_beside else None,
    }


class _Watch(TrainerCallback):
    """Seconds of steps, and of what the trainer does to save."""

    def __init__(self, trainer: BLIP3oTrainer) -> None:
        self.delays: list[float] = []
        self.until_whole: list[float] = []
        self.steps: list[float] = []
        self.steps_beside: list[float] = []
        self._trainer, self._plain = trainer, trainer._save_checkpoint
        self._began = 0.0
        trainer._save_checkpoint = self._save  # type: ignore[method-assign]
        trainer.add_callback(self)

    def _save(self, *given: Any) -> None:
        synchronize()
        began = time.perf_counter()
        self._plain(*given)
        self.delays.append(time.perf_counter() - began)
        under_way = self._trainer.files._under_way
        if under_way is None:
            self.until_whole.append(self.delays[-1])
        else:
            under_way.add_done_callback(lambda _: self.until_whole.append(time.perf_counter() - began))

    def on_step_begin(self, *_: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *_: Any, **kwargs: Any) -> None:
        synchronize()
        under_way = self._trainer.files._under_way
        beside = under_way is not None and not under_way.done()
        steps = self.steps_beside if beside else self.steps
        steps.append(time.perf_counter() - self._began)


def _trainer(
    folder: Path, goes_on: bool, *, width: int, layers: int, steps: int, every: int
) -> BLIP3oTrainer:
    """On random tokens, and with as little as may be beside the network's own arithmetic."""
    generator = torch.Generator().manual_seed(0)
    sizes = dict(num_tokens=TOKENS, condition_dim=CONDITION, target_dim=TARGET)
    with StoreWriter(folder / "store", **sizes) as writer:
        shapes = ((64, TOKENS, CONDITION), (64, TOKENS, TARGET))
        eva, clip = (torch.randn(shape, generator=generator) for shape in shapes)
        writer.append(eva, clip, [{"key": str(i)} for i in range(64)])
    config = TrainingConfig(
        embeddings_path=str(folder / "store"),
        output_dir=str(folder / "run"),
        model_dim=width,
        num_layers=layers,
        batch_size=2,
        max_steps=steps,
        logging_steps=steps,
        save_steps=every,
        save_total_limit=1,
        eval_split=0.0,
        calibrate=False,
        source="noise",
        async_checkpoints=goes_on,
        cuda_graphs=False,
        device=device().type,
    )
    return build_trainer(open_embeddings(config.embeddings_path), config)
