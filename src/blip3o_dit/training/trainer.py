"""The Hugging Face Trainer, taught flow matching."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput

from blip3o_dit.config import TRAINING_CONFIG_FILE, TrainingConfig
from blip3o_dit.data.dataset import EmbeddingDataset, shuffled_passes, whole_batch
from blip3o_dit.data.store import batches, write_atomically
from blip3o_dit.evaluation.metrics import FidelitySums
from blip3o_dit.flow.loss import BLIP3oFlowMatchingLoss
from blip3o_dit.flow.path import PathSample
from blip3o_dit.flow.times import training_times
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.source import AffineSource
from blip3o_dit.randomness import named_normal, named_uniform
from blip3o_dit.training.callbacks import ConsoleCallback, EMACallback, JSONLogCallback
from blip3o_dit.training.ema import ExponentialMovingAverage
from blip3o_dit.training.monitor import TrainingMonitor


class NonFiniteLossError(ValueError):
    """The loss became NaN or infinite; raised before the optimizer step, so the weights are intact."""


@dataclass(frozen=True)
class Draw:
    """One micro-batch on its path. Shapes: sample [B, N, C], condition [B, L, C_eva], normalised."""

    sample: PathSample
    source: AffineSource
    condition: Tensor

    @property
    def network_input(self) -> Tensor:
        """x_t in the network's units, [B, N, C]."""
        return self.source.from_flow(self.sample.x_t)


