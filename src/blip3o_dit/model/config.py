"""The sizes of the network and all that generation needs to know; what config.json holds."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from blip3o_dit.flow.config import SOLVER_NAMES, FlowMatchingConfig
from blip3o_dit.utils.json_files import read_json, short_repr
from blip3o_dit.utils.recognise import DECODER_TYPE, MODEL, refusal
from blip3o_dit.utils.validation import (
    check_bool,
    check_known,
    check_name,
    check_size,
    check_text,
    error_context,
    is_hub_id,
    is_number,
)

CONFIG_FILE = "config.json"

SIZE_FIELDS = (
    "model_dim",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "ffn_dim",
    "in_channels",
    "eva_embedding_size",
    "input_size",
    "default_steps",
)
_SWITCHES = ("gradient_checkpointing", "normalize_embeddings", "standardize")
RESIDUALS = ("float32", "bfloat16")  # see `layers.py`
_DTYPES = ("float32", "bfloat16", "float16", "float64")

# What a config.json holds beside our own fields, as Hugging Face and its Trainer write it. Not: names of
# attention kernels or of Python files, which Hugging Face would look up on the hub.
_WRITTEN_EXTRAS = {
    "model_type",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
    "use_cache",
}

# Keyword arguments that PreTrainedConfig consumes without having a dataclass field for them.
_PRETRAINED_EXTRAS = {
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
}


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
        normalize_embeddings: tokens were L2-normalised before training, and conditions must be again.
        standardize: the network sees tokens standardised with the training split's statistics. Without it the
            statistics are there too, but only for measuring.
        flow_matching: the fields of `FlowMatchingConfig`, as a dict (JSON) or as that class.
        default_solver, default_steps: what `generate` takes by default; for a distilled model the steps it
            was made for.
        residual: dtype of the residual stream.

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
    residual: str = "float32"

    def __post_init__(self, **kwargs: Any) -> None:
        check_known("BLIP3oDiTConfig", set(kwargs) - _PRETRAINED_EXTRAS, sorted(self.own_fields()))
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
        """As `PreTrainedConfig.from_pretrained`; a folder's file is checked first (see `is_hub_id`).

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
        with error_context(file):
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

    def _check_types(self) -> None:
        for name in SIZE_FIELDS:
            if name != "ffn_dim" or self.ffn_dim is not None:
                check_size(name, getattr(self, name))
        check_name("default_solver", self.default_solver, SOLVER_NAMES)
        check_name("residual", self.residual, RESIDUALS)
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not is_number(value) or not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a positive number, found {short_repr(value)}")
        for name in _SWITCHES:
            check_bool(name, getattr(self, name))

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


def _config_file(folder: str | os.PathLike[str]) -> Path:
    """The configuration in a folder, or this file itself."""
    path = Path(folder)
    if path.is_file():
        return path
    if not (path / CONFIG_FILE).is_file():
        raise refusal(path, MODEL)
    return path / CONFIG_FILE


def _check_written(file: Path, values: Any) -> None:
    """Refuse (ValueError) what Hugging Face would read of a config.json before our fields are checked."""
    if not isinstance(values, dict) or values.get("model_type") != BLIP3oDiTConfig.model_type:
        if isinstance(values, dict) and values.get("model_type") == DECODER_TYPE:
            raise refusal(file.parent, MODEL)
        found = short_repr(values.get("model_type")) if isinstance(values, dict) else short_repr(values)
        raise ValueError(f"{file}: expected model_type {BLIP3oDiTConfig.model_type!r}, found {found}")
    check_known(file, values, sorted({*BLIP3oDiTConfig.own_fields(), *_WRITTEN_EXTRAS}))
    with error_context(file):
        for name in ("dtype", "torch_dtype"):
            if values.get(name) is not None:
                check_name(name, values[name], _DTYPES)
        for name in ("transformers_version", "_name_or_path"):
            check_text(name, values.get(name, ""))
        check_bool("use_cache", values.get("use_cache", False))
    architectures = values.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise ValueError(
            f"{file}: architectures: expected a list of names, found {short_repr(architectures)}"
        )


def default_ffn_dim(model_dim: int, multiple_of: int = 256) -> int:
    """int(8 d / 3) rounded up to a multiple of 256: 4864 for d = 1792, the width of the released weights.

    diffusers >= 0.33 reads the official file as 7168 instead (BLIP3-o issues 29 and 93).
    """
    return multiple_of * math.ceil(int(8 * model_dim / 3) / multiple_of)
