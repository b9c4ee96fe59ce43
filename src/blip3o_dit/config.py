"""The three configurations: the network, the flow, the run. Keyword-only and validated when built."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from blip3o_dit.utils.atomic import is_sealed, verify
from blip3o_dit.utils.json_files import read_json, show, show_names

CONFIG_FILE = "config.json"
TRAINING_CONFIG_FILE = "training_config.json"
SCHEDULE_TYPES = ("linear", "cosine")
SPLIT_RULES = ("permutation", "key_hash")
SHUFFLES = ("exact", "window")
VERIFY_CHOICES = ("first", "never")
PREDICTION_TYPES = ("v_prediction", "epsilon", "sample", "preconditioned")
TIME_DISTRIBUTIONS = ("uniform", "logit_normal")
SOURCES = ("noise", "ridge", "ridge_3x3")
MEMORY_MODES = ("default", "low")
BEST_METRICS = ("loss", "cosine_similarity_mean", "r2")
SOLVER_NAMES = ("euler", "midpoint", "heun")

# The time shift sqrt(N d / 4096) is 1 for this many numbers a sample (RAE, arXiv 2510.11690).
SHIFT_REFERENCE = 4096

# Most features of a ridge regression on a 3x3 neighbourhood, whose normal equations hold their square.
MAX_RIDGE_FEATURES = 2560

# No size of a network, and no number of steps, reaches this; the products of such sizes fit 64 bits.
MOST = 2**20

# What a config.json holds beside our own fields, as Hugging Face and its Trainer write it. Not: names of
# attention kernels or of Python files, which Hugging Face would look up on the hub.
_WRITTEN_EXTRAS = (
    *("model_type", "architectures", "dtype", "torch_dtype"),
    *("transformers_version", "_name_or_path", "use_cache"),
)
_DTYPES = ("float32", "bfloat16", "float16", "float64")

# Keyword arguments that PreTrainedConfig consumes without having a dataclass field for them.
_PRETRAINED_EXTRAS = frozenset(
    [
        "model_type",
        "name_or_path",
        "_name_or_path",
        "torch_dtype",
        "attn_implementation",
        "output_attentions",
        "num_labels",
        "_commit_hash",
        "experts_implementation",
        "use_cache",
    ]
)


def check_name(field_name: str, value: Any, known: tuple[str, ...]) -> None:
    """Raises ValueError, listing the known names, unless `value` is one of them."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{field_name}: expected one of {known}, found {show(value)}")


def check_range(field_name: str, value: Any, low: float, high: float) -> None:
    """Raises ValueError unless `value` is a number in [low, high)."""
    if not _is_number(value) or not low <= value < high:
        raise ValueError(f"{field_name}: expected a number in [{low}, {high}), found {show(value)}")


def check_split(eval_split: Any, split_by: str) -> None:
    """Raises ValueError unless `eval_split` is a share below 1 or a count of samples.

    Hashes take shares only: with a count, a sample would change its side when data is appended.
    """
    known = _is_number(eval_split) and 0 <= eval_split <= 2**53
    if not known or (eval_split >= 1 and eval_split != int(eval_split)):
        raise ValueError(
            f"eval_split: expected a share in [0, 1) or a whole number of samples, found {show(eval_split)}"
        )
    if split_by == "key_hash" and eval_split >= 1:
        raise ValueError(
            f"eval_split: expected a share in [0, 1) with split_by key_hash, found {show(eval_split)}"
        )


def check_sigmas(sigma_min: float, sigma_max: float) -> None:
    """Raises ValueError unless 0 <= sigma_min < sigma_max < infinity."""
    check_range("sigma_max", sigma_max, 0.0, math.inf)
    check_range("sigma_min", sigma_min, 0.0, sigma_max)


