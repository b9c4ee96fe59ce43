"""One training run from its configuration: check, prepare, train, save."""

from __future__ import annotations

import logging
import os
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import TrainingArguments, set_seed

from blip3o_dit.data.dataset import EmbeddingDataset, Split, choose_samples
from blip3o_dit.data.embeddings import Embeddings, open_embeddings
from blip3o_dit.data.statistics import streamed_statistics
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.config import BLIP3oDiTConfig
from blip3o_dit.training.arguments import make_deterministic, training_arguments, use_cpu
from blip3o_dit.training.callbacks import CurvesCallback
from blip3o_dit.training.checkpoint import RunIdentity, check_checkpoint, checkpoints, remove_leftovers
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.training.fit_source import SourceFolds, fit_source, threads_of_all
from blip3o_dit.training.init_from import check_start, kept_folds, load_start, refuse_overwritten_start
from blip3o_dit.training.memory import check_room, forecast, return_freed_memory, room_on, ways_to_fit
from blip3o_dit.training.output_folder import output_folder
from blip3o_dit.training.trainer import BLIP3oTrainer
from blip3o_dit.training.wandb_setup import prepare_wandb, require_wandb
from blip3o_dit.utils.distributed import Processes
from blip3o_dit.utils.errors import StoppedEarly
from blip3o_dit.utils.logging import quiet_transformers

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
    use_cpu(config)  # what cannot run on this machine is refused before anything is read or written
    output = Path(config.output_dir)
    if config.init_from and overwrite and resume is None:
        refuse_overwritten_start(config)
    if not (overwrite or dry_run):
        _check_no_run(output, resume)
    source = open_embeddings(required(config.embeddings_path, "--embeddings_path"), verify=config.verify)
    model_config = _model_config(source, config)
    if config.init_from and resume is None:
        config = check_start(config, model_config, source)
    if resume is not None:
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        check_checkpoint(resume, model_config, RunIdentity.of(source, config, processes))
    _check_memory(config, model_config, show=dry_run)
    if dry_run:
        with tempfile.TemporaryDirectory() as aside:  # the Trainer makes its folder when it is built
            aside_config = replace(config, output_dir=aside)
            _first_step(build_trainer(source, aside_config, fitted=resume is not None))
        return output
    if os.environ.get("RANK", "0") == "0":
        remove_leftovers(output, all_checkpoints=resume is None)
    trainer = train_on(source, config, resume=resume)
    if trainer.is_world_process_zero():
        _report(trainer)
    return output


def train_on(source: Embeddings, config: TrainingConfig, *, resume: Path | None = None) -> BLIP3oTrainer:
    """Train on embeddings that are open already, and save; returns the trainer.

    Raises:
        StoppedEarly, WriteError: as `train`.
    """
    if config.wandb_project and os.environ.get("RANK", "0") == "0":
        prepare_wandb(config.wandb_project, config.output_dir, continued=resume is not None)
    trainer = build_trainer(source, config, fitted=resume is not None)
    with quiet_transformers(), trainer.stop_request.watching():
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        if trainer.stop_request.cut_short(trainer.state):
            raise StoppedEarly(
                f"{trainer.stop_request.reason}: stopped after step {trainer.state.global_step} of "
                f"{trainer.state.max_steps} and saved it: continue with --resume_from_checkpoint auto"
            )
        trainer.save_final_model()
    return trainer


def build_trainer(
    source: Embeddings, config: TrainingConfig, *, split: Split | None = None, fitted: bool = False
) -> BLIP3oTrainer:
    """A model, freshly initialised or as `config.init_from` says, its statistics, and the trainer for them.

    `split` replaces the seeded one. With `fitted`, all that is learned or fitted is left to the checkpoint
    that holds it.
    """
    if config.wandb_project:
        require_wandb()
    if config.deterministic:
        make_deterministic()
    arguments = training_arguments(config, evaluate=config.eval_split > 0)
    if split is None:
        split = config.split(source)
    set_seed(config.seed)
    model = BLIP3oDiTModel(_model_config(source, config))
    _describe(config, model, source, len(split.train), len(split.eval), arguments)
    # Checksums would read every shard here; each is verified when training first reads it.
    unverified_copy = source.unverified() if isinstance(source, EmbeddingStore) else source
    keeps = fitted or (bool(config.init_from) and load_start(model, config))
    if not keeps:  # also without standardising: held-out figures are measured with them
        fitted_on = choose_samples(split.train, max_samples=config.statistics_samples, seed=config.seed)
        _set_statistics(model, unverified_copy, fitted_on, arguments)
    folds = kept_folds(model, source, config) if keeps and not fitted else None
    if config.source != "noise" and not keeps:
        folds = _set_source(model, unverified_copy, split.train, config, arguments)
    if config.memory == "low":
        return_freed_memory()
        model.bfloat16()
    return BLIP3oTrainer(
        model,
        arguments,
        config=config,
        train_dataset=EmbeddingDataset(source, split.train),
        eval_dataset=EmbeddingDataset(source, split.eval) if len(split.eval) else None,
        source_folds=folds,
        callbacks=[CurvesCallback()],
    )


