"""Informed sources: the change of units, the fit, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from blip3o_dit.flow.config import FlowMatchingConfig
from blip3o_dit.flow.path import AffineSource, LinearPath, make_path
from blip3o_dit.flow.predictions import convert_prediction
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.ridge import (
    MAX_RIDGE_FEATURES,
    SPREAD_BOUNDS,
    context_features,
    context_sizes,
    neighbourhood_features,
    relative_spread,
    source_components,
)
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.training.fit_source import fit_source
from tests.conftest import randomize, tiny_config
from tests.helpers.linear_gaussian import LinearGaussian


def informed_model(source: str = "ridge_3x3") -> BLIP3oDiTModel:
    components = 0 if source == "ridge" else 3
    flow = dict(source=source, source_components=components, prediction_type="preconditioned")
    model = BLIP3oDiTModel(tiny_config(flow_matching=flow)).eval()
    generator = torch.Generator().manual_seed(1)
    model.set_source(
        weight=0.3 * torch.randn(model.source_weight.shape, generator=generator),
        bias=torch.randn(8, generator=generator),
        std=torch.rand(8, generator=generator) + 0.1,
        components=torch.randn(12, components, generator=generator) if components else None,
        spread=0.02 * torch.randn(17, 8, generator=generator) if model.config.flow.predicts_spread else None,
    )
    return model


@pytest.mark.parametrize("shape", [(8,), (4, 9, 8)])
def test_the_flow_starts_at_the_guess_plus_its_deviation(shape: tuple[int, ...]) -> None:
    mean, std = torch.randn(4, 9, 8), torch.rand(shape) + 0.1
    source, noise = AffineSource(mean, std), torch.randn(4, 9, 8)
    torch.testing.assert_close(source.from_flow(noise), mean + std * noise)
    torch.testing.assert_close(source.to_flow(source.from_flow(noise)), noise)
    twice = source.repeat(2).from_flow(torch.cat([noise, 2 * noise]))
    assert torch.equal(twice, torch.cat([source.from_flow(noise), source.from_flow(2 * noise)]))
    assert AffineSource().from_flow(noise) is noise and AffineSource().to_flow(noise) is noise


def test_the_path_in_the_flows_units_is_the_path_between_source_and_data() -> None:
    """x_t = (1 - t) x_0 + t x_1 with x_0 = R(c) + s eps, and v = x_1 - x_0: the issue's own formula."""
    source = AffineSource(torch.randn(4, 9, 8), torch.rand(8) + 0.1)
    x_1, noise, t = torch.randn(4, 9, 8), torch.randn(4, 9, 8), torch.rand(4)
    sample = LinearPath(sigma_min=0.0).sample(source.to_flow(x_1), noise, t)
    x_0, time = source.from_flow(noise), t[:, None, None]
    torch.testing.assert_close(source.from_flow(sample.x_t), (1 - time) * x_0 + time * x_1)
    torch.testing.assert_close(source.std * sample.velocity, x_1 - x_0)


def test_features_are_the_token_and_its_eight_neighbours() -> None:
    tokens = torch.arange(18.0).reshape(1, 9, 2) + 1
    features = neighbourhood_features(tokens, torch.eye(2))
    assert features.shape == (1, 9, 18)
    grid = tokens.reshape(3, 3, 2)
    around = [grid[y, x] for y in range(3) for x in range(3) if (y, x) != (1, 1)]
    assert torch.equal(features[0, 4], torch.cat([grid[1, 1], *around]))
    assert (features[0, 0, 2:10] == 0).all()  # the corner has nothing above it or to its left


def test_context_is_the_token_two_rings_the_picture_and_the_position() -> None:
    tokens = torch.randn(2, 25, 6)
    components = torch.linalg.qr(torch.randn(6, 6)).Q[:, -4:]
    sizes = context_sizes(6, 4, 25)
    token, ring, wider, mean, position = context_features(tokens, components).split(sizes, dim=-1)
    assert sizes == (6, 8 * 4, 16 * 4, 4, 25) and torch.equal(token, tokens)
    assert torch.equal(position, torch.eye(25).expand(2, 25, 25))
    projected = tokens @ components
    torch.testing.assert_close(mean, projected.mean(dim=1, keepdim=True).expand(2, 25, 4))
    assert torch.equal(ring, neighbourhood_features(tokens, components)[..., 6:])
    edge = [(y, x) for y in range(5) for x in range(5) if {y, x} & {0, 4}]
    grid = projected[0].reshape(5, 5, 4)
    torch.testing.assert_close(wider[0, 12], torch.cat([grid[place] for place in edge]))  # the middle's
    corner = wider[0, 0].reshape(16, 4)
    for place, (y, x) in zip(corner, edge, strict=True):  # of the top left token, two up and left of (0, 0)
        inside = y >= 2 and x >= 2
        torch.testing.assert_close(place, grid[y - 2, x - 2] if inside else torch.zeros(4))


