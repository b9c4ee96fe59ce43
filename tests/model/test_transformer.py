"""The network against diffusers, against the official layout, and against itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LuminaNextDiT2DModel
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from torch import Tensor

from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.config import BLIP3oDiTConfig
from blip3o_dit.model.conversion import diffusers_config, to_diffusers_state_dict
from blip3o_dit.model.layers import rotary_tables, sinusoidal_features
from blip3o_dit.model.transformer import NextDiTBlock
from tests.conftest import randomize, tiny_config

SIZES = {
    "plain": dict(model_dim=48, num_layers=2, num_heads=3, in_channels=8, eva_embedding_size=12),
    "grouped": dict(model_dim=96, num_layers=3, num_heads=6, num_kv_heads=2, in_channels=20, ffn_dim=160),
}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [(dict(in_channels=1792, eva_embedding_size=3584), 1_365_010_336), ({}, 1_357_210_528)],
    ids=["official", "default"],
)
def test_parameter_count(sizes: dict[str, int], expected: int) -> None:
    with torch.device("meta"):
        model = BLIP3oDiTModel(BLIP3oDiTConfig(**sizes))
    assert sum(p.numel() for p in model.parameters()) == expected
    assert len(list(model.parameters())) == 642


@pytest.mark.parametrize("name", SIZES)
def test_same_weights_give_the_same_output_as_diffusers(name: str) -> None:
    config = BLIP3oDiTConfig(input_size=5, **SIZES[name])
    model = BLIP3oDiTModel(config)
    randomize(model)
    model.eval()
    peer = LuminaNextDiT2DModel(**diffusers_config(config)).eval()
    peer.load_state_dict(to_diffusers_state_dict(model))

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 25, config.in_channels, generator=generator)
    t = torch.tensor([0.13, 0.87])
    condition = torch.randn(2, 7, config.eva_embedding_size, generator=generator)
    with torch.no_grad():
        ours = model(x, t, condition)
        theirs = peer(
            hidden_states=x.transpose(1, 2).unflatten(2, (5, 5)),
            timestep=1000 * (1 - t),
            encoder_hidden_states=model.dit.caption_projection(condition),
            encoder_mask=torch.ones(2, 7),
            image_rotary_emb=get_2d_rotary_pos_embed_lumina(config.head_dim, 5, 5),
            cross_attention_kwargs={},
        ).sample
    theirs = -theirs.flatten(2).transpose(1, 2)
    assert ours.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-4 * ours.abs().max()


def test_rotary_tables_match_the_formula_and_tell_rows_from_columns() -> None:
    cos, sin = rotary_tables(3, 16, 10000.0)
    assert cos.shape == (9, 8)
    row, column = 2, 1
    for k in range(4):
        frequency = 10000.0 ** (-4 * k / 16)
        angles = torch.tensor([row * frequency, column * frequency])
        token = row * 3 + column
        torch.testing.assert_close(cos[token, 2 * k : 2 * k + 2], angles.cos())
        torch.testing.assert_close(sin[token, 2 * k : 2 * k + 2], angles.sin())


def test_time_features_are_cosines_then_sines_of_the_noise_level() -> None:
    features = sinusoidal_features(torch.tensor([250.0]))
    assert features.shape == (1, 256)
    for k in (0, 1, 127):
        angle = torch.tensor(250.0 * 10000.0 ** (-k / 128))
        torch.testing.assert_close(features[0, k], angle.cos(), atol=1e-4, rtol=0)
        torch.testing.assert_close(features[0, 128 + k], angle.sin(), atol=1e-4, rtol=0)


def test_encoded_condition_gives_the_same_output_as_forward(tiny_model: BLIP3oDiTModel) -> None:
    x, t, condition = torch.randn(2, 9, 8), torch.rand(2), torch.randn(2, 9, 12)
    with torch.no_grad():
        encoded = tiny_model.dit.encode_condition(condition)
        cached = tiny_model.dit.predict(x, t, encoded)
        torch.testing.assert_close(cached, tiny_model(x, t, condition), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_kv_heads", [2, 4])
def test_guided_batches_share_the_null_condition(num_kv_heads: int) -> None:
    """What is left out for it, queries and all but one key and value, changes nothing."""
    model = BLIP3oDiTModel(tiny_config(model_dim=32, num_heads=4, num_kv_heads=num_kv_heads)).double()
    randomize(model)
    x, t, condition = torch.randn(3, 9, 8).double(), torch.rand(3).double(), torch.randn(3, 9, 12).double()
    with torch.no_grad():
        null = model.dit.encode_condition(torch.zeros_like(condition[:1]))
        both = model.dit.encode_condition(condition).with_null_condition(null)
        found = model.dit.predict(x.repeat(2, 1, 1), t.repeat(2), both)
        expected = model(x.repeat(2, 1, 1), t.repeat(2), torch.cat([torch.zeros_like(condition), condition]))
    assert (expected[:3] - expected[3:]).abs().mean() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # rotation and time are float32


def test_every_input_matters(tiny_model: BLIP3oDiTModel) -> None:
    x, t, condition = torch.randn(1, 9, 8), torch.tensor([0.4]), torch.randn(1, 9, 12)
    with torch.no_grad():
        base = tiny_model(x, t, condition)
        assert (tiny_model(x, t + 0.2, condition) - base).abs().max() > 1e-3
        assert (tiny_model(x, t, condition + 0.1) - base).abs().max() > 1e-3
        swapped = condition.roll(1, dims=1)  # cross-attention has no positions on the keys
        torch.testing.assert_close(tiny_model(x, t, swapped), base, rtol=1e-3, atol=2e-4)


def test_gradient_checkpointing_changes_neither_loss_nor_gradients() -> None:
    results = []
    for checkpointing in (False, True):
        model = BLIP3oDiTModel(tiny_config(gradient_checkpointing=checkpointing))
        randomize(model)
        model.train()
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(2, 9, 8, generator=generator)
        condition = torch.randn(2, 9, 12, generator=generator)
        loss = model(x, torch.tensor([0.2, 0.9]), condition).square().mean()
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    (loss_off, off), (loss_on, on) = results
    assert torch.equal(loss_off, loss_on)
    for name, gradient in off.items():
        assert gradient is not None, name
        torch.testing.assert_close(on[name], gradient, rtol=0, atol=1e-7, msg=name)


def test_checkpointing_recomputes_blocks() -> None:
    model = BLIP3oDiTModel(tiny_config(gradient_checkpointing=True)).train()
    calls = []
    model.dit.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model(torch.randn(1, 9, 8), torch.rand(1), torch.randn(1, 9, 12)).sum().backward()
    assert len(calls) == 2


def test_untrained_model_predicts_zero_and_gates_are_closed() -> None:
    model = BLIP3oDiTModel(tiny_config())
    out = model(torch.randn(2, 9, 8), torch.rand(2), torch.randn(2, 9, 12))
    assert out.abs().max() == 0
    for layer in model.dit.layers:
        assert layer.gate.abs().max() == 0
        assert layer.attn1.to_q.weight.std() > 0.05


@pytest.mark.parametrize("source", ["noise", "ridge"])
def test_a_bfloat16_residual_stream_is_saved_and_close(
    source: str, bfloat16: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every dtype of the weights the blocks add to it in its own; the output stays float32."""
    streams: list[torch.dtype] = []
    forward = NextDiTBlock.forward

    def watched(block: NextDiTBlock, x: Tensor, *args: Any) -> Tensor:
        streams.extend([x.dtype, (out := forward(block, x, *args)).dtype])
        return out

    monkeypatch.setattr(NextDiTBlock, "forward", watched)
    samples = []
    for residual in ("float32", "bfloat16"):
        config = tiny_config(flow_matching={"source": source}, residual=residual)
        model = BLIP3oDiTModel(config).eval()
        randomize(model, scale=0.1)
        model.save_pretrained(tmp_path / residual)
        for dtype in (torch.float32, torch.bfloat16):
            streams.clear()
            loaded = BLIP3oDiTModel.from_pretrained(tmp_path / residual, dtype=dtype)
            samples.append(loaded.generate(torch.ones(2, 9, 12), num_inference_steps=2))
            assert set(streams) == {getattr(torch, residual)} and samples[-1].dtype == torch.float32
    for sample in samples[1:]:
        assert 0 < (sample - samples[0]).norm() < 0.05 * samples[0].norm()
