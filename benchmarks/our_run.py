"""Steps of ours in the Trainer's own loop, loader included, for timing; it needs nothing but the package."""

from __future__ import annotations

import gc
import tempfile
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from benchmarks.measure import device, paper_config, peak_gib, synchronize
from benchmarks.our_step import RandomEmbeddings
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.config import BLIP3oDiTConfig
from blip3o_dit.training import run
from blip3o_dit.training.config import LOW_MEMORY_DEFAULTS, PAPER_RECIPE, TrainingConfig
from blip3o_dit.training.ema import ExponentialMovingAverage
from blip3o_dit.training.memory import forecast
from blip3o_dit.training.metrics import PASSES_PER_STEP, forward_flops


@dataclass(frozen=True)
class Ran:
    """Of one step, the mean: its seconds, share of them waiting for data, operations; most GiB at a time."""

    seconds: float
    data_wait: float
    flops: float
    peak: float
    forecast: float


def run_steps(
    sizes: dict[str, Any],
    batch: int,
    *,
    steps: int = 10,
    warm_up: int = 3,
    around: AbstractContextManager[Any] | None = None,
    **settings: Any,
) -> Ran:
    """Train a network of these sizes (`BLIP3oDiTConfig`'s) on noise, as `blip3o-dit train` up to its files.

    After `warm_up` steps memory has settled, kernels are chosen, blocks compiled: then `around` is entered,
    and `steps` count. `settings` are `TrainingConfig`'s. Weights are averaged as in a run that is past its
    first hundreds of steps: every `ema_every` of them, which is once in ten by default.
    """
    gc.collect()  # a trainer and its callbacks refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = paper_config(**sizes)
    data = RandomEmbeddings(*model.data_sizes, num_samples=max(4 * batch, 256))
    low = LOW_MEMORY_DEFAULTS if settings.get("memory") == "low" else {}
    names = ("model_dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim")
    with tempfile.TemporaryDirectory() as folder:
        config = TrainingConfig(
            **{
                "output_dir": folder,
                "device": device().type,
                "batch_size": batch,
                "max_steps": warm_up + steps,
                "logging_steps": warm_up + steps,
                "eval_split": 0.0,
                **{name: getattr(model, name) for name in names},
                **PAPER_RECIPE,
                "ema_decay": TrainingConfig.ema_decay,
                **low,
                **settings,
            }
        )
        needed = forecast(config, model, device()).total / 2**30
        with mock.patch.object(run, "BLIP3oDiTModel", _made_there):
            trainer = run.build_trainer(data, config)
        decay = mock.patch.object(ExponentialMovingAverage, "_decay", lambda average, step: average.decay)
        trainer.args.save_strategy = SaveStrategy.NO
        clock = Clock(warm_up, warm_up + steps, around or nullcontext())
        trainer.add_callback(clock)
        with decay:
            trainer.train()
        flops = PASSES_PER_STEP * forward_flops(model) * batch
        return Ran(clock.seconds / steps, clock.waited, flops, peak_gib(), needed)


def _made_there(config: BLIP3oDiTConfig) -> BLIP3oDiTModel:
    """A new model on the device: a billion numbers take twenty seconds to draw on one core."""
    with device():
        return BLIP3oDiTModel(config)


class Clock(TrainerCallback):
    """Seconds from the end of step `first` to that of step `last`."""

    def __init__(self, first: int, last: int, around: AbstractContextManager[Any]) -> None:
        self.seconds, self.waited = 0.0, 0.0
        self._first, self._last, self._around, self._inside = first, last, around, ExitStack()

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step not in (self._first, self._last):
            return
        synchronize()
        if state.global_step == self._first:
            self._inside.enter_context(self._around)
            self.seconds = -time.perf_counter()
        else:
            self.seconds += time.perf_counter()
            self._inside.close()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        self.waited = (logs or {}).get("data_wait", self.waited)
