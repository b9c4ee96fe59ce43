"""Distil a trained model into one that needs a few network calls: check, train, save; how: `student.py`.

A distillation has checkpoints as a training has, and the same command goes on with one that was stopped.
"""

from __future__ import annotations

import copy
import logging
import shutil
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blip3o_dit.data.embeddings import Embeddings, check_sizes, open_embeddings
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.config import BLIP3oDiTConfig
from blip3o_dit.model.loading import (
    check_is_model,
    finish_model,
    pick_weights,
    variant_of,
    weights_files,
)
from blip3o_dit.training.arguments import make_deterministic
from blip3o_dit.training.checkpoint import (
    TRAINER_STATE_FILE,
    RunIdentity,
    check_checkpoint,
    checkpoints,
    newest_whole,
    remove_leftovers,
)
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.training.console import ConsoleCallback
from blip3o_dit.training.disk import check_disk
from blip3o_dit.training.distillation_config import DistillationConfig
from blip3o_dit.training.lengths import with_lengths
from blip3o_dit.training.memory import check_room, count_weights, distillation_forecast, room_on
from blip3o_dit.training.output_folder import output_folder
from blip3o_dit.training.run import train_to_the_end
from blip3o_dit.training.student import LESSONS, StudentTrainer, as_student, teacher_calls
from blip3o_dit.utils.checksums import sha256
from blip3o_dit.utils.distributed import check_alone
from blip3o_dit.utils.errors import StoppedEarly
from blip3o_dit.utils.hub import model_folder
from blip3o_dit.utils.json_files import read_json_object
from blip3o_dit.utils.logging import quiet_transformers
from blip3o_dit.utils.progress import working
from blip3o_dit.utils.validation import is_number

logger = logging.getLogger(__name__)


