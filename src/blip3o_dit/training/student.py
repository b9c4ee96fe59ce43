"""What a student of a distillation is taught, and the trainer that teaches it.

A student of n Euler steps carries x from t_k to t_(k+1) in one call, so what it has to predict at (x, t_k) is
the teacher's average velocity over the interval,

    u = (x(t_(k+1)) - x(t_k)) / (t_(k+1) - t_k),  x(t) the teacher's own path through x at t_k.

It is found by several teacher steps inside the interval, on states that the teacher reaches: knowledge
distillation (Luhman and Luhman, arXiv 2101.02388), cut into n pieces.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.training_args import OptimizerNames

from blip3o_dit.data.dataset import BatchNoise, EmbeddingDataset, ShuffledSampler
from blip3o_dit.data.embeddings import Embeddings
from blip3o_dit.data.towers import TOWERS_FILE, copy_towers
from blip3o_dit.flow.path import FlowBatch, PathPoint, make_path, time_grid
from blip3o_dit.flow.predictions import convert_prediction
from blip3o_dit.flow.solvers import SOLVERS, Velocity
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.config import BLIP3oDiTConfig
from blip3o_dit.training.arguments import training_arguments
from blip3o_dit.training.base_trainer import ExactResumeTrainer
from blip3o_dit.training.callbacks import CurvesCallback
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.training.distillation_config import DISTILLATION_CONFIG_FILE, DistillationConfig
from blip3o_dit.training.metrics import PASSES_PER_STEP, measure_throughput
from blip3o_dit.utils.stateless_random import stateless_permutation


class StudentTrainer(ExactResumeTrainer):
    """Trains a copy of a teacher on the teacher's average velocities, in float32 whatever its weights are.

    Bfloat16 weights would lose most updates of AdamW, which are smaller than half a step of theirs.

    Args:
        train: the samples of `source` whose conditions are learned from.
        lessons: all of its numbers given (see `distillation.resolved`).
        run: the settings of the student's training, which are written beside its weights.
    """

    loss_is_scaled_for_ga = False  # compute_loss returns a mean over the batch

    def __init__(
        self,
        teacher: BLIP3oDiTModel,
        source: Embeddings,
        train: np.ndarray,
        lessons: DistillationConfig,
        run: TrainingConfig,
        held_back: np.ndarray | None = None,
    ) -> None:
        arguments = training_arguments(run, evaluate=False)
        if arguments.device.type == "cpu":  # the fused one, which GPUs need, would gain a hundredth of a step
            arguments.optim = OptimizerNames.ADAMW_TORCH
        self.lessons = lessons
        self.teacher = teacher.to(arguments.device).eval()  # type: ignore[arg-type]
        super().__init__(
            student_of(teacher, lessons.steps),
            arguments,
            config=run,
            train_dataset=EmbeddingDataset(source, train),
            held_back=held_back,
            callbacks=[CurvesCallback()],
        )
        self.noise = BatchNoise(lessons.seed, "distillation")

    def train_sampler(self, dataset: EmbeddingDataset) -> ShuffledSampler:
        return LessonSampler(len(dataset), seed=self.lessons.seed, global_batch=self.config.batch_size)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean loss of a batch. The step of one that is not finite changes no weight."""
        loss = self._loss(model, inputs)
        self.losses.add(loss, self.state.global_step + 1, inputs)
        if self._throughput is not None:
            self._throughput.count(len(inputs["index"]))
        return loss

    def loss_again(self, batch: dict[str, Any]) -> Tensor:
        return self._loss(self.unwrapped_model, batch)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """A step is the teacher's whole path, and the student's steps forward and backward."""
        if self._throughput is None:
            passes = teacher_calls(self.lessons) + PASSES_PER_STEP * self.lessons.steps
            self._throughput = measure_throughput(self.unwrapped_model, self.config, self.args.device, passes)
        return super().get_batch_samples(*args, **kwargs)

    def save_final_model(self) -> None:
        self.unwrapped_model.to(self.teacher.dtype)  # it learned in float32
        super().save_final_model()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The student takes the conditions that its teacher takes, whatever data it learned on."""
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.config.output_dir)
        (folder / DISTILLATION_CONFIG_FILE).write_bytes(self.lessons.to_json())
        (folder / TOWERS_FILE).unlink(missing_ok=True)
        if self.lessons.teacher:
            copy_towers(Path(self.lessons.teacher), folder)

    def _loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Mean squared error of the velocity, in the flow's units."""
        flow = self.unwrapped_model.config.flow
        lesson = self._lesson(batch)
        velocity = convert_prediction(
            lesson.predict(model),
            lesson.sample.x_t,
            lesson.sample.t,
            make_path(flow),
            from_type=flow.prediction_type,
            to_type="v_prediction",
        )
        return (velocity - lesson.sample.velocity).square().mean()

    @torch.no_grad()
    def _lesson(self, batch: dict[str, Any]) -> FlowBatch[PathPoint]:
        """The targets at all of the student's steps, for the conditions of a batch."""
        teacher, lessons = self.teacher, self.lessons
        condition = teacher.normalize_condition(batch["eva"])
        start = teacher.source_distribution(condition)
        flow = teacher.config.flow
        targets = trajectory_targets(
            teacher.make_velocity_fn(condition, start),
            make_path(flow).initial_point(batch["noise"]),
            student_steps=lessons.steps,
            teacher_steps=lessons.steps_of_an_interval,
            solver=lessons.teacher_solver,
            time_shift=flow.time_shift,
        )
        together = PathPoint(
            t=torch.cat([target.t for target in targets]),
            x_t=torch.cat([target.x_t for target in targets]),
            velocity=torch.cat([target.velocity for target in targets]),
        )
        return FlowBatch(together, start.repeat(len(targets)), condition.repeat(len(targets), 1, 1))


def student_of(teacher: BLIP3oDiTModel, steps: int) -> BLIP3oDiTModel:
    """A copy of the teacher in float32, to be sampled in `steps` Euler steps and no others."""
    student = copy.deepcopy(teacher).float()
    as_student(student.config, steps)
    return student


def as_student(config: BLIP3oDiTConfig, steps: int) -> BLIP3oDiTConfig:
    """Turn a teacher's configuration into its student's."""
    flow = replace(config.flow, student_steps=steps, condition_dropout=0.0)
    config.default_solver, config.default_steps = "euler", steps
    config.flow_matching = asdict(flow)
    return config


def teacher_calls(lessons: DistillationConfig) -> int:
    """Network calls of the teacher in an optimizer step."""
    return lessons.steps * lessons.steps_of_an_interval * SOLVERS[lessons.teacher_solver].calls_per_step


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


class LessonSampler(ShuffledSampler):
    """Whole batches only, as items (optimizer step, position): each step has noise of its own."""

    def __len__(self) -> int:
        return self.num_samples - self.num_samples % self.global_batch

    def items(self, first: int = 0) -> Iterator[tuple[int, ...]]:
        size = self.global_batch
        order = stateless_permutation(
            self.num_samples, seed=self.seed, stream="distillation order", counter=self.epoch
        )
        first_step = self.epoch * (len(self) // size)
        for number, position in enumerate(order[first : len(self)].tolist(), first):
            yield first_step + number // size, position
