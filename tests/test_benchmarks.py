"""The benchmarks measure what they say: the Trainer's own step in its precision, GPU checks that can fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_check
from benchmarks.gpu_check import Setup, attempt
from benchmarks.our_step import ProductDtypes, our_step, random_batch
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.training.ema import ExponentialMovingAverage
from blip3o_dit.training.trainer import BLIP3oTrainer
from tests.conftest import randomize, tiny_config

CPU = Setup(torch.device("cpu"), width=32, layers=1, steps=3, quick=True)


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("bf16", [False, True])
def test_a_measured_step_is_the_trainers_in_the_precision_it_names(
    bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    clip, update = BLIP3oTrainer._clip_grad_norm, ExponentialMovingAverage.update
    monkeypatch.setattr(BLIP3oTrainer, "_clip_grad_norm", lambda *a: calls.append("clip") or clip(*a))
    monkeypatch.setattr(ExponentialMovingAverage, "update", lambda *a: calls.append("ema") or update(*a))
    model = BLIP3oDiTModel(tiny_config())
    randomize(model)
    before = [parameter.clone() for parameter in model.parameters()]
    step = our_step(model, random_batch(model, 4), bf16)
    with ProductDtypes() as products:
        step()
    expected = torch.bfloat16 if bf16 else torch.float32
    assert set(products.operations) == {expected, torch.float32}  # the last layer's are float32
    assert products.operations[expected] > 0.7 * products.operations.total()
    assert calls == ["clip", "ema"]
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.usefixtures("cpu")
def test_measured_steps_follow_each_other_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """There a step looks at the losses of the one before."""
    made, plain = [], BLIP3oTrainer.__init__

    def gated(trainer: BLIP3oTrainer, *arguments: object, **settings: object) -> None:
        plain(trainer, *arguments, **settings)
        trainer.losses._deferred = trainer._gated = True
        made.append(trainer)

    monkeypatch.setattr(BLIP3oTrainer, "__init__", gated)
    model = BLIP3oDiTModel(tiny_config())
    step = our_step(model, random_batch(model, 4), bf16=False)
    for _ in range(3):
        step()
    assert made[0].state.global_step == 3


@pytest.mark.usefixtures("cpu")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 0
    assert capsys.readouterr().out == "gpu-check: no GPU here, nothing was checked\n"


@pytest.mark.usefixtures("cpu")
def test_every_comparison_runs_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.json"
    status = gpu_check.main(["--device", "cpu", "--json", str(file)])
    found = json.loads(file.read_text())
    assert (status, found["failed"]) == (0, [])
    assert list(found["parts"]) == ["generation", "devices", "quantized", "training", "resume"]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found


@pytest.mark.usefixtures("cpu")
def test_a_wrong_result_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    there = Setup.there

    def moved_and_changed(self: Setup, model: BLIP3oDiTModel, dtype: torch.dtype) -> BLIP3oDiTModel:
        with torch.no_grad():
            model.dit.norm_out.linear_2.weight.mul_(1.1)
        return there(self, model, dtype)

    monkeypatch.setattr(Setup, "there", moved_and_changed)
    assert gpu_check.main(["--device", "cpu", "--parts", "generation"]) == 1


def test_a_part_that_fails_or_hangs_is_one_row() -> None:
    def fails(setup: Setup) -> list:
        raise RuntimeError("out of\nmemory")

    def hangs(setup: Setup) -> list:
        while True:
            Tensor()

    (row,) = attempt("fails", fails, CPU, limit=10)
    assert row["found"].startswith("RuntimeError: out of memory (test_benchmarks.py:") and not row["ok"]
    (row,) = attempt("hangs", hangs, CPU, limit=0.05)
    assert "TimeoutError: not finished after 0.05 s" in row["found"] and not row["ok"]
