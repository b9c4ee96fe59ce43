"""The statistics that figures are measured with: those of the data, whatever the network's units are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blip3o_dit.data.dataset import split_samples
from blip3o_dit.data.store import EmbeddingStore, StoreWriter
from blip3o_dit.evaluation.evaluate import evaluate_models
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.metrics.fidelity import FidelitySums
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.config import BLIP3oDiTConfig
from blip3o_dit.training.config import PAPER_RECIPE, TrainingConfig
from blip3o_dit.training.curves import read_log
from blip3o_dit.training.run import build_trainer, train
from blip3o_dit.utils.checksums import seal
from tests.helpers.evaluation import small_evaluation
from tests.helpers.stores import write_linear_store
from tests.helpers.training import tiny_training

RAW = {**PAPER_RECIPE, "num_inference_steps": 2}
CONFIG = small_evaluation()


def config_of(store: EmbeddingStore, output: Path, **changes: Any) -> TrainingConfig:
    settings = dict(
        max_steps=4,
        logging_steps=2,
        save_steps=2,
        eval_steps=4,
        eval_split=0.4,
        eval_samples=100,
        num_inference_steps=2,
    )
    return tiny_training(store.path, output, **(settings | changes))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose targets have mean 3, and models of the paper's recipe and of the default one."""
    root = tmp_path_factory.mktemp("statistics")
    plain = write_linear_store(root / "plain", samples=60)
    eva, clip = plain.fetch(range(60))
    clip += 3 - clip.mean(dim=(0, 1))
    with StoreWriter(root / "store", num_tokens=9, condition_dim=12, target_dim=8, dtype="float32") as writer:
        writer.append(eva, clip, plain.records())
    store = EmbeddingStore(root / "store")
    train(config_of(store, root / "paper", **RAW))
    train(config_of(store, root / "default"))
    return root


def as_before(folder: Path, to: Path) -> Path:
    """The folder as it was written before config.json had `standardize`, and raw models their statistics."""
    shutil.copytree(folder, to)
    for part in (to, *to.glob("checkpoint-*")):
        values = json.loads((part / "config.json").read_text())
        values.pop("standardize", None)
        model = BLIP3oDiTModel.from_pretrained(part)
        if not TrainingConfig.from_folder(part).standardize:
            model.set_statistics(
                condition=(torch.zeros(12), torch.ones(12)), target=(torch.zeros(8), torch.ones(8))
            )
        model.save_pretrained(part)
        (part / "config.json").write_text(json.dumps(values))
        seal(part)
    return to


def sides(root: Path) -> tuple[EmbeddingStore, Any]:
    store = EmbeddingStore(root / "store")
    return store, split_samples(store, eval_split=0.4, seed=42)


def r2_about_the_training_mean(root: Path, model: BLIP3oInference) -> float:
    store, split = sides(root)
    eva, clip = store.fetch(split.eval)
    generated = model.generate(eva, 2, sample_index=split.eval.tolist())
    sums = FidelitySums(store.fetch(split.train)[1].mean(dim=(0, 1)))
    sums.add(generated, clip)
    return sums.result()["r2"]


def test_a_model_of_raw_features_holds_statistics_and_does_not_use_them(root: Path) -> None:
    store, split = sides(root)
    eva, clip = store.fetch(split.train)
    model = BLIP3oDiTModel.from_pretrained(root / "paper")
    assert model.config.standardize is False and model.has_statistics
    torch.testing.assert_close(model.target_mean, clip.mean(dim=(0, 1)))
    torch.testing.assert_close(model.target_std, clip.std(dim=(0, 1), correction=0))
    torch.testing.assert_close(model.condition_mean, eva.mean(dim=(0, 1)))
    assert torch.equal(model.normalize_condition(eva), eva)
    assert torch.equal(model.normalize_target(clip), clip)
    assert torch.equal(model.denormalize_target(clip), clip)
    default = BLIP3oDiTModel.from_pretrained(root / "default")
    assert default.config.standardize is True
    torch.testing.assert_close(
        default.normalize_target(clip).mean(dim=(0, 1)), torch.zeros(8), atol=1e-4, rtol=0
    )


def test_the_statistics_are_of_the_normalised_tokens(root: Path, tmp_path: Path) -> None:
    store, split = sides(root)
    config = config_of(store, tmp_path / "n", normalize_embeddings=True, eval_samples=0, **RAW)
    model = build_trainer(store, config).unwrapped_model
    clip = torch.nn.functional.normalize(store.fetch(split.train)[1], dim=-1)
    torch.testing.assert_close(model.target_mean, clip.mean(dim=(0, 1)))
    assert torch.equal(model.normalize_target(store.fetch(split.train)[1]), clip)


