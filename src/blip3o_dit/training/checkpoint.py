"""Checkpoints: what is in one, which is the newest whole one, which are kept, and whether one fits a run.

    checkpoint-N/               after optimizer step N
      model.safetensors, config.json, model.ema.safetensors, training_config.json
      optimizer.safetensors     the optimizer's tensors; optimizer.json: its numbers, the schedule, the scaler
      trainer_state.json        the Trainer's counters and log
      progress.json             sums since the last log line; which data the run is on
      source_folds.safetensors  with an informed source: the maps that training starts from
      checksums.json            written last

Nothing in it is a pickle. It is written as checkpoint-N.partial and renamed when it is whole.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from transformers import TrainerState

from blip3o_dit.data.embeddings import Embeddings
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.config import BLIP3oDiTConfig
from blip3o_dit.training.anomalies import SPIKES_FILE
from blip3o_dit.training.config import LOWER_IS_BETTER, TrainingConfig
from blip3o_dit.utils.atomic import ASIDE, REPLACED, remove_files_and_folders, restore_replaced
from blip3o_dit.utils.checksums import CHECKSUMS_FILE, verify
from blip3o_dit.utils.distributed import Processes
from blip3o_dit.utils.json_files import finite_or_none, read_json_object, short_repr, show_names
from blip3o_dit.utils.recognise import CHECKPOINT, refusal
from blip3o_dit.utils.stateless_random import DRAWS_VERSION

logger = logging.getLogger(__name__)

PROGRESS_FILE = "progress.json"
OPTIMIZER_TENSORS, OPTIMIZER_NUMBERS = "optimizer.safetensors", "optimizer.json"
TRAINER_STATE_FILE = "trainer_state.json"

# What a checkpoint must hold to continue from.
CHECKPOINT_FILES = (
    "config.json",
    "model.safetensors",
    "training_config.json",
    TRAINER_STATE_FILE,
    PROGRESS_FILE,
    OPTIMIZER_TENSORS,
    OPTIMIZER_NUMBERS,
)


# What is said of a refusal to resume: the way that does what was meant.
NEWEST_WHOLE = "--resume_from_checkpoint auto takes the newest whole one in --output_dir"
ANOTHER_RUN = "that needs a run of its own: leave out --resume_from_checkpoint, and give another --output_dir"


_WEIGHTS_ONLY = "; a new run can start from the weights of a model folder, with --init_from"


def from_its_weights(checkpoint: Path) -> str:
    return f"a new run can start from its weights: --init_from {checkpoint} --output_dir NEW"


@dataclass(frozen=True)
class RunIdentity:
    """What a continued run must share with the one it continues, beside the settings of its configuration.

    `samples` and `fingerprint` tell the data apart; `global_batch` is the samples of an optimizer step, over
    all processes and accumulated batches.
    """

    samples: int
    fingerprint: str
    global_batch: int

    @classmethod
    def of(cls, source: Embeddings, config: TrainingConfig, processes: int) -> RunIdentity:
        own = getattr(source, "fingerprint", None)
        name = own() if callable(own) else f"{type(source).__name__} of {source.num_samples} samples"
        return cls(source.num_samples, name, global_batch(config, processes))


@dataclass(frozen=True)
class LoopState:
    """Where a run is, beside the Trainer's own counters: what the next log line will say of the steps since
    the last one. `monitor` holds the sums and the count of `TrainingMetrics`; `draws` is the version of the
    random numbers, 1 where none was written; `pieces` those that batches were cut into for want of memory,
    written only where they were. Of several processes `of_ranks` has each one's loss and monitor; the others
    are their mean, and the first one's."""

    run: RunIdentity
    loss_since_log: float
    loss_until_log: float
    last_logged_step: int
    monitor: tuple[list[float], int] | None
    draws: int = DRAWS_VERSION
    pieces: int = 1
    of_ranks: list[tuple[float, tuple[list[float], int] | None]] | None = None

    def of_rank(self, processes: Processes) -> tuple[float, tuple[list[float], int] | None]:
        """Loss and monitor that a process goes on with; the same for all where none were written for each."""
        if self.of_ranks is None or len(self.of_ranks) != processes.count:
            return self.loss_since_log, self.monitor
        loss, monitor = self.of_ranks[processes.rank]
        return loss, monitor

    def warn_of_other_draws(self, checkpoint: str) -> None:
        """Say that a continued run is not the one that it would have been."""
        if self.draws != DRAWS_VERSION:
            logger.warning(
                "%s: its noise and times were drawn by another version: the run goes on with this version's, "
                "and will not end in the weights that one version alone would have",
                checkpoint,
            )

    def write(self, folder: Path) -> None:
        values = asdict(self)
        for name, usual in (("pieces", 1), ("of_ranks", None)):
            if values[name] == usual:  # so that earlier versions can go on
                del values[name]
        (folder / PROGRESS_FILE).write_text(json.dumps(values, indent=1))

    @classmethod
    def read(cls, folder: Path) -> LoopState:
        """Raises ValueError when the file is not what `write` made."""
        file = folder / PROGRESS_FILE
        values = read_json_object(file)
        try:
            run = RunIdentity(**values.pop("run"))
            return cls(run=run, **({"draws": 1} | values))
        except (TypeError, KeyError) as error:
            raise ValueError(f"{file}: expected the progress of a run, found something else") from error


