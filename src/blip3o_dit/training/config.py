"""One training run: settings and recipes."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip3o_dit.data.choices import SHUFFLES, SPLIT_RULES, VERIFY_CHOICES, check_split
from blip3o_dit.flow.config import (
    PREDICTION_TYPES,
    SCHEDULE_TYPES,
    SOLVER_NAMES,
    SOURCES,
    TIME_DISTRIBUTIONS,
    FlowMatchingConfig,
)
from blip3o_dit.utils.atomic import MODEL_ASIDE, finish_publishing
from blip3o_dit.utils.checksums import is_sealed, verify
from blip3o_dit.utils.json_files import read_json_object, short_repr
from blip3o_dit.utils.settings import check_settings, setting
from blip3o_dit.utils.validation import (
    check_integer,
    check_known,
    check_range,
    check_size,
    error_context,
    is_number,
)

if TYPE_CHECKING:
    from blip3o_dit.data.dataset import Split
    from blip3o_dit.data.embeddings import Embeddings
    from blip3o_dit.model.config import BLIP3oDiTConfig

TRAINING_CONFIG_FILE = "training_config.json"

# What a run notes of itself, and nobody gives.
NOTED = ("init_checksum", "extended_at", "extended_to", "extended_rate", "extended_warmup")

# What decides which samples are held out.
SPLIT_SETTINGS = ("eval_split", "seed", "split_by", "group_pattern")

# A heading of the help that several places of the settings share.
STARTING = "continuing a run, and starting from a trained model"

MEMORY_MODES = ("default", "low", "split")
MOMENTS = ("float32", "bfloat16")
OPTIMIZERS = ("adamw", "muon")
COMPILE_CHOICES = ("blocks", "full")
LOWER_IS_BETTER = ("energy_score", "loss")
BEST_METRICS = (*LOWER_IS_BETTER, "cosine_similarity_mean", "r2")

# The time shift sqrt(N d / 4096) is 1 for this many numbers a sample (RAE, arXiv 2510.11690).
SHIFT_REFERENCE = 4096

# What values a setting takes; see `check_settings`.
_at_least_1 = partial(check_integer, low=1)
_at_least_0 = partial(check_integer, low=0)
_nonnegative = partial(check_range, low=0.0, high=math.inf)
_share = partial(check_range, low=0.0, high=1.0)
_shift = partial(check_range, low=0.0, high=1e3)


def _positive(name: str, value: Any) -> None:
    if not (is_number(value) and 0 < value < math.inf):
        raise ValueError(f"{name}: expected a number above 0, found {short_repr(value)}")


def _max_steps(name: str, value: Any) -> None:
    if value != -1:
        check_integer(name, value, 1)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One training run: what the command line of `train_blip3o_dit.py` says, resolved and checked.

    Written as `training_config.json` beside the weights. The fields are the flags; their meanings are the
    help texts. What is None of the run's length, intervals and workers follows from the data: see
    `lengths.py`.

    Raises:
        ValueError: names the field, what it expects and what it found.
    """

    embeddings_path: str = setting(
        "",
        "embedding store (folder) or documented pickle (default: the resumed run's)",
        group="data and output",
    )
    output_dir: str = setting(
        "", "folder for weights, checkpoints, logs and curves (default: the resumed run's)"
    )
    send_to: str = setting(
        "",
        "address, s3://bucket/run, to which each whole checkpoint and in the end the model is sent as well",
    )
    init_from: str = setting(
        "",
        "model folder, checkpoint or owner/name on the hub whose weights the run starts from; they bring "
        "sizes, path and source",
        group=STARTING,
    )
    init_statistics: str = setting(
        "data",
        "whose statistics and source such a run has: fitted on the data, or the model's, to begin "
        "exactly where it ended",
        choices=("data", "model"),
    )
    init_checksum: str = setting("", "SHA-256 of the weights that the run started from")

    model_dim: int = setting(1792, "hidden width of the transformer", group="network", check=check_size)
    num_layers: int = setting(24, "transformer blocks", check=check_size)
    num_heads: int | None = setting(
        None,
        "attention heads (default: of 64 numbers each, or as near as the width allows)",
        check=check_size,
    )
    num_kv_heads: int | None = setting(
        None, "heads of keys and values (default: num_heads)", check=check_size
    )
    ffn_dim: int | None = setting(
        None, "feed-forward width (default: 8/3 model_dim, rounded up)", check=check_size
    )
    gradient_checkpointing: bool = setting(
        False, "recompute blocks in the backward pass, for less memory", group="memory, speed and precision"
    )
    selective_checkpointing: bool = setting(
        False, "keep products and attention, recompute only what is cheap, in the backward pass"
    )
    memory: str = setting(
        "default",
        "low: bfloat16 weights rounded stochastically, 8-bit AdamW states, gradient checkpointing, no "
        "averaged weights; split: bfloat16 weights whose float32 values AdamW keeps in 2 bytes more",
        choices=MEMORY_MODES,
    )
    moments: str = setting("float32", "AdamW's two moments with --memory split", choices=MOMENTS)
    compile: str | None = setting(
        None,
        "torch.compile each block (takes a minute or more at the start), or the full network (takes longer, "
        "leaves less to launch); given without a word: blocks",
        choices=COMPILE_CHOICES,
    )
    cuda_graphs: bool | None = setting(
        None,
        "launch forward and backward pass as CUDA graphs (default: on one GPU that has the memory for it)",
    )

    num_epochs: float | None = setting(
        None,
        "passes over the training split (default: 10, and for at least 300 steps)",
        group="optimisation",
        check=_positive,
    )
    max_steps: int = setting(
        -1, "stop after this many optimizer steps; overrides num_epochs", check=_max_steps
    )
    extend_epochs: float | None = setting(
        None,
        "train a resumed run so many passes further, with a schedule of their own",
        group=STARTING,
        check=_positive,
    )
    extend_steps: int | None = setting(None, "the same in optimizer steps", check=_at_least_1)
    extended_at: int = setting(0, "step at which that schedule begins", check=_at_least_0)
    extended_to: int = setting(0, "step at which it ends", check=_at_least_0)
    extended_rate: float = setting(0.0, "learning rate that it begins with", check=_nonnegative)
    extended_warmup: int = setting(0, "its steps of linear warm-up", check=_at_least_0)
    batch_size: int = setting(
        32, "training samples per device and step", group="optimisation", check=_at_least_1
    )
    gradient_accumulation_steps: int = setting(1, "batches per optimizer step", check=_at_least_1)
    auto_micro_batch: bool | None = setting(
        None,
        "when memory runs out in a step, take it again, and all later ones, in smaller passes that add up to "
        "the same batch (default: in one process; in several, gradients are then exchanged after the passes)",
    )
    optimizer: str = setting(
        "adamw", "muon: for the matrices of the blocks, AdamW for the rest", choices=OPTIMIZERS
    )
    learning_rate: float = setting(
        1e-4, "peak learning rate; --size small: 5e-4, tiny: 1e-3", check=_nonnegative
    )
    weight_decay: float = setting(0.0, "weight decay", check=_nonnegative)
    warmup_steps: int | None = setting(
        None,
        "optimizer steps of linear warm-up (default: a twentieth of all, at most 1000)",
        check=_at_least_0,
    )
    lr_scheduler_type: str = setting(
        "cosine", "schedule after warm-up", choices=("cosine", "linear", "constant_with_warmup")
    )
    max_grad_norm: float = setting(1.0, "gradient clipping norm; 0 turns clipping off", check=_nonnegative)
    ema_decay: float = setting(
        0.999, "decay of the averaged weights used for inference; 0: none", check=_share
    )
    ema_every: int = setting(
        10,
        "most steps between two updates of that average, which are a twentieth of its span at most",
        check=_at_least_1,
    )

    sigma_min: float = setting(1e-4, "noise left at t = 1", group="flow")
    sigma_max: float = setting(1.0, "noise at t = 0")
    prediction_type: str = setting("preconditioned", "what the network predicts", choices=PREDICTION_TYPES)
    schedule_type: str = setting("linear", "path from noise to data", choices=SCHEDULE_TYPES)
    regularization_weight: float = setting(0.0, "weight of the mean square of the network output")
    cfg_dropout: float = setting(0.1, "probability of training without the condition (guidance)")
    source: str = setting(
        "ridge_context", "what the path starts from: noise, or a ridge guess", choices=SOURCES
    )
    source_samples: int = setting(
        10000, "most training samples that the ridge source is fitted on", check=_at_least_1
    )
    time_distribution: str = setting("uniform", "how training draws times", choices=TIME_DISTRIBUTIONS)
    time_mean: float = setting(0.0, "mean of the noise level's logit, for logit_normal")
    time_std: float = setting(1.0, "deviation of the noise level's logit, for logit_normal")
    time_shift: float = setting(
        1.0,
        "shift of the noise level in training and sampling; 1: none, 0: sqrt(N d / 4096)",
        check=_shift,
    )
    solver: str = setting("midpoint", "solver that generation uses by default", choices=SOLVER_NAMES)
    num_inference_steps: int = setting(8, "steps that generation takes by default", check=_at_least_1)
    standardize: bool = setting(
        True, "standardise each channel with the training split's statistics", group="data and output"
    )
    statistics_samples: int = setting(
        10000, "most training samples that these statistics are taken from", check=_at_least_1
    )

    eval_split: float = setting(
        0.1, "share of the samples held out, or from 1 up their number; 0 trains on all of them"
    )
    split_by: str = setting(
        "permutation",
        "how samples are held out; key_hash does not change when data is appended, but reads every key "
        "first; group is the same for groups of keys (--group_pattern)",
        choices=SPLIT_RULES,
    )
    group_pattern: str = setting(
        "",
        "regular expression that takes out of a key what is held out as one, by its first parenthesis or "
        "else its whole match: '^(.*)_crop' keeps the crops of a picture together",
    )
    normalize_embeddings: bool = setting(False, "L2-normalise every token before standardising")
    shuffle: str = setting(
        "exact",
        "order of a pass: any, or whole shards through a window, for stores larger than memory on slow disks",
        choices=SHUFFLES,
    )
    shuffle_window: int = setting(4096, "samples that --shuffle window mixes at a time", check=_at_least_1)
    calibrate: bool = setting(
        True,
        "hold back a sixteenth of the training samples, at most 256, to choose the averaged weights and the "
        "scale of the noise by",
    )
    verify: str = setting(
        "first",
        "checksums of a store: checked when a sample is first read, or never",
        choices=VERIFY_CHOICES,
    )
    num_workers: int | None = setting(
        None,
        "data-loader processes (default: none on a processor; on a GPU one less than its cores, at most 4)",
        check=_at_least_0,
    )

    fp16: bool = setting(False, "float16 mixed precision (needs a GPU)", group="memory, speed and precision")
    bf16: bool = setting(False, "bfloat16 mixed precision")
    residual: str = setting(
        "float32",
        "dtype of the residual stream, in generation too; bfloat16 goes with --bf16 and narrow weights",
        choices=("float32", "bfloat16"),
    )
    device: str = setting("auto", "where to train", choices=("auto", "cpu", "cuda"))
    deterministic: bool = setting(
        False, "on a GPU, only kernels that give the same bits in every run; slower (the CPU has no others)"
    )
    seed: int = setting(
        42,
        "names every random draw: weights, split, order, noise, times",
        group="optimisation",
        check=_at_least_0,
    )

    logging_steps: int | None = setting(
        None,
        "optimizer steps between log lines (default: a hundredth of all, at most 100)",
        group="logging",
        check=_at_least_1,
    )
    save_steps: int | None = setting(
        None,
        "optimizer steps between checkpoints (default: a fifth of all, from 10 to 1000)",
        group="checkpoints and stopping",
        check=_at_least_1,
    )
    save_total_limit: int | None = setting(
        None,
        "newest checkpoints kept, and the best one of those that were evaluated (default: all)",
        check=_at_least_1,
    )
    async_checkpoints: bool | None = setting(
        None,
        "write checkpoints while the run goes on, from a copy in the host's memory (default: on a GPU, where "
        "that has room for one)",
    )
    best_metric: str | None = setting(
        None,
        "figure that names the best checkpoint (default: energy_score of samples held back, or the held-out "
        "loss where there are none)",
        choices=BEST_METRICS,
    )
    early_stop: int | None = setting(
        None,
        "end the training after so many evaluations without a better energy score (default: never)",
        check=_at_least_1,
    )
    max_hours: float | None = setting(
        None, "save and stop after so many hours (default: no limit)", check=_positive
    )
    rank_timeout: float | None = setting(
        None,
        "of several processes, seconds in which a step must get on: a rank that hangs is named, and all end "
        "with status 76, for the launcher to restart (default: none)",
        check=_positive,
    )
    eval_steps: int | None = setting(
        None,
        "optimizer steps between evaluations (default: a fifth of all, from 10 to 1000)",
        group="evaluation while training",
        check=_at_least_1,
    )
    eval_batch_size: int = setting(32, "evaluation samples per device and step", check=_at_least_1)
    eval_loss_samples: int = setting(
        4096, "most held-out samples that each evaluation takes the loss of", check=_at_least_1
    )
    eval_samples: int = setting(64, "held-out samples that each evaluation generates", check=_at_least_0)
    eval_inference_steps: int = setting(8, "solver steps of these generations", check=_at_least_1)

    report_to: str | None = setting(
        None,
        "loggers of the Trainer, by name, with commas between several: tensorboard, mlflow, trackio, ... "
        "(default: none)",
        group="logging",
    )
    wandb_project: str | None = setting(None, "log to this Weights & Biases project", group="logging")
    wandb_run_name: str | None = setting(None, "name of the run there (default: one that it makes up)")

    def __post_init__(self) -> None:
        if isinstance(self.compile, bool):  # as older runs noted it
            object.__setattr__(self, "compile", "blocks" if self.compile else None)
        check_settings(self)
        if self.num_heads is None:  # training_config.json says what it was
            object.__setattr__(self, "num_heads", default_heads(self.model_dim))
        check_split(self.eval_split, self.split_by, self.group_pattern)
        self.flow_matching()
        if self.fp16 and self.bf16:
            raise ValueError("fp16 and bf16: expected at most one of them, found both")
        if self.memory != "default" and self.fp16:
            raise ValueError(
                f"memory: {self.memory} keeps the weights in bfloat16, expected no fp16 beside it"
            )
        if self.moments != "float32" and self.memory != "split":
            raise ValueError(f"moments: {self.moments} expects memory split, found {self.memory}")
        if self.optimizer == "muon" and (self.memory != "default" or self.fp16):
            found = "fp16" if self.fp16 else f"memory {self.memory}"
            raise ValueError(f"optimizer: muon expects float32 weights and no loss scale, found {found}")
        if self.cuda_graphs and self.not_recorded_with:
            raise ValueError(f"cuda_graphs: expected none with {self.not_recorded_with}")
        if self.residual == "bfloat16" and not (self.bf16 or self.memory != "default"):
            raise ValueError("residual: bfloat16 expects bf16, or memory low or split, found neither")
        if self.compile and self.selective_checkpointing:
            raise ValueError(
                "selective_checkpointing: expected none with compile, which itself recomputes what is cheap"
            )
        if self.early_stop and not (self.calibrate and self.eval_split):
            raise ValueError(
                "early_stop: expected calibrate and an eval_split above 0, to have samples held back"
            )
        if self.best_metric in ("cosine_similarity_mean", "r2") and not self.eval_samples:
            raise ValueError(f"best_metric: {self.best_metric} expects eval_samples above 0, found 0")
        if self.init_statistics == "model" and not self.init_from:
            raise ValueError("init_statistics: expected a model to start from (init_from), found none")
        if (self.extend_epochs or self.extend_steps) and not self.extended_at:
            raise ValueError(
                "extend_epochs: expected a run to train further (--resume_from_checkpoint), found none; "
                "--init_from starts a new run from a model's weights"
            )

    @property
    def not_recorded_with(self) -> str:
        """What there is that passes recorded as CUDA graphs cannot go with, or nothing."""
        found = {
            "gradient_checkpointing": self.gradient_checkpointing,
            "selective_checkpointing": self.selective_checkpointing,
            "gradient_accumulation_steps": self.gradient_accumulation_steps > 1,
            "memory low": self.memory == "low",
        }
        return next((name for name, given in found.items() if given), "")

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
        finish_publishing(file.parent / MODEL_ASIDE, file.parent)
        if not file.is_file():
            raise ValueError(f"{folder}: expected {TRAINING_CONFIG_FILE}, found none")
        if is_sealed(Path(folder)):
            verify(Path(folder), [TRAINING_CONFIG_FILE])
        # An earlier version trained on what is held back now.
        values = {"calibrate": False} | read_json_object(file)
        check_known(file, values, sorted(f.name for f in fields(cls)))
        with error_context(file):
            return cls(**values)

    def split(self, source: Embeddings) -> Split:
        """The samples of the data that this run trains on, those that it holds out, and those held back."""
        from blip3o_dit.data.dataset import hold_back, split_samples

        rule = {name: getattr(self, name) for name in SPLIT_SETTINGS}
        split = split_samples(source, **rule)
        return hold_back(source, split, **rule) if self.calibrate else split

    def flow_matching(
        self, *, num_tokens: int = 1, condition_dim: int = 1, target_dim: int = 1
    ) -> FlowMatchingConfig:
        """The flow part of the flags, for data of these sizes."""
        from blip3o_dit.ridge import source_components

        shift = self.time_shift or (num_tokens * target_dim / SHIFT_REFERENCE) ** 0.5
        same = {f.name: getattr(self, f.name) for f in fields(FlowMatchingConfig) if hasattr(self, f.name)}
        resolved = {
            "condition_dropout": self.cfg_dropout,
            "source_components": source_components(self.source, condition_dim),
            "time_shift": shift,
        }
        return FlowMatchingConfig(**(same | resolved))

    def model(self, *, num_tokens: int, condition_dim: int, target_dim: int) -> BLIP3oDiTConfig:
        """The model configuration of this run for data of these sizes. num_tokens must be a square."""
        from blip3o_dit.model.config import BLIP3oDiTConfig

        sizes = {"num_tokens": num_tokens, "condition_dim": condition_dim, "target_dim": target_dim}
        same = {name: getattr(self, name) for name in BLIP3oDiTConfig.own_fields() if hasattr(self, name)}
        resolved = {
            "in_channels": target_dim,
            "eva_embedding_size": condition_dim,
            "input_size": math.isqrt(num_tokens),
            "gradient_checkpointing": self.gradient_checkpointing or self.selective_checkpointing,
            "flow_matching": asdict(self.flow_matching(**sizes)),
            "default_solver": self.solver,
            "default_steps": self.num_inference_steps,
        }
        return BLIP3oDiTConfig(**(same | resolved))


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


