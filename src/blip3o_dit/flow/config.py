"""What is trained: the path, its source, the prediction type, and how times are sampled."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from blip3o_dit.flow.path import PATHS, check_sigmas
from blip3o_dit.flow.predictions import PREDICTIONS, Prediction
from blip3o_dit.flow.solvers import SOLVERS
from blip3o_dit.utils.json_files import short_repr
from blip3o_dit.utils.validation import check_integer, check_known, check_name, check_range

SCHEDULE_TYPES = tuple(PATHS)
PREDICTION_TYPES = tuple(PREDICTIONS)
SOLVER_NAMES = tuple(SOLVERS)
TIME_DISTRIBUTIONS = ("uniform", "logit_normal")
SOURCES = ("noise", "ridge", "ridge_3x3", "ridge_context", "ridge_context_spread")
ANY_STEPS = "any"


def source_on(source: str, num_tokens: int) -> str:
    """The same source without the neighbours that a grid of one token does not have."""
    return "ridge" if num_tokens == 1 and source in ("ridge_3x3", "ridge_context") else source


@dataclass(frozen=True, kw_only=True)
class FlowMatchingConfig:
    """The path, where it starts, what the network predicts on it, and how times are sampled.

    Most of these are flags of training: for a line on each see `TrainingConfig`, for the paths and times
    `flow/path.py`, for the prediction types `flow/predictions.py`.

    Args:
        sigma_min, sigma_max: noise at t = 1 and at t = 0; 0 <= sigma_min < sigma_max.
        source: what the path starts from. "noise" is N(0, I). The others are informed: a ridge regression
            from the condition token, it and its neighbours, or all that is around it, plus noise of its
            residual's deviation (see `AffineSource`); the last one predicts that deviation too.
        source_components: principal components of other tokens that a source with neighbours uses, or 0.
        condition_dropout: probability with which training replaces a sample's condition by the null
            condition; classifier-free guidance needs it above zero. BLIP3-o uses 0.1.
        student_steps: for a distilled model the number of Euler steps it was trained for: its velocity is the
            average over such a step. "any": it is told where its step ends. 0 for every other model.
        noise_scale: sampling starts from so many times the noise that training starts from; what calibration
            fits (see `training/calibration.py`). Training and what one call says of the mean leave it out.

    Raises:
        ValueError: names the field, what it expects and what it found.
    """

    schedule_type: str = "linear"
    sigma_min: float = 1e-4
    sigma_max: float = 1.0
    prediction_type: str = "v_prediction"
    regularization_weight: float = 0.0
    condition_dropout: float = 0.1
    source: str = "noise"
    source_components: int = 0
    time_distribution: str = "uniform"
    time_mean: float = 0.0
    time_std: float = 1.0
    time_shift: float = 1.0
    student_steps: int | str = 0
    noise_scale: float = 1.0

    def __post_init__(self) -> None:
        check_name("source", self.source, SOURCES)
        if self.student_steps != ANY_STEPS:
            check_integer("student_steps", self.student_steps, 0)
        check_integer("source_components", self.source_components, int(self.sees_neighbours))
        if self.source_components and not self.sees_neighbours:
            raise ValueError(
                f"source_components: expected 0 for source {self.source!r}, found {self.source_components}"
            )
        check_name("time_distribution", self.time_distribution, TIME_DISTRIBUTIONS)
        check_range("time_mean", self.time_mean, -20.0, 20.0)
        check_range("time_std", self.time_std, 1e-3, 20.0)
        check_range("time_shift", self.time_shift, 1e-3, 1e3)
        check_name("schedule_type", self.schedule_type, SCHEDULE_TYPES)
        check_name("prediction_type", self.prediction_type, PREDICTION_TYPES)
        check_sigmas(self.sigma_min, self.sigma_max)
        check_range("regularization_weight", self.regularization_weight, 0.0, math.inf)
        check_range("condition_dropout", self.condition_dropout, 0.0, 1.0)
        check_range("noise_scale", self.noise_scale, 0.0, 100.0)

    @property
    def prediction(self) -> Prediction:
        """What the network predicts."""
        return PREDICTIONS[self.prediction_type]

    @property
    def sees_neighbours(self) -> bool:
        """Whether the source's mean depends on more than the token at a position."""
        return self.source not in ("noise", "ridge")

    @property
    def predicts_spread(self) -> bool:
        """Whether the source's deviation depends on its mean (`ridge.relative_spread`)."""
        return self.source.endswith("_spread")

    @property
    def sees_context(self) -> bool:
        """Whether the source's mean depends on all of `ridge.context_features`."""
        return self.source.startswith("ridge_context")

    @property
    def fixed_sampling(self) -> tuple[str, int] | None:
        """The solver and steps of a model that can be sampled in no other way; None: it takes any steps."""
        steps = self.student_steps
        return ("euler", steps) if steps and isinstance(steps, int) else None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FlowMatchingConfig:
        """Raises ValueError for an unknown key, listing the known ones."""
        if not isinstance(values, dict):
            raise ValueError(f"flow_matching: expected an object, found {short_repr(values)}")
        check_known("flow_matching", values, [f.name for f in fields(cls)])
        return cls(**values)
