"""The Hugging Face Trainer, taught flow matching."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput

from blip3o_dit.data.dataset import (
    BatchNoise,
    EmbeddingDataset,
    ShuffledSampler,
    identity_collate,
    training_sampler,
)
from blip3o_dit.data.embeddings import batches
from blip3o_dit.flow.loss import BLIP3oFlowMatchingLoss
from blip3o_dit.flow.path import PathSample
from blip3o_dit.flow.source import AffineSource
from blip3o_dit.flow.timesteps import training_times
from blip3o_dit.metrics.fidelity import FidelitySums
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.loading import EMA_FILE
from blip3o_dit.model.precision import has_native_matmul
from blip3o_dit.training.anomalies import (
    DIAGNOSIS_FILE,
    SPIKES_FILE,
    GradientNorms,
    LossMonitor,
    NonFiniteLossError,
    write_diagnosis,
)
from blip3o_dit.training.callbacks import (
    ConsoleCallback,
    EMACallback,
    JSONLogCallback,
    ShardingCallback,
    StepHooks,
)
from blip3o_dit.training.checkpoint import (
    TRAINER_STATE_FILE,
    LoopState,
    RunIdentity,
    best_saved,
    fingerprint,
    global_batch,
    keep_newest,
    save_trainer_state,
)
from blip3o_dit.training.config import TRAINING_CONFIG_FILE, TrainingConfig
from blip3o_dit.training.ema import ExponentialMovingAverage
from blip3o_dit.training.fit_source import SourceFolds, load_folds
from blip3o_dit.training.fsdp import check_sharding, keep_the_dtype_rule
from blip3o_dit.training.metrics import TrainingMetrics
from blip3o_dit.training.optimizer_state import gathered_state, load_optimizer, save_optimizer
from blip3o_dit.training.stopping import StopRequest, outlive_stops
from blip3o_dit.training.throughput import PASSES_PER_STEP, Throughput, forward_flops, matmul_rate
from blip3o_dit.utils.atomic import written_aside
from blip3o_dit.utils.distributed import Processes
from blip3o_dit.utils.json_files import finite_or_none
from blip3o_dit.utils.stateless_random import named_seed, stateless_permutation

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FlowBatch:
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
        source_folds: what an informed source starts from in training; a checkpoint brings its own.
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
        source_folds: SourceFolds | None = None,
        callbacks: Iterable[TrainerCallback] = (),
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=_with_draws(train_dataset, config.seed, "training"),
            eval_dataset=eval_dataset and _with_draws(eval_dataset, config.seed, "evaluation"),
            data_collator=identity_collate,  # type: ignore[arg-type]
            callbacks=list(callbacks),
        )
        self.config = config
        self.source_folds = source_folds
        self.processes = Processes(args.process_index, args.world_size, args.device)
        check_sharding(self.accelerator.state)
        keep_the_dtype_rule(self.accelerator.state)
        self.loss_fn = BLIP3oFlowMatchingLoss.from_config(model.config.flow)
        self.monitor = TrainingMetrics()
        # Waiting for a loss or a gradient would leave a GPU idle, and a process that stops at once leaves
        # others waiting for its gradients: there a step is looked at before the next one is taken, and fused
        # AdamW takes none that is not sound. float16 steps are waited for: the schedule must know whether
        # the loss scaler skipped one; so are those of --memory low, whose optimizer cannot skip.
        deferred = args.device.type == "cuda" or args.world_size > 1
        self.losses = LossMonitor(deferred=deferred, on_spike=self._on_spike)
        self._gated = deferred and not config.fp16 and config.memory != "low"
        self._gradients: GradientNorms | None = None  # of the last step, not looked at yet
        self._overflowed = False  # the loss scaler skips the step under way
        self.stop_request = StopRequest(config.max_hours)
        self.add_callback(self.stop_request)
        self._progress: LoopState | None = None  # of the checkpoint that the run continues
        self._passes: ShuffledSampler | None = None
        self.add_callback(
            StepHooks(
                begin=self._restore_progress,
                before_step=self._before_optimizer_step,
                after_step=self._after_optimizer_step,
            )
        )
        self._throughput: Throughput | None = None
        self.dit.dit.selective_checkpointing = config.selective_checkpointing
        if config.compile:
            self.dit.dit.compile_blocks()
        self.ema: ExponentialMovingAverage | None = None
        if config.ema_decay > 0:
            self.ema = ExponentialMovingAverage(self.dit, config.ema_decay)
            self.add_callback(EMACallback(self.ema, skip=lambda: self._overflowed))
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

    def flow_batch(self, batch: dict[str, Any], *, training: bool) -> FlowBatch:
        """A batch on its path; in training the guess is by maps that have not seen the samples, and the
        condition is dropped for some of them."""
        condition = self.dit.normalize_condition(batch["eva"])
        if training and self.source_folds is not None:
            source = self.source_folds.source_distribution(self.dit, condition, batch["index"])
        else:
            source = self.dit.source_distribution(condition)
        x_1 = source.to_flow(self.dit.normalize_target(batch["clip"]))
        t = training_times(batch["u_time"], self.dit.config.flow)
        sample = self.loss_fn.sample_path(x_1, batch["noise"], t)
        if training and self.config.cfg_dropout > 0:
            keep = batch["u_dropout"] >= self.config.cfg_dropout
            condition = condition * keep[:, None, None]
        return FlowBatch(sample, source, condition)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean loss of a micro-batch. The step of one that is not finite changes no weight."""
        flow = self.flow_batch(inputs, training=True)
        prediction = self._predict(model, flow)
        output = self.loss_fn(prediction, flow.sample)
        self.losses.add(output.loss, self.state.global_step + 1, inputs)
        if self._throughput is not None:
            self._throughput.count(len(inputs["index"]))
        self.monitor.add(self.loss_fn, flow.sample, flow.source, prediction, output)
        return (output.loss, prediction) if return_outputs else output.loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        try:
            return super().training_step(*args, **kwargs)
        except NonFiniteLossError as error:
            raise self._diagnosed(error, self.state.global_step + 1) from None

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clips gradients; returns their norm before. Losses and gradients must be finite: clipping would
        spread a NaN to all."""
        self._check_step()
        self.accelerator.unscale_gradients()
        self._gradients = GradientNorms(self.dit, self.state.global_step + 1)
        norm = self._gradients.total
        if self._gated:
            self._gate(norm)
        else:
            self._check_step()
        if self.args.max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(self.dit.parameters(), self.args.max_grad_norm, norm)
        return norm

    def _gate(self, norm: Tensor) -> None:
        """Have fused AdamW change nothing in this step if a loss or gradient is not finite."""
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # torch's, in accelerate's
        assert all(group["fused"] for group in optimizer.param_groups)
        optimizer.found_inf = 1.0 - (torch.isfinite(norm) & self.losses.all_finite()).float()

    def _check_step(self) -> None:
        """Look at the last step whose gradients are there: raises NonFiniteLossError unless it was sound."""
        gradients = self._gradients
        if gradients is None:
            return
        try:
            self.losses.check(gradients.step)
            if self.accelerator.scaler is None:
                gradients.check()
            else:  # it skips the step itself, in search of its scale
                self._overflowed = bool(gradients.bad())
        except NonFiniteLossError as error:
            raise self._diagnosed(error, gradients.step) from None
        self.losses.forget(gradients.step)
        self._gradients = None

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return self._clip_grad_norm(model) if grad_norm is None else grad_norm

    def _before_optimizer_step(self) -> None:
        """Stochastic rounding draws from torch's own generator: by name as well, so that a continued run and
        every process round alike."""
        torch.manual_seed(named_seed(self.config.seed, "optimizer step", self.state.global_step))

    def _after_optimizer_step(self) -> None:
        """accelerate does not see that the scaler skipped a step of a fused optimizer, and the schedule would
        go on without it."""
        optimizer: Any = self.optimizer
        if self.accelerator.scaler is not None:
            optimizer._is_overflow = self._overflowed

    def _diagnosed(self, error: NonFiniteLossError, step: int) -> NonFiniteLossError:
        """The error, with where its diagnosis was written."""
        process = self.args.process_index
        name = f"diagnosis-{process}.json" if process else DIAGNOSIS_FILE
        file = write_diagnosis(
            Path(self.args.output_dir or "") / name,
            error,
            step,
            self.dit,
            self.losses.inputs_of(step),
            self._gradients,
            # With weights that are shared out, all processes would have to take part.
            forward=None if self.is_fsdp_enabled else self._loss_once_more,
            keys=self._keys,
        )
        return NonFiniteLossError(f"{error}; what was found is in {file}")

    def _loss_once_more(self, batch: dict[str, Any]) -> Tensor:
        with self.compute_loss_context_manager():
            flow = self.flow_batch(batch, training=True)
            return self.loss_fn(self._predict(self.dit, flow), flow.sample).loss

    def _keys(self, samples: list[int]) -> list[str]:
        assert isinstance(self.train_dataset, EmbeddingDataset)
        return [record.get("key", "") for record in self.train_dataset.source.records(samples)]

    def _on_spike(self, step: int, loss: float, usual: float, samples: list[int]) -> None:
        found = {"step": step, "loss": loss, "usual": usual, "samples": samples, "keys": self._keys(samples)}
        with open(Path(self.args.output_dir or "") / SPIKES_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        logger.warning(
            "step %d: loss %.4g where %.4g is usual; its samples are in %s", *(step, loss, usual, SPIKES_FILE)
        )

    def _predict(self, model: nn.Module, flow: FlowBatch) -> Tensor:
        return model(flow.network_input, flow.sample.t, flow.condition, flow.source.mean)

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
        measured = len(self._held_out(dataset, self.config.eval_loss_samples))
        return EvalLoopOutput(None, None, named, measured)  # type: ignore[arg-type]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the monitor's means to a training log line; what is not finite is logged as None."""
        if "loss" in logs:
            means = self.monitor.pop()
            if means is not None:
                means = self.accelerator.reduce(means, reduction="mean")
                logs.update(TrainingMetrics.describe(means))
            if self._throughput is not None:
                logs.update(self._throughput.pop(self.args.world_size))
        if "train_loss" in logs:  # of the whole run, not of what came after the checkpoint
            if self.stop_request.cut_short(self.state):
                return
            logs["train_loss"] = self._total_loss_scalar / max(1, self.state.global_step)
        super().log(finite_or_none(logs), start_time)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """What is logged, measured or saved, or ends the run, is looked at first."""
        control = self.control
        if (
            control.should_log
            or control.should_evaluate
            or control.should_save
            or control.should_training_stop
        ):
            self._check_step()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of the next optimizer step, and how long they were waited for."""
        if self._throughput is None:
            self._throughput = self._measure_throughput()
        with self._throughput.waiting():
            return super().get_batch_samples(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self._not_training():
            return super().evaluate(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """A pass, from where the checkpoint left it; nothing when the run was complete already."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if self._passes is not None:  # accelerate does not find it below the sampler that skips what is done
            self._passes.set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A checkpoint, written aside and renamed when it is whole; then old ones are removed."""
        with self._not_training():
            output = Path(self.args.output_dir or "")
            self.store_flos()
            with self._written_aside(output / f"checkpoint-{self.state.global_step}") as aside:
                self._write_checkpoint(aside)
            if self.args.should_save:
                best = best_saved(output, self.state.log_history, f"eval_{self.config.best_metric}")
                keep_newest(output, self.config.save_total_limit, best_step=best)

    def save_final_model(self) -> None:
        """The model files of the output folder, moved there when all of them are whole."""
        output = Path(self.args.output_dir or "")
        with self._written_aside(output, files_only=True) as aside:
            self.save_model(str(aside), _internal_call=True)
            if self.ema is not None:
                self.ema.save(self.dit, aside, write=self.args.should_save, dtype=self.dit.dtype)
            if self.args.should_save:
                save_trainer_state(self.state, aside / TRAINER_STATE_FILE)

    @contextmanager
    def _written_aside(self, final: Path, *, files_only: bool = False) -> Iterator[Path]:
        """`written_aside` on the process that saves; all take part: weights may be shared out over them."""
        if self.args.should_save:
            with written_aside(final, files_only=files_only, replaces=[EMA_FILE]) as aside:
                yield aside
        else:
            yield final
        self.processes.barrier()

    def _write_checkpoint(self, folder: Path) -> None:
        self.save_model(str(folder), _internal_call=True)
        if self.ema is not None:
            self.ema.save(self.dit, folder, write=self.args.should_save)
        optimizer = gathered_state(self.dit, self.optimizer)
        progress = self._current_progress()
        if not self.args.should_save:
            return
        scaler = self.accelerator.scaler
        assert self.lr_scheduler is not None
        save_optimizer(folder, optimizer, self.lr_scheduler, scaler.state_dict() if scaler else None)
        progress.write(folder)
        if self.source_folds is not None:
            self.source_folds.save(folder)
        save_trainer_state(self.state, folder / TRAINER_STATE_FILE)

    def run_identity(self) -> RunIdentity:
        """What a checkpoint of this run says of it."""
        assert isinstance(self.train_dataset, EmbeddingDataset)
        source = self.train_dataset.source
        return RunIdentity(
            source.num_samples, fingerprint(source), global_batch(self.config, self.args.world_size)
        )

    def _current_progress(self) -> LoopState:
        loss = self._tr_loss / self.args.world_size
        return LoopState(
            run=self.run_identity(),
            loss_since_log=self.accelerator.reduce(loss).item(),
            loss_until_log=self._total_loss_scalar,
            last_logged_step=self._globalstep_last_logged,
            monitor=self.monitor.state,
        )

    def _restore_progress(self) -> None:
        """When training begins: what the next log line will say of the steps before the checkpoint."""
        # The Trainer would go on with the intervals that the checkpoint was written with.
        self.state.compute_steps(self.args, self.state.max_steps)
        if self._progress is None:
            return
        self._tr_loss.fill_(self._progress.loss_since_log)
        self._total_loss_scalar = self._progress.loss_until_log
        self._globalstep_last_logged = self._progress.last_logged_step
        self.monitor.restore(self._progress.monitor, self.args.device)

    def _not_training(self) -> AbstractContextManager[None]:
        return nullcontext() if self._throughput is None else self._throughput.pause()

    def _measure_throughput(self) -> Throughput:
        config, device = self.dit.config, self.args.device
        half = torch.bfloat16 if self.config.bf16 else torch.float16
        dtype = half if self.config.bf16 or self.config.fp16 else self.dit.compute_dtype
        rate = matmul_rate(config, self.config.batch_size, device, dtype)
        return Throughput(PASSES_PER_STEP * forward_flops(config), rate)

    def _held_out(self, dataset: EmbeddingDataset, most: int) -> np.ndarray:
        """Positions of at most so many held-out samples, ascending, the same at every evaluation.

        Not the first ones, which in a store that was made from a folder tree are pictures of one class.
        """
        order = stateless_permutation(len(dataset), seed=self.config.seed, stream="held-out figures")
        return np.sort(order[:most])

    def _held_out_loss(self, dataset: EmbeddingDataset) -> float:
        """Mean over at most `eval_loss_samples`, on draws that are the same at every evaluation."""
        chosen = self._held_out(dataset, self.config.eval_loss_samples).tolist()
        pieces = list(batches(chosen, self.config.eval_batch_size))
        mine, counts = zip(*self.processes.shard(pieces), strict=True)
        loader = DataLoader(
            dataset,
            batch_sampler=mine,
            num_workers=self.config.num_workers,
            collate_fn=identity_collate,  # type: ignore[arg-type]
            worker_init_fn=outlive_stops,
        )
        self.callback_handler.eval_dataloader = loader
        total = torch.zeros(2, dtype=torch.float64)  # of the losses, and of the samples
        for batch, counted in zip(loader, counts, strict=True):
            with torch.no_grad(), self.accelerator.autocast():
                flow = self.flow_batch(self._prepare_inputs(batch), training=False)
                loss = self.loss_fn(self._predict(self.dit, flow), flow.sample).loss
            if counted:
                samples = len(batch["index"])
                total += torch.tensor([samples * float(loss), samples], dtype=torch.float64)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        loss_sum, samples = self.processes.sum(total).tolist()
        return loss_sum / samples

    def _generation_metrics(self, dataset: EmbeddingDataset) -> dict[str, float]:
        """Fidelity of generated tokens for at most `eval_samples` held-out samples."""
        wanted = dataset.indices[self._held_out(dataset, self.config.eval_samples)]
        sums = FidelitySums(self.dit.target_mean)
        native = has_native_matmul(
            torch.bfloat16, self.args.device
        )  # emulated, it would take many times as long
        for piece, counted in self.processes.shard(list(batches(wanted, self.config.eval_batch_size))):
            eva, clip = dataset.source.fetch(piece)
            with self.accelerator.autocast() if native else nullcontext():
                generated = self.dit.generate(
                    eva,
                    num_inference_steps=self.config.eval_inference_steps,
                    seed=self.config.seed,
                    sample_index=piece.tolist(),
                )
            if counted:
                sums.add(generated, self.dit.l2_normalize_if_configured(clip))
        sums.state = self.processes.sum(sums.state)
        return sums.result()

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices; no biases, gains of norms or gates of attention heads.

        Without weight decay the Trainer's own choice, which then means nothing but the order in which
        checkpoints number parameters.
        """
        if not self.config.weight_decay:
            return super().get_decay_parameter_names(model)
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        inner: Any = getattr(loader, "base_dataloader", loader)  # in accelerate's
        inner.worker_init_fn = outlive_stops  # the Trainer's seeds generators, and nothing draws from them
        return loader

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        dataset = train_dataset or self.train_dataset
        assert isinstance(dataset, EmbeddingDataset)
        config = self.config
        self._passes = training_sampler(
            dataset,
            shuffle=config.shuffle,
            window=config.shuffle_window,
            seed=config.seed,
            global_batch=global_batch(config, self.args.world_size),
        )
        return self._passes

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = output_dir or self.args.output_dir or ""
        super()._save(folder, state_dict)
        if self.args.should_save:
            Path(folder, TRAINING_CONFIG_FILE).write_bytes(self.config.to_json())
            # A pickle that nothing reads; training_config.json says the same in plain text.
            Path(folder, TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:  # every process reads all weights, and keeps its part
            weights: dict[str, Any] = {**load_file(Path(resume_from_checkpoint, "model.safetensors"))}
            set_model_state_dict(self.dit, weights, options=StateDictOptions(full_state_dict=True))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.source_folds = load_folds(Path(resume_from_checkpoint), self.dit)
        if self.ema is not None:
            self.ema.load(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self.lr_scheduler is not None
        scaler = load_optimizer(Path(checkpoint), self.dit, self.optimizer, self.lr_scheduler)
        if scaler and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(scaler)
        self._progress = LoopState.read(Path(checkpoint))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """It comes with the optimizer."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing draws from a generator's state: see `randomness.py` and `_before_optimizer_step`."""


def _with_draws(dataset: EmbeddingDataset, seed: int, stream: str) -> EmbeddingDataset:
    return EmbeddingDataset(dataset.source, dataset.indices, BatchNoise(seed, stream))
