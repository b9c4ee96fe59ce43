"""Distil a trained model into one that needs a few network calls.

A student of n Euler steps carries x from t_k to t_(k+1) in one call, so what it has to predict at (x, t_k) is
the teacher's average velocity over the interval,

    u = (x(t_(k+1)) - x(t_k)) / (t_(k+1) - t_k),  x(t) the teacher's own path through x at t_k.

It is found by several teacher steps inside the interval, on states that the teacher reaches: knowledge
distillation (Luhman and Luhman, arXiv 2101.02388), cut into n pieces.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from blip3o_dit.data.embeddings import Embeddings, check_sizes, open_embeddings
from blip3o_dit.data.towers import copy_towers
from blip3o_dit.flow.path import FlowBatch, PathPoint, make_path, time_grid
from blip3o_dit.flow.predictions import convert_prediction
from blip3o_dit.flow.solvers import SOLVERS, Velocity
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.config import BLIP3oDiTConfig
from blip3o_dit.model.loading import EMA_FILE, EMA_VARIANT, check_is_model, pick_weights
from blip3o_dit.training.config import TRAINING_CONFIG_FILE, DistillationConfig, TrainingConfig
from blip3o_dit.training.ema import ExponentialMovingAverage
from blip3o_dit.training.memory import check_room, distillation_forecast, room_on
from blip3o_dit.training.output_folder import output_folder
from blip3o_dit.utils.atomic import written_aside
from blip3o_dit.utils.distributed import check_alone
from blip3o_dit.utils.stateless_random import stateless_normal, stateless_permutation

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

    The student is an ordinary model folder whose `generate` takes `config.steps` Euler steps, no more and no
    fewer, without guidance: its targets have none.

    Raises:
        FileNotFoundError, ValueError: one line naming what was expected and found.
    """
    check_alone("distill")
    check_is_model(Path(model_path))  # before a folder is made
    with output_folder(Path(output_dir), "a distillation"):
        return _distill(
            Path(model_path), embeddings, Path(output_dir), config, overwrite=overwrite, progress=progress
        )


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
    if (output / "config.json").exists() and not overwrite:
        raise ValueError(
            f"{output}: expected no model there, found one: give overwrite=True to replace it, or "
            "another --output_dir"
        )
    source = open_embeddings(embeddings)
    variant = EMA_VARIANT if pick_weights(model_path, "auto") == "ema" else None
    run = TrainingConfig.from_folder(model_path)
    device, sizes = torch.device(config.device), BLIP3oDiTConfig.from_pretrained(model_path)
    needed = distillation_forecast(
        sizes, device, batch=config.batch_size, targets=config.steps, averages=config.ema_decay > 0
    )
    check_room(needed, room_on(device), "less is taken with a smaller --batch_size, --ema_decay 0")
    teacher: Any = BLIP3oDiTModel.from_pretrained(model_path, variant=variant)
    check_sizes(source, teacher.config.data_sizes, model_path)
    train = run.split(source).train
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
        copy_towers(Path(model_path), aside)
    logger.info("the student, %d network calls a sample, is in %s", config.steps, output)
    return output