def _model_config(source: Embeddings, config: TrainingConfig) -> BLIP3oDiTConfig:
    return config.model(
        num_tokens=source.num_tokens,
        condition_dim=source.condition_dim,
        target_dim=source.target_dim,
    )


def _check_memory(config: TrainingConfig, model: BLIP3oDiTConfig, *, show: bool) -> None:
    """Refuse (ValueError) a run that does not fit, before any of it is built; `show` the forecast."""
    device = torch.device("cpu")
    if not use_cpu(config):
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    room = room_on(device)
    needed = forecast(config, model, device, processes=int(os.environ.get("WORLD_SIZE", "1")))
    if show:
        logger.info("memory of each process\n%s", needed.table(room))
    check_room(needed, room, ways_to_fit(config))


def _set_statistics(
    model: BLIP3oDiTModel, source: Embeddings, indices: np.ndarray, arguments: TrainingArguments
) -> None:
    """Stream these samples once on the first process; the others receive the result."""
    processes, found = Processes(arguments.process_index, arguments.world_size), None
    if processes.is_main:
        track = partial(tqdm, desc="statistics of the training split", unit="batch", leave=False)
        normalize = model.config.normalize_embeddings
        found = streamed_statistics(source, indices, normalize=normalize, progress=track)
    condition, target = processes.broadcast(found)
    model.set_statistics(condition=(condition.mean, condition.std), target=(target.mean, target.std))


def _set_source(
    model: BLIP3oDiTModel,
    source: Embeddings,
    train: np.ndarray,
    config: TrainingConfig,
    arguments: TrainingArguments,
) -> SourceFolds | None:
    """Fit the ridges of an informed source on the first process; the others receive them."""
    processes, found = Processes(arguments.process_index, arguments.world_size), None
    if processes.is_main:
        logger.info("fitting the %s source on at most %d samples", config.source, config.source_samples)
        with threads_of_all(processes.count):
            found = fit_source(
                model,
                source,
                train,
                max_samples=config.source_samples,
                seed=config.seed,
                device=arguments.device,
            )
    fitted, folds = processes.broadcast(found)
    model.set_source(**fitted)
    return folds


def _first_step(trainer: BLIP3oTrainer) -> None:
    """Forward and backward of one batch, no update: whatever cannot work fails here.

    The model is prepared as the Trainer does it, for the run's own precision and processes.
    """
    batch = next(iter(trainer.get_train_dataloader()))
    # With FSDP the Trainer leaves the model on the CPU until it trains.
    trainer.unwrapped_model.to(trainer.args.device).train()  # type: ignore[arg-type]
    model, _ = trainer.accelerator.prepare(trainer.unwrapped_model, trainer.create_optimizer())
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(model, trainer._prepare_inputs(batch))
    trainer.accelerator.backward(loss)
    logger.info(
        "dry run: data, model, loss (%.4g) and gradients work; nothing was trained or written",
        loss.item(),
    )


def _report(trainer: BLIP3oTrainer) -> None:
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
    train: int,
    held_out: int,
    arguments: TrainingArguments,
) -> None:
    logger.info(
        f"data: {source.path}, {source.num_samples} samples of {source.num_tokens} tokens, "
        f"{source.condition_dim} -> {source.target_dim} wide; {train} to train on, {held_out} held out"
    )
    precision = "bf16" if config.bf16 else "fp16" if config.fp16 else "float32"
    if config.memory == "low":
        precision = "bfloat16 weights"
    logger.info(
        f"model: {sum(p.numel() for p in model.parameters()) / 1e6:.4g} million parameters; "
        f"{precision} on {arguments.device.type}, {arguments.world_size} process(es) x "
        f"batch {config.batch_size} x accumulation {config.gradient_accumulation_steps}"
    )


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
