"""A run that starts from trained weights: what it takes from the model, what it refuses."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from blip3o_dit.data.embeddings import open_embeddings
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.model.loading import EMA_FILE
from blip3o_dit.training.checkpoint import newest_whole
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.training.resolve import resolve_config
from blip3o_dit.training.run import build_trainer, train
from blip3o_dit.training.trainer import BLIP3oTrainer
from blip3o_dit.utils.checksums import sha256
from tests.helpers.stores import write_linear_store
from tests.helpers.training import same, train_model

pytestmark = pytest.mark.usefixtures("no_curves")

# Nothing of this is the default of TrainingConfig.
RECIPE: dict[str, Any] = dict(
    cfg_dropout=0.2,
    time_distribution="logit_normal",
    sigma_min=1e-3,
    solver="heun",
    num_inference_steps=3,
    source="ridge_context_spread",
)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return write_linear_store(tmp_path_factory.mktemp("data") / "old")


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    """Other data of the same widths, around another mean."""
    return write_linear_store(tmp_path_factory.mktemp("data") / "new", samples=40)


@pytest.fixture(scope="module")
def model(old: EmbeddingStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_model(old, tmp_path_factory.mktemp("run") / "model", learning_rate=1e-2, **RECIPE)


def resolved(model: Path, store: EmbeddingStore, output: Path, **given: Any) -> TrainingConfig:
    """As the command line would have it."""
    settings = dict(
        embeddings_path=str(store.path),
        output_dir=str(output),
        init_from=str(model),
        device="cpu",
        max_steps=3,
    )
    settings |= dict(batch_size=8, eval_samples=2, eval_inference_steps=2, eval_split=0.4, save_steps=2)
    return resolve_config(settings | given, debug=False, resume=None)


def started(model: Path, store: EmbeddingStore, output: Path, **given: Any) -> BLIP3oTrainer:
    return build_trainer(open_embeddings(store.path), resolved(model, store, output, **given))


def test_with_the_models_statistics_a_run_begins_where_the_model_ended(
    model: Path, new: EmbeddingStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    eva = new.fetch(range(6))[0]
    expected = BLIP3oInference(model, device="cpu", dtype=torch.float32).generate(eva, seed=3)
    raw = BLIP3oInference(model, device="cpu", dtype=torch.float32, weights="raw").generate(eva, seed=3)
    assert not torch.equal(expected, raw)
    with caplog.at_level(logging.INFO, logger="blip3o_dit"):
        trainer = started(model, new, tmp_path / "out", init_statistics="model")
    assert f"starting from the averaged weights of {model}" in caplog.text
    assert "statistics and source: of the model" in caplog.text
    run = trainer.unwrapped_model.eval()
    assert torch.equal(run.generate(eva, seed=3), expected)
    assert trainer.ema is not None
    averaged = load_file(model / EMA_FILE)
    assert all(torch.equal(averaged[name], average) for name, average in trainer.ema.weights.items())
    assert {name: getattr(trainer.config, name) for name in RECIPE} == RECIPE
    assert trainer.config.model_dim == 16 and trainer.source_folds is None


def test_statistics_and_source_are_of_the_data_by_default(
    model: Path, new: EmbeddingStore, tmp_path: Path
) -> None:
    trainer = started(model, new, tmp_path / "out")
    fresh = build_trainer(
        new,
        replace(trainer.config, init_from="", output_dir=str(tmp_path / "fresh")),
    )
    ours, theirs = (dict(t.unwrapped_model.named_buffers(recurse=False)) for t in (trainer, fresh))
    assert same(ours, theirs) and {"source_weight", "source_spread"} <= set(ours)
    assert trainer.source_folds is not None
    weights = load_file(model / EMA_FILE)
    assert all(torch.equal(weights[n], p) for n, p in trainer.unwrapped_model.named_parameters())


def test_a_run_notes_what_it_started_from_and_continues_without_it(
    model: Path, new: EmbeddingStore, tmp_path: Path
) -> None:
    moved = shutil.copytree(model, tmp_path / "moved")
    config = resolved(moved, new, tmp_path / "run")
    run = train(config)
    saved = TrainingConfig.from_folder(run)
    assert saved.init_from == str(moved) and saved.init_checksum == sha256(model / EMA_FILE)
    shutil.rmtree(moved)
    again = tmp_path / "again"
    checkpoint = Path(shutil.copytree(run / "checkpoint-2", again / "checkpoint-2"))
    given = dict(output_dir=str(again), init_from=str(moved))
    continued = resolve_config(given, debug=False, resume=newest_whole(again))
    train(continued, resume=checkpoint, dry_run=True)
    train(continued, resume=checkpoint)
    for file in ("model.safetensors", EMA_FILE):
        assert same(load_file(run / file), load_file(again / file)), file


def test_a_checkpoint_on_the_same_data_brings_its_folds(
    model: Path, old: EmbeddingStore, new: EmbeddingStore, tmp_path: Path
) -> None:
    """The model's own source has seen these samples; on other data it has seen none."""
    checkpoint = model / "checkpoint-4"
    kept = {"init_statistics": "model"}
    assert started(checkpoint, old, tmp_path / "a", **kept).source_folds is not None
    assert started(checkpoint, new, tmp_path / "b", **kept).source_folds is None


