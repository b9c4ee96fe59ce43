"""bfloat16 weights whose float32 values AdamW keeps (`--memory split`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.layers import BFLOAT16_VARIABLE
from blip3o_dit.model.loading import EMA_FILE
from blip3o_dit.training import memory
from blip3o_dit.training.anomalies import GradientNorms, NonFiniteLossError
from blip3o_dit.training.arguments import training_arguments
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.training.curves import read_log
from blip3o_dit.training.run import train
from blip3o_dit.training.split_weights import (
    SplitAdamW,
    SplitWeights,
    joined,
    rounded_at_random,
    split,
)
from tests.conftest import randomize, tiny_config
from tests.helpers.stores import write_linear_store
from tests.helpers.training import config_for, make_trainer, same

# Every kind of float32 number: both zeros, subnormal, the middle between two bfloat16 numbers, infinite.
BITS = [0, -(2**31), 1, 0x7FFF, 0x8000, 0x3F808000, 0x3F818000, 0x3F80FFFF, 0x7F800000, 0xFF800000 - 2**32]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return write_linear_store(tmp_path_factory.mktemp("data") / "store")


def test_a_split_number_is_kept_to_the_bit_and_rounded_to_the_nearest() -> None:
    bits = torch.randint(-(2**31), 2**31, (100_000,), dtype=torch.int64).to(torch.int32)
    numbers = torch.cat([torch.tensor(BITS, dtype=torch.int32), bits]).view(torch.float32)
    numbers = numbers[~numbers.isnan() & (numbers.abs() < 3.38e38) | numbers.isinf()]
    weight, remainder = split(numbers)
    assert torch.equal(joined(weight, remainder).view(torch.int32), numbers.view(torch.int32))
    between = (numbers.view(torch.int32) & 0xFFFF) == 0x8000  # there torch takes the even one
    assert torch.equal(weight[~between], numbers.bfloat16()[~between])
    assert weight.dtype == torch.bfloat16 and remainder.dtype == torch.int16


def test_rounding_at_random_loses_nothing_on_average() -> None:
    number = torch.full((100_000,), 1.0 + 2**-7 / 10)
    assert float(rounded_at_random(number).double().mean() - 1.0) == pytest.approx(2**-7 / 10, rel=0.05)


def test_it_is_float32_adamw_to_the_bit_where_gradients_are_the_same() -> None:
    """With weight decay, clipping inside the step, and a step that is not taken."""
    model = BLIP3oDiTModel(tiny_config())
    randomize(model)
    plain = BLIP3oDiTModel(model.config)
    plain.load_state_dict(model.state_dict())
    weights = SplitWeights(model)
    settings: dict[str, Any] = dict(lr=1e-3, weight_decay=0.1)
    names = {parameter: weights.remainders[name] for name, parameter in model.named_parameters()}
    ours = SplitAdamW(model.parameters(), remainders=names, moments=torch.float32, **settings)
    theirs = torch.optim.AdamW(plain.parameters(), fused=True, **settings)
    for step, (scale, skipped) in enumerate([(None, 0.0), (3.0, 0.0), (None, 1.0), (None, 0.0)]):
        for optimizer in (ours, theirs):
            optimizer.grad_scale = None if scale is None else torch.tensor(scale)  # type: ignore[union-attr]
            optimizer.found_inf = torch.tensor(skipped)  # type: ignore[union-attr]
        for own, other in zip(model.parameters(), plain.parameters(), strict=True):
            gradient = torch.randn(own.shape, generator=torch.Generator().manual_seed(step)).bfloat16()
            own.grad, other.grad = gradient, gradient.float()
        ours.step()
        theirs.step()
        found = {name: weights.exact(name, p.detach()) for name, p in model.named_parameters()}
        assert same(found, dict(plain.named_parameters()))  # type: ignore[arg-type]
    assert next(model.parameters()).dtype == torch.bfloat16


def test_norms_of_narrow_gradients_are_not_narrow() -> None:
    layer = nn.Linear(3, 1, bias=False).bfloat16()
    layer.weight.grad = torch.tensor([[1.0, 1.0, 1.0]], dtype=torch.bfloat16)
    assert float(GradientNorms(layer, 1).total) == pytest.approx(3**0.5, rel=1e-6)


def losses(run: Path) -> list[float]:
    return [entry["loss"] for entry in read_log(run / "training_log.jsonl") if "loss" in entry]


def test_it_learns_what_bf16_autocast_learns(store: EmbeddingStore, tmp_path: Path, bfloat16: str) -> None:
    common = dict(model_dim=16, num_epochs=None, max_steps=12, eval_split=0.0, save_steps=20, source="noise")
    autocast = train(config_for(store, tmp_path / "autocast", **common, bf16=True))
    halves = train(config_for(store, tmp_path / "split", **common, memory="split"))
    assert losses(halves) == pytest.approx(losses(autocast), rel=5e-3)
    saved, expected = (load_file(folder / "model.safetensors") for folder in (halves, autocast))
    name = "dit.norm_out.linear_2.weight"  # it begins at zero
    assert float((saved[name] - expected[name]).norm() / expected[name].norm()) < 0.03
    assert saved[name].dtype == load_file(halves / EMA_FILE)[name].dtype == torch.float32
    assert not torch.equal(saved[name], saved[name].bfloat16().float())
    assert BLIP3oDiTModel.from_pretrained(halves, dtype="auto").dtype == torch.float32
    assert same(saved, load_file(halves / "checkpoint-12" / "model.safetensors"))


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_it_continues_bit_for_bit(store: EmbeddingStore, tmp_path: Path, moments: str) -> None:
    common: dict[str, Any] = dict(memory="split", moments=moments, max_grad_norm=0.1, model_dim=16)
    common |= dict(eval_steps=100, eval_samples=0)
    whole = train(config_for(store, tmp_path / "whole", **common))
    torch.manual_seed(123)  # the state of the process must not matter
    again = train(config_for(store, tmp_path / "again", **common), resume=whole / "checkpoint-5")
    for file in ("model.safetensors", EMA_FILE, "checkpoint-10/optimizer.safetensors"):
        assert same(load_file(whole / file), load_file(again / file)), file
    state: dict[str, Tensor] = load_file(whole / "checkpoint-5" / "optimizer.safetensors")
    assert {str(t.dtype) for name, t in state.items() if "exp_avg" in name} == {f"torch.{moments}"}


def test_averages_are_of_the_float32_values_and_a_bad_step_changes_nothing(
    store: EmbeddingStore, tmp_path: Path
) -> None:
    trainer = make_trainer(store, tmp_path, memory="split", max_steps=1, ema_decay=0.5)
    assert trainer.split is not None and trainer.ema is not None
    name = "dit.norm_out.linear_2.weight"
    weight = trainer.unwrapped_model.get_parameter(name)
    start = trainer.split.exact(name, weight.detach())
    trainer.train()
    end, decay = trainer.split.exact(name, weight.detach()), 2 / 11
    assert not torch.equal(end, weight.float())
    expected = decay * start + (1 - decay) * end
    torch.testing.assert_close(trainer.ema.weights[name], expected, rtol=1e-6, atol=0)
    before = weight.detach().clone()
    with trainer.ema.applied(trainer.unwrapped_model):
        assert not torch.equal(before, weight)
    assert torch.equal(before, weight) and torch.equal(end, trainer.split.exact(name, weight.detach()))
    with torch.no_grad():
        trainer.unwrapped_model.dit.norm_out.linear_2.bias[0] = float("nan")
    with pytest.raises(NonFiniteLossError):
        trainer.train()
    assert torch.equal(before, weight)


def test_what_cannot_work_with_it_is_refused(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="split keeps the weights in bfloat16, expected no fp16"):
        TrainingConfig(memory="split", fp16=True)
    with pytest.raises(ValueError, match="moments: bfloat16 expects memory split, found default"):
        TrainingConfig(moments="bfloat16")
    monkeypatch.setattr("transformers.TrainingArguments.world_size", property(lambda self: 2))
    monkeypatch.setattr("blip3o_dit.training.arguments.check_launch", lambda size: None)
    with pytest.raises(ValueError, match="--memory split: expected one process without FSDP, found 2"):
        training_arguments(config_for(store, tmp_path / "out", memory="split"), evaluate=False)


def test_sharded_weights_are_refused(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="--memory split: expected one process without FSDP, found FSDP"):
        training_arguments(config_for(store, tmp_path / "out", memory="split"), evaluate=False)


def test_the_forecast_counts_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BFLOAT16_VARIABLE, "native")
    sizes = dict(num_tokens=64, condition_dim=1280, target_dim=768)
    config = TrainingConfig(memory="split", moments="bfloat16")
    weights, _ = memory.count_weights(config.model(**sizes))
    needed = memory.forecast(config, config.model(**sizes), torch.device("cpu"))
    assert needed.weights == needed.averages == needed.optimizer == 4 * weights
    assert needed.gradients == 2 * weights and needed.copies == 0
    exact = memory.forecast(TrainingConfig(memory="split"), config.model(**sizes), torch.device("cpu"))
    assert exact.optimizer == 8 * weights
