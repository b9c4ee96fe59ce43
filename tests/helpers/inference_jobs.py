"""What the tests of several processes do in each of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from blip3o_dit.evaluation.evaluate import evaluate_models
from blip3o_dit.evaluation.samplers import ModelSampler
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.utils import kept_state
from tests.helpers.evaluation import small_evaluation


def generate_store(model: Path, data: Path, output: Path) -> tuple[dict[str, Any], int]:
    """Generate 21 samples into a store: the results, and the samples that this process generated."""
    inference = BLIP3oInference(model, device="cpu", dtype=torch.float32)
    generate, mine = inference.generate, []

    def counted(eva: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        mine.append(len(eva))
        return generate(eva, *arguments, **options)

    inference.generate = counted  # type: ignore[method-assign]
    found = inference.generate_from_dataset(
        data, num_samples=21, batch_size=4, num_inference_steps=2, output_path=output, progress=False
    )
    return found, sum(mine)


def stop_and_go_on(model: Path, data: Path, output: Path) -> list[int]:
    """A store, a file and an evaluation, each stopped in every process and gone on with.

    Returns how often this process sampled in each of the three before and after the stop.
    """
    kept_state.KEEP_EVERY = kept_state.KEEP_SHARE = 0
    inference = BLIP3oInference(model, device="cpu", dtype=torch.float32)
    options: dict[str, Any] = dict(num_samples=24, batch_size=4, num_inference_steps=1, progress=False)
    config = small_evaluation(num_inference_steps=1, batch_size=3, draw_samples=12)

    def generate(name: str) -> None:
        inference.generate_from_dataset(data, output_path=output / name, **options)

    def evaluate() -> None:
        evaluate_models([model], data, output / "report", config, progress=False)

    counts = []
    for place, name, job in (
        (inference, "generate", lambda: generate("store")),
        (inference, "generate", lambda: generate("out.npz")),
        (ModelSampler, "sample", evaluate),
    ):
        counts += [_count(place, name, job, stop=2), _count(place, name, job, stop=-1)]
    return counts


def _count(place: Any, name: str, job: Callable[[], None], *, stop: int) -> int:
    """How often a job calls a function, which interrupts it instead of the call after `stop` others."""
    function, calls = getattr(place, name), []

    def counted(*arguments: Any, **options: Any) -> Any:
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(1)
        return function(*arguments, **options)

    setattr(place, name, counted)
    try:
        job()
    except KeyboardInterrupt:
        assert stop >= 0
    finally:
        setattr(place, name, function)
    return len(calls)
