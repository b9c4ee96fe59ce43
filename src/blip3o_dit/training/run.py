"""One training run from its configuration: check, prepare, train, save."""

from __future__ import annotations

import logging
import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainingArguments, set_seed

from blip3o_dit.data.dataset import (
    LEAST_HELD_BACK,
    PART_HELD_BACK,
    EmbeddingDataset,
    Split,
    choose_samples,
)
from blip3o_dit.data.embeddings import Embeddings, open_embeddings
from blip3o_dit.data.statistics import streamed_statistics
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.flow.config import source_on
from blip3o_dit.flow.solvers import SOLVERS
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.config import BLIP3oDiTConfig
from blip3o_dit.training.arguments import make_deterministic, training_arguments, use_cpu
from blip3o_dit.training.base_trainer import ExactResumeTrainer
from blip3o_dit.training.calibration import DRAWS, FEW_STEPS
from blip3o_dit.training.callbacks import CurvesCallback
from blip3o_dit.training.checkpoint import (
    TRAINER_STATE_FILE,
    RunIdentity,
    check_checkpoint,
    checkpoints,
    global_batch,
    remove_leftovers,
)
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.training.console import ConsoleCallback, closing_bar, estimate, evaluations_left
from blip3o_dit.training.disk import check_disk, checkpoint_bytes
from blip3o_dit.training.finishing import EarlyStop, finish
from blip3o_dit.training.fit_source import SourceFolds, fit_source, threads_of_all
from blip3o_dit.training.heartbeat import losses_in_one_line
from blip3o_dit.training.init_from import check_start, kept_folds, load_start, refuse_overwritten_start
from blip3o_dit.training.lengths import total_steps, with_lengths
from blip3o_dit.training.loggers import loggers, prepare_loggers
from blip3o_dit.training.memory import (
    GIB,
    check_room,
    forecast,
    return_freed_memory,
    room_on,
    ways_to_fit,
)
from blip3o_dit.training.metrics import PASSES_PER_STEP, synchronize
from blip3o_dit.training.output_folder import output_folder
from blip3o_dit.training.sent_checkpoints import SendCheckpoints
from blip3o_dit.training.trainer import SCORED_SAMPLES, BLIP3oTrainer
from blip3o_dit.utils.distributed import Processes, cores
from blip3o_dit.utils.errors import StoppedEarly
from blip3o_dit.utils.json_files import read_json_object
from blip3o_dit.utils.logging import quiet_transformers
from blip3o_dit.utils.progress import progress, working

QUICK = 10.0  # seconds

logger = logging.getLogger(__name__)


def train(
    config: TrainingConfig,
    *,
    resume: Path | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
) -> Path:
    """Train as configured; returns the output folder.

    Args:
        resume: checkpoint folder to continue from.
        dry_run: do everything up to the first optimizer step, then stop without writing.
        overwrite: allow an output folder that holds a run already.

    Raises:
        FileNotFoundError, ValueError, OSError: one line saying what was expected and what was found.
        WriteError: when the disk is full; the last checkpoint is whole.
        StoppedEarly: on SIGTERM, SIGINT or at `max_hours`; a checkpoint was saved.
    """
    with output_folder(Path(required(config.output_dir, "--output_dir")), "a training", dry_run=dry_run):
        return run_alone(config, resume=resume, dry_run=dry_run, overwrite=overwrite)


def run_alone(
    config: TrainingConfig, *, resume: Path | None, dry_run: bool = False, overwrite: bool = False
) -> Path:
    """`train` in an output folder that is held already (see `output_folder`)."""
    output = Path(config.output_dir)
    with _interruptible(resume):
        source, split, config = _checked(config, resume=resume, dry_run=dry_run, overwrite=overwrite)
        if dry_run:
            with tempfile.TemporaryDirectory() as aside:  # the Trainer makes its folder when it is built
                aside_config = replace(config, output_dir=aside)
                _first_step(
                    build_trainer(source, aside_config, split=split, fitted=resume is not None), split
                )
            return output
        if os.environ.get("RANK", "0") == "0":
            remove_leftovers(output, all_checkpoints=resume is None)
        began_at = _step_of(resume)  # which newer checkpoints may replace
    trainer = train_on(source, config, resume=resume, split=split)
    if trainer.is_world_process_zero():
        _report(trainer, began_at)
    return output


