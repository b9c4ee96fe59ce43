"""Configurations: defaults, derived sizes, and errors that say both numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from blip3o_dit.flow.config import FlowMatchingConfig
from blip3o_dit.model.config import BLIP3oDiTConfig, default_ffn_dim
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.utils.validation import is_hub_id


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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected an integer >= 1, found 0"),
        ({"learning_rate": -1.0}, r"learning_rate: expected a number in \[0.0, inf\), found -1.0"),
        ({"learning_rate": float("nan")}, "learning_rate.*found nan"),
        ({"eval_split": 1.5}, r"eval_split: expected a share in \[0, 1\) or a whole number .*, found 1.5"),
        ({"eval_split": 5, "split_by": "key_hash"}, "expected a share .* with split_by key_hash, found 5"),
        ({"num_epochs": 0.0}, "num_epochs: expected a number above 0, found 0.0"),
        ({"max_steps": 0}, "max_steps: expected an integer >= 1, found 0"),
        ({"fp16": True, "bf16": True}, "expected at most one of them, found both"),
        ({"split_by": "date"}, r"split_by: expected one of \('permutation', 'key_hash'\), found 'date'"),
        ({"shuffle": "shards"}, r"shuffle: expected one of \('exact', 'window'\), found 'shards'"),
        ({"shuffle_window": 0}, "shuffle_window: expected an integer >= 1, found 0"),
        ({"statistics_samples": 0}, "statistics_samples: expected an integer >= 1, found 0"),
        ({"prediction_type": "x0"}, "prediction_type: expected one of .*found 'x0'"),
        ({"sigma_min": 2.0}, "sigma_min.*found 2.0"),
    ],
)
def test_bad_training_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**values)


def test_training_config_reads_what_it_writes_and_refuses_the_rest(tmp_path: Path) -> None:
    config = TrainingConfig(embeddings_path="a", output_dir="b", learning_rate=3e-4, save_total_limit=2)
    file = tmp_path / "training_config.json"
    file.write_bytes(config.to_json())
    assert TrainingConfig.from_folder(tmp_path) == config
    file.write_text('{"leraning_rate": 1}')
    with pytest.raises(ValueError, match=r"unknown \['leraning_rate'\]"):
        TrainingConfig.from_folder(tmp_path)
    file.write_text("{")
    with pytest.raises(ValueError, match="not readable JSON"):
        TrainingConfig.from_folder(tmp_path)
    with pytest.raises(ValueError, match=r"expected training_config\.json, found none"):
        TrainingConfig.from_folder(tmp_path / "nowhere")


# Files that anyone may have written


@pytest.fixture
def written(tmp_path: Path) -> Path:
    config = BLIP3oDiTConfig(model_dim=8, num_layers=1, num_heads=1)
    config.save_pretrained(tmp_path)
    training = TrainingConfig(embeddings_path="store", output_dir="run")
    (tmp_path / "training_config.json").write_bytes(training.to_json())
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


@pytest.mark.parametrize("name", ["config.json", "training_config.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"5", b"{", b"\xff", b"[" * 9999, b'{"a": NaN}'])
def test_a_config_that_is_no_object_is_refused_by_file(written: Path, name: str, content: bytes) -> None:
    (written / name).write_bytes(content)
    read = BLIP3oDiTConfig.from_pretrained if name == "config.json" else TrainingConfig.from_folder
    with pytest.raises(ValueError, match=f"^{written / name}: "):
        read(written)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_epochs": "3"}, "num_epochs: expected a number above 0, found '3'"),
        ({"num_epochs": []}, "num_epochs: expected a number above 0, found []"),
        ({"time_shift": []}, "time_shift: expected a number"),
        ({"model_dim": None}, "model_dim: expected a positive integer, found None"),
        ({"num_heads": 2**48}, "num_heads: expected at most 1048576"),
        ({"seed": 10**400}, "seed: expected an integer below 2^53"),
        ({"fp16": 0}, "fp16: expected true or false, found 0"),
        ({"embeddings_path": ["x"]}, "embeddings_path: expected text"),
        ({"wandb_project": 5}, "wandb_project: expected text, found 5"),
        ({"solver": {"a": 1}}, "solver: expected text"),
        ({"../x": 1}, "unknown ['../x']"),
    ],
)
def test_a_training_config_with_bad_values_is_refused_by_file(
    written: Path, change: dict[str, Any], message: str
) -> None:
    file = written / "training_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=f"^{file}: ") as caught:
        TrainingConfig.from_folder(written)
    assert message in str(caught.value)


def test_only_what_can_be_meant_as_a_hub_id_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert is_hub_id("owner/model") and is_hub_id("model")
    folders = ("checkpoints", "checkpoints/run", "./model", "../model", "/a", "~/a", "a/b/c", "", Path("a/b"))
    assert not any(is_hub_id(name) for name in folders)
