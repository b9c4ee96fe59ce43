"""Distil a trained model into one that needs a few network calls."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from blip3o_dit.data.dataset import split_samples
from blip3o_dit.data.embeddings import Embeddings, check_sizes, open_embeddings
from blip3o_dit.flow.config import SOLVER_NAMES
from blip3o_dit.flow.distillation import DistillationTarget, trajectory_targets
from blip3o_dit.flow.path import convert_prediction, make_path
from blip3o_dit.flow.source import AffineSource
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.config import BLIP3oDiTConfig
from blip3o_dit.model.loading import EMA_FILE, EMA_VARIANT, pick_weights
from blip3o_dit.training.config import TRAINING_CONFIG_FILE, TrainingConfig
from blip3o_dit.training.ema import ExponentialMovingAverage
from blip3o_dit.training.memory import check_room, distillation_forecast, room_on
from blip3o_dit.utils.atomic import written_aside
from blip3o_dit.utils.launch import check_alone
from blip3o_dit.utils.stateless_random import stateless_normal, stateless_permutation
from blip3o_dit.utils.validation import check_name, check_range

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """How a student is taught.

    Args:
        steps: network calls that the student needs for a sample (Euler steps).
        train_steps: optimizer steps. batch_size: conditions per step; each gives `steps` lessons.
        learning_rate: peak of AdamW's, after a warm-up over a twentieth of the steps, cosine to zero.
        teacher_solver, teacher_steps: how the teacher walks a whole path; its steps are shared out over the
            student's intervals, at least one in each.
        ema_decay: of the averaged weights; 0 keeps none.
        seed: names conditions and noise. device: "cpu", "cuda", ...
    """

    steps: int
    train_steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 1e-3
    teacher_solver: str = "heun"
    teacher_steps: int = 8
    ema_decay: float = 0.999
    max_grad_norm: float = 1.0
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("steps", "train_steps", "batch_size", "teacher_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        check_name("teacher_solver", self.teacher_solver, SOLVER_NAMES)
        check_range("learning_rate", self.learning_rate, 0.0, math.inf)
        check_range("ema_decay", self.ema_decay, 0.0, 1.0)
        check_range("max_grad_norm", self.max_grad_norm, 0.0, math.inf)


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

    The student is an ordinary model folder whose `generate` takes `config.steps` Euler steps, no more and no
    fewer, without guidance: its lessons have none.

    Raises:
        FileNotFoundError, ValueError: one line naming what was expected and found.
    """
    check_alone("distill")
    output = Path(output_dir)
    if (output / "config.json").exists() and not overwrite:
        raise ValueError(f"{output}: expected no model there, found one (overwrite it?)")
    variant = EMA_VARIANT if pick_weights(Path(model_path), "auto") == "ema" else None
    run = TrainingConfig.from_folder(model_path)
    _check_memory(BLIP3oDiTConfig.from_pretrained(model_path), config)
    teacher: Any = BLIP3oDiTModel.from_pretrained(model_path, variant=variant)
    source = open_embeddings(embeddings)
    check_sizes(source, teacher.config.data_sizes, model_path)
    train = split_samples(source, eval_split=run.eval_split, seed=run.seed, split_by=run.split_by).train
    student, average = train_student(
        teacher.to(config.device).eval(), source, train, config, progress=progress
    )
    taught = replace(
        run,
        output_dir=str(output),
        solver="euler",
        num_inference_steps=config.steps,
        ema_decay=config.ema_decay,
    )
    student.to(teacher.dtype)  # it learned in float32
    with written_aside(output, files_only=True, replaces=[EMA_FILE]) as aside:
        student.save_pretrained(aside)
        if average is not None:
            average.save(student, aside, dtype=teacher.dtype)
        (aside / TRAINING_CONFIG_FILE).write_bytes(taught.to_json())
    logger.info("the student, %d network calls a sample, is in %s", config.steps, output)
    return output


def _check_memory(model: BLIP3oDiTConfig, config: DistillationConfig) -> None:
    """Refuse (ValueError) what does not fit, before any of it is built."""
    device = torch.device(config.device)
    needed = distillation_forecast(
        model, device, batch=config.batch_size, targets=config.steps, averages=config.ema_decay > 0
    )
    check_room(needed, room_on(device), "less is taken with a smaller --batch_size, --ema_decay 0")


