"""Weights out and back, under every prefix, with every misfit refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.config import BLIP3oDiTConfig
from blip3o_dit.model.conversion import (
    OFFICIAL_PREFIXES,
    from_diffusers_state_dict,
    from_official_state_dict,
    load_official_checkpoint,
    to_diffusers_state_dict,
    to_official_state_dict,
)
from tests.conftest import tiny_config


def same_weights(a: BLIP3oDiTModel, b: BLIP3oDiTModel) -> bool:
    left, right = a.dit.state_dict(), b.dit.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("prefix", OFFICIAL_PREFIXES)
def test_official_round_trip(tiny_model: BLIP3oDiTModel, prefix: str) -> None:
    released = to_official_state_dict(tiny_model, prefix)
    released["visual.blocks.0.weight"] = torch.zeros(2)
    released["lm_head.weight"] = torch.zeros(3)
    back = from_official_state_dict(released, input_size=3)
    assert same_weights(tiny_model, back)
    assert back.config.model_dim == 48
    assert back.config.num_layers == 2
    assert back.config.eva_embedding_size == 12


def test_released_velocity_points_the_other_way(tiny_model: BLIP3oDiTModel) -> None:
    released = to_official_state_dict(tiny_model, "")
    assert torch.equal(released["norm_out.linear_2.weight"], -tiny_model.dit.norm_out.linear_2.weight)
    assert torch.equal(released["norm_out.linear_2.bias"], -tiny_model.dit.norm_out.linear_2.bias)
    assert torch.equal(released["layers.0.gate"], tiny_model.dit.layers[0].gate)


@pytest.mark.parametrize("export", [to_official_state_dict, to_diffusers_state_dict])
@pytest.mark.parametrize(
    ("flow", "found"),
    [
        ({"source": "ridge"}, "source ridge"),
        ({"prediction_type": "epsilon"}, "prediction_type epsilon"),
        ({"prediction_type": "preconditioned"}, "prediction_type preconditioned"),
        ({"schedule_type": "cosine"}, "schedule_type cosine"),
        ({"sigma_max": 3.0}, r"sigma_max 3.0 \(expected 1.0\)"),
        ({"sigma_min": 0.1}, r"sigma_min 0.1 \(expected at most 0.001\)"),
        ({"student_steps": 2}, "student_steps 2"),
    ],
)
def test_a_model_that_was_trained_otherwise_is_not_exported(
    export: Callable[[BLIP3oDiTModel], object], flow: dict[str, object], found: str
) -> None:
    with pytest.raises(ValueError, match=f"expected a model of --recipe paper, found {found}"):
        export(BLIP3oDiTModel(tiny_config(flow_matching=flow)))


@pytest.mark.parametrize("export", [to_official_state_dict, to_diffusers_state_dict])
def test_a_network_of_standardised_tokens_is_not_exported(
    tiny_model: BLIP3oDiTModel, export: Callable[[BLIP3oDiTModel], dict[str, torch.Tensor]]
) -> None:
    """Neither layout has a place for statistics; a model that has them for measuring only is exported."""
    statistics = torch.full((12,), 2.0), torch.ones(12)
    tiny_model.set_statistics(condition=statistics, target=(torch.full((8,), 2.0), torch.ones(8)))
    with pytest.raises(ValueError, match=r"found standardize True \(expected False\)"):
        export(tiny_model)
    tiny_model.config.standardize = False
    assert export(tiny_model)


def test_diffusers_round_trip(tiny_model: BLIP3oDiTModel) -> None:
    weights = to_diffusers_state_dict(tiny_model)
    assert "pad_token" in weights
    projection = tiny_model.dit.caption_projection.state_dict()
    back = from_diffusers_state_dict(weights, tiny_model.config, caption_projection=projection)
    assert same_weights(tiny_model, back)


def test_sharded_checkpoint_folder(tiny_model: BLIP3oDiTModel, tmp_path: Path) -> None:
    released = to_official_state_dict(tiny_model)
    released["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(4, 4)  # the language model's
    names = sorted(released)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: released[name].clone() for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert same_weights(tiny_model, load_official_checkpoint(tmp_path, input_size=3))


def test_missing_and_unexpected_tensors_are_refused(tiny_model: BLIP3oDiTModel) -> None:
    released = to_official_state_dict(tiny_model)
    missing = "model.dit.model.layers.1.norm2.weight"
    with pytest.raises(ValueError, match=r"1 missing \(layers.1.norm2.weight\)"):
        from_official_state_dict({k: v for k, v in released.items() if k != missing})
    released["model.dit.model.extra"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"1 unexpected \(extra\)"):
        from_official_state_dict(released)
    with pytest.raises(ValueError, match="under one of the prefixes"):
        from_official_state_dict({"visual.weight": torch.zeros(1)})


def test_wrong_feed_forward_width_names_the_trap(tiny_model: BLIP3oDiTModel) -> None:
    config = tiny_model.config.to_dict() | {"ffn_dim": 512}
    with pytest.raises(ValueError, match=r"expected \[512, 48\], found \[256, 48\].*4864.*7168"):
        from_official_state_dict(to_official_state_dict(tiny_model), config=BLIP3oDiTConfig.from_dict(config))
