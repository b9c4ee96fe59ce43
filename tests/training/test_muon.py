"""Muon for the blocks' matrices: which they are, what a step does to them, resuming, refusals, memory."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import AdamW
from transformers import TrainingArguments

from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.layers import BFLOAT16_VARIABLE
from blip3o_dit.model.loading import EMA_FILE
from blip3o_dit.training import arguments
from blip3o_dit.training.anomalies import NonFiniteLossError
from blip3o_dit.training.config import OPTIMIZERS, TrainingConfig
from blip3o_dit.training.disk import checkpoint_bytes
from blip3o_dit.training.distillation import distill
from blip3o_dit.training.distillation_config import DistillationConfig
from blip3o_dit.training.memory import optimizer_bytes
from blip3o_dit.training.muon import MuonWithAdamW, block_matrices
from blip3o_dit.training.optimizer_state import load_optimizer
from blip3o_dit.training.resolve import resolve_config
from blip3o_dit.training.run import train
from tests.conftest import tiny_config
from tests.helpers.stores import write_linear_store
from tests.helpers.training import config_for, make_trainer, same

# Steps 4 and 5 of 5 a pass: the checkpoint lies inside one.
SHORT: dict[str, Any] = dict(optimizer="muon", max_steps=6, save_steps=4, eval_samples=0, source="noise")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return write_linear_store(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture(scope="module")
def whole(store: EmbeddingStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(config_for(store, tmp_path_factory.mktemp("run") / "whole", **SHORT))


def with_muon(model: BLIP3oDiTModel, rate: float, decay: float = 0.0) -> MuonWithAdamW:
    adamw = AdamW([{"params": list(model.parameters()), "weight_decay": decay}], lr=rate, fused=True)
    return MuonWithAdamW(adamw, model, decay)


def give_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


# What it does


def test_each_matrix_of_attention_and_feed_forward_is_taken_and_nothing_else() -> None:
    model = BLIP3oDiTModel(tiny_config(num_kv_heads=1))
    taken = {id(matrix) for matrix in block_matrices(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in taken}
    of_a_block = {
        *(f"{part}.to_{which}.weight" for part in ("attn1", "attn2") for which in "qkv"),
        *("attn2.to_out.0.weight", *(f"feed_forward.linear_{i}.weight" for i in (1, 2, 3))),
    }
    layers = range(model.config.num_layers)
    assert names == {f"dit.layers.{layer}.{name}" for layer in layers for name in of_a_block}
    optimizer = with_muon(model, 1e-3)
    counts = [len(group["params"]) for group in optimizer.param_groups]
    assert counts == [len(list(model.parameters())) - len(names), len(names)]


@pytest.mark.parametrize("bfloat16", ["native", "emulated"])
def test_a_step_is_muons_for_matrices_and_adamws_for_the_rest(
    monkeypatch: pytest.MonkeyPatch, bfloat16: str
) -> None:
    """Both by their definitions; the second step after a state that was read back."""
    monkeypatch.setenv(BFLOAT16_VARIABLE, bfloat16)
    torch.manual_seed(0)
    model = BLIP3oDiTModel(tiny_config(num_kv_heads=1))
    expected = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    taken = {id(matrix) for matrix in block_matrices(model)}
    matrices = {name for name, p in model.named_parameters() if id(p) in taken}
    rest = AdamW([p for name, p in expected.items() if name not in matrices], lr=0.02, weight_decay=0.1)
    averages = {name: torch.zeros_like(expected[name]) for name in matrices}
    first = with_muon(model, 0.01, 0.1)
    for step, optimizer in enumerate((first, with_muon(model, 0.01, 0.1))):
        optimizer.load_state_dict(first.state_dict())
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.02  # as a schedule does it
        give_gradients(model, step)
        for name, parameter in model.named_parameters():
            expected[name].grad = parameter.grad
        optimizer.step()
        first = optimizer
        rest.step()
        for name in matrices:
            gradient = expected[name].grad
            assert gradient is not None
            averages[name] = 0.95 * averages[name] + 0.05 * gradient
            update = orthogonalised(0.05 * gradient + 0.95 * averages[name])
            rate = 0.02 * 0.2 * max(gradient.shape) ** 0.5
            expected[name] = (expected[name] * (1 - 0.02 * 0.1) - rate * update).detach()
    tolerance = 1e-6 if bfloat16 == "emulated" else 3e-3  # of bfloat16 products
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=tolerance, msg=name)


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """U p(S) V^T of the matrix U S V^T, p five times Jordan's quintic polynomial."""
    u, s, v = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ s.diag() @ v


# Runs


def test_a_run_continued_inside_a_pass_equals_the_uninterrupted_one(
    whole: Path, store: EmbeddingStore, tmp_path: Path
) -> None:
    again = train(config_for(store, tmp_path / "again", **SHORT), resume=whole / "checkpoint-4")
    for file in ("model.safetensors", EMA_FILE, "checkpoint-6/optimizer.safetensors"):
        assert same(load_file(whole / file), load_file(again / file)), file
    texts = [(folder / "checkpoint-6" / "optimizer.json").read_text() for folder in (whole, again)]
    assert texts[0] == texts[1] and '"match_rms_adamw"' in texts[0]