def _checked(
    config: TrainingConfig, *, resume: Path | None, dry_run: bool, overwrite: bool
) -> tuple[Embeddings, Split, TrainingConfig]:
    """The data, its split, and the configuration in numbers: whatever can be refused is refused here."""
    if config.deterministic:
        make_deterministic()  # before a GPU is asked for its memory
    use_cpu(config)  # what cannot run on this machine is refused before anything is read or written
    loggers(config)
    if config.init_from and overwrite and resume is None:
        refuse_overwritten_start(config)
    output, path = Path(config.output_dir), required(config.embeddings_path, "--embeddings_path")
    if not (overwrite or dry_run):
        _check_no_run(output, resume)
    with working(f"opening {path}"):
        source = open_embeddings(path, verify=config.verify)
    if not config.init_from and resume is None:
        config = replace(config, source=source_on(config.source, source.num_tokens))
    model_config, processes = _model_config(source, config), _processes()
    if config.init_from and resume is None:
        config = check_start(config, model_config, source)
    if resume is not None:
        with working(f"checking {resume}"):
            check_checkpoint(resume, model_config, RunIdentity.of(source, config, processes))
    _check_memory(config, model_config, table=dry_run)
    with working("splitting the samples"):
        split = config.split(source)
    config = with_lengths(_with_held_back(config, split), len(split.train), processes)
    check_disk(config, model_config, total_steps(config, len(split.train), processes) - _step_of(resume))
    return source, split, config


@contextmanager
def _interruptible(resume: Path | None) -> Iterator[None]:
    """Control-C before the first step: one line that says what it leaves."""
    try:
        yield
    except KeyboardInterrupt:
        kept = f"{resume} is as it was" if resume else "nothing was trained yet"
        raise KeyboardInterrupt(
            f"interrupted before the first step; {kept}: give the same command again"
        ) from None


def train_on(
    source: Embeddings, config: TrainingConfig, *, resume: Path | None = None, split: Split | None = None
) -> BLIP3oTrainer:
    """Train on embeddings that are open already, and save; returns the trainer. `split` as `build_trainer`.

    Raises:
        StoppedEarly, WriteError: as `train`.
    """
    with _interruptible(resume):
        if os.environ.get("RANK", "0") == "0":
            prepare_loggers(config, continued=resume is not None)
        trainer = build_trainer(source, config, split=split, fitted=resume is not None)
        logger.info(_plan(trainer))
    with quiet_transformers(), trainer.stop_request.watching():
        train_to_the_end(trainer, resume, go_on="continue with --resume_from_checkpoint auto")
    return trainer


def train_to_the_end(trainer: ExactResumeTrainer, resume: Path | None, *, go_on: str) -> None:
    """Take all steps and save the model.

    Raises:
        StoppedEarly: a stop was asked for, and a checkpoint saved; `go_on` says how to continue from it.
    """
    with losses_in_one_line(trainer.args.world_size), closing_bar(trainer), trainer.files:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if trainer.stop_request.cut_short(trainer.state):
        raise StoppedEarly(
            f"{trainer.stop_request.reason}: stopped after step {trainer.state.global_step} of "
            f"{trainer.state.max_steps} and saved it: {go_on}"
        )
    finish(trainer)


def build_trainer(
    source: Embeddings, config: TrainingConfig, *, split: Split | None = None, fitted: bool = False
) -> BLIP3oTrainer:
    """A model, freshly initialised or as `config.init_from` says, its statistics, and the trainer for them.

    `split` replaces the seeded one. With `fitted`, all that is learned or fitted is left to the checkpoint
    that holds it. What is None in `config` follows from the data (`with_lengths`).
    """
    if config.deterministic:
        make_deterministic()
    if split is None:
        split = config.split(source)
    config = with_lengths(_with_held_back(config, split), len(split.train), _processes())
    arguments = training_arguments(config, evaluate=config.eval_split > 0)
    set_seed(config.seed)
    with working("initialising the network"):
        model = BLIP3oDiTModel(_model_config(source, config))
    _describe(config, model, source, split, arguments)
    # Checksums would read every shard here; each is verified when training first reads it.
    unverified_copy = source.unverified() if isinstance(source, EmbeddingStore) else source
    keeps = fitted or (bool(config.init_from) and load_start(model, config))
    if not keeps:  # also without standardising: held-out figures are measured with them
        fitted_on = choose_samples(split.train, max_samples=config.statistics_samples, seed=config.seed)
        _set_statistics(model, unverified_copy, fitted_on, arguments)
    folds = kept_folds(model, source, config) if keeps and not fitted else None
    if config.source != "noise" and not keeps:
        folds = _set_source(model, unverified_copy, split, config, arguments)
    if config.memory != "default":
        return_freed_memory()
    if config.memory == "low":
        model.bfloat16()
    return BLIP3oTrainer(
        model,
        arguments,
        config=config,
        train_dataset=EmbeddingDataset(source, split.train),
        eval_dataset=EmbeddingDataset(source, split.eval) if len(split.eval) else None,
        held_back=split.held_back,
        source_folds=folds,
        callbacks=[
            CurvesCallback(),
            ConsoleCallback(_evaluation_cost(config, split)),
            EarlyStop(config.early_stop, since=config.extended_at),
            *([SendCheckpoints(config.send_to)] if config.send_to else []),
        ],
    )


