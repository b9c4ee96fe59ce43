"""What others do to layers works: hooks see each of them, adapters change the output and learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.training.anomalies import _first_bad_layer
from tests.conftest import randomize, tiny_config

CALLS = {
    "training": lambda model, eva: model(torch.randn(2, 9, 8), torch.rand(2), eva),
    "generation": lambda model, eva: model.generate(eva, num_inference_steps=1),
    "guidance": lambda model, eva: model.generate(eva, num_inference_steps=1, guidance_scale=2.0),
}


@pytest.fixture
def model() -> BLIP3oDiTModel:
    model = BLIP3oDiTModel(tiny_config(flow_matching={"source": "ridge", "condition_dropout": 0.1}))
    randomize(model)
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_forward_hooks_see_every_linear_layer(
    model: BLIP3oDiTModel, call: str, gradients: bool, checkpointing: bool
) -> None:
    model.train().dit.gradient_checkpointing = checkpointing
    torch.manual_seed(0)
    with torch.set_grad_enabled(gradients):
        expected = CALLS[call](model, torch.ones(2, 9, 12))
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    seen: dict[str, list[Tensor]] = {name: [] for name in linear}
    for name in linear:
        model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: seen[name].append(out))
    torch.manual_seed(0)
    with torch.set_grad_enabled(gradients):
        found = CALLS[call](model, torch.ones(2, 9, 12))
    assert len(linear) == 9 + 2 * 11 and all(seen.values())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["attn1.to_k", "attn2.to_v", "feed_forward.linear_3"])
def test_a_diagnosis_names_the_projection(model: BLIP3oDiTModel, name: str) -> None:
    with torch.no_grad():
        model.dit.layers[1].get_submodule(name).weight[0, 0] = float("nan")

    def forward(batch: dict[str, Any]) -> Tensor:
        return model(batch["x"], torch.rand(2), torch.ones(2, 9, 12))

    found = _first_bad_layer(model, [{"x": torch.randn(2, 9, 8)}], forward)
    assert found == {"name": f"dit.layers.1.{name}", "class": "Linear", "dtype": "torch.float32"}


@pytest.mark.parametrize("target", ["to_q", "to_k", "linear_1", "linear_3"])
def test_lora_changes_the_output_and_learns(model: BLIP3oDiTModel, target: str) -> None:
    x, t, eva = torch.randn(2, 9, 8), torch.rand(2), torch.randn(2, 9, 12)
    with torch.no_grad():
        plain, sample = model(x, t, eva), model.generate(eva, num_inference_steps=1)
    names = [f"dit.layers.{i}.{block}.{target}" for i in range(2) for block in ("attn1", "feed_forward")]
    inject_adapter_in_model(LoraConfig(r=2, target_modules=names, init_lora_weights=False), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    adapted = model(x, t, eva)
    assert (adapted - plain).abs().max() > 1e-3
    assert (model.generate(eva, num_inference_steps=1) - sample).abs().max() > 1e-3
    adapted.square().sum().backward()
    learned = [parameter for name, parameter in model.named_parameters() if "lora" in name]
    assert len(learned) == 4 and all(p.grad is not None and p.grad.any() for p in learned)
    assert all(p.grad is None for name, p in model.named_parameters() if "lora" not in name)