def checkpoints(output_dir: Path) -> list[Path]:
    """Folders that have the name of a checkpoint, the newest first."""
    named = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    folders = filter(Path.is_dir, named)
    return sorted(folders, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)


def newest_whole(output_dir: Path, since: float = 0.0) -> Path | None:
    """The newest checkpoint whose files are all there and unaltered; says why it passes over others. Not one
    that was finished before `since`, in seconds since 1970."""
    for left in output_dir.glob(f"checkpoint-*{REPLACED}"):
        restore_replaced(left.with_name(left.name.removesuffix(REPLACED)))
    for path in checkpoints(output_dir):
        try:
            verify_checkpoint(path)
        except ValueError as error:
            logger.warning("passed over: %s", error)
        else:
            return path if (path / CHECKSUMS_FILE).stat().st_mtime >= since else None
    return None


def remove_leftovers(output_dir: Path, *, all_checkpoints: bool = False) -> None:
    """Remove what a killed run left half-written, and with `all_checkpoints` those of an earlier run, and
    its diagnoses and loss spikes."""
    remove_files_and_folders((*output_dir.glob(f"*{ASIDE}"), *output_dir.glob(f"checkpoint-*{REPLACED}")))
    if all_checkpoints:
        for path in checkpoints(output_dir):
            shutil.rmtree(path)
        remove_files_and_folders((output_dir / SPIKES_FILE, *output_dir.glob("diagnosis*.json")))


def keep_newest(output_dir: Path, limit: int | None, *, best_step: int | None) -> None:
    """Remove all but the newest `limit` checkpoints (None: keep all) and the one of the best step."""
    for path in checkpoints(output_dir)[limit:] if limit else []:
        if path.name != f"checkpoint-{best_step}":
            shutil.rmtree(path)


def best_saved(output_dir: Path, log: list[dict[str, Any]], metric: str) -> int | None:
    """The step of the best checkpoint that is there, by a figure of the log; None when none was evaluated.

    Not the best evaluation: after that there may have been no checkpoint. Losses and scores are better lower.
    """
    steps = {int(path.name.removeprefix("checkpoint-")) for path in checkpoints(output_dir)}
    sign = 1 if metric.removeprefix("eval_") in LOWER_IS_BETTER else -1
    found = [(entry.get(metric), entry["step"]) for entry in log if entry.get("step") in steps]
    numbers = [(sign * value, step) for value, step in found if isinstance(value, int | float)]
    finite = [(value, step) for value, step in numbers if math.isfinite(value)]
    return min(finite)[1] if finite else None


_verified: set[tuple[Any, ...]] = set()