@pytest.mark.parametrize("recipe", ["paper", "default"])
def test_r2_is_about_the_training_mean_in_training_and_after(root: Path, recipe: str) -> None:
    inference = BLIP3oInference(root / recipe, device="cpu", dtype=torch.float32)
    expected = r2_about_the_training_mean(root, inference)
    found = inference.evaluate_model(root / "store", num_inference_steps=2, progress=False)["r2"]
    assert found == pytest.approx(expected, rel=1e-4)
    logged = [entry for entry in read_log(root / recipe / "training_log.jsonl") if "eval_r2" in entry]
    model = inference.generate_from_dataset(
        root / "store", split="eval", num_inference_steps=2, seed=42, progress=False
    )
    assert logged[-1]["eval_r2"] == pytest.approx(model["generation_metrics"]["r2"], rel=1e-3)


def test_the_report_of_raw_features_is_about_the_training_mean(root: Path, tmp_path: Path) -> None:
    result = evaluate_models([root / "paper"], root / "store", tmp_path, CONFIG, progress=False)
    by_name = {method["name"]: method["metrics"] for method in result["methods"]}
    for group in ("best_guess", "sample"):
        r2 = by_name["DiT"][group]["r2"]["value"]
        assert r2 < 0.5  # about zero nearly everything of mean 3 is near 1
    assert by_name["training mean"]["best_guess"]["r2"]["value"] == pytest.approx(0.0, abs=1e-4)
    # A constant is off by about one deviation of the tokens: the score is in their units.
    assert 0.3 < by_name["training mean"]["conditional"]["energy_score"]["value"] < 1.5


def test_figures_do_not_depend_on_the_order_of_the_models(root: Path, tmp_path: Path) -> None:
    old = as_before(root / "paper", tmp_path / "old")
    found = []
    for models in ([old, root / "default"], [root / "default", old]):
        result = evaluate_models(models, root / "store", tmp_path / "out", CONFIG, progress=False)
        found.append({method["name"]: method["metrics"] for method in result["methods"]})
    assert found[0].keys() == found[1].keys()
    for name, metrics in found[0].items():
        for group, figures in metrics.items():
            assert found[1][name][group] == figures, (name, group)


@pytest.mark.parametrize("recipe", ["paper", "default"])
def test_a_folder_from_before_works_as_before(root: Path, tmp_path: Path, recipe: str) -> None:
    new = BLIP3oInference(root / recipe, device="cpu", dtype=torch.float32)
    old = BLIP3oInference(as_before(root / recipe, tmp_path / "old"), device="cpu", dtype=torch.float32)
    eva = EmbeddingStore(root / "store").fetch(range(4))[0]
    if recipe == "paper":  # the default one holds averaged weights beside those that `as_before` saves
        assert not old.model.has_statistics and old.model.config.standardize
    assert torch.equal(old.generate(eva, 2), new.generate(eva, 2))
    found, expected = (
        model.evaluate_model(root / "store", num_inference_steps=2, progress=False) for model in (old, new)
    )
    assert found == pytest.approx(expected, rel=1e-5)
    everything = old.generate_from_dataset(root / "store", num_inference_steps=2, progress=False)
    assert np.isfinite(everything["generation_metrics"]["r2"])


@pytest.mark.parametrize("recipe", ["paper", "default"])
def test_a_run_from_before_goes_on(root: Path, tmp_path: Path, recipe: str) -> None:
    folder = as_before(root / recipe, tmp_path / "old")
    store = EmbeddingStore(root / "store")
    changes: dict[str, Any] = RAW if recipe == "paper" else {}
    config = config_of(store, folder, eval_samples=0, **changes)
    train(config, resume=folder / "checkpoint-2")
    found, expected = (BLIP3oDiTModel.from_pretrained(f).state_dict() for f in (folder, root / recipe))
    for name, tensor in expected.items():
        if name.startswith("dit."):
            assert torch.equal(found[name], tensor), name
    other = config_of(store, folder, eval_samples=0, **(changes | {"standardize": recipe == "paper"}))
    with pytest.raises(ValueError, match="standardize is"):
        train(other, resume=folder / "checkpoint-2")


def test_standardize_is_a_switch() -> None:
    with pytest.raises(ValueError, match="standardize: expected true or false, found 'no'"):
        BLIP3oDiTConfig(standardize="no")


def test_metrics_leave_the_device_before_they_become_float64() -> None:
    """MPS has no float64."""

    class OnMps(torch.Tensor):
        def double(self, *_: Any, **__: Any) -> torch.Tensor:
            raise TypeError("Cannot convert a MPS Tensor to float64")

        def cpu(self, *_: Any, **__: Any) -> torch.Tensor:
            return self.as_subclass(torch.Tensor)

    mean, generated, target = (
        torch.randn(*shape).as_subclass(OnMps) for shape in ((8,), (2, 9, 8), (2, 9, 8))
    )
    sums = FidelitySums(mean)
    sums.add(generated, target)
    assert np.isfinite(sums.result()["r2"])
