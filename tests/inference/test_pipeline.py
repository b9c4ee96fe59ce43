"""Generation from saved models: identical after loading, independent of the batch, honest about misfits."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

from blip3o_dit.data.safe_unpickler import load_pickle
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.model.blip3o_dit import GENERATION_STREAM, BLIP3oDiTModel
from blip3o_dit.model.config import BLIP3oDiTConfig
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.training.ema import ExponentialMovingAverage
from blip3o_dit.utils.distributed import pick_device
from blip3o_dit.utils.stateless_random import draw_names, stateless_normal
from tests.conftest import randomize, tiny_config
from tests.helpers.stores import write_linear_store


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return write_linear_store(tmp_path / "store", samples=20)


@pytest.fixture
def folder(tiny_model: BLIP3oDiTModel, store: EmbeddingStore, tmp_path: Path) -> Path:
    """What a training run leaves: weights with statistics, and the run's configuration."""
    tiny_model.set_statistics(
        condition=(torch.full((12,), 3.0), torch.full((12,), 1.1)),
        target=(torch.linspace(-1, 1, 8), torch.linspace(0.1, 0.4, 8)),
    )
    tiny_model.save_pretrained(tmp_path / "model")
    config = TrainingConfig(embeddings_path=str(store.path), output_dir="x", eval_split=0.25)
    (tmp_path / "model" / "training_config.json").write_bytes(config.to_json())
    return tmp_path / "model"


def test_saved_and_loaded_models_generate_the_same(tiny_model: BLIP3oDiTModel, folder: Path) -> None:
    """Bit for bit, in float32; in bfloat16 see tests/test_precision.py."""
    eva = torch.randn(3, 9, 12)
    expected = tiny_model.generate(eva, num_inference_steps=4, seed=5)
    inference = BLIP3oInference(folder, device="cpu", dtype=torch.float32)
    assert torch.equal(inference.generate(eva, num_inference_steps=4, seed=5), expected)
    assert isinstance(AutoConfig.from_pretrained(folder), BLIP3oDiTConfig)
    auto = AutoModel.from_pretrained(folder).eval()
    assert torch.equal(auto.generate(eva, num_inference_steps=4, seed=5), expected)


def test_a_sample_does_not_depend_on_its_batch(folder: Path) -> None:
    inference = BLIP3oInference(folder, device="cpu")
    eva = torch.randn(5, 9, 12)
    together = inference.generate(eva, num_inference_steps=4, guidance_scale=2.0)
    alone = inference.generate(eva[3:4], num_inference_steps=4, guidance_scale=2.0, sample_index=[3])
    torch.testing.assert_close(together[3], alone[0], rtol=1e-3, atol=1e-3)
    other = inference.generate(eva[3:4], num_inference_steps=4, guidance_scale=2.0, sample_index=[4])
    assert (other - alone).abs().max() > 1e-2


def test_seed_condition_solver_and_guidance_matter(folder: Path) -> None:
    inference = BLIP3oInference(folder, device="cpu")
    eva = torch.randn(2, 9, 12)
    base = inference.generate(eva, num_inference_steps=4)
    assert torch.equal(base, inference.generate(eva.numpy(), num_inference_steps=4))
    changed = [
        inference.generate(eva, num_inference_steps=4, seed=1),
        inference.generate(eva + 0.5, num_inference_steps=4),
        inference.generate(eva, num_inference_steps=4, solver="heun"),
        inference.generate(eva, num_inference_steps=4, guidance_scale=3.0),
    ]
    assert all((other - base).abs().max() > 1e-4 for other in changed)


