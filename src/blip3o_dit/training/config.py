"""One training run: the flags of train_blip3o_dit.py, resolved and checked."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from blip3o_dit.data.dataset import SHUFFLES, SPLIT_RULES, check_split
from blip3o_dit.data.store import VERIFY_CHOICES
from blip3o_dit.flow.config import (
    PREDICTION_TYPES,
    SCHEDULE_TYPES,
    SOLVER_NAMES,
    SOURCES,
    TIME_DISTRIBUTIONS,
    FlowMatchingConfig,
)
from blip3o_dit.model.config import SIZE_FIELDS, BLIP3oDiTConfig
from blip3o_dit.ridge import neighbour_components
from blip3o_dit.utils.atomic import is_sealed, verify
from blip3o_dit.utils.json_files import read_json, short_repr, show_names
from blip3o_dit.utils.validation import (
    check_integer,
    check_name,
    check_range,
    check_size,
    error_context,
    is_number,
)

TRAINING_CONFIG_FILE = "training_config.json"


MEMORY_MODES = ("default", "low")


BEST_METRICS = ("loss", "cosine_similarity_mean", "r2")


# The time shift sqrt(N d / 4096) is 1 for this many numbers a sample (RAE, arXiv 2510.11690).
SHIFT_REFERENCE = 4096


def _option(default: Any, help_text: str, *, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help_text, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One training run: what the command line of `train_blip3o_dit.py` says, resolved and checked.

    Written as `training_config.json` beside the weights. The fields are the flags; their meanings are the
    help texts.

    Raises:
        ValueError: names the field, what it expects and what it found.
    """

    embeddings_path: str = _option("", "embedding store (folder) or documented pickle")
    output_dir: str = _option("", "folder for weights, checkpoints, logs and curves")

    model_dim: int = _option(1792, "hidden width of the transformer")
    num_layers: int = _option(24, "transformer blocks")
    num_heads: int = _option(28, "attention heads")
    num_kv_heads: int | None = _option(None, "heads of keys and values (default: num_heads)")
    ffn_dim: int | None = _option(None, "feed-forward width (default: 8/3 model_dim, rounded up)")
    gradient_checkpointing: bool = _option(False, "recompute blocks in the backward pass")
    selective_checkpointing: bool = _option(
        False, "keep products and attention, recompute only what is cheap, in the backward pass"
    )
    memory: str = _option(
        "default",
        "low: bfloat16 weights rounded stochastically, 8-bit AdamW states, gradient checkpointing, no "
        "averaged weights",
        choices=MEMORY_MODES,
    )
    compile: bool = _option(
        False, "compile the blocks with torch.compile (takes a minute or more at the start)"
    )

    num_epochs: float = _option(10.0, "passes over the training split")
    max_steps: int = _option(-1, "stop after this many optimizer steps; overrides num_epochs")
    batch_size: int = _option(32, "training samples per device and step")
    eval_batch_size: int = _option(32, "evaluation samples per device and step")
    gradient_accumulation_steps: int = _option(1, "batches per optimizer step")
    learning_rate: float = _option(1e-4, "peak learning rate (AdamW)")
    weight_decay: float = _option(0.0, "AdamW weight decay")
    warmup_steps: int = _option(0, "optimizer steps of linear warm-up")
    lr_scheduler_type: str = _option(
        "cosine", "schedule after warm-up", choices=("cosine", "linear", "constant_with_warmup")
    )
    max_grad_norm: float = _option(1.0, "gradient clipping norm; 0 turns clipping off")
    ema_decay: float = _option(0.999, "decay of the averaged weights used for inference; 0: none")

    sigma_min: float = _option(1e-4, "noise left at t = 1")
    sigma_max: float = _option(1.0, "noise at t = 0")
    prediction_type: str = _option("preconditioned", "what the network predicts", choices=PREDICTION_TYPES)
    schedule_type: str = _option("linear", "path from noise to data", choices=SCHEDULE_TYPES)
    regularization_weight: float = _option(0.0, "weight of the mean square of the network output")
    cfg_dropout: float = _option(0.1, "probability of training without the condition (guidance)")
    source: str = _option("ridge_3x3", "what the path starts from: noise, or a ridge guess", choices=SOURCES)
    source_samples: int = _option(10000, "most training samples that the ridge source is fitted on")
    time_distribution: str = _option("uniform", "how training draws times", choices=TIME_DISTRIBUTIONS)
    time_mean: float = _option(0.0, "mean of the noise level's logit, for logit_normal")
    time_std: float = _option(1.0, "deviation of the noise level's logit, for logit_normal")
    time_shift: float = _option(
        1.0, "shift of the noise level in training and sampling; 1: none, 0: sqrt(N d / 4096)"
    )
    solver: str = _option("midpoint", "solver that generation uses by default", choices=SOLVER_NAMES)
    num_inference_steps: int = _option(8, "steps that generation takes by default")
    standardize: bool = _option(True, "standardise each channel with the training split's statistics")
    statistics_samples: int = _option(10000, "most training samples that these statistics are taken from")

    eval_split: float = _option(
        0.1, "share of the samples held out, or from 1 up their number; 0 trains on all of them"
    )
    split_by: str = _option(
        "permutation",
        "how samples are held out; key_hash does not change when data is appended, but reads every key first",
        choices=SPLIT_RULES,
    )
    normalize_embeddings: bool = _option(False, "L2-normalise every token before standardising")
    shuffle: str = _option(
        "exact",
        "order of a pass: any, or whole shards through a window, for stores larger than memory on slow disks",
        choices=SHUFFLES,
    )
    shuffle_window: int = _option(4096, "samples that --shuffle window mixes at a time")
    verify: str = _option(
        "first",
        "checksums of a store's shards: taken when this machine first reads a shard, or never",
        choices=VERIFY_CHOICES,
    )
    num_workers: int = _option(0, "data-loader processes")

    fp16: bool = _option(False, "float16 mixed precision (needs a GPU)")
    bf16: bool = _option(False, "bfloat16 mixed precision")
    device: str = _option("auto", "where to train", choices=("auto", "cpu", "cuda"))
    deterministic: bool = _option(
        False, "on a GPU, only kernels that give the same bits in every run; slower (the CPU has no others)"
    )
    seed: int = _option(42, "names every random draw: weights, split, order, noise, times")

    logging_steps: int = _option(100, "optimizer steps between log lines")
    save_steps: int = _option(1000, "optimizer steps between checkpoints")
    save_total_limit: int | None = _option(
        None, "newest checkpoints kept, and the best one of those that were evaluated (default: all)"
    )
    best_metric: str = _option("loss", "held-out figure that names the best checkpoint", choices=BEST_METRICS)
    max_hours: float | None = _option(None, "save and stop after so many hours (default: no limit)")
    eval_steps: int = _option(1000, "optimizer steps between evaluations")
    eval_loss_samples: int = _option(4096, "most held-out samples that each evaluation takes the loss of")
    eval_samples: int = _option(64, "held-out samples that each evaluation generates")
    eval_inference_steps: int = _option(8, "solver steps of these generations")

    wandb_project: str | None = _option(None, "log to this Weights & Biases project")
    wandb_run_name: str | None = _option(None, "name of the run there")

    def __post_init__(self) -> None:
        if self.fp16 and self.bf16:
            raise ValueError("fp16 and bf16: expected at most one of them, found both")
        if self.memory == "low" and self.fp16:
            raise ValueError("memory: low keeps the weights in bfloat16, expected no fp16 beside it")
        if self.compile and self.selective_checkpointing:
            raise ValueError(
                "selective_checkpointing: expected none with compile, which itself recomputes what is cheap"
            )
        for name in _COUNTS_FROM_ONE:
            check_integer(name, getattr(self, name), 1)
        for name in ("warmup_steps", "num_workers", "seed", "eval_samples"):
            check_integer(name, getattr(self, name), 0)
        if self.save_total_limit is not None:
            check_integer("save_total_limit", self.save_total_limit, 1)
        if self.max_steps != -1:
            check_integer("max_steps", self.max_steps, 1)
        for name in ("num_epochs", "max_hours"):
            value = getattr(self, name)
            no_limit = name == "max_hours" and value is None
            if not no_limit and not (is_number(value) and 0 < value < math.inf):
                raise ValueError(f"{name}: expected a number above 0, found {short_repr(value)}")
        for name in ("learning_rate", "weight_decay", "max_grad_norm"):
            check_range(name, getattr(self, name), 0.0, math.inf)
        check_range("ema_decay", self.ema_decay, 0.0, 1.0)
        if self.best_metric != "loss" and not self.eval_samples:
            raise ValueError(f"best_metric: {self.best_metric} expects eval_samples above 0, found 0")
        self._check_plain_types()
        for option in fields(self):
            if option.metadata["choices"]:
                check_name(option.name, getattr(self, option.name), option.metadata["choices"])
        check_split(self.eval_split, self.split_by)
        self.flow_matching()

    def _check_plain_types(self) -> None:
        """Switches are true or false, names and paths are text; sizes of the model are checked with it."""
        for option in fields(self):
            value = getattr(self, option.name)
            if isinstance(option.default, bool):
                if not isinstance(value, bool):
                    raise ValueError(f"{option.name}: expected true or false, found {short_repr(value)}")
            elif option.type in ("str", "str | None"):
                if not isinstance(value, str) and not (value is None and option.type != "str"):
                    raise ValueError(f"{option.name}: expected text, found {short_repr(value)}")
            elif option.name in SIZE_FIELDS and not (value is None and "None" in str(option.type)):
                check_size(option.name, value)
        check_range("time_shift", self.time_shift, 0.0, 1e3)

    def to_json(self) -> bytes:
        """The content of `training_config.json`."""
        return json.dumps(asdict(self), indent=2).encode()

    @classmethod
    def from_folder(cls, folder: str | Path) -> TrainingConfig:
        """The configuration saved in a model folder or checkpoint.

        Raises:
            ValueError: when the file is missing, is not JSON, has unknown fields or bad values.
        """
        file = Path(folder) / TRAINING_CONFIG_FILE
        if not file.is_file():
            raise ValueError(f"{folder}: expected {TRAINING_CONFIG_FILE}, found none")
        if is_sealed(Path(folder)):
            verify(Path(folder), [TRAINING_CONFIG_FILE])
        values = read_json(file)
        if not isinstance(values, dict):
            raise ValueError(f"{file}: expected an object, found {short_repr(values)}")
        known = {f.name for f in fields(cls)}
        unknown = set(values) - known
        if unknown:
            raise ValueError(f"{file}: unknown {show_names(unknown)}; known are {sorted(known)}")
        with error_context(file):
            return cls(**values)

    def flow_matching(
        self, *, num_tokens: int = 1, condition_dim: int = 1, target_dim: int = 1
    ) -> FlowMatchingConfig:
        """The flow part of the flags, for data of these sizes."""
        shift = self.time_shift or (num_tokens * target_dim / SHIFT_REFERENCE) ** 0.5
        components = neighbour_components(condition_dim) if self.source == "ridge_3x3" else 0
        return FlowMatchingConfig(
            schedule_type=self.schedule_type,
            sigma_min=self.sigma_min,
            sigma_max=self.sigma_max,
            prediction_type=self.prediction_type,
            regularization_weight=self.regularization_weight,
            condition_dropout=self.cfg_dropout,
            source=self.source,
            source_components=components,
            time_distribution=self.time_distribution,
            time_mean=self.time_mean,
            time_std=self.time_std,
            time_shift=shift,
        )

    def model(self, *, num_tokens: int, condition_dim: int, target_dim: int) -> BLIP3oDiTConfig:
        """The model configuration of this run for data of these sizes. num_tokens must be a square."""
        return BLIP3oDiTConfig(
            model_dim=self.model_dim,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            ffn_dim=self.ffn_dim,
            in_channels=target_dim,
            eva_embedding_size=condition_dim,
            input_size=math.isqrt(num_tokens),
            gradient_checkpointing=self.gradient_checkpointing or self.selective_checkpointing,
            normalize_embeddings=self.normalize_embeddings,
            standardize=self.standardize,
            flow_matching=asdict(
                self.flow_matching(num_tokens=num_tokens, condition_dim=condition_dim, target_dim=target_dim)
            ),
            default_solver=self.solver,
            default_steps=self.num_inference_steps,
        )


# BLIP3-o (arXiv 2505.09568 and its training code): raw features, pure noise, uniform times, the velocity,
# Euler steps, no averaged weights.
PAPER_RECIPE: dict[str, Any] = {
    "standardize": False,
    "source": "noise",
    "prediction_type": "v_prediction",
    "schedule_type": "linear",
    "time_distribution": "uniform",
    "time_shift": 1.0,
    "ema_decay": 0.0,
    "solver": "euler",
    "num_inference_steps": 50,
    "eval_inference_steps": 20,
}


# `--memory low`: what its flag stands for beside the weights and the optimizer; flags given beside it win.
LOW_MEMORY_DEFAULTS: dict[str, Any] = {"gradient_checkpointing": True, "ema_decay": 0.0}


_COUNTS_FROM_ONE = (
    *("batch_size", "eval_batch_size", "gradient_accumulation_steps"),
    *("logging_steps", "save_steps", "eval_steps", "eval_inference_steps", "eval_loss_samples"),
    *("source_samples", "statistics_samples", "shuffle_window", "num_inference_steps"),
)
