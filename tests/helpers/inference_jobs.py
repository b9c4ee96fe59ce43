"""What the tests of several processes do in each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from blip3o_dit.inference.pipeline import BLIP3oInference


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