@dataclass(frozen=True, kw_only=True)
class FlowMatchingConfig:
    """The path, where it starts, what the network predicts on it, and how times are drawn.

    Args:
        schedule_type: "linear" (optimal transport) or "cosine" (trigonometric).
        sigma_min, sigma_max: noise at t = 1 and at t = 0; 0 <= sigma_min < sigma_max.
        prediction_type: "v_prediction", "epsilon", "sample" or "preconditioned" (see `flow/path.py`).
        source: what the path starts from. "noise" is N(0, I). "ridge" and "ridge_3x3" are informed: a ridge
            regression from the condition, plus noise of its residual's deviation (see `model/source.py`).
        source_components: principal components of a neighbour that "ridge_3x3" uses; 0 for other sources.
        time_distribution: how training draws times, "uniform" or "logit_normal".
        time_mean, time_std: of the logit of the noise level, for "logit_normal".
        time_shift: alpha of the shift of the noise level, in training and in the sampler's grid; 1 is none.
        regularization_weight: weight of the mean square of the network's output in the loss.
        condition_dropout: probability with which training replaces a sample's condition by the null
            condition; classifier-free guidance needs it above zero. BLIP3-o uses 0.1.
        student_steps: for a distilled model the Euler steps that it was taught, on whose intervals its
            velocity is an average; 0 for every other model.

    Raises:
        ValueError: names the field, what it expects and what it found.
    """

    schedule_type: str = "linear"
    sigma_min: float = 1e-4
    sigma_max: float = 1.0
    prediction_type: str = "v_prediction"
    regularization_weight: float = 0.0
    condition_dropout: float = 0.1
    source: str = "noise"
    source_components: int = 0
    time_distribution: str = "uniform"
    time_mean: float = 0.0
    time_std: float = 1.0
    time_shift: float = 1.0
    student_steps: int = 0

    def __post_init__(self) -> None:
        check_name("source", self.source, SOURCES)
        _check_integer("student_steps", self.student_steps, 0)
        _check_integer("source_components", self.source_components, int(self.source == "ridge_3x3"))
        if self.source != "ridge_3x3" and self.source_components:
            raise ValueError(
                f"source_components: expected 0 for source {self.source!r}, found {self.source_components}"
            )
        check_name("time_distribution", self.time_distribution, TIME_DISTRIBUTIONS)
        check_range("time_mean", self.time_mean, -20.0, 20.0)
        check_range("time_std", self.time_std, 1e-3, 20.0)
        check_range("time_shift", self.time_shift, 1e-3, 1e3)
        check_name("schedule_type", self.schedule_type, SCHEDULE_TYPES)
        check_name("prediction_type", self.prediction_type, PREDICTION_TYPES)
        check_sigmas(self.sigma_min, self.sigma_max)
        check_range("regularization_weight", self.regularization_weight, 0.0, math.inf)
        check_range("condition_dropout", self.condition_dropout, 0.0, 1.0)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FlowMatchingConfig:
        """Raises ValueError for an unknown key, listing the known ones."""
        if not isinstance(values, dict):
            raise ValueError(f"flow_matching: expected an object, found {show(values)}")
        known = [f.name for f in fields(cls)]
        unknown = set(values) - set(known)
        if unknown:
            raise ValueError(f"flow_matching: unknown {show_names(unknown)}; known are {known}")
        return cls(**values)


