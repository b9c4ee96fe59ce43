"""Settings of a distillation: the flags of `blip3o-dit distill`."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, asdict, dataclass, replace
from pathlib import Path
from typing import Any

from blip3o_dit.flow.config import SOLVER_NAMES
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.utils.json_files import read_json_object, short_repr
from blip3o_dit.utils.settings import setting
from blip3o_dit.utils.validation import check_name, check_range

DISTILLATION_CONFIG_FILE = "distillation_config.json"

# By default a student learns from a third of the samples that its teacher learned from, within these bounds:
# in that many steps it has nearly all that it can have, and they take as long as a few of the teacher's runs.
SHARE_OF_TEACHER, MIN_STEPS, MAX_STEPS = 3, 50, 1000

# What may change when a distillation is continued: none of it changes the student, but in its last bits.
FREE = {"teacher", "device", "deterministic", "logging_steps", "save_steps", "max_hours"}


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """How a student is trained; the fields with a help text are the flags.

    `device`: "cpu", "cuda", ... Written as `distillation_config.json` beside the student's weights, with what
    came in for the numbers that were not given, and which teacher and data it was.
    """

    steps: int = setting(
        MISSING,
        "network calls that the student takes when not told otherwise, which are Euler steps: 1, 2, 4, ...",
        group="student and teacher",
    )
    train_steps: int | None = setting(
        None,
        "optimizer steps (default: as many as it takes to see a third of the samples that the teacher saw, "
        f"{MIN_STEPS} to {MAX_STEPS})",
        group="optimisation",
    )
    batch_size: int | None = setting(
        None,
        "paths of the teacher per step, each with two lessons (default: the teacher's batch size)",
    )
    learning_rate: float = setting(1e-3, "peak learning rate (AdamW), after a warm-up, then cosine to 0")
    warmup_steps: int | None = setting(
        None,
        "optimizer steps of linear warm-up (default: a twentieth of them all, or the teacher's share where "
        "that is more)",
    )
    teacher_solver: str = setting(
        "heun", "solver of the teacher's paths", group="student and teacher", choices=SOLVER_NAMES
    )
    teacher_steps: int = setting(8, "solver steps of a whole path of the teacher")
    ema_decay: float = setting(0.999, "decay of the averaged weights; 0: none", group="optimisation")
    seed: int = setting(0, "seed of the order of conditions and of the noise")
    deterministic: bool = setting(
        False, "on a GPU, only kernels that give the same bits in every run; slower (the CPU has no others)"
    )
    logging_steps: int | None = setting(
        None,
        "optimizer steps between log lines (default: a twentieth of them all)",
        group="checkpoints, logging and stopping",
    )
    save_steps: int | None = setting(
        None, "optimizer steps between checkpoints (default: a tenth of them all, but at least 10)"
    )
    max_hours: float | None = setting(None, "save and stop after so many hours (default: no limit)")

    max_grad_norm: float = 1.0
    device: str = "cpu"

    # What a distillation notes of itself: the folder and the SHA-256 of the weights of the teacher, and the
    # fingerprint of the data.
    teacher: str = ""
    teacher_checksum: str = ""
    data_fingerprint: str = ""

    def __post_init__(self) -> None:
        least = {"steps": 1, "train_steps": 1, "batch_size": 1, "warmup_steps": 0, "teacher_steps": 1}
        for name, low in (least | {"logging_steps": 1, "save_steps": 1}).items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name}: expected at least {low}, found {value}")
        check_name("teacher_solver", self.teacher_solver, SOLVER_NAMES)
        check_range("learning_rate", self.learning_rate, 0.0, math.inf)
        check_range("ema_decay", self.ema_decay, 0.0, 1.0)
        check_range("max_grad_norm", self.max_grad_norm, 0.0, math.inf)
        if self.max_hours is not None and not 0 < self.max_hours < math.inf:
            raise ValueError(f"max_hours: expected a number above 0, found {self.max_hours}")

    def resolved(self, run: TrainingConfig, *, samples: int, samples_seen: float) -> DistillationConfig:
        """With a number for all that was not given.

        Args:
            run: the teacher's training; `samples_seen`: how many it learned from, counted again in each pass.
            samples: those to learn from now.
        """
        batch = min(self.batch_size or run.batch_size, samples)
        wanted = math.ceil(samples_seen / (SHARE_OF_TEACHER * batch))
        steps = self.train_steps or min(max(wanted, MIN_STEPS), MAX_STEPS)
        teacher_steps = samples_seen / (run.batch_size * run.gradient_accumulation_steps)
        teachers_share = min(0.5, (run.warmup_steps or 0) / teacher_steps) if teacher_steps else 0.0
        warmup = max(1, steps // 20, round(steps * teachers_share))
        return replace(
            self,
            batch_size=batch,
            train_steps=steps,
            warmup_steps=warmup if self.warmup_steps is None else self.warmup_steps,
            logging_steps=self.logging_steps or max(1, steps // 20),
            save_steps=self.save_steps or max(10, steps // 10),
        )

    def to_json(self) -> bytes:
        """The content of `distillation_config.json`."""
        return json.dumps(asdict(self), indent=2).encode()

    def differences(self, folder: Path) -> list[str]:
        """How the distillation in a folder, its output or a checkpoint, is another one than this.

        Raises:
            ValueError: the file there is not JSON.
        """
        file = folder / DISTILLATION_CONFIG_FILE
        if not file.is_file():
            return ["it is no distillation's"]
        there: dict[str, Any] = read_json_object(file)
        return [
            f"{name} was {short_repr(there.get(name))}, now {value!r}"
            for name, value in asdict(self).items()
            if name not in FREE and there.get(name) != value
        ]