def _with_held_back(config: TrainingConfig, split: Split) -> TrainingConfig:
    """The configuration, with what the best checkpoint is named by.

    Raises:
        ValueError: when that, or an early stop, is to be by samples of which none are held back.
    """
    if len(split.held_back):
        return replace(config, best_metric=config.best_metric or "energy_score")
    wanted = {"early_stop": config.early_stop, "best_metric": config.best_metric == "energy_score"}
    for name in (name for name, asked in wanted.items() if asked):
        raise ValueError(
            f"{name}: expected at least {PART_HELD_BACK * LEAST_HELD_BACK} training samples, to hold some "
            f"back, found {len(split.train)}"
        )
    return replace(config, best_metric=config.best_metric or "loss")


def _model_config(source: Embeddings, config: TrainingConfig) -> BLIP3oDiTConfig:
    return config.model(
        num_tokens=source.num_tokens,
        condition_dim=source.condition_dim,
        target_dim=source.target_dim,
    )


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _step_of(checkpoint: Path | None) -> int:
    """The step that a checked checkpoint was written after; 0 for none."""
    if checkpoint is None:
        return 0
    return int(read_json_object(checkpoint / TRAINER_STATE_FILE, non_finite=True)["global_step"])


def _evaluation_cost(config: TrainingConfig, split: Split) -> float:
    """Steps that an evaluation takes as long as: its network calls, against the passes of a step."""
    held_out = len(split.eval)
    calls = SOLVERS[config.solver].calls_per_step * config.eval_inference_steps
    network_calls = min(held_out, config.eval_loss_samples) + calls * min(held_out, config.eval_samples)
    network_calls += DRAWS * FEW_STEPS * 2 * min(len(split.held_back), SCORED_SAMPLES)
    return network_calls / (PASSES_PER_STEP * global_batch(config, _processes()))


def _check_memory(config: TrainingConfig, model: BLIP3oDiTConfig, *, table: bool) -> None:
    """Refuse (ValueError) a run that does not fit, before any of it is built; otherwise say what it takes."""
    device = torch.device("cpu")
    if not use_cpu(config):
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    room = room_on(device)
    needed = forecast(config, model, device, processes=_processes())
    if config.async_checkpoints and device.type == "cpu":
        copy = checkpoint_bytes(config, model)  # which is done without where it does not fit
        needed = replace(needed, staging=copy if needed.total + copy <= room.size else 0)
    if table:
        logger.info("memory of each process\n%s", needed.table(room))
    check_room(needed, room, ways_to_fit(config))
    if not table:
        logger.info(f"memory: at most {needed.total / GIB:.1f} of {room.size / GIB:.1f} GiB {room.where}")


def _set_statistics(
    model: BLIP3oDiTModel, source: Embeddings, indices: np.ndarray, arguments: TrainingArguments
) -> None:
    """Stream these samples once on the first process; the others receive the result."""
    processes, found = Processes(arguments.process_index, arguments.world_size), None
    if processes.is_main:
        what = f"statistics of {len(indices)} training samples"
        track = partial(progress, what=what, unit="batch")
        normalize = model.config.normalize_embeddings
        found = streamed_statistics(source, indices, normalize=normalize, progress=track)
    condition, target = processes.broadcast(found)
    model.set_statistics(condition=(condition.mean, condition.std), target=(target.mean, target.std))


def _set_source(
    model: BLIP3oDiTModel,
    source: Embeddings,
    split: Split,
    config: TrainingConfig,
    arguments: TrainingArguments,
) -> SourceFolds | None:
    """Fit the ridges of an informed source on the first process; the others receive them."""
    processes, found = Processes(arguments.process_index, arguments.world_size), None
    if processes.is_main:
        samples = min(config.source_samples, len(split.train))
        what = f"fitting the {config.source} source on {samples} samples"
        # Principal components, moments; moments of the residuals and how large they are.
        flow = model.config.flow
        passes = 1 + bool(flow.source_components) + 2 * flow.predicts_spread
        with threads_of_all(processes.count), working(what, passes * samples, "sample") as count:
            found = fit_source(
                model,
                source,
                split.train,
                max_samples=config.source_samples,
                seed=config.seed,
                groups=split.groups,
                device=arguments.device,
                count=count,
            )
    fitted, folds = processes.broadcast(found)
    model.set_source(**fitted)
    return folds