def test_a_folder_as_on_the_hub_is_enough(model: Path, new: EmbeddingStore, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    hub.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model / name, hub)
    eva = new.fetch(range(3))[0]
    run = started(hub, new, tmp_path / "out", init_statistics="model").unwrapped_model.eval()
    assert torch.equal(
        run.generate(eva), BLIP3oInference(hub, device="cpu", dtype=torch.float32).generate(eva)
    )


def test_debug_and_free_settings_keep_the_weights_sizes(model: Path) -> None:
    given = dict(init_from=str(model), cfg_dropout=0.0, model_dim=16)
    config = resolve_config(given, debug=True, resume=None)
    assert (config.model_dim, config.max_steps, config.cfg_dropout) == (16, 20, 0.0)


def changed(model: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a model without its seal, with another config.json."""
    copy = Path(shutil.copytree(model, folder, ignore=shutil.ignore_patterns("check*")))
    values = json.loads((copy / "config.json").read_text())
    change(values)
    (copy / "config.json").write_text(json.dumps(values))
    return copy


def test_settings_that_are_not_the_weights_are_refused_with_both_values(
    model: Path, new: EmbeddingStore, tmp_path: Path
) -> None:
    there = r"model_dim is 16 there, 64 was given; source is 'ridge_context_spread' there"
    with pytest.raises(ValueError, match=there):
        resolved(model, new, tmp_path / "out", model_dim=64, source="noise")
    with pytest.raises(ValueError, match=r"prediction_type is 'preconditioned' there, 'v_prediction' was"):
        resolve_config({"init_from": str(model)}, debug=False, resume=None, recipe="paper")
    bare = TrainingConfig(
        embeddings_path=str(new.path), output_dir=str(tmp_path / "out"), init_from=str(model), device="cpu"
    )
    with pytest.raises(ValueError, match=r"model_dim is 16 there, 1792 here; .*num_heads is 2 there, 28"):
        train(bare)
    other = changed(model, tmp_path / "other", lambda values: values.update(norm_eps=1e-6))
    with pytest.raises(ValueError, match=r"do not fit this run: norm_eps is 1e-06 there, 1e-05 here$"):
        train(resolved(other, new, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_started_from_is_one_line(model: Path, new: EmbeddingStore, tmp_path: Path) -> None:
    wide = write_linear_store(tmp_path / "wide", condition=16)
    with pytest.raises(ValueError, match=r"\(9, 12, 8\) as the model at .*found \(9, 16, 8\)"):
        train(resolved(model, wide, tmp_path / "out"))
    student = changed(model, tmp_path / "student", lambda v: v["flow_matching"].update(student_steps=1))
    with pytest.raises(ValueError, match="a student of 1 steps: start from its teacher"):
        resolved(student, new, tmp_path / "out")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    with pytest.raises(FileNotFoundError, match=r"expected a model folder with config.json"):
        resolved(adapter, new, tmp_path / "out")
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"found an adapter .* merge it"):
        resolved(adapter, new, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="nobody/nothing: expected a folder, or a repository on"):
        resolved(Path("nobody/nothing"), new, tmp_path / "out")
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    (broken / EMA_FILE).write_bytes((broken / EMA_FILE).read_bytes()[:-1])
    with pytest.raises(ValueError, match="truncated or altered"):
        train(resolved(broken, new, tmp_path / "out"))


@pytest.mark.parametrize("inside", ["", "checkpoint-4"])
def test_starting_over_does_not_remove_what_it_starts_from(
    model: Path, old: EmbeddingStore, tmp_path: Path, inside: str
) -> None:
    run = Path(shutil.copytree(model, tmp_path / "run"))
    with pytest.raises(ValueError, match="overwrite=True would remove the weights to start from"):
        train(resolved(run / inside, old, run), overwrite=True)
    assert (run / "checkpoint-4").is_dir()


def test_a_model_without_statistics_gets_them_for_measuring(
    model: Path, new: EmbeddingStore, tmp_path: Path
) -> None:
    """Weights from elsewhere have none; where the network does not standardise they change nothing."""
    plain = train_model(new, tmp_path / "plain", max_steps=1, standardize=False, source="noise")
    for file in ("model.safetensors", EMA_FILE):
        tensors = load_file(plain / file)
        tensors["target_mean"].zero_()
        tensors["target_std"].fill_(1.0)
        save_file(tensors, plain / file, metadata={"format": "pt"})
    (plain / "checksums.json").unlink()
    eva = new.fetch(range(3))[0]
    run = started(plain, new, tmp_path / "out").unwrapped_model.eval()
    assert run.has_statistics
    assert torch.equal(
        run.generate(eva), BLIP3oInference(plain, device="cpu", dtype=torch.float32).generate(eva)
    )


def test_every_setting_of_a_model_is_decided(model: Path) -> None:
    """A new field of config.json is either one of its weights or free."""
    config = resolve_config({"init_from": str(model)}, debug=False, resume=None)
    given = asdict(config.flow_matching(num_tokens=9, condition_dim=12, target_dim=8))
    assert json.loads((model / "config.json").read_text())["flow_matching"] == given