def train_student(
    teacher: BLIP3oDiTModel,
    source: Embeddings,
    train: np.ndarray,
    config: DistillationConfig,
    *,
    progress: bool = True,
) -> tuple[BLIP3oDiTModel, ExponentialMovingAverage | None]:
    """The student in memory, and its averaged weights, in float32 whatever the teacher's weights are.

    Bfloat16 weights would lose most updates of AdamW, which are smaller than half a step of theirs. A teacher
    that predicts the noise is refused: it has no velocity at t = 0.

    Raises:
        ValueError: for a teacher that predicts the noise, which has no velocity at t = 0, for a student asked
            to teach otherwise than by its own steps, and when the loss is not finite.
    """
    flow = teacher.config.flow
    fixed = flow.fixed_sampling
    if fixed is not None and fixed != (config.teacher_solver, config.teacher_steps):
        raise ValueError(
            f"distill: expected a teacher that is not distilled, found a student of {fixed[1]} steps "
            f"(it can only teach with teacher_solver {fixed[0]} and teacher_steps {fixed[1]})"
        )
    if not flow.prediction.gives_mean_at_noise:
        raise ValueError(
            f"distill: expected a teacher that does not predict the noise, found {flow.prediction_type}"
        )
    student = copy.deepcopy(teacher).float().train()
    student.config.default_solver, student.config.default_steps = "euler", config.steps
    flow = replace(flow, student_steps=config.steps, condition_dropout=0.0)
    student.config.flow_matching = asdict(flow)
    average = ExponentialMovingAverage(student, config.ema_decay) if config.ema_decay > 0 else None
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.learning_rate, weight_decay=0.0)
    warm_up = max(1, config.train_steps // 20)
    schedule = get_cosine_schedule_with_warmup(optimizer, warm_up, config.train_steps)
    batches = _batches(train, config)
    bar = tqdm(range(config.train_steps), desc="distilling", unit="step", disable=not progress)
    for step in bar:
        loss = _loss(student, _targets(teacher, source, next(batches), step, config))
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
) -> FlowBatch[PathPoint]:
    """The targets at all of the student's steps, for the conditions of one batch."""
    eva = source.fetch(indices)[0].to(teacher.device)
    condition = teacher.normalize_condition(eva)
    start = teacher.source_distribution(condition)
    shape = (teacher.config.num_tokens, teacher.config.in_channels)
    noise = stateless_normal(
        indices.tolist(), shape, seed=config.seed, stream="distillation noise", counter=step
    )
    flow = teacher.config.flow
    targets = trajectory_targets(
        teacher.make_velocity_fn(condition, start),
        make_path(flow).initial_point(noise.to(teacher.device)),
        student_steps=config.steps,
        teacher_steps=max(1, -(-config.teacher_steps // config.steps)),
        solver=config.teacher_solver,
        time_shift=flow.time_shift,
    )
    together = PathPoint(
        t=torch.cat([target.t for target in targets]),
        x_t=torch.cat([target.x_t for target in targets]),
        velocity=torch.cat([target.velocity for target in targets]),
    )
    return FlowBatch(together, start.repeat(len(targets)), condition.repeat(len(targets), 1, 1))


@torch.no_grad()
def trajectory_targets(
    teacher: Velocity,
    x_0: Tensor,
    *,
    student_steps: int,
    teacher_steps: int,
    solver: str = "heun",
    time_shift: float = 1.0,
) -> list[PathPoint]:
    """Follow the teacher from noise x_0 [B, ...] to data, and note its average velocity over each interval of
    the student's grid, `time_grid(student_steps, time_shift)`; inside each it takes `teacher_steps`.

    Returns: `student_steps` batches of B points, with the velocity that the student has to predict there.
    """
    grid = time_grid(student_steps * teacher_steps, time_shift).to(x_0.device)
    step, x = SOLVERS[solver].step, x_0.float()
    targets = []
    for first in range(0, len(grid) - 1, teacher_steps):
        before, times = x, grid[first : first + teacher_steps + 1]
        for t, after in pairwise(times):
            x = step(teacher, x, t.expand(len(x)), after - t)
        start, end = times[0], times[-1]
        targets.append(PathPoint(start.expand(len(x)), before, (x - before) / (end - start)))
    return targets


def _loss(student: BLIP3oDiTModel, batch: FlowBatch[PathPoint]) -> Tensor:
    """Mean squared error of the velocity, in the flow's units."""
    flow, target = student.config.flow, batch.sample
    velocity = convert_prediction(
        batch.predict(student),
        target.x_t,
        target.t,
        make_path(flow),
        from_type=flow.prediction_type,
        to_type="v_prediction",
    )
    return (velocity - target.velocity).square().mean()


def _batches(train: np.ndarray, config: DistillationConfig) -> Iterator[np.ndarray]:
    """Shuffled epochs over the training samples, without end; the last batch of each is left out if short."""
    size, epoch = min(config.batch_size, len(train)), 0
    while True:
        order = stateless_permutation(
            len(train), seed=config.seed, stream="distillation order", counter=epoch
        )
        for start in range(0, len(train) - size + 1, size):
            yield train[order[start : start + size]]
        epoch += 1