def test_guidance_is_the_documented_combination(tiny_model: BLIP3oDiTModel) -> None:
    condition = tiny_model.normalize_condition(torch.randn(2, 9, 12))
    x, t = torch.randn(2, 9, 8), torch.full((2,), 0.3)
    with torch.no_grad():
        start = tiny_model.source_distribution(condition)
        conditional = tiny_model.make_velocity_fn(condition, start)(x, t)
        null = tiny_model.make_velocity_fn(torch.zeros_like(condition), start)(x, t)
        guided = tiny_model.make_velocity_fn(condition, start, 2.5)(x, t)
        outside = tiny_model.make_velocity_fn(condition, start, 2.5)(x, t, guided=False)
    torch.testing.assert_close(guided, null + 2.5 * (conditional - null), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(outside, conditional, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="guidance_interval: expected 0 <= low < high <= 1"):
        tiny_model.generate(torch.randn(2, 9, 12), guidance_interval=(0.5, 0.5))


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun", "dopri5"])
def test_guidance_acts_in_all_stages_of_the_steps_that_begin_in_its_interval(
    tiny_model: BLIP3oDiTModel, solver: str
) -> None:
    """The last stage of Heun's method is at t = 1 exactly."""
    rows: list[tuple[float, int]] = []

    def predict(x: torch.Tensor, t: torch.Tensor, encoded: object, end: object = None) -> torch.Tensor:
        rows.append((round(float(t[0]), 6), len(x)))
        return torch.zeros_like(x)

    tiny_model.dit.predict = predict
    steps = None if solver == "dopri5" else 4
    tiny_model.generate(torch.randn(1, 9, 12), num_inference_steps=steps, solver=solver, guidance_scale=2.0)
    assert rows and {count for _, count in rows} == {2}
    rows.clear()
    tiny_model.generate(
        torch.randn(1, 9, 12),
        num_inference_steps=steps,
        solver=solver,
        guidance_scale=2.0,
        guidance_interval=(0.25, 0.75),
    )
    per_step = {"euler": 1, "midpoint": 2, "heun": 2}
    if solver in per_step:
        assert [count for _, count in rows] == [
            count for count in (1, 2, 2, 1) for _ in range(per_step[solver])
        ]
    else:
        assert all(count == (2 if 0.25 <= t < 0.75 else 1) for t, count in rows)


def test_guidance_asks_the_device_for_no_time(
    tiny_model: BLIP3oDiTModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU each such question would wait for all that is queued."""
    drawn = draw_names([0], seed=0, stream="test"), torch.randn(1, 9, 12)
    monkeypatch.setattr(tiny_model, "_draw", lambda *_: drawn)
    with monkeypatch.context() as patch:
        for name in ("__float__", "__bool__", "item", "tolist", "cpu"):
            plain = getattr(torch.Tensor, name)

            def refused(self: torch.Tensor, name: str = name, plain: Callable[..., Any] = plain) -> Any:
                assert self.device.type == "cpu" and self.ndim == 1 and name == "tolist", name  # the grid
                return plain(self)

            patch.setattr(torch.Tensor, name, refused)
        tiny_model.generate(
            torch.randn(1, 9, 12), num_inference_steps=2, guidance_scale=2.0, guidance_interval=(0.2, 0.9)
        )


def test_samples_are_of_length_one_when_training_normalised_the_tokens() -> None:
    model = BLIP3oDiTModel(tiny_config(normalize_embeddings=True)).eval()
    randomize(model)
    model.set_statistics(
        condition=(torch.zeros(12), torch.full((12,), 0.3)), target=(torch.zeros(8), torch.full((8,), 0.35))
    )
    eva = torch.randn(2, 9, 12)
    generated = model.generate(eva, num_inference_steps=3)
    torch.testing.assert_close(generated.norm(dim=-1), torch.ones(2, 9))
    assert (model.predict_mean(eva).norm(dim=-1) - 1).abs().max() > 0.1  # an average is not projected


def test_network_calls_are_those_of_the_solver(tiny_model: BLIP3oDiTModel) -> None:
    calls: list[int] = []
    tiny_model.dit.patch_embedder.register_forward_hook(lambda *_: calls.append(1))
    encoded: list[int] = []
    tiny_model.dit.caption_projection.register_forward_hook(lambda *_: encoded.append(1))
    eva = torch.randn(1, 9, 12)
    tiny_model.generate(eva, num_inference_steps=6)
    assert (len(calls), len(encoded)) == (6, 1)
    tiny_model.generate(eva, num_inference_steps=6, solver="heun", guidance_scale=2.0)
    assert (len(calls), len(encoded)) == (6 + 12, 1 + 2)  # the null condition is one sample of its own


def test_results_are_in_the_units_of_the_data() -> None:
    """A model that predicts the velocity of a single point generates that point, statistics undone."""
    model = BLIP3oDiTModel(tiny_config(flow_matching={"prediction_type": "sample"})).eval()
    target_mean, target_std = torch.linspace(-5, 5, 8), torch.linspace(0.5, 2, 8)
    model.set_statistics(condition=(torch.zeros(12), torch.ones(12)), target=(target_mean, target_std))
    with torch.no_grad():
        model.dit.norm_out.linear_2.bias.fill_(0.7)  # every prediction of x_1 is 0.7
    generated = model.generate(torch.randn(2, 9, 12), num_inference_steps=100)
    expected = (target_mean + 0.7 * target_std).expand(2, 9, 8)
    torch.testing.assert_close(generated, expected, atol=0.1, rtol=0)


def test_sampling_starts_from_the_named_noise_at_the_scale_of_training() -> None:
    """An untrained network predicts no velocity: what comes out is where sampling started."""
    model = BLIP3oDiTModel(tiny_config(flow_matching={"sigma_max": 1.7}))
    generated = model.generate(torch.randn(2, 9, 12), num_inference_steps=3, seed=4, sample_index=[8, 2])
    noise = stateless_normal([8, 2], (9, 8), seed=4, stream=GENERATION_STREAM)
    torch.testing.assert_close(generated, 1.7 * noise)


def test_statistics_stay_float32_when_weights_do_not(tiny_model: BLIP3oDiTModel, folder: Path) -> None:
    loaded = BLIP3oInference(folder, device="cpu", dtype=torch.bfloat16).model
    cast = tiny_model.to(torch.bfloat16)
    for model in (loaded, cast):
        assert model.dtype == torch.bfloat16
        assert torch.equal(model.target_mean, torch.linspace(-1, 1, 8))
    generated = loaded.generate(torch.randn(2, 9, 12), num_inference_steps=2)
    assert generated.dtype == torch.float32 and torch.isfinite(generated).all()


def test_conditions_are_normalised_as_in_training() -> None:
    model = BLIP3oDiTModel(tiny_config(normalize_embeddings=True))
    randomize(model)
    eva = torch.randn(2, 9, 12)
    a = model.generate(eva, num_inference_steps=2)
    b = model.generate(17.0 * eva, num_inference_steps=2)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_averaged_weights_are_used_when_there_are_any(tiny_model: BLIP3oDiTModel, folder: Path) -> None:
    assert BLIP3oInference(folder, device="cpu").weights == "raw"
    with pytest.raises(ValueError, match="expected averaged weights"):
        BLIP3oInference(folder, device="cpu", weights="ema")
    average = ExponentialMovingAverage(tiny_model, 0.9)
    for value in average.weights.values():
        value.mul_(1.5)
    tiny_model.save_pretrained(folder, state_dict=average.whole_state(tiny_model), variant="ema")
    eva = torch.randn(1, 9, 12)
    dtype = torch.float32  # in which the two are compared bit for bit
    raw = BLIP3oInference(folder, device="cpu", weights="raw", dtype=dtype).generate(eva, 2)
    averaged = BLIP3oInference(folder, device="cpu", dtype=dtype)
    assert averaged.weights == "ema"
    assert torch.equal(raw, tiny_model.generate(eva, num_inference_steps=2))
    with average.applied(tiny_model):
        assert torch.equal(averaged.generate(eva, 2), tiny_model.generate(eva, num_inference_steps=2))


def test_generate_from_dataset_writes_plain_arrays(folder: Path, store: EmbeddingStore) -> None:
    inference = BLIP3oInference(folder, device="cpu")
    path = folder / "results" / "generated.pkl"
    results = inference.generate_from_dataset(
        store.path, num_samples=7, batch_size=3, num_inference_steps=2, output_path=path, progress=False
    )
    read = load_pickle(path)
    plain = pickle.loads(path.read_bytes())
    assert isinstance(read, dict)
    for name in ("generated_clip_embeddings", "eva_embeddings", "target_clip_embeddings"):
        assert np.array_equal(read[name], results[name]) and np.array_equal(plain[name], results[name])
    chosen = inference.choose(store, "all", 7)
    assert read["keys"] == [f"sample-{i}" for i in chosen]
    assert read["captions"][6] == f"caption {chosen[6]}"
    eva, clip = store.fetch(chosen)
    assert np.array_equal(results["target_clip_embeddings"], clip.numpy())
    whole = inference.generate(eva, 2, sample_index=chosen)
    np.testing.assert_allclose(results["generated_clip_embeddings"], whole.numpy(), rtol=1e-4, atol=1e-5)
    metrics = results["generation_metrics"]
    cosine = torch.cosine_similarity(whole, clip, dim=-1).mean()
    assert metrics["cosine_similarity_mean"] == pytest.approx(float(cosine), abs=1e-5)


def test_generate_from_dataset_writes_a_store(folder: Path, store: EmbeddingStore) -> None:
    inference = BLIP3oInference(folder, device="cpu")
    results = inference.generate_from_dataset(
        store.path,
        num_inference_steps=2,
        output_path=folder / "generated",
        split="eval",
        compute_metrics=False,
        return_arrays=True,
        progress=False,
    )
    written = EmbeddingStore(folder / "generated")
    assert written.num_samples == 5 == len(results["keys"])
    assert results["generation_metrics"] is None
    generated = written.fetch(range(5))[1]
    assert np.array_equal(generated.numpy(), results["generated_clip_embeddings"])
    assert [record["key"] for record in written.records()] == results["keys"]


def test_evaluate_model_uses_the_split_of_the_run(folder: Path, store: EmbeddingStore) -> None:
    inference = BLIP3oInference(folder, device="cpu")
    metrics = inference.evaluate_model(store.path, batch_size=2, num_inference_steps=2, progress=False)
    again = inference.evaluate_model(store.path, batch_size=5, num_inference_steps=2, progress=False)
    assert metrics["num_samples"] == 5
    assert metrics == pytest.approx(again, rel=1e-4)
    assert {"flow_matching_loss", "cosine_similarity_mean", "r2"} <= set(metrics)
    assert inference.evaluate_model(store.path, split="train", num_samples=2, num_inference_steps=1)


def test_some_samples_are_chosen_by_name_and_not_the_first(folder: Path, store: EmbeddingStore) -> None:
    """Neighbours in a store are often of one class."""
    inference = BLIP3oInference(folder, device="cpu")
    chosen = inference.choose(store, "all", 8)
    assert chosen == sorted(set(chosen)) and len(chosen) == 8
    assert chosen != list(range(8)) and max(chosen) >= 10
    assert set(inference.choose(store, "all", 5)) < set(chosen)
    assert inference.choose(store, "all", 100) == list(range(20))
    side = inference.choose(store, "train", None)
    some = inference.choose(store, "train", 4)
    assert set(some) < set(side) and some != side[:4]
    results = inference.generate_from_dataset(
        store.path, num_samples=8, num_inference_steps=1, seed=3, progress=False
    )
    assert results["keys"] == [f"sample-{i}" for i in chosen]


class TestRefusals:
    def test_no_model(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"expected a model folder with config\.json"):
            BLIP3oInference(tmp_path)

    def test_weights_that_do_not_fit(self, tiny_model: BLIP3oDiTModel, folder: Path) -> None:
        tiny_config(num_layers=3).save_pretrained(folder)
        with pytest.raises(ValueError, match=r"do not fit the configuration: 26 missing"):
            BLIP3oInference(folder, device="cpu")
        tiny_config(ffn_dim=512).save_pretrained(folder)
        with pytest.raises(ValueError, match=r"6 mismatched \(dit.layers.0.feed_forward"):
            BLIP3oInference(folder, device="cpu")
        tiny_config(num_layers=1).save_pretrained(folder)
        with pytest.raises(ValueError, match=r"26 unexpected"):
            BLIP3oInference(folder, device="cpu")

    def test_data_of_other_sizes(self, folder: Path, tmp_path: Path) -> None:
        other = write_linear_store(tmp_path / "other", samples=4, condition=10)
        with pytest.raises(ValueError, match=r"expected .* \(9, 12, 8\) .* found \(9, 10, 8\)"):
            BLIP3oInference(folder, device="cpu").generate_from_dataset(other.path)

    def test_bad_arguments(self, folder: Path, store: EmbeddingStore) -> None:
        inference = BLIP3oInference(folder, device="cpu")
        eva = torch.randn(2, 9, 12)
        with pytest.raises(ValueError, match=r"expected shape \[batch, 9, 12\], found \[2, 9, 11\]"):
            inference.generate(eva[..., :11])
        with pytest.raises(ValueError, match="sample_index: expected 2 entries, found 1"):
            inference.generate(eva, 1, sample_index=[0])
        with pytest.raises(ValueError, match="solver: expected one of"):
            inference.generate(eva, 1, solver="rk45")
        with pytest.raises(ValueError, match="split: expected one of"):
            inference.evaluate_model(store.path, split="test")
        with pytest.raises(ValueError, match="num_samples: expected an integer >= 1, found 0"):
            inference.generate_from_dataset(store.path, num_samples=0)
        with pytest.raises(ValueError, match="batch_size: expected an integer >= 1, found 0"):
            inference.generate_from_dataset(store.path, batch_size=0)

    def test_guidance_without_a_null_condition(self) -> None:
        model = BLIP3oDiTModel(tiny_config(flow_matching={"condition_dropout": 0.0}))
        with pytest.raises(ValueError, match="does not know the null condition, found 2"):
            model.generate(torch.randn(1, 9, 12), guidance_scale=2.0)

    def test_devices(self) -> None:
        with pytest.raises(ValueError, match="expected auto, cpu, cuda or cuda:N, found 'abacus'"):
            pick_device("abacus")
        with pytest.raises(ValueError, match="CUDA GPUs"):
            pick_device("cuda:99")