@pytest.mark.parametrize(
    ("width", "tokens"), [(1280, 64), (1280, 256), (320, 64), (64, 16), (4096, 64), (1, 1)]
)
def test_context_keeps_to_so_many_features(width: int, tokens: int) -> None:
    """Beside one for each position; the nearest neighbours have at least what the others have."""
    sizes = context_sizes(width, source_components("ridge_context", width), tokens)
    token, ring, wider, mean, position = sizes
    assert token + ring + wider + mean <= max(MAX_RIDGE_FEATURES, width + 26) and position == tokens
    assert 1 <= wider // 16 <= ring // 8 <= mean <= width


def test_a_spread_depends_on_the_guess_and_is_bounded() -> None:
    guess, weight = torch.randn(2, 9, 8), torch.randn(17, 8)
    logarithm = guess @ weight[:8] + guess.square() @ weight[8:16] + weight[16]
    low, high = SPREAD_BOUNDS
    torch.testing.assert_close(relative_spread(guess, weight), logarithm.exp().clamp(low, high))
    assert torch.equal(relative_spread(guess, 0 * weight), torch.ones(2, 9, 8))
    extreme = relative_spread(torch.tensor([[1e4], [-1e4]]), torch.tensor([[1.0], [0.0], [0.0]]))
    torch.testing.assert_close(extreme, torch.tensor([[high], [low]]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model, condition = informed_model("ridge_context_spread"), torch.randn(2, 9, 12)
        start = model.source_distribution(condition)
    assert start.mean is not None and start.std is not None and start.std.shape == (2, 9, 8)
    expected = model.source_std * relative_spread(start.mean, model.source_spread)
    assert torch.equal(start.std, expected) and start.std.std(dim=1).min() > 0.01


@pytest.mark.parametrize("source", ["ridge", "ridge_3x3", "ridge_context", "ridge_context_spread"])
def test_a_new_model_samples_the_ridge_and_its_gaussian_residual(source: str) -> None:
    """Before any training the head puts out zero: the one-call estimate is R(c), samples are R + s eps."""
    model = informed_model(source)
    eva = torch.randn(3, 9, 12)
    start = model.source_distribution(model.normalize_condition(eva))
    torch.testing.assert_close(
        model.predict_mean(eva), model.denormalize_target(start.mean), rtol=0, atol=2e-4
    )
    names, _ = model._draw(eva, 0, None, 0)
    noise, _ = model.initial_state(model.noise_of(names), eva)
    expected = model.denormalize_target(start.from_flow(noise))
    sampled = model.generate(eva, num_inference_steps=60, solver="midpoint")
    torch.testing.assert_close(sampled, expected, rtol=1e-3, atol=5e-3)


def test_the_network_sees_the_guess_beside_the_point() -> None:
    model = informed_model()
    randomize(model)
    condition, x_t, t = torch.randn(2, 9, 12), torch.randn(2, 9, 8), torch.tensor([0.2, 0.7])
    start = model.source_distribution(condition)
    with torch.no_grad():
        own = model(x_t, t, condition)
        given = model(x_t, t, condition, start.mean)
        other = model(x_t, t, condition, start.mean + 1)
        dropped = model(x_t, t, torch.zeros_like(condition), start.mean)
        encoded = model.dit.encode_condition(condition, start.mean)
        split = model.dit.predict(x_t, t, encoded)
        one_encoded = model.dit.encode_condition(condition[1:], start.mean[1:])
        one = model.dit.predict(x_t[1:], t[1:], one_encoded)
    assert torch.equal(own, given)
    for changed in (other, dropped):
        assert (changed - given).abs().mean() > 0.01
    torch.testing.assert_close(split, given, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(one, given[1:], rtol=1e-3, atol=1e-3)
    assert not hasattr(BLIP3oDiTModel(tiny_config()).dit, "guess_embedder")  # BLIP3-o's own network has none


@pytest.mark.parametrize("source", ["ridge_3x3", "ridge_context_spread"])
def test_sampling_follows_the_network_that_was_trained(source: str) -> None:
    """v(y, t) is what `forward` says at x = R(c) + s y, with and without guidance."""
    model = informed_model(source)
    randomize(model)
    condition, y, t = torch.randn(2, 9, 12), torch.randn(2, 9, 8), torch.full((2,), 0.3)
    start = model.source_distribution(condition)
    path = make_path(model.config.flow)

    def expected(shown: torch.Tensor) -> torch.Tensor:
        prediction = model(start.from_flow(y), t, shown, start.mean)
        return convert_prediction(prediction, y, t, path, from_type="preconditioned", to_type="v_prediction")

    with torch.no_grad():
        full, null = expected(condition), expected(torch.zeros_like(condition))
        plain = model.make_velocity_fn(condition, start)(y, t)
        guided = model.make_velocity_fn(condition, start, 2.0)(y, t)
        outside = model.make_velocity_fn(condition, start, 2.0)(y, t, guided=False)
    for found, wanted in ((plain, full), (guided, null + 2.0 * (full - null)), (outside, full)):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=2e-3)
    assert (full - null).abs().mean() > 0.02


def test_the_source_is_saved_with_the_model(tmp_path: Path) -> None:
    model = informed_model("ridge_context_spread")
    randomize(model)
    eva = torch.randn(2, 9, 12)
    expected = model.generate(eva, num_inference_steps=3)
    model.save_pretrained(tmp_path)
    loaded = BLIP3oDiTModel.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.generate(eva, num_inference_steps=3), expected)
    half = BLIP3oDiTModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    names = ("weight", "bias", "std", "components", "spread")
    assert {half.get_buffer(f"source_{name}").dtype for name in names} == {torch.float32}
    assert model.bfloat16().source_std.dtype == torch.float32


def test_wrong_shapes_are_refused() -> None:
    model = informed_model("ridge")
    with pytest.raises(ValueError, match=r"source_std: expected shape \(8,\), found \(9,\)"):
        model.set_source(weight=torch.zeros(12, 8), bias=torch.zeros(8), std=torch.zeros(9), components=None)
    with pytest.raises(ValueError, match="source_components: expected an integer >= 1"):
        FlowMatchingConfig(source="ridge_3x3")
    with pytest.raises(ValueError, match="source_components: expected 0 for source 'ridge'"):
        FlowMatchingConfig(source="ridge", source_components=2)


@pytest.mark.parametrize("source", ["ridge", "ridge_3x3", "ridge_context"])
def test_the_fit_finds_the_regression_and_its_residual(source: str) -> None:
    data = LinearGaussian(num_samples=2000, num_tokens=9, condition_dim=6, target_dim=5)
    sizes = dict(num_tokens=9, condition_dim=6, target_dim=5)
    config = TrainingConfig(model_dim=16, num_layers=1, num_heads=2, source=source)
    model = BLIP3oDiTModel(config.model(**sizes))
    mean, std = data._clip.mean(dim=(0, 1)), data._clip.std(dim=(0, 1))
    model.set_statistics(
        condition=(data._eva.mean(dim=(0, 1)), data._eva.std(dim=(0, 1))), target=(mean, std)
    )
    model.set_source(**fit_source(model, data, np.arange(2000), max_samples=2000, seed=0)[0])
    eva, _ = data.fetch(np.arange(50))
    source_mean = model.denormalize_target(model.source_distribution(model.normalize_condition(eva)).mean)
    torch.testing.assert_close(source_mean, data.mean(eva), rtol=0, atol=0.2)
    deviation = data.factor.square().sum(dim=1).sqrt() / std
    torch.testing.assert_close(model.source_std, deviation, rtol=0.1, atol=0)


def test_guidance_changes_what_is_attended_to_and_not_the_source() -> None:
    model = informed_model()
    randomize(model)
    condition = torch.randn(2, 9, 12)
    y, t = torch.randn(2, 9, 8), torch.full((2,), 0.5)
    start = model.source_distribution(condition)
    with torch.no_grad():
        null = model.make_velocity_fn(torch.zeros_like(condition), start)(y, t)
        full = model.make_velocity_fn(condition, start)(y, t)
        guided = model.make_velocity_fn(condition, start, 3.0)(y, t)
    torch.testing.assert_close(guided, null + 3.0 * (full - null), rtol=1e-3, atol=1e-3)
