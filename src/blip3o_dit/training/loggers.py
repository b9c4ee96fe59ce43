"""Which of the Trainer's loggers a run writes to, beside its own `training_log.jsonl`."""

from __future__ import annotations

import os
from pathlib import Path

from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.training.wandb_setup import prepare_wandb, require_wandb
from blip3o_dit.utils.validation import check_name, package_missing

TENSORBOARD_VARIABLE = "TENSORBOARD_LOGGING_DIR"
TENSORBOARD_FOLDER = "runs"
# Packages whose names are not those of their loggers.
_PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml"}


def loggers(config: TrainingConfig) -> list[str]:
    """The Trainer's names of them.

    Raises:
        ValueError: no such logger, or its package is not there.
    """
    names = [name.strip() for name in (config.report_to or "").split(",") if name.strip()]
    for name in names:
        check_name("report_to", name, tuple(sorted(INTEGRATION_TO_CALLBACK)))
        if name == "wandb" and not config.wandb_project:
            raise ValueError("--report_to wandb: expected --wandb_project beside it, found none")
        if name not in get_available_reporting_integrations():
            raise package_missing(f"--report_to {name}", _PACKAGES.get(name, name))
    if config.wandb_project:
        require_wandb()
        names.append("wandb")
    return list(dict.fromkeys(names))


def prepare_loggers(config: TrainingConfig, *, continued: bool) -> None:
    """Before the Trainer starts them, on one process: a continued run goes on where it wrote before."""
    if config.wandb_project:
        prepare_wandb(config.wandb_project, config.output_dir, continued=continued)
    if os.environ.get(TENSORBOARD_VARIABLE) in (None, *_set_here):
        folder = str(Path(config.output_dir) / TENSORBOARD_FOLDER)
        os.environ[TENSORBOARD_VARIABLE] = folder
        _set_here.add(folder)


# So that a second run of this process does not take the first one's folder for given.
_set_here: set[str] = set()