def verify_checkpoint(checkpoint: Path) -> None:
    """Raises FileNotFoundError or ValueError when a checkpoint is not whole.

    Reads all of it, once for as long as its files keep their sizes and times.
    """
    if not any((checkpoint / name).is_file() for name in (PROGRESS_FILE, OPTIMIZER_TENSORS)):
        error = refusal(checkpoint, CHECKPOINT)
        raise type(error)(f"{error}; {NEWEST_WHOLE}{_WEIGHTS_ONLY}")
    missing = [name for name in CHECKPOINT_FILES if not (checkpoint / name).is_file()]
    if missing:
        raise ValueError(
            f"{checkpoint}: expected a whole checkpoint, found no {', '.join(missing)}: "
            f"{NEWEST_WHOLE}{_WEIGHTS_ONLY}"
        )
    files = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint.iterdir()]
    if tuple(sorted(files)) not in _verified:
        try:
            verify(checkpoint)
        except ValueError as error:
            raise ValueError(f"{error}: {NEWEST_WHOLE}") from error
        _verified.add(tuple(sorted(files)))


def check_checkpoint(checkpoint: Path, model_config: BLIP3oDiTConfig, run: RunIdentity) -> None:
    """Refuse a checkpoint that is not whole or does not fit the run.

    Raises:
        FileNotFoundError, ValueError: naming the file, or each difference.
    """
    verify_checkpoint(checkpoint)
    saved = read_json_object(checkpoint / "config.json")
    wanted = model_config.to_dict()
    for config in (saved, wanted):  # which training does not know
        if isinstance(config.get("flow_matching"), dict):
            config["flow_matching"] = {k: v for k, v in config["flow_matching"].items() if k != "noise_scale"}
    if "standardize" not in saved:  # older than this field of config.json
        saved["standardize"] = TrainingConfig.from_folder(checkpoint).standardize
    names = set(BLIP3oDiTConfig.own_fields()) - {"gradient_checkpointing"}
    different = [
        f"{name} is {short_repr(saved.get(name))} there, {wanted[name]!r} here"
        for name in sorted(names)
        if saved.get(name) != wanted[name]
    ]
    way = ANOTHER_RUN if different else from_its_weights(checkpoint)
    saved = asdict(LoopState.read(checkpoint).run)
    for name, now in asdict(run).items():
        if saved[name] != now:
            different.append(f"{_RUN_NAMES[name]} was {short_repr(saved[name])}, now {short_repr(now)}")
    if different:
        found = "; ".join(different)
        raise ValueError(f"{checkpoint}: the checkpoint does not fit this run: {found}: {way}")
    BLIP3oDiTModel.check_weights(checkpoint / "model.safetensors", model_config)
    _check_trainer_state(checkpoint / TRAINER_STATE_FILE)


_RUN_NAMES = {
    "samples": "the number of samples",
    "fingerprint": "the data (its fingerprint)",
    "global_batch": "the samples of an optimizer step (batch_size x processes x gradient_accumulation_steps)",
}


def global_batch(config: TrainingConfig, processes: int) -> int:
    """Samples of an optimizer step."""
    return config.batch_size * processes * config.gradient_accumulation_steps


def save_trainer_state(state: TrainerState, file: Path) -> None:
    """Write the Trainer's counters and log as JSON: numbers in it that are not finite become null."""
    values = finite_or_none(asdict(state))
    file.write_text(json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n")


def _check_trainer_state(file: Path) -> None:
    """The Trainer takes what it finds: refuse what it could not have written, which a NaN is not."""
    state = read_json_object(file, non_finite=True)
    known = {field.name for field in fields(TrainerState)}
    unknown = sorted(set(state) - known)
    if unknown:
        raise ValueError(f"{file}: unknown {show_names(unknown)}")
    step, log = state.get("global_step"), state.get("log_history")
    if not isinstance(step, int) or isinstance(step, bool) or step < 1:
        raise ValueError(f"{file}: global_step: expected a positive integer, found {short_repr(step)}")
    if not isinstance(log, list) or not all(isinstance(entry, dict) for entry in log):
        raise ValueError(f"{file}: log_history: expected a list of objects")
