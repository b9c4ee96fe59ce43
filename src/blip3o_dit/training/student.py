"""What a student of a distillation is taught, and the trainer that teaches it.

A student carries x from t to t' in one call, whatever these are, so what it has to predict at (x, t, t') is
the teacher's average velocity between them (MeanFlow's, arXiv 2505.13447),

    u = (x(t') - x(t)) / (t' - t),  x(t) the teacher's own path from noise to data.

The path is followed in several steps, and two of its points give a lesson: knowledge distillation (Luhman and
Luhman, arXiv 2101.02388) of all pieces. A path gives two lessons, the whole of it and a random piece.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
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
from blip3o_dit.flow.config import ANY_STEPS
from blip3o_dit.flow.path import FlowBatch, PathPoint, expand_times, make_path, time_grid
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

LESSONS = 2  # of a path: see above
HUBER = 0.1  # c of the pseudo-Huber loss


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
        self.note_loss(loss, inputs)
        return loss

    def loss_again(self, batch: dict[str, Any]) -> Tensor:
        return self._loss(self.unwrapped_model, batch)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """A step is the teacher's whole path, and the student's lessons forward and backward."""
        if self._throughput is None:
            passes = teacher_calls(self.lessons) + PASSES_PER_STEP * LESSONS
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
        """Mean over lessons of (e^2 + c^2)^(1/2), e^2 the velocity's mean squared error in the flow's units.

        Pseudo-Huber, as consistency models have it (arXiv 2310.14189): fewer samples end between two modes,
        where the mean of e^2 is least.
        """
        flow = self.unwrapped_model.config.flow
        lesson = self._lesson(batch)
        piece = lesson.sample
        velocity = convert_prediction(
            model(lesson.network_input, piece.t, lesson.condition, lesson.source.mean, piece.end),
            piece.x_t,
            piece.t,
            make_path(flow),
            from_type=flow.prediction_type,
            to_type="v_prediction",
            end=piece.end,
        )
        squares = (velocity - piece.velocity).square().flatten(1).mean(dim=1)
        return (squares + HUBER**2).sqrt().mean()

    @torch.no_grad()
    def _lesson(self, batch: dict[str, Any]) -> FlowBatch[PathPiece]:
        """The whole path and a random piece of it, for the conditions of a batch."""
        teacher, lessons = self.teacher, self.lessons
        condition = teacher.normalize_condition(batch["eva"])
        start = teacher.source_distribution(condition)
        flow = teacher.config.flow
        grid = time_grid(lessons.teacher_steps, flow.time_shift).to(condition.device)
        points = teacher_path(
            teacher.make_velocity_fn(condition, start),
            make_path(flow).initial_point(batch["noise"]),
            grid,
            lessons.teacher_solver,
        )
        pieces = whole_and_random(points, grid, batch["u_time"])
        return FlowBatch(pieces, start.repeat(LESSONS), condition.repeat(LESSONS, 1, 1))


@dataclass(frozen=True)
class PathPiece(PathPoint):
    """Points x_t [B, ...] at t [B], and the average velocity [B, ...] from there to `end` [B]."""

    end: Tensor


def student_of(teacher: BLIP3oDiTModel, steps: int) -> BLIP3oDiTModel:
    """A copy of the teacher in float32, to be sampled in any number of Euler steps, by default in `steps`.

    What it is told of its step's end is added to what it is told of its time, and is zero at first.
    """
    student = copy.deepcopy(teacher).float()
    as_student(student.config, steps)
    embedder = copy.deepcopy(student.dit.time_caption_embed.timestep_embedder)
    nn.init.zeros_(embedder.linear_2.weight)
    nn.init.zeros_(embedder.linear_2.bias)
    student.dit.step_embedder = embedder
    return student


def as_student(config: BLIP3oDiTConfig, steps: int) -> BLIP3oDiTConfig:
    """Turn a teacher's configuration into its student's."""
    flow = replace(config.flow, student_steps=ANY_STEPS, condition_dropout=0.0)
    config.default_solver, config.default_steps = "euler", steps
    config.flow_matching = asdict(flow)
    return config


def teacher_calls(lessons: DistillationConfig) -> int:
    """Network calls of the teacher in an optimizer step."""
    return lessons.teacher_steps * SOLVERS[lessons.teacher_solver].calls_per_step


@torch.no_grad()
def teacher_path(teacher: Velocity, x_0: Tensor, grid: Tensor, solver: str = "heun") -> Tensor:
    """The teacher's path from noise x_0 [B, ...] at the times of a grid [n + 1]: [n + 1, B, ...], float32."""
    step, x = SOLVERS[solver].step, x_0.float()
    points = [x]
    for t, after in pairwise(grid):
        x = step(teacher, x, t.expand(len(x)), after - t)
        points.append(x)
    return torch.stack(points)


def whole_and_random(points: Tensor, grid: Tensor, uniform: Tensor) -> PathPiece:
    """Of each of B paths [n + 1, B, ...] at the times of a grid [n + 1] two pieces: all wholes, then a random
    one of each, chosen evenly among all by a uniform number in [0, 1) [B]."""
    last, batch = len(grid) - 1, torch.arange(points.shape[1], device=grid.device)
    ends = torch.triu_indices(last + 1, last + 1, offset=1, device=grid.device)  # [2, n (n + 1) / 2]
    chosen = (uniform.double() * ends.shape[1]).long()
    i, j = torch.cat(
        [torch.tensor([[0], [last]], device=grid.device).expand(2, len(batch)), ends[:, chosen]], dim=1
    )
    batch = batch.repeat(LESSONS)
    before, after = points[i, batch], points[j, batch]
    length = expand_times(grid[j] - grid[i], before)
    return PathPiece(t=grid[i], x_t=before, velocity=(after - before) / length, end=grid[j])


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
