"""A training run's configuration: what it refuses, and its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from blip3o_dit.training.config import SIZES, TrainingConfig, default_heads
from blip3o_dit.training.resolve import resolve_config


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
        (
            {"eval_split": 5, "split_by": "group", "group_pattern": "a"},
            "share .* with split_by group, found 5",
        ),
        (
            {"split_by": "group"},
            "group_pattern: expected with split_by group a regular expression .* found none",
        ),
        (
            {"group_pattern": "a"},
            "group_pattern: expected split_by group beside it, found split_by permutation",
        ),
        (
            {"split_by": "group", "group_pattern": "(a"},
            r"group_pattern: expected a regular expression, found '\(a': missing \)",
        ),
        (
            {"split_by": "group", "group_pattern": "a{5000000000}"},
            "expected a regular expression, found 'a{5",
        ),
        ({"split_by": "group", "group_pattern": 1}, "group_pattern: expected text, found 1"),
        (
            {"split_by": "date"},
            r"split_by: expected one of \('permutation', 'key_hash', 'group'\), found 'date'",
        ),
        ({"shuffle": "shards"}, r"shuffle: expected one of \('exact', 'window'\), found 'shards'"),
        ({"shuffle_window": 0}, "shuffle_window: expected an integer >= 1, found 0"),
        ({"statistics_samples": 0}, "statistics_samples: expected an integer >= 1, found 0"),
        ({"prediction_type": "x0"}, "prediction_type: expected one of .*found 'x0'"),
        ({"sigma_min": 2.0}, "sigma_min.*found 2.0"),
        ({"init_statistics": "model"}, r"init_statistics: expected a model to start from \(init_from\)"),
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
    training = TrainingConfig(embeddings_path="store", output_dir="run")
    (tmp_path / "training_config.json").write_bytes(training.to_json())
    return tmp_path


@pytest.mark.parametrize("content", [b"", b"[]", b"5", b"{", b"\xff", b"[" * 9999, b'{"a": NaN}'])
def test_a_training_config_that_is_no_object_is_refused_by_file(written: Path, content: bytes) -> None:
    (written / "training_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"^{written / 'training_config.json'}: "):
        TrainingConfig.from_folder(written)


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


@pytest.mark.parametrize(
    ("width", "heads"),
    [(1792, 28), (512, 8), (384, 6), (128, 2), (64, 1), (32, 1), (96, 2), (100, 1), (1000, 10), (2048, 32)],
)
def test_heads_follow_from_the_width(width: int, heads: int) -> None:
    assert default_heads(width) == heads
    config = TrainingConfig(model_dim=width)
    assert config.num_heads == heads
    assert config.model(num_tokens=4, condition_dim=8, target_dim=8).head_dim % 4 == 0


@pytest.mark.parametrize("width", [1, 7, 4093])
def test_a_width_without_heads_is_refused_by_the_model(width: int) -> None:
    config = TrainingConfig(model_dim=width)
    with pytest.raises(ValueError, match="multiple of 4"):
        config.model(num_tokens=4, condition_dim=8, target_dim=8)


@pytest.mark.parametrize("size", SIZES)
def test_a_size_is_a_network_and_flags_beside_it_win(size: str) -> None:
    config = resolve_config({}, debug=False, resume=None, size=size)
    assert {name: getattr(config, name) for name in SIZES[size]} == SIZES[size]
    config.model(num_tokens=64, condition_dim=1280, target_dim=768)
    config = resolve_config({"model_dim": 256}, debug=False, resume=None, size=size)
    assert (config.model_dim, config.num_heads) == (256, 4)
    assert config.num_layers == SIZES[size]["num_layers"]
    assert resolve_config({"num_layers": 1}, debug=False, resume=None, size=size).num_layers == 1


def test_a_new_run_of_a_size_has_its_rate_and_a_given_one_wins() -> None:
    given = {"learning_rate": 0.5}
    for size, rate in (("tiny", 1e-3), ("small", 5e-4), ("base", TrainingConfig.learning_rate)):
        assert resolve_config({}, debug=False, resume=None, size=size).learning_rate == rate
        assert resolve_config(given, debug=False, resume=None, size=size).learning_rate == 0.5
    assert resolve_config({"model_dim": 128}, debug=False, resume=None).learning_rate == 1e-4


def test_a_run_of_a_size_is_resumed_at_its_own_rate(tmp_path: Path) -> None:
    """It may have begun before sizes had rates, or with another one."""
    older = TrainingConfig(**SIZES["small"], learning_rate=3e-4)
    (tmp_path / "training_config.json").write_bytes(older.to_json())
    assert resolve_config({}, debug=False, resume=tmp_path, size="small") == older


def test_the_default_is_the_base_size() -> None:
    default = TrainingConfig()
    assert {name: getattr(default, name) for name in SIZES["base"]} == SIZES["base"]


@pytest.mark.parametrize(("noted", "now"), [("true", "blocks"), ("false", None), ('"full"', "full")])
def test_compile_is_read_as_older_runs_noted_it(tmp_path: Path, noted: str, now: str | None) -> None:
    text = TrainingConfig().to_json().decode().replace('"compile": null', f'"compile": {noted}')
    (tmp_path / "training_config.json").write_text(text)
    assert TrainingConfig.from_folder(tmp_path).compile == now
