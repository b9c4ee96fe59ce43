"""An informed source in training: each sample starts from a map that was fitted without it."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip3o_dit import normal_equations
from blip3o_dit.data.embeddings import TransformedEmbeddings
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.ridge import TokenRidge, relative_spread
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.training.fit_source import (
    FOLDS,
    FOLDS_FILE,
    SourceFolds,
    fit_source,
    load_folds,
    threads_of_all,
)
from blip3o_dit.training.run import build_trainer, train
from blip3o_dit.training.trainer import BLIP3oTrainer
from blip3o_dit.utils.checksums import CHECKSUMS_FILE, seal
from tests.helpers.stores import write_linear_store
from tests.helpers.training import config_for, same

# Samples with the same last two digits are a group.
GROUPS = dict(split_by="group", group_pattern=r"^sample-\d*?(\d?\d)$")
EVERYTHING: dict[str, Any] = dict(
    save_steps=2, max_steps=4, eval_steps=100, eval_samples=0, source="ridge_context_spread", **GROUPS
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return write_linear_store(tmp_path_factory.mktemp("data") / "store", samples=160)


@pytest.fixture(scope="module")
def run(store: EmbeddingStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(config_for(store, tmp_path_factory.mktemp("run") / "whole", **EVERYTHING))


def deviation(trainer: BLIP3oTrainer, data: Any, *, training: bool) -> float:
    """Of the data in the flow's units: what is left of it over s."""
    batch = trainer._prepare_inputs(data.__getitems__([(0, place) for place in range(len(data))]))
    with torch.no_grad():
        return float(trainer.flow_batch(batch, training=training).sample.x_1.square().mean().sqrt())


@pytest.mark.parametrize(("source", "within"), [("ridge_3x3", 0.05), ("ridge_context_spread", 0.12)])
def test_training_meets_residuals_as_large_as_new_samples_leave(
    store: EmbeddingStore, tmp_path: Path, source: str, within: float
) -> None:
    """12 x 9 features on 80 pictures: one map for all leaves 0.93 of the deviation there. Of 12 x 25 a fifth
    more pictures show: the folds' maps leave more than the map of all."""
    trainer = build_trainer(store, config_for(store, tmp_path, eval_split=0.5, source=source))
    assert trainer.eval_dataset is not None
    seen, unseen = (
        deviation(trainer, data, training=training)
        for data, training in ((trainer.train_dataset, True), (trainer.eval_dataset, False))
    )
    assert seen == pytest.approx(1.0, abs=1e-3)
    assert unseen == pytest.approx(1.0, abs=within)
    assert deviation(trainer, trainer.train_dataset, training=False) < 0.97  # what is cured here


def fitted(store: Any, source: str, most: int) -> tuple[BLIP3oDiTModel, SourceFolds]:
    sizes = dict(num_tokens=store.num_tokens, condition_dim=12, target_dim=8)
    config = replace(config_for(store, Path("nowhere")), source=source)
    model = BLIP3oDiTModel(config.model(**sizes))
    arguments, folds = fit_source(model, store, np.arange(10, 110), max_samples=most, seed=3)
    model.set_source(**arguments)
    assert folds is not None
    return model, folds


