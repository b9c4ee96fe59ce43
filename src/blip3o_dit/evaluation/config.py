"""What an evaluation measures, and how much: the flags of `blip3o-dit evaluate`, checked."""

from __future__ import annotations

from dataclasses import dataclass, fields

from blip3o_dit.data.choices import DTYPE_NAMES, QUANTIZATIONS
from blip3o_dit.flow.config import SOLVER_NAMES
from blip3o_dit.utils.settings import setting
from blip3o_dit.utils.validation import check_name


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured: one field per flag of `blip3o-dit evaluate`; their meanings are the help texts.

    Every random choice is made by `seed`.

    Raises:
        ValueError: names the field, what it expects and what it found.
    """

    split: str = setting(
        "eval",
        "side of the training split to measure; baselines are fitted on the other, with all on --fit_on",
        group="samples",
        choices=("eval", "train", "all"),
    )
    # Intervals are narrow by then.
    num_samples: int | None = setting(
        20_000, "most held-out samples to measure, chosen by the seed, or all", minimum=2
    )
    seed: int = setting(0, "seed of the samples and of every random choice")
    num_inference_steps: int | None = setting(
        None,
        "steps of the solver (default: what the model was saved with)",
        group="how models sample",
        minimum=1,
    )
    solver: str | None = setting(None, "solver of the models (default: the model's)", choices=SOLVER_NAMES)
    guidance_scale: float = setting(1.0, "classifier-free guidance of the models; 1: none")
    noise_scale: float | None = None
    draws: int = setting(
        4, "samples per condition for the energy score, spread and diversity", group="metrics", minimum=2
    )
    draw_samples: int = setting(1000, "conditions that get them; all others get one sample", minimum=2)
    distribution_samples: int = setting(
        2048, "most vectors on each side of a distribution distance", minimum=2
    )
    # Its cost is the square. 5,000 is usual (the test split of COCO, arXiv 1504.00325).
    gallery_samples: int = setting(
        5000, "most samples that retrieval and neighbour agreement are among", minimum=2
    )
    probe_samples: int = setting(5000, "most training samples that the linear probe is fitted on", minimum=2)
    bootstrap: int = setting(1000, "resamples for the intervals of means and medians", minimum=2)
    half_samples: int = setting(30, "random halves for the intervals of distribution distances", minimum=2)
    curve_calls: tuple[int, ...] = setting(
        (1, 2, 4, 8, 16, 32, 50), "network calls of the cost curve; none: no curve"
    )
    curve_samples: int = setting(256, "samples of the cost curve", minimum=2)
    fit_on: str | None = setting(
        None, "embeddings the baselines are fitted on (default: the same)", group="baselines"
    )
    fit_samples: int | None = setting(
        None,
        "most samples a baseline is fitted on (default: 5000, or as many as the model's source)",
        minimum=2,
    )
    regression_steps: int = setting(
        0, "also train the same network by plain regression for so many steps; 0: do not", minimum=0
    )
    shown: int = setting(6, "samples drawn on the page", group="page", minimum=0)
    weights: str = setting(
        "auto",
        "averaged (ema) or raw weights; auto: averaged if there are any",
        group="weights, device and precision",
        choices=("auto", "ema", "raw"),
    )
    device: str = setting("auto", "device of the models", choices=("auto", "cpu", "cuda"))
    dtype: str = setting("float32", "precision of the models", choices=DTYPE_NAMES)
    quantize: str | None = setting(
        None, "keep the blocks' weights in one byte each (default: do not)", choices=QUANTIZATIONS
    )
    batch_size: int = setting(32, "samples at a time", minimum=1)

    def __post_init__(self) -> None:
        for option in fields(self):
            value, minimum = getattr(self, option.name), option.metadata.get("minimum")
            if value is not None and minimum is not None and value < minimum:
                raise ValueError(f"{option.name}: expected at least {minimum}, found {value}")
        if any(calls < 1 for calls in self.curve_calls):
            raise ValueError(f"curve_calls: expected 1 or more each, found {list(self.curve_calls)}")
        check_name("dtype", self.dtype, DTYPE_NAMES)
        if self.quantize is not None:
            check_name("quantize", self.quantize, QUANTIZATIONS)
