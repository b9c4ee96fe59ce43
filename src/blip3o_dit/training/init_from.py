"""A run that starts from the weights of a trained model: `--init_from`.

Taken from the model: its weights (averaged ones, where there are any), sizes, path, prediction type, source
and normalisation. Statistics and the fitted source are the data's, or with `init_statistics` "model" the
model's, and before its first step the run then generates what the model does. New: optimizer, schedule,
counters, and averages, which begin with those weights.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from blip3o_dit.data.embeddings import Embeddings, check_sizes
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.config import CONFIG_FILE, BLIP3oDiTConfig
from blip3o_dit.model.loading import EMA_VARIANT, pick_weights, weights_files
from blip3o_dit.training.checkpoint import PROGRESS_FILE, LoopState, RunIdentity
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.training.fit_source import FOLDS_FILE, SourceFolds, load_folds
from blip3o_dit.utils.checksums import sha256
from blip3o_dit.utils.json_files import short_repr
from blip3o_dit.utils.recognise import MODEL, refusal

logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter_config.json"

# What weights were learned for: settings that are fields of config.json, and of its flow_matching.
_OF_THE_NETWORK = (
    *("model_dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim"),
    *("normalize_embeddings", "standardize"),
)
_OF_THE_FLOW = ("schedule_type", "sigma_min", "sigma_max", "prediction_type", "source")
OF_THE_WEIGHTS = (*_OF_THE_NETWORK, *_OF_THE_FLOW)

# What training and generation may do in another way with the same weights.
_FREE_IN_CONFIG = {
    *("gradient_checkpointing", "flow_matching", "default_solver", "default_steps", "residual"),
}
_FREE_IN_FLOW = {
    *("condition_dropout", "regularization_weight", "noise_scale"),
    *("time_distribution", "time_mean", "time_std", "time_shift"),
}


def settings_of_model(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The settings that a run has from the model it starts from, by the names of `TrainingConfig`.

    Raises:
        FileNotFoundError, ValueError: no model to start from, or a given setting is another one than that of
            its weights.
    """
    model = _trained_config(folder)
    flow = model.flow
    fixed = {name: getattr(model, name) for name in _OF_THE_NETWORK}
    fixed |= {name: getattr(flow, name) for name in _OF_THE_FLOW}
    different = [
        f"{name} is {value!r} there, {given[name]!r} was given"
        for name, value in fixed.items()
        if name in given and given[name] != value
    ]
    if different:
        raise ValueError(
            f"{folder}: a run that starts from these weights has their settings: {'; '.join(different)}: "
            "leave them out, or train without --init_from"
        )
    usual = {
        "cfg_dropout": flow.condition_dropout,
        "regularization_weight": flow.regularization_weight,
        "time_distribution": flow.time_distribution,
        "time_mean": flow.time_mean,
        "time_std": flow.time_std,
        "time_shift": flow.time_shift,
        "solver": model.default_solver,
        "num_inference_steps": model.default_steps,
        "residual": model.residual,
    }
    return fixed | {name: value for name, value in usual.items() if name not in given}


def check_start(config: TrainingConfig, model: BLIP3oDiTConfig, source: Embeddings) -> TrainingConfig:
    """Refuse a model that does not fit the run, before anything is built; notes which weights it has.

    Raises:
        FileNotFoundError, ValueError: one line naming what was expected and found.
    """
    folder = Path(config.init_from)
    trained = _trained_config(folder)
    check_sizes(source, trained.data_sizes, folder)
    there, here = ({**settings.to_dict(), **asdict(settings.flow)} for settings in (trained, model))
    names = {*BLIP3oDiTConfig.own_fields(), *asdict(model.flow)} - _FREE_IN_CONFIG - _FREE_IN_FLOW
    different = [
        f"{name} is {short_repr(there[name])} there, {short_repr(here[name])} here"
        for name in sorted(names)
        if there[name] != here[name]
    ]
    if different:
        raise ValueError(f"{folder}: its weights do not fit this run: " + "; ".join(different))
    pick_weights(folder, "auto")  # refuses weights that were altered
    files = _weights(folder)
    BLIP3oDiTModel.check_weights(files, model)
    return replace(config, init_checksum=" ".join(sha256(file) for file in files))


def load_start(model: BLIP3oDiTModel, config: TrainingConfig) -> bool:
    """Fill a new model with the weights to start from; whether it keeps their statistics and source."""
    files = _weights(Path(config.init_from))
    BLIP3oDiTModel.check_weights(files, model.config)
    weights = model.state_dict()
    with torch.no_grad():
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                names = list(tensors.keys())
            for name in names:
                with safe_open(file, framework="pt") as tensors:  # what is mapped counts as memory
                    weights[name].copy_(tensors.get_tensor(name))
    # Statistics of a model that does not standardise are for measuring only; from elsewhere it has none.
    keeps = config.init_statistics == "model" and (model.config.standardize or model.has_statistics)
    logger.info(
        "starting from %s of %s, with its sizes, path and normalisation; statistics and source: %s; "
        "optimizer, schedule and averages begin anew",
        "the averaged weights" if _has_averages(Path(config.init_from)) else "the weights",
        config.init_from,
        "of the model" if keeps else "fitted on the data",
    )
    return keeps


def kept_folds(model: BLIP3oDiTModel, source: Embeddings, config: TrainingConfig) -> SourceFolds | None:
    """The maps that training starts from, of a checkpoint of a run on the same data.

    For other data none is needed: the model's source has not seen them.
    """
    folder = Path(config.init_from)
    if not all((folder / name).is_file() for name in (FOLDS_FILE, PROGRESS_FILE)):
        return None
    same = LoopState.read(folder).run.fingerprint == RunIdentity.of(source, config, 1).fingerprint
    return load_folds(folder, model) if same else None


def refuse_overwritten_start(config: TrainingConfig) -> None:
    """Refuse (ValueError) to start over in the folder that the weights to start from are in."""
    start, output = Path(config.init_from).resolve(), Path(config.output_dir).resolve()
    if start == output or output in start.parents:
        raise ValueError(
            f"{config.init_from}: overwrite=True would remove the weights to start from: give "
            "another --output_dir"
        )


def _weights(folder: Path) -> list[Path]:
    return weights_files(folder, EMA_VARIANT if _has_averages(folder) else None)


def _has_averages(folder: Path) -> bool:
    return all(file.is_file() for file in weights_files(folder, EMA_VARIANT))


def _trained_config(folder: Path) -> BLIP3oDiTConfig:
    """The configuration of a model to start from. Raises FileNotFoundError or ValueError: there is none."""
    if (folder / ADAPTER_FILE).is_file():
        raise ValueError(
            f"{folder}: expected a whole model to start from, found an adapter ({ADAPTER_FILE}): merge it "
            "into its model, and save that"
        )
    if not (folder / CONFIG_FILE).is_file():
        raise refusal(folder, MODEL)
    config: BLIP3oDiTConfig = BLIP3oDiTConfig.from_pretrained(folder)
    if config.flow.student_steps:
        raise ValueError(
            f"{folder}: expected a model that is not distilled, found a student of "
            f"{config.flow.student_steps} steps: start from its teacher, and distil the result"
        )
    return config