def _first_step(trainer: BLIP3oTrainer, split: Split) -> None:
    """Forward and backward of one batch, no update: whatever cannot work fails here.

    The model is prepared as the Trainer does it, for the run's own precision and processes. A quick step is
    timed again: the first one also loads kernels.
    """
    with working("trying the first step"):
        batch = next(iter(trainer.get_train_dataloader()))
        # With FSDP the Trainer leaves the model on the CPU until it trains.
        trainer.unwrapped_model.to(trainer.args.device).train()  # type: ignore[arg-type]
        model, _ = trainer.accelerator.prepare(trainer.unwrapped_model, trainer.create_optimizer())
        loss, seconds = _timed_step(trainer, model, batch)
        if seconds < QUICK:
            _, seconds = _timed_step(trainer, model, batch)
    seconds *= trainer.config.gradient_accumulation_steps
    logger.info(_plan(trainer))
    cost = _evaluation_cost(trainer.config, split)
    evaluations = evaluations_left(trainer.args, 0, _steps(trainer))
    logger.info(estimate(_steps(trainer), seconds, evaluations, cost * seconds))
    logger.info("dry run: data, model, loss (%.4g) and gradients work; nothing was trained or written", loss)


def _timed_step(trainer: BLIP3oTrainer, model: nn.Module, batch: dict[str, Any]) -> tuple[float, float]:
    """Loss and seconds of a forward and a backward pass."""
    started = time.monotonic()
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(model, trainer._prepare_inputs(batch))
    trainer.accelerator.backward(loss)
    synchronize(trainer.args.device)
    return loss.item(), time.monotonic() - started


def _steps(trainer: BLIP3oTrainer) -> int:
    return total_steps(trainer.config, len(trainer.train_dataset), trainer.args.world_size)  # type: ignore[arg-type]


def _plan(trainer: BLIP3oTrainer) -> str:
    """One line: how long the run is, and how often it says and saves something."""
    config, samples = trainer.config, len(trainer.train_dataset)  # type: ignore[arg-type]
    batch, steps = global_batch(config, trainer.args.world_size), _steps(trainer)
    intervals = [f"log every {config.logging_steps}", f"save {config.save_steps}"]
    if trainer.eval_dataset is not None:
        intervals.insert(1, f"evaluate {config.eval_steps}")
    passes = steps / math.ceil(samples / batch)
    return (
        f"{steps} steps of {batch} samples, {passes:.3g} passes, warm-up {config.warmup_steps}; "
        + ", ".join(intervals)
    )


def _report(trainer: BLIP3oTrainer, began_at: int) -> None:
    taken = trainer.state.global_step - began_at
    if not taken:
        logger.info("all %d steps were taken already; nothing was left to train", began_at)
    logger.info("the trained model is in %s", trainer.args.output_dir)
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    if evaluations:
        last = {k: v for k, v in evaluations[-1].items() if isinstance(v, float)}
        names = ("eval_loss", "eval_cosine_similarity_mean", "eval_r2")
        shown = ", ".join(f"{name.removeprefix('eval_')} {last[name]:.4g}" for name in names if name in last)
        logger.info("last evaluation on held-out samples: %s", shown)


def _describe(
    config: TrainingConfig,
    model: BLIP3oDiTModel,
    source: Embeddings,
    split: Split,
    arguments: TrainingArguments,
) -> None:
    logger.info(
        f"data: {source.path}, {source.num_samples} samples of {source.num_tokens} tokens, "
        f"{source.condition_dim} -> {source.target_dim} wide; "
        f"{len(split.train)} to train on, {len(split.eval)} held out, "
        f"{len(split.held_back) or 'none (too few)'} held back"
    )
    precision = "bf16" if config.bf16 else "fp16" if config.fp16 else "float32"
    if config.memory != "default":
        precision = "bfloat16 weights" + (" with their float32 remainders" * (config.memory == "split"))
    logger.info(
        f"model: {sum(p.numel() for p in model.parameters()) / 1e6:.4g} million parameters; "
        f"{precision} on {arguments.device.type}, {arguments.world_size} process(es) x "
        f"batch {config.batch_size} x accumulation {config.gradient_accumulation_steps}"
    )
    if (config.num_workers or 0) > cores():
        logger.info(f"num_workers {config.num_workers}: more than the {cores()} cores there are")


def _check_no_run(output: Path, resume: Path | None) -> None:
    """Refuse (ValueError) a folder with a run, unless it is the one to continue."""
    holds_run = bool(checkpoints(output)) or (output / "model.safetensors").exists()
    if holds_run and (resume is None or resume.resolve().parent != output.resolve()):
        raise ValueError(
            f"{output}: expected no run there, found one: give --resume_from_checkpoint auto to continue "
            "it (and --extend_epochs N to train a finished one further), overwrite=True to start "
            "over, or another --output_dir"
        )


def required(value: str, flag: str) -> str:
    if not value:
        raise ValueError(f"{flag}: expected a path, found none")
    return value