def distill(
    model_path: str | Path,
    embeddings: str | Path,
    output_dir: str | Path,
    config: DistillationConfig,
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Teach a student on the training side of the teacher's own split, and save it; returns the folder.

    The student is an ordinary model folder whose `generate` takes any number of Euler steps, by default
    `config.steps`, without guidance: its targets have none. A distillation that was stopped in that folder is
    continued, and ends with the bits of one that was not; one that is finished stays as it is, unless
    `overwrite` asks for it again.

    Raises:
        FileNotFoundError, ValueError: one line naming what was expected and found.
        WriteError: when the disk is full; the last checkpoint is whole.
        StoppedEarly: on SIGTERM, SIGINT or at `max_hours`; a checkpoint was saved.
    """
    check_alone("distill")
    model = model_folder(model_path)
    check_is_model(model)  # before a folder is made
    with output_folder(Path(output_dir), "a distillation"):
        return _distill(model, embeddings, Path(output_dir), config, overwrite=overwrite, progress=progress)


def _distill(
    model_path: Path,
    embeddings: str | Path,
    output: Path,
    config: DistillationConfig,
    *,
    overwrite: bool,
    progress: bool,
) -> Path:
    """`distill` into a folder that is held."""
    if config.deterministic:
        make_deterministic()
    with working(f"checking {model_path}"):
        variant = variant_of(pick_weights(model_path, "auto"))
        checksum = " ".join(sha256(file) for file in weights_files(model_path, variant))
    run, sizes = TrainingConfig.from_folder(model_path), BLIP3oDiTConfig.from_pretrained(model_path)
    _check_teacher(sizes)
    _check_apart(model_path, output)
    with working(f"opening {embeddings}"):
        source = open_embeddings(embeddings)
        check_sizes(source, sizes.data_sizes, model_path)
        split = run.split(source)
    train = split.train
    config = replace(
        config.resolved(run, samples=len(train), samples_seen=_samples_seen(model_path, run, len(train))),
        teacher=str(model_path),
        teacher_checksum=checksum,
        data_fingerprint=RunIdentity.of(source, run, 1).fingerprint,
    )
    if not overwrite and _is_finished(output, config):
        _remove_checkpoints(output)
        logger.info("%s: this student is finished; --overwrite trains it again", output)
        return output
    taught = _settings_of_student(run, config, output, len(train))
    resume = _checkpoint(output, config, overwrite=overwrite)
    if resume is not None:
        student = as_student(copy.deepcopy(sizes), config.steps)
        check_checkpoint(resume, student, RunIdentity.of(source, taught, 1))
    _check_memory(sizes, taught, torch.device(config.device))
    check_disk(taught, sizes, taught.max_steps)
    _describe(model_path, sizes, config, len(train), resume)
    remove_leftovers(output, all_checkpoints=resume is None)
    try:
        with working("loading the teacher"):
            teacher = BLIP3oDiTModel.from_pretrained(model_path, variant=variant)
            trainer = StudentTrainer(teacher, source, train, config, taught, split.held_back)
        teach(trainer, resume, progress=progress)
    except KeyboardInterrupt:
        if resume is None:
            raise
        raise StoppedEarly(f"interrupted: {resume} stays, and the same command continues") from None
    logger.info("the student, by default %s a sample, is in %s", _calls(config.steps), output)
    return output


def train_student(
    teacher: BLIP3oDiTModel,
    source: Embeddings,
    train: np.ndarray,
    config: DistillationConfig,
    run: TrainingConfig,
) -> StudentTrainer:
    """A student of a teacher in memory, trained and in `run.output_dir`; returns its trainer.

    Raises:
        FileNotFoundError, ValueError: as `distill`.
    """
    trainer = student_trainer(teacher, source, train, config, run)
    teach(trainer, None, progress=False)
    return trainer


def student_trainer(
    teacher: BLIP3oDiTModel,
    source: Embeddings,
    train: np.ndarray,
    config: DistillationConfig,
    run: TrainingConfig,
) -> StudentTrainer:
    """The trainer of a student, before its first step. Raises ValueError as `distill`."""
    _check_teacher(teacher.config)
    config = config.resolved(run, samples=len(train), samples_seen=0.0)
    taught = _settings_of_student(run, config, Path(run.output_dir), len(train))
    return StudentTrainer(teacher, source, train, config, taught)


def teach(trainer: StudentTrainer, resume: Path | None, *, progress: bool) -> None:
    """Train to the end and save the student; its checkpoints, which nothing can go on from, are removed.

    Raises:
        StoppedEarly, WriteError: as `distill`.
    """
    if progress:
        trainer.add_callback(ConsoleCallback())
    with quiet_transformers(), trainer.stop_request.watching():
        train_to_the_end(trainer, resume, go_on="the same command continues")
        _remove_checkpoints(Path(trainer.config.output_dir))


def _check_teacher(teacher: BLIP3oDiTConfig) -> None:
    """Refuse (ValueError) one that predicts the noise, which has no velocity at t = 0, and a student."""
    if teacher.flow.student_steps:
        found = teacher.flow.student_steps
        raise ValueError(
            f"distill: expected a teacher that is not distilled, found a student of {found} steps"
        )
    if not teacher.flow.prediction.gives_mean_at_noise:
        found = teacher.flow.prediction_type
        raise ValueError(f"distill: expected a teacher that does not predict the noise, found {found}")


def _check_apart(model_path: Path, output: Path) -> None:
    """Refuse (ValueError) an output folder that is the teacher's, or that the teacher is a checkpoint in."""
    if model_path.resolve() in (output.resolve(), *(path.resolve() for path in checkpoints(output))):
        raise ValueError(
            f"{output}: expected another folder than the teacher's, found {model_path} in it: give another "
            "--output_dir"
        )


def _samples_seen(model_path: Path, run: TrainingConfig, samples: int) -> float:
    """How many samples a model was trained on, over all passes: what its folder says, or what was planned."""
    file = model_path / TRAINER_STATE_FILE
    passes: Any = read_json_object(file, non_finite=True).get("epoch") if file.is_file() else None
    if is_number(passes) and 0 < passes < inf:
        return float(passes) * samples
    if run.max_steps > 0:
        return float(run.max_steps * run.batch_size * run.gradient_accumulation_steps)
    return (run.num_epochs or 0.0) * samples


def _is_finished(output: Path, config: DistillationConfig) -> bool:
    """Whether the folder holds this very student. Raises ValueError when its files were altered."""
    finish_model(output)
    if not (output / "config.json").is_file() or config.differences(output):
        return False
    pick_weights(output, "auto")
    return True


def _checkpoint(output: Path, config: DistillationConfig, *, overwrite: bool) -> Path | None:
    """The checkpoint in the output folder to continue from.

    Raises:
        ValueError: the folder holds something else, and is not to be overwritten.
    """
    begun = next(iter(checkpoints(output)), None)
    if begun is not None and not config.differences(begun):
        return newest_whole(output)
    found = output if (output / "config.json").exists() else begun
    if overwrite or found is None:
        return None
    what = "model" if found == output else "unfinished run"
    raise ValueError(
        f"{output}: expected no {what} there, found one: {'; '.join(config.differences(found))}: give "
        "overwrite=True to replace it, or another --output_dir"
    )


def _settings_of_student(
    run: TrainingConfig, config: DistillationConfig, output: Path, samples: int
) -> TrainingConfig:
    """The settings of the student's training: the teacher's, which name split, sizes and path, but for what
    the distillation does in its own way."""
    default = TrainingConfig()
    usual = {name: getattr(default, name) for name in _NOT_OF_THE_TEACHER}
    own = {name: getattr(config, name) for name in _OF_THE_DISTILLATION}
    own |= {"max_steps": config.train_steps, "num_inference_steps": config.steps, "solver": "euler"}
    own |= {"save_total_limit": 1, "num_workers": 0, "cuda_graphs": False}
    device = torch.device(config.device).type
    return with_lengths(replace(run, **(usual | own), output_dir=str(output), device=device), samples)


_OF_THE_DISTILLATION = (
    *("batch_size", "learning_rate", "warmup_steps", "ema_decay", "max_grad_norm"),
    *("logging_steps", "save_steps", "max_hours", "deterministic"),
)
_NOT_OF_THE_TEACHER = (
    *("num_epochs", "eval_steps", "gradient_accumulation_steps", "lr_scheduler_type", "weight_decay"),
    *("memory", "fp16", "bf16", "compile", "selective_checkpointing"),
    *("init_from", "init_statistics", "init_checksum", "report_to", "wandb_project", "wandb_run_name"),
    *("ema_every", "moments", "optimizer", "early_stop"),
    *("extend_epochs", "extend_steps", "extended_at", "extended_to", "extended_rate", "extended_warmup"),
)


def _check_memory(sizes: BLIP3oDiTConfig, taught: TrainingConfig, device: torch.device) -> None:
    needed = distillation_forecast(
        sizes,
        device,
        batch=taught.batch_size,
        targets=LESSONS,
        averages=taught.ema_decay > 0,
    )
    check_room(needed, room_on(device), "less is taken with a smaller --batch_size, --ema_decay 0")


def _describe(
    model_path: Path, sizes: BLIP3oDiTConfig, config: DistillationConfig, samples: int, resume: Path | None
) -> None:
    weights, _ = count_weights(sizes)
    logger.info(
        "teacher: %s, %.4g million parameters, %d samples to learn from", model_path, weights / 1e6, samples
    )
    logger.info(
        "student: %d steps x batch %d; network calls in each: teacher %d, student %d",
        config.train_steps,
        config.batch_size,
        teacher_calls(config),
        LESSONS,
    )
    if resume is not None:
        logger.info("continuing from %s", resume)


def _calls(number: int) -> str:
    return f"{number} network call{'' if number == 1 else 's'}"


def _remove_checkpoints(output: Path) -> None:
    for path in checkpoints(output):
        shutil.rmtree(path)