def train_student(
    teacher: BLIP3oDiTModel,
    source: Embeddings,
    train: np.ndarray,
    config: DistillationConfig,
    *,
    progress: bool = True,
) -> tuple[BLIP3oDiTModel, ExponentialMovingAverage | None]:
    """The student in memory, and its averaged weights, in float32 whatever the teacher's weights are.

    Bfloat16 weights would lose most updates of AdamW, which are smaller than half a step of theirs.

    Raises:
        ValueError: for a teacher that predicts the noise, which has no velocity at t = 0, for a student asked
            to teach otherwise than by its own steps, and when the loss is not finite.
    """
    own_steps = teacher.config.flow.student_steps
    if own_steps and (config.teacher_solver, config.teacher_steps) != ("euler", own_steps):
        raise ValueError(
            f"distill: expected a teacher that is not distilled, found a student of {own_steps} steps "
            f"(it can only teach with teacher_solver euler and teacher_steps {own_steps})"
        )
    if teacher.config.flow.prediction_type == "epsilon":
        raise ValueError("distill: expected a teacher that does not predict the noise, found epsilon")
    student = copy.deepcopy(teacher).float().train()
    student.config.default_solver, student.config.default_steps = "euler", config.steps
    flow = replace(teacher.config.flow, student_steps=config.steps, condition_dropout=0.0)
    student.config.flow_matching = asdict(flow)
    average = ExponentialMovingAverage(student, config.ema_decay) if config.ema_decay > 0 else None
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.learning_rate, weight_decay=0.0)
    warm_up = max(1, config.train_steps // 20)
    schedule = get_cosine_schedule_with_warmup(optimizer, warm_up, config.train_steps)
    batches = _batches(train, config)
    bar = tqdm(range(config.train_steps), desc="distilling", unit="step", disable=not progress)
    for step in bar:
        target, condition, start = _targets(teacher, source, next(batches), step, config)
        loss = _loss(student, target, condition, start)
        if not torch.isfinite(loss):
            raise ValueError(f"step {step + 1}: expected a finite loss, found {loss.item()} (lower the rate)")
        optimizer.zero_grad()
        loss.backward()
        if config.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(student.parameters(), config.max_grad_norm)
        optimizer.step()
        schedule.step()
        if average is not None:
            average.update(student, step + 1)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4g}")
    return student.eval(), average


def _targets(
    teacher: BLIP3oDiTModel,
    source: Embeddings,
    indices: np.ndarray,
    step: int,
    config: DistillationConfig,
) -> tuple[DistillationTarget, Tensor, AffineSource]:
    """All lessons of one batch in one, their conditions, and where their paths start."""
    eva = source.fetch(indices)[0].to(teacher.device)
    condition = teacher.normalize_condition(eva)
    start = teacher.source_distribution(condition)
    shape = (teacher.config.num_tokens, teacher.config.in_channels)
    noise = stateless_normal(
        indices.tolist(), shape, seed=config.seed, stream="distillation noise", counter=step
    )
    flow = teacher.config.flow
    path = make_path(flow)
    targets = trajectory_targets(
        teacher.make_velocity_fn(condition, start),
        path.source(noise.to(teacher.device)),
        student_steps=config.steps,
        teacher_steps=max(1, -(-config.teacher_steps // config.steps)),
        solver=config.teacher_solver,
        time_shift=flow.time_shift,
    )
    together = DistillationTarget(
        t=torch.cat([target.t for target in targets]),
        x=torch.cat([target.x for target in targets]),
        velocity=torch.cat([target.velocity for target in targets]),
    )
    return together, condition.repeat(len(targets), 1, 1), start.repeat(len(targets))


def _loss(
    student: BLIP3oDiTModel, target: DistillationTarget, condition: Tensor, start: AffineSource
) -> Tensor:
    """Mean squared error of the velocity, in the flow's units."""
    flow = student.config.flow
    prediction = student(start.from_flow(target.x), target.t, condition, start.mean)
    velocity = convert_prediction(
        prediction,
        target.x,
        target.t,
        make_path(flow),
        from_type=flow.prediction_type,
        to_type="v_prediction",
    )
    return (velocity - target.velocity).square().mean()


def _batches(train: np.ndarray, config: DistillationConfig) -> Iterator[np.ndarray]:
    """Shuffled passes over the training samples, without end; a pass's short rest is left out."""
    size, number = min(config.batch_size, len(train)), 0
    while True:
        order = stateless_permutation(
            len(train), seed=config.seed, stream="distillation order", counter=number
        )
        for start in range(0, len(train) - size + 1, size):
            yield train[order[start : start + size]]
        number += 1
