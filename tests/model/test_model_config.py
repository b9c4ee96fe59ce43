"""The model's configuration: defaults, derived sizes, and errors that say both numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from blip3o_dit.flow.config import FlowMatchingConfig
from blip3o_dit.model.config import BLIP3oDiTConfig, default_ffn_dim


def test_defaults_are_the_official_sizes_at_our_widths() -> None:
    config = BLIP3oDiTConfig()
    assert (config.model_dim, config.num_layers, config.num_heads, config.num_kv_heads) == (1792, 24, 28, 28)
    assert (config.eva_embedding_size, config.in_channels, config.num_tokens) == (1280, 768, 64)
    assert (config.ffn_dim, config.head_dim, config.time_embed_dim) == (4864, 64, 1024)
    assert config.flow == FlowMatchingConfig()


@pytest.mark.parametrize(("dim", "width"), [(1792, 4864), (2048, 5632), (96, 256), (97, 512)])
def test_feed_forward_width(dim: int, width: int) -> None:
    assert default_ffn_dim(dim) == width


def test_round_trip_through_json(tmp_path: Path) -> None:
    config = BLIP3oDiTConfig(
        model_dim=96, num_heads=6, num_kv_heads=2, ffn_dim=100, flow_matching={"schedule_type": "cosine"}
    )
    config.save_pretrained(tmp_path)
    back = BLIP3oDiTConfig.from_pretrained(tmp_path)
    assert {n: getattr(back, n) for n in config.own_fields()} == {
        n: getattr(config, n) for n in config.own_fields()
    }
    assert back.flow.schedule_type == "cosine"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle_dim": 64}, r"unknown \['modle_dim'\]; known are .*'model_dim'"),
        ({"model_dim": 100, "num_heads": 3}, "found model_dim=100, num_heads=3"),
        ({"model_dim": 36, "num_heads": 6}, r"multiple of 4, found .* 36 / 6 = 6"),
        ({"num_heads": 28, "num_kv_heads": 5}, "found num_heads=28, num_kv_heads=5"),
        ({"num_layers": 0}, "num_layers: expected a positive integer, found 0"),
        ({"model_dim": "64"}, "model_dim: expected a positive integer, found '64'"),
        ({"norm_eps": -1.0}, "norm_eps: expected a positive number, found -1.0"),
        ({"gradient_checkpointing": 1}, "gradient_checkpointing: expected true or false, found 1"),
        ({"flow_matching": {"sigma": 1}}, r"flow_matching: unknown \['sigma'\]"),
        ({"flow_matching": {"condition_dropout": 1.0}}, "condition_dropout.*found 1.0"),
    ],
)
def test_bad_model_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BLIP3oDiTConfig(**values)


# Files that anyone may have written


@pytest.fixture
def written(tmp_path: Path) -> Path:
    BLIP3oDiTConfig(model_dim=8, num_layers=1, num_heads=1).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_dim": 10**30}, "model_dim: expected at most 1048576"),
        ({"num_layers": 10**9}, "num_layers: expected at most 1048576"),
        ({"flow_matching": 5}, "flow_matching: expected an object, found 5"),
        ({"flow_matching": {"x" * 9999: 1}}, "flow_matching: unknown ['xxx"),
        ({"flow_matching": {"sigma_max": 10**400}}, "sigma_max: expected a number"),
        ({"flow_matching": {"source": []}}, "source: expected one of"),
        ({"rope_theta": True}, "rope_theta: expected a positive number, found True"),
        ({"dtype": "nul"}, "dtype: expected one of"),
        ({"dtype": {"a": 1}}, "dtype: expected one of"),
        ({"model_type": "bert"}, "expected model_type 'blip3o-dit', found 'bert'"),
        ({"architectures": 5}, "architectures: expected a list of names"),
        ({"transformers_version": []}, "transformers_version: expected text"),
        ({"auto_map": {"AutoModel": "evil.Evil"}}, "unknown ['auto_map']"),
        ({"attn_implementation": "owner/kernel"}, "unknown ['attn_implementation']"),
        ({"quantization_config": {}}, "unknown ['quantization_config']"),
        ({"id2label": 5}, "unknown ['id2label']"),
    ],
)
def test_a_model_config_that_is_none_is_refused_by_file(
    written: Path, change: dict[str, Any], message: str
) -> None:
    file = written / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=f"^{file}: ") as caught:
        BLIP3oDiTConfig.from_pretrained(written)
    assert message in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 800


@pytest.mark.parametrize("content", [b"", b"[]", b"5", b"{", b"\xff", b"[" * 9999, b'{"a": NaN}'])
def test_a_model_config_that_is_no_object_is_refused_by_file(written: Path, content: bytes) -> None:
    (written / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"^{written / 'config.json'}: "):
        BLIP3oDiTConfig.from_pretrained(written)
