"""The Hugging Face Trainer, taught flow matching."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput

from blip3o_dit.config import TRAINING_CONFIG_FILE, TrainingConfig
from blip3o_dit.data.dataset import EmbeddingDataset, NamedDraws, shuffled_passes, whole_batch
from blip3o_dit.data.store import batches, write_atomically
from blip3o_dit.distributed import Processes
from blip3o_dit.evaluation.metrics import FidelitySums
from blip3o_dit.flow.loss import BLIP3oFlowMatchingLoss
from blip3o_dit.flow.path import PathSample
from blip3o_dit.flow.times import training_times
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.source import AffineSource
from blip3o_dit.training.callbacks import (
    BeforeOptimizerStep,
    ConsoleCallback,
    EMACallback,
    JSONLogCallback,
    ShardingCallback,
)
from blip3o_dit.training.ema import ExponentialMovingAverage
from blip3o_dit.training.monitor import FiniteLosses, TrainingMonitor
from blip3o_dit.training.sharding import check_sharding
from blip3o_dit.training.throughput import PASSES_PER_STEP, Throughput, forward_flops, matmul_rate


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
            train_dataset=_with_draws(train_dataset, config.seed, "training"),
            eval_dataset=eval_dataset and _with_draws(eval_dataset, config.seed, "evaluation"),
            data_collator=whole_batch,  # type: ignore[arg-type]
            callbacks=list(callbacks),
        )
        self.config = config
        self.processes = Processes(args.process_index, args.world_size, args.device)
        check_sharding(self.accelerator.state)
        self.loss_fn = BLIP3oFlowMatchingLoss.from_config(model.config.flow)
        self.monitor = TrainingMonitor()
        # Waiting for a loss would leave a GPU idle: there it is looked at when its step is about to be taken.
        self.finite_losses = FiniteLosses(deferred=args.device.type == "cuda")
        self.add_callback(BeforeOptimizerStep(self.finite_losses.check))
        self._throughput: Throughput | None = None
        self.dit.dit.selective_checkpointing = config.selective_checkpointing
        if config.compile:
            self.dit.dit.compile_blocks()
        self.ema: ExponentialMovingAverage | None = None
        if config.ema_decay > 0:
            self.ema = ExponentialMovingAverage(self.dit, config.ema_decay)
            self.add_callback(EMACallback(self.ema))
        self.add_callback(ShardingCallback(self.ema))
        self.add_callback(JSONLogCallback())
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(ConsoleCallback())

    @property
    def dit(self) -> BLIP3oDiTModel:
        """The model, outside of whatever wraps it for several processes."""
        assert isinstance(self.model, BLIP3oDiTModel)
        return self.model

    def draw(self, batch: dict[str, Any], *, training: bool) -> Draw:
        """A batch on its path; the condition is dropped for some samples in training only."""
        condition = self.dit.normalize_condition(batch["eva"])
        source = self.dit.source_of(condition)
        x_1 = source.to_flow(self.dit.normalize_target(batch["clip"]))
        t = training_times(batch["time"], self.dit.config.flow)
        sample = self.loss_fn.sample_path(x_1, batch["noise"], t)
        if training and self.config.cfg_dropout > 0:
            keep = batch["drop"] >= self.config.cfg_dropout
            condition = condition * keep[:, None, None]
        return Draw(sample, source, condition)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean loss of a micro-batch. A NonFiniteLossError comes before anything is updated."""
        draw = self.draw(inputs, training=True)
        prediction = self._predict(model, draw)
        output = self.loss_fn(prediction, draw.sample)
        self.finite_losses.add(output.loss, self.state.global_step + 1, inputs["index"])
        if self._throughput is not None:
            self._throughput.count(len(inputs["index"]))
        self.monitor.add(self.loss_fn, draw.sample, draw.source, prediction, output)
        return (output.loss, prediction) if return_outputs else output.loss

    def _predict(self, model: nn.Module, draw: Draw) -> Tensor:
        dtype = self.dit.compute_dtype
        condition = draw.condition.to(dtype)
        return model(draw.network_input.to(dtype), draw.sample.t, condition, draw.source.mean)

    def evaluation_loop(
        self, dataloader: DataLoader, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Held-out loss and metrics of generated tokens, both with the averaged weights if there are any.

        In place of the Trainer's loop, whose result depends on the number of processes: it fills up the last
        batches with samples that it has seen.
        """
        dataset = dataloader.dataset
        assert isinstance(dataset, EmbeddingDataset)
        self.dit.eval()
        with nullcontext() if self.ema is None else self.ema.applied(self.dit):
            metrics = {"loss": self._held_out_loss(dataset)}
            if self.config.eval_samples:
                metrics |= self._generation_metrics(dataset)
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(None, None, named, len(dataset))  # type: ignore[arg-type]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the monitor's means to a training log line."""
        if "loss" in logs:
            means = self.monitor.pop()
            if means is not None:
                means = self.accelerator.reduce(means, reduction="mean")
                logs.update(TrainingMonitor.describe(means))
            if self._throughput is not None:
                logs.update(self._throughput.pop(self.args.world_size))
        super().log(logs, start_time)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of the next optimizer step, and how long they were waited for."""
        if self._throughput is None:
            self._throughput = self._measure_throughput()
        with self._throughput.waiting():
            return super().get_batch_samples(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self._not_training():
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._not_training():
            super()._save_checkpoint(*args, **kwargs)

    def _not_training(self) -> AbstractContextManager[None]:
        return nullcontext() if self._throughput is None else self._throughput.pause()

    def _measure_throughput(self) -> Throughput:
        config, device = self.dit.config, self.args.device
        half = torch.bfloat16 if self.config.bf16 else torch.float16
        dtype = half if self.config.bf16 or self.config.fp16 else self.dit.compute_dtype
        rate = matmul_rate(config, self.config.batch_size, device, dtype)
        return Throughput(PASSES_PER_STEP * forward_flops(config), rate)

    def _held_out_loss(self, dataset: EmbeddingDataset) -> float:
        """Mean over all samples, on draws that are the same at every evaluation."""
        pieces = list(batches(range(len(dataset)), self.config.eval_batch_size))
        mine, counts = zip(*self.processes.share(pieces), strict=True)
        loader = DataLoader(
            dataset,
            batch_sampler=mine,
            num_workers=self.config.num_workers,
            collate_fn=whole_batch,  # type: ignore[arg-type]
        )
        self.callback_handler.eval_dataloader = loader
        total = torch.zeros(2, dtype=torch.float64)  # of the losses, and of the samples
        for batch, counted in zip(loader, counts, strict=True):
            with torch.no_grad(), self.accelerator.autocast():
                draw = self.draw(self._prepare_inputs(batch), training=False)
                loss = self.loss_fn(self._predict(self.dit, draw), draw.sample).loss
            if counted:
                samples = len(batch["index"])
                total += torch.tensor([samples * float(loss), samples], dtype=torch.float64)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        loss_sum, samples = self.processes.sum(total).tolist()
        return loss_sum / samples

    def _generation_metrics(self, dataset: EmbeddingDataset) -> dict[str, float]:
        """Fidelity of generated tokens for the first held-out samples."""
        wanted = dataset.indices[: self.config.eval_samples]
        sums = FidelitySums(self.dit.target_mean)
        for piece, counted in self.processes.share(list(batches(wanted, self.config.eval_batch_size))):
            eva, clip = dataset.source.fetch(piece)
            generated = self.dit.generate(
                eva,
                num_inference_steps=self.config.eval_inference_steps,
                seed=self.config.seed,
                sample_index=piece.tolist(),
            )
            if counted:
                sums.add(generated, self.dit.as_trained_on(clip))
        sums.state = self.processes.sum(sums.state)
        return sums.result()

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        dataset = train_dataset or self.train_dataset
        assert isinstance(dataset, EmbeddingDataset)
        config = self.config
        return shuffled_passes(
            dataset,
            shuffle=config.shuffle,
            window=config.shuffle_window,
            seed=config.seed,
            global_batch=config.batch_size * self.args.world_size * config.gradient_accumulation_steps,
        )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = output_dir or self.args.output_dir or ""
        super()._save(folder, state_dict)
        if self.ema is not None:
            self.ema.save(self.dit, folder, write=self.args.should_save)
        if self.args.should_save:
            write_atomically(f"{folder}/{TRAINING_CONFIG_FILE}", self.config.to_json())
            # A pickle that nothing reads; training_config.json says the same in plain text.
            Path(folder, TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.ema is not None:
            self.ema.load(resume_from_checkpoint)


def _with_draws(dataset: EmbeddingDataset, seed: int, stream: str) -> EmbeddingDataset:
    return EmbeddingDataset(dataset.source, dataset.indices, NamedDraws(seed, stream))
