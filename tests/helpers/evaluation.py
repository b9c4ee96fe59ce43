"""Small evaluations for tests."""

from __future__ import annotations

from typing import Any

from blip3o_dit.evaluation.config import EvaluationConfig


def small_evaluation(**changes: Any) -> EvaluationConfig:
    """Two samples a condition, few resamples, no curve, no images; `changes` win."""
    settings: dict[str, Any] = dict(
        curve_calls=(),
        shown=0,
        device="cpu",
        draws=2,
        draw_samples=8,
        distribution_samples=32,
        bootstrap=4,
        half_samples=2,
    )
    return EvaluationConfig(**(settings | changes))
