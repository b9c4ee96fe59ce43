"""From noise to tokens: what is computed before the first network call changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from blip3o_dit.model import generation
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.cpu_kernels import NextDiT
from tests.conftest import randomize, tiny_config


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun"])
@pytest.mark.parametrize("guidance", [dict(), dict(guidance_scale=3.0, guidance_interval=(0.3, 0.8))])
def test_modulations_are_computed_once_and_are_those_of_every_call(
    solver: str, guidance: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their layers see all times of all samples at once, or are called each time; samples are the same."""
    model = BLIP3oDiTModel(tiny_config(flow_matching={"time_shift": 2.0})).eval()
    randomize(model)
    calls, plain = [], NextDiT.modulate

    def modulate(dit: NextDiT, temb: Tensor) -> Tensor:
        calls.append(tuple(temb.shape[:-1]))
        return plain(dit, temb)

    monkeypatch.setattr(NextDiT, "modulate", modulate)
    eva, settings = torch.randn(3, 9, 12), dict(num_inference_steps=4, solver=solver, **guidance)
    once = model.generate(eva, **settings)
    network_calls = 4 if solver == "euler" else 8
    shapes = {(network_calls, 3), (network_calls, 1)} if guidance else {(network_calls, 3)}
    assert set(calls) == shapes and len(calls) == len(shapes)
    monkeypatch.setattr(generation, "MAX_MODULATION_BYTES", 0)
    calls.clear()
    each_time = model.generate(eva, **settings)
    assert (each_time - once).norm() < 1e-4 * once.norm()
    assert len(calls) == network_calls


def test_samples_that_would_take_too_much_are_modulated_call_by_call(tiny_model: BLIP3oDiTModel) -> None:
    """One sample at one time takes four scales and gates a block, and one scale at the end."""
    config = tiny_model.config
    assert tiny_model.dit.modulation_bytes == (4 * config.num_layers + 1) * config.model_dim * 4
