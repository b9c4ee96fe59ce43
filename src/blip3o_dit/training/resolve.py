"""From the flags that were given to the settings of a run: a new one, a resumed one, one that is extended."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from blip3o_dit.training.checkpoint import ANOTHER_RUN, from_its_weights
from blip3o_dit.training.config import (
    DEBUG_DEFAULTS,
    LOW_MEMORY_DEFAULTS,
    PAPER_RECIPE,
    SIZE_RATES,
    SIZES,
    TrainingConfig,
    launcher_precision,
)
from blip3o_dit.training.extension import plan_extension
from blip3o_dit.training.init_from import OF_THE_WEIGHTS, settings_of_model
from blip3o_dit.utils.hub import model_folder

# Settings that a resumed run may change: they do not change what is learned from which data.
RESUMABLE_CHANGES = {
    "embeddings_path",
    "output_dir",
    "send_to",
    "num_workers",
    "verify",
    "device",
    "deterministic",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "async_checkpoints",
    "eval_steps",
    "eval_loss_samples",
    "eval_samples",
    "eval_inference_steps",
    "eval_batch_size",
    "gradient_checkpointing",
    "selective_checkpointing",
    "compile",
    "report_to",
    "wandb_project",
    "wandb_run_name",
    "best_metric",
    "early_stop",
    "max_hours",
    "rank_timeout",
    # together the samples of a step, which `check_checkpoint` compares
    "batch_size",
    "gradient_accumulation_steps",
    "auto_micro_batch",
    "solver",
    "num_inference_steps",
}


# The learning rate over the run. An extension has its own.
SCHEDULE = {"num_epochs", "max_steps", "learning_rate", "warmup_steps", "lr_scheduler_type"}
EXTENSION_CHANGES = {"learning_rate", "warmup_steps", "lr_scheduler_type", "extend_epochs", "extend_steps"}


def resolve_config(
    given: dict[str, Any],
    *,
    debug: bool,
    resume: Path | None,
    recipe: str = "default",
    size: str | None = None,
) -> TrainingConfig:
    """The configuration of a run from the flags that were given, over those of size, `--debug` and recipe.

    A run that starts from a model (`init_from`) takes from there what its weights were learned for. A resumed
    run takes what was not given from its checkpoint, and refuses to change what was learned.

    Raises:
        ValueError: with each difference, and the flags that do what was meant.
    """
    given = launcher_precision() | _network(size, given) | given
    if given.get("init_from"):
        given["init_from"] = str(model_folder(given["init_from"]))
    recipe_settings = PAPER_RECIPE if recipe == "paper" else {}
    if given.get("memory") == "low":
        recipe_settings = recipe_settings | LOW_MEMORY_DEFAULTS
    chosen = recipe_settings | given
    if resume is not None:
        return _resumed(chosen, resume)
    start = settings_of_model(Path(given["init_from"]), chosen) if given.get("init_from") else {}
    if size is not None:
        recipe_settings = {"learning_rate": SIZE_RATES[size]} | recipe_settings
    return TrainingConfig(**(recipe_settings | (DEBUG_DEFAULTS if debug else {}) | start | given))


def _network(size: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """Settings of a size; its heads only with its own width."""
    settings = dict(SIZES[size]) if size is not None else {}
    if "model_dim" in given:
        settings.pop("num_heads", None)
    return settings


def _resumed(given: dict[str, Any], checkpoint: Path) -> TrainingConfig:
    saved = asdict(TrainingConfig.from_folder(checkpoint))
    may_change, extension = RESUMABLE_CHANGES, plan_extension(checkpoint, saved, given)
    if extension:
        may_change = may_change | EXTENSION_CHANGES
    if saved["lr_scheduler_type"] == "constant_with_warmup":  # the others end where the run ends
        may_change = may_change | {"num_epochs", "max_steps"}
    changed = {
        name: f"{name} was {saved[name]!r}, now {value!r}"
        for name, value in given.items()
        if name not in may_change and saved[name] != value
    }
    if changed:
        raise ValueError(
            f"{checkpoint}: cannot resume with other settings: {'; '.join(changed.values())}: "
            + _way(set(changed), checkpoint)
        )
    return TrainingConfig(**(saved | given | extension))


def _way(changed: set[str], checkpoint: Path) -> str:
    """How to have a run with other values of these settings."""
    if changed & {*OF_THE_WEIGHTS, "init_from", "init_statistics"}:
        return ANOTHER_RUN
    if changed <= SCHEDULE:
        return (
            "leave them out to continue; --extend_epochs N (or --extend_steps N) trains further with a "
            "schedule of its own, for which --learning_rate, --warmup_steps and --lr_scheduler_type count"
        )
    return from_its_weights(checkpoint)