class BLIP3oDiTConfig(PreTrainedConfig):
    """Sizes of the diffusion transformer, and everything else that generation needs to know.

    Args:
        model_dim: hidden width d. num_layers, num_heads: blocks and attention heads.
        num_kv_heads: heads of keys and values (grouped-query attention); None means `num_heads`.
        ffn_dim: inner width of the feed-forward layers; None means int(8 d / 3) rounded up to a multiple
            of 256, which is 4864 for d = 1792 as in the released weights.
        in_channels: width of a target (CLIP) token. eva_embedding_size: width of a condition token.
        input_size: side of the square grid of target tokens; 8 means 64 tokens.
        norm_eps: of the RMS norms. rope_theta: base of the rotary embedding.
        gradient_checkpointing: recompute each block in the backward pass to save memory.
        normalize_embeddings: tokens were L2-normalised before training, and conditions must be again.
        standardize: the network sees tokens standardised with the training split's statistics. Without it the
            statistics are there too, but only for measuring.
        flow_matching: the fields of `FlowMatchingConfig`, as a dict (JSON) or as that class.
        default_solver, default_steps: what `generate` does when it is not told; a distilled model says
            here how few steps it was made for.

    Raises:
        ValueError: for an unknown name, or sizes that do not fit each other; says both numbers.
    """

    model_type = "blip3o-dit"

    model_dim: int = 1792
    num_layers: int = 24
    num_heads: int = 28
    num_kv_heads: int | None = None
    ffn_dim: int | None = None
    in_channels: int = 768
    eva_embedding_size: int = 1280
    input_size: int = 8
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    gradient_checkpointing: bool = False
    normalize_embeddings: bool = False
    standardize: bool = True
    flow_matching: dict[str, Any] | None = None
    default_solver: str = "euler"
    default_steps: int = 50

    def __post_init__(self, **kwargs: Any) -> None:
        self._refuse_unknown(kwargs)
        if self.num_kv_heads is None:
            self.num_kv_heads = self.num_heads
        self._check_types()
        if self.ffn_dim is None:
            self.ffn_dim = default_ffn_dim(self.model_dim)
        flow = self.flow_matching if self.flow_matching is not None else FlowMatchingConfig()
        if not isinstance(flow, FlowMatchingConfig):
            flow = FlowMatchingConfig.from_dict(flow)
        self.flow_matching = asdict(flow)
        self._check_sizes()
        super().__post_init__(**kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> Any:
        """As `PreTrainedConfig.from_pretrained`; a folder's file is read and checked here.

        Raises:
            FileNotFoundError: no such folder, and the name is no hub id (see `is_hub_id`).
            ValueError: one line naming the file: not JSON, another model's, an unknown field, a bad value.
        """
        where = pretrained_model_name_or_path
        if is_hub_id(where):
            return super().from_pretrained(where, *args, **kwargs)
        file = _config_file(where)
        values = read_json(file)
        _check_written(file, values)
        kwargs["local_files_only"] = True
        with naming(file):
            # Built once before Hugging Face sees the values, which copies and converts them unchecked.
            cls(**{name: value for name, value in values.items() if name in cls.own_fields()})
            return super().from_pretrained(where, *args, **kwargs)

    @classmethod
    def own_fields(cls) -> list[str]:
        """Names of this class's fields, without those every Hugging Face configuration has."""
        inherited = {f.name for f in fields(PreTrainedConfig)}
        return [f.name for f in fields(cls) if f.name not in inherited]

    @property
    def flow(self) -> FlowMatchingConfig:
        return FlowMatchingConfig.from_dict(self.flow_matching or {})

    @property
    def num_tokens(self) -> int:
        """Target tokens per sample, N = input_size^2."""
        return self.input_size**2

    @property
    def data_sizes(self) -> tuple[int, int, int]:
        """(tokens, condition width, target width) of the embeddings this model takes."""
        return self.num_tokens, self.eva_embedding_size, self.in_channels

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        """Width of all keys or values of a token."""
        return (self.num_kv_heads or self.num_heads) * self.head_dim

    @property
    def time_embed_dim(self) -> int:
        """Width of the time and pooled-condition embedding, min(d, 1024)."""
        return min(self.model_dim, 1024)

    def _refuse_unknown(self, kwargs: dict[str, Any]) -> None:
        unknown = set(kwargs) - _PRETRAINED_EXTRAS
        if unknown:
            raise ValueError(
                f"BLIP3oDiTConfig: unknown {show_names(unknown)}; known are {sorted(self.own_fields())}"
            )

    def _check_types(self) -> None:
        for name in _INTEGER_FIELDS:
            value = getattr(self, name)
            if value is None and name == "ffn_dim":
                continue
            _check_size(name, value)
        check_name("default_solver", self.default_solver, SOLVER_NAMES)
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a positive number, found {show(value)}")
        for name in ("gradient_checkpointing", "normalize_embeddings", "standardize"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected true or false, found {show(getattr(self, name))}")

    def _check_sizes(self) -> None:
        if self.model_dim % self.num_heads:
            raise ValueError(
                f"model_dim must be a multiple of num_heads, "
                f"found model_dim={self.model_dim}, num_heads={self.num_heads}"
            )
        if self.head_dim % 4:
            raise ValueError(
                f"2-D rotary embedding needs a head width that is a multiple of 4, "
                f"found model_dim / num_heads = {self.model_dim} / {self.num_heads} = {self.head_dim}"
            )
        if self.num_heads % (self.num_kv_heads or 1):
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, "
                f"found num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"
            )


_INTEGER_FIELDS = (
    *("model_dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim"),
    *("in_channels", "eva_embedding_size", "input_size", "default_steps"),
)


def is_hub_id(name: str | os.PathLike[str]) -> bool:
    """Whether the user named a hub repository (`model` or `owner/model`) rather than a folder.

    A path object never is one, nor a name whose folder, or whose parent folder, is there: a mistyped
    folder must not become a request to somebody else's server.
    """
    if not isinstance(name, str) or name.count("/") > 1 or name.startswith((".", "/", "~")) or not name:
        return False
    return not Path(name).exists() and not ("/" in name and Path(name).parent.exists())


def _config_file(folder: str | os.PathLike[str]) -> Path:
    """The configuration in a folder, or this file itself."""
    path = Path(folder)
    if path.is_file():
        return path
    if not (path / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{path}: expected a model folder with {CONFIG_FILE}, found none")
    return path / CONFIG_FILE


def _check_written(file: Path, values: Any) -> None:
    """What Hugging Face reads of a config.json by itself, before our fields are looked at."""
    if not isinstance(values, dict) or values.get("model_type") != BLIP3oDiTConfig.model_type:
        found = show(values.get("model_type")) if isinstance(values, dict) else show(values)
        raise ValueError(f"{file}: expected model_type {BLIP3oDiTConfig.model_type!r}, found {found}")
    known = {*BLIP3oDiTConfig.own_fields(), *_WRITTEN_EXTRAS}
    unknown = set(values) - known
    if unknown:
        raise ValueError(f"{file}: unknown {show_names(unknown)}; known are {sorted(known)}")
    for name in ("dtype", "torch_dtype"):
        if values.get(name) is not None:
            with naming(file):
                check_name(name, values[name], _DTYPES)
    for name in ("transformers_version", "_name_or_path"):
        if not isinstance(values.get(name, ""), str):
            raise ValueError(f"{file}: {name}: expected text, found {show(values[name])}")
    if not isinstance(values.get("use_cache", False), bool):
        raise ValueError(f"{file}: use_cache: expected true or false, found {show(values['use_cache'])}")
    architectures = values.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise ValueError(f"{file}: architectures: expected a list of names, found {show(architectures)}")


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """A ValueError about a value says which file the value is from."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _check_size(field_name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{field_name}: expected a positive integer, found {show(value)}")
    if value > MOST:
        raise ValueError(f"{field_name}: expected at most {MOST}, found {show(value)}")


def _is_number(value: Any) -> bool:
    """An int or a float that every float can stand for; JSON's integers have no end."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= 2**53
    return isinstance(value, float)


def default_ffn_dim(model_dim: int, multiple_of: int = 256) -> int:
    """int(8 d / 3) rounded up to a multiple of 256: 4864 for d = 1792, the width of the released weights.

    diffusers >= 0.33 reads the official file as 7168 instead (BLIP3-o issues 29 and 93).
    """
    return multiple_of * math.ceil(int(8 * model_dim / 3) / multiple_of)


def neighbour_components(condition_dim: int) -> int:
    """Principal components of each of 8 neighbours, so that a ridge has at most `MAX_RIDGE_FEATURES`."""
    return min(condition_dim, max(1, (MAX_RIDGE_FEATURES - condition_dim) // 8))


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
            _check_integer(name, getattr(self, name), 1)
        for name in ("warmup_steps", "num_workers", "seed", "eval_samples"):
            _check_integer(name, getattr(self, name), 0)
        if self.save_total_limit is not None:
            _check_integer("save_total_limit", self.save_total_limit, 1)
        if self.max_steps != -1:
            _check_integer("max_steps", self.max_steps, 1)
        for name in ("num_epochs", "max_hours"):
            value = getattr(self, name)
            no_limit = name == "max_hours" and value is None
            if not no_limit and not (_is_number(value) and 0 < value < math.inf):
                raise ValueError(f"{name}: expected a number above 0, found {show(value)}")
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
                    raise ValueError(f"{option.name}: expected true or false, found {show(value)}")
            elif option.type in ("str", "str | None"):
                if not isinstance(value, str) and not (value is None and option.type != "str"):
                    raise ValueError(f"{option.name}: expected text, found {show(value)}")
            elif option.name in _INTEGER_FIELDS and not (value is None and "None" in str(option.type)):
                _check_size(option.name, value)
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
            raise ValueError(f"{file}: expected an object, found {show(values)}")
        known = {f.name for f in fields(cls)}
        unknown = set(values) - known
        if unknown:
            raise ValueError(f"{file}: unknown {show_names(unknown)}; known are {sorted(known)}")
        with naming(file):
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


def _check_integer(field_name: str, value: Any, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{field_name}: expected an integer >= {low}, found {show(value)}")
    if value >= 2**53:
        raise ValueError(f"{field_name}: expected an integer below 2^53, found {show(value)}")
