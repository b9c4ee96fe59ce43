"""The benchmarks measure what they say: the Trainer's own step in its precision, GPU checks that can fail."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_check, gpu_compare, gpu_measure
from benchmarks.gpu_compare import Setup
from benchmarks.measure import Row
from benchmarks.our_step import ProductDtypes, our_step, random_batch
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.cuda_graphs import CUDAGraphs
from blip3o_dit.training.config import TrainingConfig
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
    before = made[0].state.global_step
    for _ in range(3):
        step()
    assert made[0].state.global_step == before + 3


@pytest.mark.usefixtures("cpu")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 0
    assert capsys.readouterr().out == "gpu-check: no GPU here, nothing was checked\n"


# Of each kind of part one: a lent GPU's minutes must not be lost to a slip of the pen.
TRIED = (
    *("compare", "hardware", "one call end to end", "checkpoints"),
    *("training speed: batch 32, memory low", "training speed: batch 256, bf16, cuda graphs, compile"),
    *("generation speed: batch 64, guidance 3", "split: generation, batch 64"),
    *("diffusers: training, batch 32", "diffusers: generation, batch 1"),
)


@pytest.mark.usefixtures("cpu")
def test_every_kind_of_part_runs_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.json"
    status = gpu_check.main(["--device", "cpu", "--json", str(file), "--parts", *TRIED])
    assert (status, capsys.readouterr().out.splitlines()[-1]) == (0, "all is well")
    found = json.loads(file.read_text())
    rows = {row.get("figure", row.get("of")): row for runs in found.values() for row in runs[0]["rows"]}
    assert rows["training step, batch 256, bf16, cuda graphs, compile blocks"]["mfu"] > 0
    assert rows["diffusers, batch 32, bf16"]["seconds"] > 0


def test_what_is_measured_are_runs_that_can_be_configured(tmp_path: Path) -> None:
    entries = [*gpu_measure.TRAININGS, *gpu_measure.SPLITS, *gpu_measure.PEERS]
    for asked in entries:
        if isinstance(asked, gpu_measure.Training):
            TrainingConfig(output_dir=str(tmp_path), batch_size=asked.batch, **asked.settings)
    for kind in gpu_compare.TRAININGS.values():
        TrainingConfig(output_dir=str(tmp_path), **kind.settings)
    names = list(gpu_measure.parts())
    assert len(names) == len({*names}) == 4 + len(entries) + len(gpu_measure.GENERATIONS)


def test_one_recorded_call_is_split_around_its_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA imitated: the first call runs plainly, the second is recorded."""

    def record(graphs: CUDAGraphs, function: Any, inputs: Any, device: torch.device) -> Any:
        return SimpleNamespace(replay=lambda given: function(*given))

    def record_generation(model: BLIP3oDiTModel) -> None:
        model._graphs = CUDAGraphs()

    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(CUDAGraphs, "_record", record)
    monkeypatch.setattr(BLIP3oDiTModel, "record_generation", record_generation)
    whole, *parts = gpu_measure.measure_end_to_end(CPU)
    assert [row["figure"].split(", ")[1] for row in parts] == [
        "before the replay",
        "replay",
        "after the replay",
    ]
    assert all(row["ms"] > 0 for row in (whole, *parts))


@pytest.mark.usefixtures("cpu")
def test_a_wrong_result_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    there = Setup.there

    def moved_and_changed(self: Setup, model: BLIP3oDiTModel, dtype: torch.dtype) -> BLIP3oDiTModel:
        with torch.no_grad():
            model.dit.norm_out.linear_2.weight.mul_(1.1)
        return there(self, model, dtype)

    monkeypatch.setattr(Setup, "there", moved_and_changed)
    assert gpu_check.main(["--device", "cpu", "--parts", "compare: generation"]) == 1


def fails(setup: Setup) -> Iterator[Row]:
    yield {"figure": "before it failed"}
    raise RuntimeError("out of\nmemory")


def hangs(setup: Setup) -> list[Row]:
    while True:
        Tensor()


def dies(setup: Setup) -> list[Row]:
    os._exit(1)


def test_a_part_that_fails_hangs_or_dies_is_one_line_and_what_was_found_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    parts: dict[str, tuple[gpu_check.Part, int]] = {part.__name__: (part, 10) for part in (fails, dies)}
    parts["left out"] = (lambda setup: [{"figure": "the last"}], 10)
    failed = gpu_check.run_parts(parts, CPU, 60.0, file, {"gpu": "GPU"})
    assert failed[0].startswith("fails: RuntimeError: out of memory (test_benchmarks.py:")
    assert failed[1:] == ["dies: it ended without a word"]
    kept = [runs[0]["rows"] for runs in json.loads(file.read_text()).values()]
    assert kept == [[{"figure": "before it failed"}], [{"figure": "the last"}]]
    printed = capsys.readouterr().out
    assert all(line in printed for line in failed)
    assert gpu_check.attempt("hangs", hangs, CPU, limit=0.2) == ([], "hangs: not finished after 0.2 s")


def test_parts_are_named_by_how_their_names_begin() -> None:
    assert list(gpu_check.choose(["split: training, batch 128"], on_cpu=True)) == [
        "split: training, batch 128, bf16, cuda graphs"
    ]
    with pytest.raises(
        ValueError, match=r"--parts: expected a beginning of one of compare: generation, .*, found spilt"
    ):
        gpu_check.choose(["spilt"], on_cpu=False)