def test_a_gradient_that_is_not_finite_stops_before_the_step(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where AdamW is left to skip it: on a GPU and with several processes."""
    with monkeypatch.context() as several:
        several.setattr(TrainingArguments, "world_size", 2)
        several.setattr(arguments, "check_launch", lambda processes: None)
        waited_for = [not make_trainer(store, tmp_path, optimizer=name)._gated for name in OPTIMIZERS]
    assert dict(zip(OPTIMIZERS, waited_for, strict=True)) == {"adamw": False, "muon": True}
    trainer = make_trainer(store, tmp_path, optimizer="muon")
    trainer.losses._deferred = True
    bias = trainer.unwrapped_model.dit.norm_out.linear_2.bias
    bias.register_hook(lambda gradient: gradient * float("nan"))
    before = {name: p.clone() for name, p in trainer.unwrapped_model.named_parameters()}
    with pytest.raises(NonFiniteLossError, match=r"infinity in dit.norm_out.linear_2.bias; stopped before"):
        trainer.train()
    assert all(torch.equal(before[name], p) for name, p in trainer.unwrapped_model.named_parameters())


def test_a_dry_run_says_what_it_takes(
    store: EmbeddingStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    train(config_for(store, tmp_path / "run", **SHORT), dry_run=True)
    assert "memory of each process" in caplog.text and "gradients work" in caplog.text


def test_memory_and_disk_count_one_state_for_a_matrix(whole: Path) -> None:
    config = TrainingConfig.from_folder(whole)
    model = config.model(num_tokens=9, condition_dim=12, target_dim=8)
    state = load_file(whole / "checkpoint-6" / "optimizer.safetensors")
    counters = sum(4 for name in state if name.endswith(".step"))
    held = sum(tensor.numel() * tensor.element_size() for tensor in state.values()) - counters
    assert optimizer_bytes(config, model) == held
    adamw = replace(config, optimizer="adamw")
    less = checkpoint_bytes(adamw, model) - checkpoint_bytes(config, model)
    assert less == optimizer_bytes(adamw, model) - held > 0


def test_a_student_of_such_a_model_learns_by_adamw(
    whole: Path, store: EmbeddingStore, tmp_path: Path
) -> None:
    lessons = DistillationConfig(steps=1, train_steps=2, teacher_steps=1, batch_size=8)
    student = distill(whole, store.path, tmp_path / "student", lessons, progress=False)
    assert TrainingConfig.from_folder(student).optimizer == "adamw"


# Refusals


@pytest.mark.parametrize("beside", [dict(fp16=True), dict(memory="low")])
def test_settings_that_muon_cannot_go_with_are_refused(beside: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="optimizer: muon expects float32 weights and no loss scale, found"):
        TrainingConfig(optimizer="muon", **beside)


def test_sharded_weights_are_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    config = TrainingConfig(optimizer="muon", embeddings_path="nowhere", output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="optimizer: muon takes matrices as a whole, expected no FSDP"):
        train(config)


def test_another_optimizers_run_is_refused(whole: Path, store: EmbeddingStore, tmp_path: Path) -> None:
    checkpoint = whole / "checkpoint-4"
    with pytest.raises(ValueError, match="optimizer was 'muon', now 'adamw': a new run can start from"):
        resolve_config({"optimizer": "adamw"}, debug=False, resume=checkpoint)
    config = config_for(store, tmp_path / "again", **SHORT | dict(optimizer="adamw"))
    with pytest.raises(ValueError, match=r"optimizer.json: param_groups: expected \[\d+, \d+\] parameters"):
        train(config, resume=checkpoint)


def test_a_damaged_state_is_refused(whole: Path, store: EmbeddingStore, tmp_path: Path) -> None:
    trainer = make_trainer(store, tmp_path / "run", **SHORT)
    trainer.create_optimizer_and_scheduler(num_training_steps=6)
    assert trainer.lr_scheduler is not None
    checkpoint = tmp_path / "checkpoint-4"
    shutil.copytree(whole / "checkpoint-4", checkpoint)
    file = checkpoint / "optimizer.safetensors"
    state = load_file(file)
    name = next(name for name in state if name.endswith(".momentum_buffer"))
    others = {key: tensor for key, tensor in state.items() if key != name}
    renamed = name.replace("momentum_buffer", "exp_avg")
    for damaged, expected in (
        (others, "states of"),
        (others | {renamed: state[name]}, "momentum_buffer, found"),
        (others | {name: state[name][1:].clone()}, "shape"),
    ):
        save_file(damaged, file)
        with pytest.raises(ValueError, match=rf"optimizer.safetensors: .*expected {expected}"):
            load_optimizer(checkpoint, trainer.unwrapped_model, trainer.optimizer, trainer.lr_scheduler)
