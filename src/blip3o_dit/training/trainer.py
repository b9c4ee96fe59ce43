"""The Hugging Face Trainer, taught flow matching."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from blip3o_dit.data.dataset import BatchNoise, EmbeddingDataset, ShuffledSampler, training_sampler
from blip3o_dit.data.embeddings import batches
from blip3o_dit.data.worker_batches import whole_batch
from blip3o_dit.flow.loss import BLIP3oFlowMatchingLoss
from blip3o_dit.flow.path import FlowBatch, PathSample
from blip3o_dit.metrics.fidelity import FidelitySums
from blip3o_dit.training.base_trainer import ExactResumeTrainer
from blip3o_dit.training.checkpoint import global_batch
from blip3o_dit.training.extension import extended_schedule
from blip3o_dit.training.muon import MuonWithAdamW
from blip3o_dit.training.stopping import outlive_stops
from blip3o_dit.utils.progress import progress
from blip3o_dit.utils.stateless_random import stateless_permutation

SCORED_SAMPLES = 64  # held back, of which each evaluation takes the energy score


class BLIP3oTrainer(ExactResumeTrainer):
    """Trains a `BLIP3oDiTModel` on an `EmbeddingDataset`.

    Noise, times, condition dropout and the order of each epoch are functions of (seed, epoch, sample index):
    they do not depend on the number of processes, the batch split, workers, evaluation or a restart.
    """

    loss_is_scaled_for_ga = False  # compute_loss returns a mean over the micro-batch

    @cached_property
    def loss_fn(self) -> BLIP3oFlowMatchingLoss:
        return BLIP3oFlowMatchingLoss.from_config(self.unwrapped_model.config.flow)

    def train_sampler(self, dataset: EmbeddingDataset) -> ShuffledSampler:
        config = self.config
        return training_sampler(
            dataset,
            shuffle=config.shuffle,
            window=config.shuffle_window,
            seed=config.seed,
            global_batch=global_batch(config, self.args.world_size),
        )

    def flow_batch(self, batch: dict[str, Any], *, training: bool) -> FlowBatch[PathSample]:
        """A batch on its path; in training the source's mean is by maps that have not seen the samples, and
        the condition is dropped for some of them."""
        model, source_of = self.unwrapped_model, None
        if training and self.source_folds is not None:
            source_of = partial(self.source_folds.source_distribution, model, index=batch["index"])
        return model.flow_batch(
            batch["eva"],
            batch["clip"],
            batch["noise"],
            batch["u_time"],
            u_dropout=batch["u_dropout"] if training else None,
            source_of=source_of,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean loss of a micro-batch. The step of one that is not finite changes no weight."""
        flow = self.flow_batch(inputs, training=True)
        prediction = flow.predict(model)
        output = self.loss_fn(prediction, flow.sample)
        self.losses.add(output.loss, self.state.global_step + 1, inputs)
        if self._throughput is not None:
            self._throughput.count(len(inputs["index"]))
        mean = None if self.unwrapped_model.config.standardize else self.unwrapped_model.target_mean.float()
        self.step_metrics.add(self.loss_fn, flow.sample, flow.source, prediction, output, mean)
        return (output.loss, prediction) if return_outputs else output.loss

    def loss_again(self, batch: dict[str, Any]) -> Tensor:
        with self.compute_loss_context_manager():
            flow = self.flow_batch(batch, training=True)
            return self.loss_fn(flow.predict(self.unwrapped_model), flow.sample).loss

    def evaluation_loop(
        self, dataloader: DataLoader, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Held-out loss, metrics of generated tokens and the energy score of samples held back, all with the
        averaged weights if there are any.

        In place of the Trainer's loop, whose result depends on the number of processes: it fills up the last
        batches with samples that it has seen.
        """
        dataset = dataloader.dataset
        assert isinstance(dataset, EmbeddingDataset)
        self.unwrapped_model.eval()
        with nullcontext() if self.ema is None else self.ema.applied(self.unwrapped_model):
            metrics = {"loss": self._held_out_loss(dataset)}
            if self.config.eval_samples:
                metrics |= self._generation_metrics(dataset)
            if self.held_back is not None:
                scores = self.held_back.quick(SCORED_SAMPLES).scores(self.unwrapped_model)
                metrics["energy_score"] = scores.means["energy_score"]
        prefixed = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        measured = len(self._held_out(dataset, self.config.eval_loss_samples))
        return EvalLoopOutput(None, None, prefixed, measured)  # type: ignore[arg-type]

    def _held_out(self, dataset: EmbeddingDataset, max_samples: int) -> np.ndarray:
        """Positions of at most so many held-out samples, ascending, the same at every evaluation.

        Not the first ones, which in a store that was made from a folder tree are images of one class.
        """
        order = stateless_permutation(len(dataset), seed=self.config.seed, stream="held-out figures")
        return np.sort(order[:max_samples])

    def _held_out_loss(self, dataset: EmbeddingDataset) -> float:
        """Mean over at most `eval_loss_samples`, with noise that is the same at every evaluation."""
        chosen = self._held_out(dataset, self.config.eval_loss_samples).tolist()
        pieces = list(batches(chosen, self.config.eval_batch_size))
        own_pieces, counts = zip(*self.processes.shard(pieces), strict=True)
        loader = DataLoader(
            dataset,
            batch_sampler=own_pieces,
            num_workers=self.config.num_workers or 0,
            collate_fn=whole_batch,  # type: ignore[arg-type]
            worker_init_fn=outlive_stops,
        )
        self.callback_handler.eval_dataloader = loader
        noise = BatchNoise(self.config.seed, "evaluation")
        total = torch.zeros(2, dtype=torch.float64)  # of the losses, and of the samples
        shown = progress(
            zip(loader, counts, strict=True), "held-out loss", "batch", len(own_pieces), lasting=False
        )
        for batch, counted in shown:
            with torch.no_grad(), self.accelerator.autocast():
                prepared: Any = self._prepare_input(batch)
                flow = self.flow_batch({**prepared, **noise.of(prepared)}, training=False)
                loss = self.loss_fn(flow.predict(self.unwrapped_model), flow.sample).loss
            if counted:
                samples = len(batch["index"])
                total += torch.tensor([samples * float(loss), samples], dtype=torch.float64)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        loss_sum, samples = self.processes.sum(total).tolist()
        return loss_sum / samples

    def _generation_metrics(self, dataset: EmbeddingDataset) -> dict[str, float]:
        """Fidelity of generated tokens for at most `eval_samples` held-out samples."""
        model = self.unwrapped_model
        wanted = dataset.indices[self._held_out(dataset, self.config.eval_samples)]
        sums = FidelitySums(model.target_mean)
        own_pieces = list(self.processes.shard(list(batches(wanted, self.config.eval_batch_size))))
        for piece, counted in progress(own_pieces, "generating held-out samples", "batch", lasting=False):
            eva, clip = dataset.source.fetch(piece)
            with self.generation_precision():
                generated = model.generate(
                    eva,
                    num_inference_steps=self.config.eval_inference_steps,
                    seed=self.config.seed,
                    sample_index=piece.tolist(),
                )
            if counted:
                sums.add(generated, model.l2_normalize_if_configured(clip))
        sums.state = self.processes.sum(sums.state)
        return sums.result()

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """The Trainer's AdamW, from which Muon takes the matrices of the blocks if that was asked for."""
        if self.optimizer is None and self.config.optimizer == "muon":
            adamw: Any = super().create_optimizer(model)
            self.optimizer = MuonWithAdamW(adamw, self.unwrapped_model, self.config.weight_decay)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """The Trainer's own choice, unless the run is extended (see `extension.py`)."""
        if self.config.extended_at and self.lr_scheduler is None:
            used = optimizer or self.optimizer
            assert used is not None
            self.lr_scheduler = extended_schedule(used, self.config)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices; no biases, gains of norms or gates of attention heads.

        Without weight decay the Trainer's own choice, which then means nothing but the order in which
        checkpoints number parameters.
        """
        if not self.config.weight_decay:
            return super().get_decay_parameter_names(model)
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]
