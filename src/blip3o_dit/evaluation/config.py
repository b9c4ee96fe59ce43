"""What an evaluation measures, and how much: the flags of `blip3o-dit evaluate`, checked."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from blip3o_dit.flow.config import SOLVER_NAMES
from blip3o_dit.utils.validation import check_name

DTYPES = ("float32", "bfloat16", "float16")


def _option(
    default: Any, help_text: str, *, choices: tuple[str, ...] | None = None, minimum: int | None = None
) -> Any:
    return field(default=default, metadata={"help": help_text, "choices": choices, "minimum": minimum})


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured: one field per flag of `blip3o-dit evaluate`; their meanings are the help texts.

    Every random choice is made by `seed`.

    Raises:
        ValueError: names the field, what it expects and what it found.
    """

    split: str = _option(
        "eval",
        "side of the training split to measure; baselines are fitted on the other, with all on --fit_on",
        choices=("eval", "train", "all"),
    )
    # Intervals are narrow by then.
    num_samples: int | None = _option(
        20_000, "most held-out samples to measure, chosen by the seed, or all", minimum=2
    )
    batch_size: int = _option(32, "samples at a time", minimum=1)
    num_inference_steps: int | None = _option(
        None, "steps of the solver (default: what the model was saved with)", minimum=1
    )
    solver: str | None = _option(None, "solver of the models (default: the model's)", choices=SOLVER_NAMES)
    guidance_scale: float = _option(1.0, "classifier-free guidance of the models; 1: none")
    seed: int = _option(0, "seed of the samples and of every random choice")
    draws: int = _option(4, "samples per condition for the energy score, spread and diversity", minimum=2)
    draw_samples: int = _option(1000, "conditions that get them; all others get one sample", minimum=2)
    distribution_samples: int = _option(
        2048, "most vectors on each side of a distribution distance", minimum=2
    )
    # Its cost is the square. 5,000 is usual (the test split of COCO, arXiv 1504.00325).
    gallery_samples: int = _option(
        5000, "most samples that retrieval and neighbour agreement are among", minimum=2
    )
    probe_samples: int = _option(5000, "most training samples that the linear probe is fitted on", minimum=2)
    bootstrap: int = _option(1000, "resamples for the intervals of means and medians", minimum=2)
    half_samples: int = _option(30, "random halves for the intervals of distribution distances", minimum=2)
    curve_calls: tuple[int, ...] = _option(
        (1, 2, 4, 8, 16, 32, 50), "network calls of the cost curve; none: no curve"
    )
    curve_samples: int = _option(256, "samples of the cost curve", minimum=2)
    fit_on: str | None = _option(None, "embeddings the baselines are fitted on (default: the same)")
    fit_samples: int | None = _option(
        None,
        "most samples a baseline is fitted on (default: 5000, or as many as the model's source)",
        minimum=2,
    )
    regression_steps: int = _option(
        0, "also train the same network by plain regression for so many steps; 0: do not", minimum=0
    )
    shown: int = _option(6, "samples drawn on the page", minimum=0)
    weights: str = _option(
        "auto",
        "averaged (ema) or raw weights; auto: averaged if there are any",
        choices=("auto", "ema", "raw"),
    )
    device: str = _option("auto", "device of the models", choices=("auto", "cpu", "cuda"))
    dtype: str = _option("float32", "precision of the models", choices=DTYPES)

    def __post_init__(self) -> None:
        for option in fields(self):
            value, minimum = getattr(self, option.name), option.metadata["minimum"]
            if value is not None and minimum is not None and value < minimum:
                raise ValueError(f"{option.name}: expected at least {minimum}, found {value}")
        if any(calls < 1 for calls in self.curve_calls):
            raise ValueError(f"curve_calls: expected 1 or more each, found {list(self.curve_calls)}")
        check_name("dtype", self.dtype, DTYPES)