class BLIP3oTrainer(Trainer):
    """Trains a `BLIP3oDiTModel` on an `EmbeddingDataset`.

    Noise, times, condition dropout and the order of each pass are named by (seed, pass, sample index):
    they do not depend on the number of processes, the batch split, workers, evaluation or a restart.

    Args:
        model: with its statistics set; `model.config.flow` says what is trained.
        args: Hugging Face's arguments, see `training_arguments`.
        config: the run's configuration, written beside the weights.
        train_dataset, eval_dataset: the two sides of the split; evaluation is skipped without the second.
        callbacks: further callbacks.
    """

    loss_is_scaled_for_ga = False  # compute_loss returns a mean over the micro-batch

    def __init__(
        self,
        model: BLIP3oDiTModel,
        args: TrainingArguments,
        *,
        config: TrainingConfig,
        train_dataset: EmbeddingDataset,
        eval_dataset: EmbeddingDataset | None = None,
        callbacks: Iterable[TrainerCallback] = (),
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=whole_batch,  # type: ignore[arg-type]
            callbacks=list(callbacks),
        )
        self.config = config
        self.loss_fn = BLIP3oFlowMatchingLoss.from_config(model.config.flow)
        self.monitor = TrainingMonitor()
        self.ema: ExponentialMovingAverage | None = None
        if config.ema_decay > 0:
            self.ema = ExponentialMovingAverage(self.dit, config.ema_decay)
            self.add_callback(EMACallback(self.ema))
        self.add_callback(JSONLogCallback())
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(ConsoleCallback())

    @property
    def dit(self) -> BLIP3oDiTModel:
        """The model, outside of whatever wraps it for several processes."""
        assert isinstance(self.model, BLIP3oDiTModel)
        return self.model

    def draw(self, batch: dict[str, Any], stream: str) -> Draw:
        """Everything random about a step, on the model's device."""
        name: dict[str, Any] = {"seed": self.config.seed, "pass_index": batch["pass_index"]}
        indices = batch["index"]
        condition = self.dit.normalize_condition(batch["eva"])
        source = self.dit.source_of(condition)
        x_1 = source.to_flow(self.dit.normalize_target(batch["clip"]))
        noise = named_normal(indices, x_1.shape[1:], stream=f"{stream} noise", **name)
        uniform = named_uniform(indices, stream=f"{stream} time", **name)
        t = training_times(uniform, self.dit.config.flow)
        sample = self.loss_fn.sample_path(x_1, noise.to(x_1.device), t.to(x_1.device))
        if stream == "training" and self.config.cfg_dropout > 0:
            drop = named_uniform(indices, stream="training condition dropout", **name)
            keep = (drop >= self.config.cfg_dropout).to(condition.device)
            condition = condition * keep[:, None, None]
        return Draw(sample, source, condition)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean loss of a micro-batch. Raises NonFiniteLossError before anything is updated."""
        draw = self.draw(inputs, "training")
        prediction = model(draw.network_input, draw.sample.t, draw.condition, draw.source.mean)
        output = self.loss_fn(prediction, draw.sample)
        if not torch.isfinite(output.loss):
            raise NonFiniteLossError(
                f"step {self.state.global_step + 1}: expected a finite loss, found "
                f"{output.loss.item()} for samples {inputs['index']}; stopped before the "
                "optimizer step (lower --learning_rate, or train without --fp16)"
            )
        self.monitor.add(self.loss_fn, draw.sample, draw.source, prediction, output)
        return (output.loss, prediction) if return_outputs else output.loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Held-out loss, on draws that are the same at every evaluation."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            draw = self.draw(inputs, "evaluation")
            prediction = model(draw.network_input, draw.sample.t, draw.condition, draw.source.mean)
            output = self.loss_fn(prediction, draw.sample)
        return output.loss, None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Held-out loss and metrics of generated tokens, both with the averaged weights if there are any."""
        if self.ema is None:
            return self._evaluate_weights(*args, **kwargs)
        with self.ema.applied(self.dit):
            return self._evaluate_weights(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the monitor's means to a training log line."""
        if "loss" in logs:
            means = self.monitor.pop()
            if means is not None:
                means = self.accelerator.reduce(means, reduction="mean")
                logs.update(TrainingMonitor.describe(means))
        super().log(logs, start_time)

    def _evaluate_weights(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        output = super().evaluation_loop(*args, **kwargs)
        if self.config.eval_samples and isinstance(self.eval_dataset, EmbeddingDataset):
            self.dit.eval()
            metrics = self._generation_metrics(self.eval_dataset)
            output.metrics.update({f"eval_{name}": value for name, value in metrics.items()})  # type: ignore[union-attr]
        return output

    def _generation_metrics(self, dataset: EmbeddingDataset) -> dict[str, float]:
        """Fidelity of generated tokens for the first held-out samples, shared out over the processes."""
        wanted = dataset.indices[: self.config.eval_samples]
        mine = wanted[self.args.process_index :: self.args.world_size]
        sums = FidelitySums(self.dit.target_mean)
        for piece in batches(mine, self.config.eval_batch_size):
            eva, clip = dataset.source.fetch(piece)
            generated = self.dit.generate(
                eva,
                num_inference_steps=self.config.eval_inference_steps,
                seed=self.config.seed,
                sample_index=piece.tolist(),
            )
            sums.add(generated, self.dit.as_trained_on(clip))
        if self.args.world_size > 1:
            state = sums.state.float() if self.args.device.type == "mps" else sums.state
            state = state.to(self.args.device)
            torch.distributed.all_reduce(state)
            sums.state = state.cpu().double()
        return sums.result()

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        dataset = train_dataset or self.train_dataset
        assert isinstance(dataset, EmbeddingDataset)
        config = self.config
        return shuffled_passes(
            dataset, shuffle=config.shuffle, window=config.shuffle_window, seed=config.seed
        )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = output_dir or self.args.output_dir or ""
        super()._save(folder, state_dict)
        if self.args.should_save:
            if self.ema is not None:
                self.ema.save(self.dit, folder)
            write_atomically(f"{folder}/{TRAINING_CONFIG_FILE}", self.config.to_json())
            # A pickle that nothing reads; training_config.json says the same in plain text.
            Path(folder, TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.ema is not None:
            self.ema.load(resume_from_checkpoint)