def default_heads(width: int) -> int:
    """Heads of 64 numbers, or as near as the width divides; rotary positions take multiples of 4."""
    counts = [heads for heads in range(1, width + 1) if width % heads == 0 and width // heads % 4 == 0]
    return min(counts, key=lambda heads: abs(math.log(width / heads / 64)), default=1)


# `--size`: networks for a try, for a processor, and for a GPU; flags given beside it win.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"model_dim": 128, "num_layers": 2, "num_heads": 4},
    "small": {"model_dim": 384, "num_layers": 6, "num_heads": 6},
    "base": {"model_dim": 1792, "num_layers": 24, "num_heads": 28},
}

# What a new run of a size learns at, unless given: narrow networks take larger steps.
SIZE_RATES = {"tiny": 1e-3, "small": 5e-4, "base": 1e-4}

# `--debug` is a small and quick run; a flag given beside it wins.
DEBUG_DEFAULTS: dict[str, Any] = {
    **SIZES["tiny"],
    "max_steps": 20,
    "batch_size": 8,
    "eval_batch_size": 8,
    "learning_rate": 1e-3,
    "logging_steps": 5,
    "eval_steps": 10,
    "save_steps": 10,
    "eval_samples": 8,
    "eval_inference_steps": 5,
}


def launcher_precision() -> dict[str, Any]:
    """The mixed precision that `accelerate launch` asks for, as the flag that says the same."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return {precision: True} if precision in ("bf16", "fp16") else {}
