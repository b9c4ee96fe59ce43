"""What metrics.json says beside the scores: models, data, settings, versions."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch

from blip3o_dit.evaluation.config import EvaluationConfig
from blip3o_dit.evaluation.reference import ReferenceSet
from blip3o_dit.inference.pipeline import BLIP3oInference

# Options whose key in metrics.json begins with "measure_".
MEASURE_OPTIONS = (
    "batch_size",
    "draws",
    "draw_samples",
    "distribution_samples",
    "gallery_samples",
    "probe_samples",
    "bootstrap",
    "half_samples",
)


def describe_model(name: str, found: BLIP3oInference) -> dict[str, Any]:
    return {
        "name": name,
        "folder": found.model_path.resolve().name,
        "path": str(found.model_path),
        "weights": "averaged (EMA)" if found.weights == "ema" else "raw",
        "parameters": sum(parameter.numel() for parameter in found.model.parameters()),
        "device": str(found.device),
        "dtype": str(found.model.dtype).removeprefix("torch."),
    }


def describe_data(reference: ReferenceSet) -> dict[str, Any]:
    source = reference.source
    return {
        "path": str(source.path),
        "split": reference.config.split,
        "num_samples": len(reference.indices),
        "gallery_samples": len(reference.gallery),
        "num_tokens": source.num_tokens,
        "condition_dim": source.condition_dim,
        "target_dim": source.target_dim,
        "drawn_samples": int(reference.drawn.sum()),
        "probe_accuracy_of_truth": reference.probe_accuracy and reference.probe_accuracy.to_json(),
    }


def describe_settings(config: EvaluationConfig) -> dict[str, Any]:
    settings = asdict(config)
    measure = {f"measure_{name}": settings.pop(name) for name in MEASURE_OPTIONS}
    settings["curve_calls"] = list(config.curve_calls)
    settings["float32_products"] = torch.get_float32_matmul_precision()
    return settings | measure | {"measure_seed": config.seed}


def describe_versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    found["threads"] = str(torch.get_num_threads())
    return found | {name: version(name) for name in ("blip3o-dit", "torch", "transformers", "numpy")}