@pytest.mark.parametrize("source", ["ridge", "ridge_3x3"])
def test_a_map_does_not_depend_on_the_samples_of_its_fold(
    store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setattr(normal_equations, "PENALTIES", (1e-3, 1e-3))
    model, folds = fitted(store, source, 100)
    third = set(folds.samples[folds.fold == 3].tolist())
    assert len(third) == 100 // FOLDS and len(folds.samples) == 100

    class Altered(TransformedEmbeddings):
        def fetch(self, indices: Any) -> tuple[Tensor, Tensor]:
            eva, clip = super().fetch(indices)
            return eva, clip + torch.tensor([float(int(i) in third) for i in indices])[:, None, None]

    other, changed = fitted(Altered(store, lambda eva: eva, lambda clip: clip), source, 100)
    torch.testing.assert_close(changed.weight[3], folds.weight[3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(changed.bias[3], folds.bias[3], rtol=1e-4, atol=1e-5)
    eva = store.fetch(range(10))[0]
    index = folds.samples[folds.fold != 3][:20].tolist()
    condition = store.fetch(index)[0]
    moved = (
        changed.source_distribution(other, condition, index).mean
        - folds.source_distribution(model, condition, index).mean
    )
    assert moved.mean(dim=(1, 2)).min() > 0.1  # by a fifth of the samples, less the fold's own
    assert (other.source_distribution(eva).mean - model.source_distribution(eva).mean).mean() > 0.1


def test_the_maps_are_ridge_regressions_on_the_other_samples(
    store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(normal_equations, "PENALTIES", (1e-2, 1e-2))
    model, folds = fitted(store, "ridge", 100)
    eva = store.fetch(range(6))[0]
    for fold in (0, 3):
        expected = TokenRidge.fit(store, folds.samples[folds.fold != fold].numpy(), penalty=1e-2)
        found = eva @ folds.weight[fold] + folds.bias[fold]
        torch.testing.assert_close(found, expected.predict(eva), rtol=1e-4, atol=1e-4)
    everything = TokenRidge.fit(store, folds.samples.numpy(), penalty=1e-2)
    torch.testing.assert_close(
        model.source_distribution(eva).mean, everything.predict(eva), rtol=1e-4, atol=1e-4
    )


def test_on_one_token_the_neighbours_add_nothing_and_are_left_out(tmp_path: Path) -> None:
    """`train` on vectors takes ridge where neighbours are asked for: the same map of fewer features."""
    store = write_linear_store(tmp_path / "store", samples=110, tokens=1)
    eva = store.fetch(range(10))[0]
    alone, around = (fitted(store, source, 100)[0] for source in ("ridge", "ridge_3x3"))
    assert alone.source_weight.shape == (12, 8) and around.source_weight.shape == (9 * 12, 8)
    expected, found = alone.source_distribution(eva), around.source_distribution(eva)
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.std, expected.std, rtol=1e-4, atol=1e-5)
    run = train(config_for(store, tmp_path / "run", max_steps=1, num_epochs=None, eval_samples=0))
    assert TrainingConfig.from_folder(run).source == "ridge"
    assert BLIP3oDiTModel.from_pretrained(run).config.flow.source == "ridge"


def test_each_sample_has_the_map_of_its_fold_and_one_that_was_not_fitted_the_whole(
    store: EmbeddingStore,
) -> None:
    model, folds = fitted(store, "ridge", 60)
    index = [*range(10, 110), 3]
    numbers = folds.folds_of(index)
    assert [int((numbers == fold).sum()) for fold in range(-1, FOLDS)] == [41, *[60 // FOLDS] * FOLDS]
    assert numbers[-1] == -1
    condition = store.fetch(index)[0]
    found, whole = folds.source_distribution(model, condition, index), model.source_distribution(condition)
    assert found.mean is not None and whole.mean is not None and found.std is whole.std
    for row, fold in enumerate(numbers):
        expected = whole.mean[row] if fold < 0 else condition[row] @ folds.weight[fold] + folds.bias[fold]
        torch.testing.assert_close(found.mean[row], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.mean[numbers < 0], whole.mean[numbers < 0])
    assert (found.mean - whole.mean)[numbers >= 0].abs().amax(dim=(1, 2)).min() > 0


def test_samples_of_a_group_are_in_one_fold(store: EmbeddingStore, tmp_path: Path) -> None:
    """Of a run that is split by groups; the folds are of about one size."""
    trainer = build_trainer(store, config_for(store, tmp_path, **GROUPS, eval_split=0.2))
    folds, split = trainer.source_folds, trainer.config.split(store)
    assert folds is not None and np.array_equal(folds.samples.numpy(), split.train)
    pairs = set(zip(split.groups[folds.samples], folds.fold.tolist(), strict=True))
    groups = len(set(split.groups[split.train]))
    assert len(pairs) == groups < len(split.train) and len(folds.weight) == FOLDS
    assert folds.fold.bincount().min() > len(split.train) / FOLDS / 2
    model, one_group = trainer.unwrapped_model, np.zeros(store.num_samples, dtype=int)
    plain, of_one = (
        fit_source(model, store, np.arange(10, 110), max_samples=90, seed=3, groups=given)[1]
        for given in (None, one_group)
    )
    assert plain is not None and of_one is not None and torch.equal(plain.fold, of_one.fold)


def test_one_sample_has_one_map(store: EmbeddingStore) -> None:
    model, _ = fitted(store, "ridge", 100)
    arguments, folds = fit_source(model, store, np.array([4]), max_samples=10, seed=0)
    assert folds is None and all(torch.isfinite(v).all() for v in arguments.values() if v is not None)
    alone = fitted(store, "ridge_context_spread", 100)[0]
    arguments, folds = fit_source(alone, store, np.array([4]), max_samples=10, seed=0)
    assert folds is None and all(torch.isfinite(v).all() for v in arguments.values() if v is not None)
    two = fit_source(model, store, np.array([4, 9]), max_samples=10, seed=0)[1]
    assert two is not None and len(two.weight) == 2 and torch.isfinite(two.weight).all()


class Uneven(TransformedEmbeddings):
    """Targets c + s(c) z: the deviation s of the first channel grows with c, that of the others is 0.3."""

    def __init__(self, source: Any) -> None:
        super().__init__(source, lambda eva: eva, lambda clip: clip)

    def fetch(self, indices: Any) -> tuple[Tensor, Tensor]:
        eva, _ = super().fetch(indices)
        noise = [torch.randn(9, 8, generator=torch.Generator().manual_seed(int(i))) for i in indices]
        return eva, eva[..., :8] + self.deviation(eva) * torch.stack(noise)

    @staticmethod
    def deviation(eva: Tensor) -> Tensor:
        return 0.3 * torch.cat([(0.5 * (eva[..., :1] - 3)).exp(), torch.ones(*eva.shape[:2], 7)], dim=-1)


def test_the_spread_follows_what_the_targets_do(store: EmbeddingStore) -> None:
    data = Uneven(store)
    model, folds = fitted(data, "ridge_context_spread", 100)
    index = folds.samples.tolist()
    condition, clip = data.fetch(index)
    start = folds.source_distribution(model, condition, index)
    assert start.std is not None and folds.spread is not None
    torch.testing.assert_close(start.to_flow(clip).square().mean(dim=(0, 1)).sqrt(), torch.ones(8))
    new, fresh = data.fetch(range(110, 160))
    found = model.source_distribution(new)
    assert found.std is not None
    true = Uneven.deviation(new)
    pairs = torch.stack([found.std[..., 0].flatten(), true[..., 0].flatten()]).log()
    assert float(torch.corrcoef(pairs)[0, 1]) > 0.8
    # The guess, of 300 features on 100 samples, tells a part: no steeper than the truth.
    assert 0.2 < float(pairs[0].std() / pairs[1].std()) < 0.6
    assert float((found.std[..., 1:].log() - true[..., 1:].log()).square().mean().sqrt()) < 0.2
    assert float(found.to_flow(fresh).square().mean().sqrt()) == pytest.approx(1.0, abs=0.12)


def test_a_samples_spread_is_by_the_maps_of_its_fold(store: EmbeddingStore) -> None:
    model, folds = fitted(Uneven(store), "ridge_context_spread", 60)
    assert folds.spread is not None and (folds.spread - folds.spread[0])[1:].abs().amax(dim=(1, 2)).min() > 0
    index = [*range(10, 110), 3]
    condition = store.fetch(index)[0]
    found, whole = folds.source_distribution(model, condition, index), model.source_distribution(condition)
    assert found.mean is not None and found.std is not None and whole.std is not None
    for row, fold in enumerate(folds.folds_of(index)):
        weight = model.source_spread if fold < 0 else folds.spread[fold]
        expected = model.source_std * relative_spread(found.mean[row], weight)
        torch.testing.assert_close(found.std[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_the_least_deviation_follows_the_targets(store: EmbeddingStore, scale: float) -> None:
    """Targets that ridge predicts exactly, in raw units: a hundredth of their deviation, whatever that is."""
    channels = scale * torch.tensor([1, 5, 1, 1, 1, 1, 1, 0.0])  # the last one is constant

    class Exact(TransformedEmbeddings):
        def fetch(self, indices: Any) -> tuple[Tensor, Tensor]:
            eva, _ = super().fetch(indices)
            return eva, eva[..., :8] * channels

    exact = Exact(store, lambda eva: eva, lambda clip: clip)
    model, _ = fitted(exact, "ridge", 100)
    predicting, _ = fitted(exact, "ridge_context_spread", 100)
    spread = predicting.source_distribution(exact.fetch(range(5))[0]).std
    assert torch.isfinite(predicting.source_spread).all() and spread is not None and spread.min() > 0
    targets = exact.fetch(range(10, 110))[1].std(dim=(0, 1))
    torch.testing.assert_close(model.source_std[:7], 0.01 * targets[:7], rtol=0.05, atol=0)
    assert 0 < float(model.source_std[7]) < 0.01 * float(targets[0])  # a constant channel


def test_folds_are_kept_in_checkpoints_and_nowhere_else(run: Path, store: EmbeddingStore) -> None:
    found = load_file(run / "checkpoint-2" / FOLDS_FILE)
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        "weight": torch.float32,
        "bias": torch.float32,
        "samples": torch.int64,
        "fold": torch.int64,
        "spread": torch.float32,
    }
    assert not list(run.glob(FOLDS_FILE))
    trainer = build_trainer(store, config_for(store, run.with_name("other"), **EVERYTHING))
    assert trainer.source_folds is not None
    assert same(found, vars(trainer.source_folds))


@pytest.mark.parametrize("folds_lost", [False, True])
def test_a_run_goes_on_with_the_maps_it_began_with(
    run: Path, store: EmbeddingStore, tmp_path: Path, caplog: pytest.LogCaptureFixture, folds_lost: bool
) -> None:
    """Bit for bit; a checkpoint of a version without folds with its one map, and says so."""
    checkpoint = tmp_path / "again" / "checkpoint-2"
    shutil.copytree(run / "checkpoint-2", checkpoint)
    if folds_lost:
        (checkpoint / FOLDS_FILE).unlink()
        (checkpoint / CHECKSUMS_FILE).unlink()
        seal(checkpoint)
    with caplog.at_level(logging.INFO):
        train(config_for(store, tmp_path / "again", **EVERYTHING), resume=checkpoint)
    assert (f"no {FOLDS_FILE}: it was trained, and goes on, with one map" in caplog.text) == folds_lost
    weights = [load_file(folder / "model.safetensors") for folder in (run, tmp_path / "again")]
    assert same(*weights) != folds_lost
    assert (tmp_path / "again" / "checkpoint-4" / FOLDS_FILE).is_file() != folds_lost


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("bias"), "expected"),
        (lambda t: t.pop("spread"), "names, types or shapes"),
        (lambda t: t.update(weight=t["weight"].double()), "tensors of other names, types or shapes"),
        (lambda t: t.update(weight=t["weight"][:, :-1].contiguous()), "names, types or shapes"),
        (lambda t: t["fold"].fill_(FOLDS), f"each in one of {FOLDS} folds"),
        (lambda t: t["samples"].zero_(), "expected ascending samples"),
    ],
)
def test_folds_that_do_not_fit_are_refused(run: Path, tmp_path: Path, change: Any, message: str) -> None:
    tensors = load_file(run / "checkpoint-2" / FOLDS_FILE)
    change(tensors)
    save_file(tensors, tmp_path / FOLDS_FILE)
    model = BLIP3oDiTModel.from_pretrained(run)
    with pytest.raises(ValueError, match=message) as caught:
        load_folds(tmp_path, model)
    assert "\n" not in str(caught.value) and str(tmp_path / FOLDS_FILE) in str(caught.value)


def test_one_process_computes_with_the_cores_of_those_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(3), raising=False)
    own = torch.get_num_threads()
    with threads_of_all(2):
        assert torch.get_num_threads() == max(own, 3)
    assert torch.get_num_threads() == own
    with threads_of_all(1):
        assert torch.get_num_threads() == own
