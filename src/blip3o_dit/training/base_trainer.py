"""transformers.Trainer with exact resume, sealed checkpoints and a stop before a bad step changes a weight.

All that overrides the Trainer's private methods is here, each with the reason why its own does not do; what
is trained is in `trainer.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.utils.data import DataLoader
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME

from blip3o_dit.data.batch_stream import BatchStream, OwnBatches
from blip3o_dit.data.dataset import BatchNoise, EmbeddingDataset, ShuffledSampler
from blip3o_dit.data.towers import write_towers
from blip3o_dit.data.worker_batches import whole_batch
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.calibration import CALIBRATION_FILE, Calibration
from blip3o_dit.model.layers import has_native_matmul
from blip3o_dit.model.loading import EMA_FILE, WEIGHTS_FILE
from blip3o_dit.training.anomalies import (
    DIAGNOSIS_FILE,
    SPIKES_FILE,
    GradientNorms,
    LossMonitor,
    NonFiniteLossError,
    write_diagnosis,
    write_spike,
)
from blip3o_dit.training.background import OF_WEIGHTS, CheckpointFiles, may_go_on
from blip3o_dit.training.calibration import HeldBack
from blip3o_dit.training.callbacks import JSONLogCallback
from blip3o_dit.training.checkpoint import (
    TRAINER_STATE_FILE,
    LoopState,
    RunIdentity,
    best_saved,
    keep_newest,
    save_trainer_state,
)
from blip3o_dit.training.clipping import clip, skip_unless
from blip3o_dit.training.config import TRAINING_CONFIG_FILE, TrainingConfig
from blip3o_dit.training.disk import checkpoint_bytes
from blip3o_dit.training.ema import ExponentialMovingAverage, as_float32
from blip3o_dit.training.fit_source import SourceFolds, load_folds
from blip3o_dit.training.fsdp import check_sharding, keep_the_dtype_rule, let_generate
from blip3o_dit.training.heartbeat import Heartbeat
from blip3o_dit.training.metrics import Throughput, TrainingMetrics, measure_throughput
from blip3o_dit.training.micro_batches import MicroBatches, may_cut
from blip3o_dit.training.optimizer_state import gathered_state, load_optimizer, save_optimizer, unwrapped
from blip3o_dit.training.overrides import overrides_trainer
from blip3o_dit.training.recorded_passes import may_record, record_passes
from blip3o_dit.training.split_weights import SplitWeights
from blip3o_dit.training.stopping import StopRequest, outlive_stops
from blip3o_dit.utils.atomic import written_aside
from blip3o_dit.utils.distributed import Processes
from blip3o_dit.utils.json_files import finite_or_none
from blip3o_dit.utils.progress import working
from blip3o_dit.utils.stateless_random import stateless_seed

# What the Trainer sums the loss in between log lines, and is read and written here.
PRIVATE_SUMS = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged")


class ExactResumeTrainer(Trainer, TrainerCallback, ABC):
    """Trains a `BLIP3oDiTModel`; a continued run ends in the same weights as one that was not stopped.

    It is a callback of itself: see the methods `on_...`.

    Args:
        model: with its statistics set; `model.config.flow` says what is trained.
        args: see `training_arguments`.
        train_dataset, eval_dataset: the two sides of the split; evaluation is skipped without the second.
        held_back: samples of the same source that are neither trained on nor evaluated, for `finishing.py`.
        source_folds: what an informed source starts from in training; a checkpoint brings its own.
    """

    def __init__(
        self,
        model: BLIP3oDiTModel,
        args: TrainingArguments,
        *,
        config: TrainingConfig,
        train_dataset: EmbeddingDataset,
        eval_dataset: EmbeddingDataset | None = None,
        held_back: np.ndarray | None = None,
        source_folds: SourceFolds | None = None,
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
        self.source_folds = source_folds
        self.noise = BatchNoise(config.seed, "training")
        self.processes = Processes(args.process_index, args.world_size, args.device)
        self.files = CheckpointFiles(self.processes)
        self.held_back: HeldBack | None = None
        if held_back is not None and len(held_back):
            self.held_back = HeldBack(
                train_dataset.source,
                held_back,
                seed=config.seed,
                batch_size=config.eval_batch_size,
                processes=self.processes,
                precision=self.generation_precision,
            )
        self.calibration: Calibration | None = None  # found when all steps are taken
        check_sharding(self.accelerator.state)
        keep_the_dtype_rule(self.accelerator.state)
        self.step_metrics = TrainingMetrics()
        # Waiting for a loss or a gradient would leave a GPU idle, and a process that stops at once leaves
        # others waiting for its gradients: there a step is looked at before the next one is taken, and fused
        # AdamW takes none that is not sound. Other optimizers cannot skip, and their steps are waited for; so
        # are float16's: the schedule must know whether the loss scaler skipped one.
        deferred = args.device.type == "cuda" or args.world_size > 1
        self.losses = LossMonitor(deferred=deferred, on_spike=self._on_spike)
        can_skip = config.memory != "low" and config.optimizer == "adamw"
        self._gated = deferred and can_skip and not config.fp16
        self.heartbeat = Heartbeat()
        self.micro_batches: MicroBatches | None = None
        if may_cut(config, args.world_size):
            self.micro_batches = MicroBatches(self, super().training_step)
        self._gradients: GradientNorms | None = None  # of the last step, not looked at yet
        self._overflowed = False  # the loss scaler skips the step under way
        self.stop_request = StopRequest(config.max_hours)
        self._drop_recordings: Callable[[], None] | None = None
        self._loop_state: LoopState | None = None  # of the checkpoint that the run continues
        self._stream: BatchStream | None = None
        self._throughput: Throughput | None = None
        self.ema: ExponentialMovingAverage | None = None
        if config.ema_decay > 0:
            self.ema = ExponentialMovingAverage(model, config.ema_decay, config.ema_every)
        self.split: SplitWeights | None = None
        if config.memory == "split":
            self.split = SplitWeights(model)
            self.optimizer_cls_and_kwargs = self.split.optimizer(args, config.moments)
        for callback in (self.stop_request, self, JSONLogCallback()):
            self.add_callback(callback)
        self.remove_callback(ProgressCallback)  # `console.py` says what a person should see
        model.dit.selective_checkpointing = config.selective_checkpointing
        if config.compile == "full":
            model.dit.compile_forward()
        elif config.compile:
            model.dit.compile_blocks()

    @property
    def unwrapped_model(self) -> BLIP3oDiTModel:
        """The model, outside of whatever wraps it for several processes."""
        assert isinstance(self.model, BLIP3oDiTModel)
        return self.model

    def generation_precision(self) -> AbstractContextManager:
        """The run's mixed precision, but where bfloat16 is emulated: it would take many times as long."""
        native = has_native_matmul(torch.bfloat16, self.args.device)
        return self.accelerator.autocast() if native else nullcontext()

    def record_passes(self) -> None:
        """The passes of a training step as CUDA graphs, if that was asked for or nothing is in the way."""
        config = self.config
        if may_record(config, self.unwrapped_model.config, self.args.device, self.args.world_size):
            dtype = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None
            self._drop_recordings = record_passes(self.unwrapped_model, config.batch_size, dtype)

    def _write_in_the_background(self) -> None:
        """Have checkpoints written while the run goes on, where there is room: the first process decides."""
        config, model = self.config, self.unwrapped_model.config
        here = self.processes.is_main and may_go_on(config, model, self.args.device, self.args.world_size)
        if self.processes.broadcast(here):
            self.files.go_on(checkpoint_bytes(config, model))

    def drop_recorded_passes(self) -> None:
        """Take the passes of all later steps as they were before `record_passes`."""
        if self._drop_recordings is not None:
            self._drop_recordings()

    @abstractmethod
    def loss_again(self, batch: dict[str, Any]) -> Tensor:
        """The training loss of a batch by the unwrapped model, with nothing noted of it: for a diagnosis."""

    @abstractmethod
    def train_sampler(self, dataset: EmbeddingDataset) -> ShuffledSampler:
        """The order of each epoch, in whole global batches."""

    # The data ------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """The stock one starts each epoch with nothing read, and its workers end with the signal that stops a
        run; on several processes a resume leaves the sampler under wrappers that forward no epoch."""
        dataset, args = self.train_dataset, self.args
        assert isinstance(dataset, EmbeddingDataset)
        sampler, size = self.train_sampler(dataset), self.config.batch_size
        self._stream = BatchStream(
            dataset,
            OwnBatches(sampler, size, args.process_index, args.world_size),
            device=args.device,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.device.type == "cuda",
            collate_fn=self.data_collator,
            worker_init_fn=outlive_stops,
        )
        return self._stream.in_order()

    def num_examples(self, dataloader: DataLoader) -> int:
        """The stock one would count batches: items of our loader."""
        return len(self.train_dataset)  # type: ignore[arg-type]

    @overrides_trainer
    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The stock one, and the random numbers of a training batch, made beside the model."""
        batch = super()._prepare_inputs(inputs)
        return {**batch, **self.noise.of(batch)}

    @overrides_trainer
    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The stock one, and how long the batches of an optimizer step were waited for."""
        if self._throughput is None:
            with working("measuring how fast products are here", lasting=False):
                self._throughput = measure_throughput(self.unwrapped_model, self.config, self.args.device)
        self.heartbeat.mark(self.state.global_step + 1)
        with self._throughput.waiting():
            batches, items = super().get_batch_samples(*args, **kwargs)
        if self.micro_batches is not None:
            self.micro_batches.begin(batches)
        return batches, items

    @overrides_trainer
    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The stock one takes a step of a run that has ended already, and cannot set our stream's epoch."""
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return
        assert self._stream is not None
        self._stream.epoch = kwargs["epoch"]
        super()._run_epoch(*args, **kwargs)

    # A step that is not finite -------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The stock one goes on after a loss that is not finite, and not when memory runs out."""
        try:
            if self.micro_batches is None:
                return super().training_step(model, inputs, *args, **kwargs)
            return self.micro_batches.step(model)
        except NonFiniteLossError as error:
            raise self._diagnosed(error, self.state.global_step + 1) from None

    @overrides_trainer
    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """The stock one would spread a NaN to all gradients: losses and gradients must be finite first.

        Returns the gradients' norm before they are clipped.
        """
        self._check_step()
        self.accelerator.unscale_gradients()
        self._gradients = GradientNorms(self.unwrapped_model, self.state.global_step + 1)
        norm, optimizer = self._gradients.total, unwrapped(self.optimizer)
        if self._gated:
            skip_unless(torch.isfinite(norm) & self.losses.all_finite(), optimizer)
        else:
            self._check_step()
        if self.args.max_grad_norm > 0:
            parameters, scaled = self.unwrapped_model.parameters(), self.accelerator.scaler is not None
            limit = self.args.max_grad_norm
            clip(optimizer, parameters, norm, limit, inside=not scaled, read=not self._gated)
        return norm

    @overrides_trainer
    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The stock one, called without clipping, does not check."""
        return self._clip_grad_norm(model) if grad_norm is None else grad_norm

    @overrides_trainer
    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """The stock one logs, measures and saves without having looked at the step."""
        asked = self.control
        if asked.should_log or asked.should_evaluate or asked.should_save or asked.should_training_stop:
            self._check_step()
            self.heartbeat.busy()
        with nullcontext() if self._throughput is None else self._throughput.pause():
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def note_loss(self, loss: Tensor, inputs: dict[str, Any]) -> None:
        """Take in what the forward pass of a micro-batch has found."""
        step = self.state.global_step + 1
        self.losses.add(loss, step, inputs)
        self.heartbeat.mark(step)
        if self._throughput is not None:
            self._throughput.count(len(inputs["index"]))

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

    def _diagnosed(self, error: NonFiniteLossError, step: int) -> NonFiniteLossError:
        """The error, with where its diagnosis was written."""
        process = self.args.process_index
        name = f"diagnosis-{process}.json" if process else DIAGNOSIS_FILE
        file = write_diagnosis(
            Path(self.args.output_dir or "") / name,
            error,
            step,
            self.unwrapped_model,
            self.losses.inputs_of(step),
            self._gradients,
            # With weights that are shared out, all processes would have to take part.
            forward=None if self.is_fsdp_enabled else self.loss_again,
            keys=self._keys,
        )
        return NonFiniteLossError(f"{error}; what was found is in {file}")

    def _on_spike(self, step: int, loss: float, usual: float, samples: list[int]) -> None:
        file = Path(self.args.output_dir or "") / SPIKES_FILE
        write_spike(file, step, loss, usual, samples, self._keys(samples))

    def _keys(self, samples: list[int]) -> list[str]:
        assert isinstance(self.train_dataset, EmbeddingDataset)
        return [record.get("key", "") for record in self.train_dataset.source.records(samples)]

    def on_pre_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
        """Re-seed torch's global generator from (seed, step): torchao's stochastic rounding uses it, and must
        agree across processes and after a resume."""
        torch.manual_seed(stateless_seed(self.config.seed, "optimizer step", self.state.global_step))

    def on_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
        """accelerate does not see that the scaler skipped a step of a fused optimizer, and the schedule would
        go on without it."""
        optimizer: Any = self.optimizer
        if self.accelerator.scaler is not None:
            optimizer._is_overflow = self._overflowed

    def on_step_end(self, *_: Any, **kwargs: Any) -> None:
        self.heartbeat.mark(self.state.global_step)
        self.files.check()
        if self.ema is not None and not self._overflowed:
            exact = as_float32 if self.split is None else self.split.exact
            self.ema.update(self.unwrapped_model, self.state.global_step, exact)

    # Logging -------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The stock one, with the step metrics' means in a training line; what is not finite becomes None."""
        if "loss" in logs:
            means = self.step_metrics.pop()
            if means is not None:
                means = self.accelerator.reduce(means, reduction="mean")
                logs.update(TrainingMetrics.log_entries(means))
            if self._throughput is not None:
                logs.update(self._throughput.pop(self.args.world_size))
        if "train_loss" in logs:  # of the whole run, not of what came after the checkpoint
            if self.stop_request.cut_short(self.state):
                return
            logs["train_loss"] = self._total_loss_scalar / max(1, self.state.global_step)
        super().log(finite_or_none(logs), start_time)

    # Checkpoints ---------------------------------------------------------------------------------------

    @overrides_trainer
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The stock one pickles, and writes in place: a killed run would leave half of a checkpoint."""
        output, name = Path(self.args.output_dir or ""), f"checkpoint-{self.state.global_step}"
        self.store_flos()
        log, metric = list(self.state.log_history), f"eval_{self.config.best_metric or 'loss'}"

        def remove_others() -> None:
            best = best_saved(output, log, metric)
            keep_newest(output, self.config.save_total_limit, best_step=best)

        writing = working(f"writing {name}", lasting=False)
        with writing, self.files.checkpoint(output / name, remove_others) as aside:
            self._write_checkpoint(aside)

    def save_final_model(self) -> None:
        """The model files of the output folder, moved there when all of them are whole."""
        output = Path(self.args.output_dir or "")
        writing = working("writing the model")
        with writing, self._exact(), self._written_aside(output) as aside:
            self._save_weights(aside, dtype_of_averages=self.unwrapped_model.dtype)
            if self.args.should_save:
                save_trainer_state(self.state, aside / TRAINER_STATE_FILE)

    def _save_weights(self, folder: Path, dtype_of_averages: torch.dtype = torch.float32) -> None:
        """The model's files, and its averages."""
        self.save_model(str(folder), _internal_call=True)
        if self.ema is not None:
            write = self.args.should_save
            averages = self.ema.whole_state(self.unwrapped_model, keep=write, dtype=dtype_of_averages)
            if write:
                self.files.put(averages, folder / EMA_FILE, OF_WEIGHTS)

    @contextmanager
    def _written_aside(self, final: Path) -> Iterator[Path]:
        """`written_aside` on the process that saves; all take part: weights may be shared out over them."""
        if self.args.should_save:
            with written_aside(final, files_only=True, replaces=[EMA_FILE]) as aside:
                yield aside
        else:
            yield final
        self.processes.barrier()

    def _exact(self) -> AbstractContextManager[None]:
        """Around what saves or loads the weights: they are those that are learned."""
        return nullcontext() if self.split is None else self.split.whole()

    def _write_checkpoint(self, folder: Path) -> None:
        with self._exact():
            self._save_weights(folder)
        optimizer = gathered_state(self.unwrapped_model, self.optimizer)
        assert isinstance(self.train_dataset, EmbeddingDataset)
        monitor = self.step_metrics.state
        of_ranks = self.processes.gather((self._tr_loss.item(), monitor))
        loop_state = LoopState(
            run=RunIdentity.of(self.train_dataset.source, self.config, self.args.world_size),
            loss_since_log=self.accelerator.reduce(self._tr_loss / self.args.world_size).item(),
            loss_until_log=self._total_loss_scalar,
            last_logged_step=self._globalstep_last_logged,
            monitor=monitor,
            pieces=self.micro_batches.pieces if self.micro_batches else 1,
            of_ranks=of_ranks if len(of_ranks) > 1 else None,
        )
        if not self.args.should_save:
            return
        scaler = self.accelerator.scaler
        assert self.lr_scheduler is not None
        scale = scaler.state_dict() if scaler else None
        save_optimizer(folder, optimizer, self.lr_scheduler, scale, self.files.put)
        loop_state.write(folder)
        if self.source_folds is not None:
            self.source_folds.save(folder, self.files.put)
        save_trainer_state(self.state, folder / TRAINER_STATE_FILE)

    @overrides_trainer
    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The stock one writes tensors at once, and leaves a pickle that nothing reads; ours is plain text,
        training_config.json."""
        folder = output_dir or self.args.output_dir or ""
        super()._save(folder, {})  # config.json
        if self.args.should_save:
            weights = self.unwrapped_model.state_dict() if state_dict is None else state_dict
            self.files.put(weights, Path(folder, WEIGHTS_FILE), OF_WEIGHTS)
            Path(folder, TRAINING_CONFIG_FILE).write_bytes(self.config.to_json())
            if self.calibration is not None:
                Path(folder, CALIBRATION_FILE).write_bytes(self.calibration.to_json())
            write_towers(self.train_dataset.source, Path(folder))  # type: ignore[union-attr]
            Path(folder, TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        """What the next log line will say of the steps before the checkpoint; weights may be sharded now."""
        let_generate(self.unwrapped_model)
        if self.ema is not None:
            self.ema.lay_out_like(self.unwrapped_model)
        self.record_passes()
        self._write_in_the_background()
        if self.config.rank_timeout and self.processes.count > 1:
            self.heartbeat.begin(self.processes, self.config.rank_timeout, self.state.global_step + 1)
        assert all(name in vars(self) for name in PRIVATE_SUMS), "the Trainer sums its loss elsewhere"
        # The Trainer would go on with the intervals that the checkpoint was written with.
        self.state.compute_steps(self.args, self.state.max_steps)
        if self._loop_state is None:
            return
        loss, sums = self._loop_state.of_rank(self.processes)
        self._tr_loss.fill_(loss)
        self._total_loss_scalar = self._loop_state.loss_until_log
        self._globalstep_last_logged = self._loop_state.last_logged_step
        self.step_metrics.restore(sums, self.args.device)
        if self.micro_batches is not None:
            self.micro_batches.go_on(self._loop_state.pieces)

    def on_train_end(self, *_: Any, **kwargs: Any) -> None:
        """What was read ahead is not needed, and workers would stay; what comes next reads checkpoints."""
        if self._stream is not None:
            self._stream.close()
        self.heartbeat.end()
        self.files.wait()
        self.processes.barrier()

    @overrides_trainer
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The stock one knows neither averaged weights nor folds, and no FSDP from one safetensors file."""
        with working(f"reading {Path(resume_from_checkpoint).name}"), self._exact():
            self._load_weights(resume_from_checkpoint, model)

    def _load_weights(self, resume_from_checkpoint: str, model: Any) -> None:
        if self.is_fsdp_enabled:  # every process reads all weights, and keeps its part
            weights: dict[str, Any] = {**load_file(Path(resume_from_checkpoint, "model.safetensors"))}
            options = StateDictOptions(full_state_dict=True)
            set_model_state_dict(self.unwrapped_model, weights, options=options)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.source_folds = load_folds(Path(resume_from_checkpoint), self.unwrapped_model)
        if self.ema is not None:
            self.ema.load(resume_from_checkpoint)

    @overrides_trainer
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The stock one reads pickles."""
        if checkpoint is None:
            return
        assert self.lr_scheduler is not None
        scaler = load_optimizer(Path(checkpoint), self.unwrapped_model, self.optimizer, self.lr_scheduler)
        if scaler and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(scaler)
        self._loop_state = LoopState.read(Path(checkpoint))
        self._loop_state.warn_of_other_draws(checkpoint)

    @overrides_trainer
    def _load_scaler(self, checkpoint: str | None) -> None:
        """The stock one reads a pickle; the scaler comes with the optimizer."""

    @overrides_trainer
    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The stock one reads a pickle, and nothing here depends on a generator's state: see
        `utils/stateless_random.py` and `on_pre_optimizer_step`."""
