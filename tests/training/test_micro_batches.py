"""Where memory runs out, the same batches are taken in smaller passes, and the run is that of such passes.

The lack is injected: what a pass does with too many samples is raise the error that torch would.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from blip3o_dit.cli.command import USER_ERROR, run_command
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.training.anomalies import NonFiniteLossError
from blip3o_dit.training.arguments import training_arguments
from blip3o_dit.training.base_trainer import ExactResumeTrainer
from blip3o_dit.training.lengths import with_lengths
from blip3o_dit.training.micro_batches import MicroBatches, is_lack_of_memory, may_cut, next_divisor
from blip3o_dit.training.run import train
from blip3o_dit.training.trainer import BLIP3oTrainer
from tests.helpers.stores import write_linear_store
from tests.helpers.training import config_for, make_trainer, same_files
from tests.training.test_resume import continued, logged

pytestmark = pytest.mark.usefixtures("no_curves")

EVERY: dict[str, Any] = dict(max_steps=6, logging_steps=4, save_steps=2, eval_steps=100, eval_samples=0)
LACK = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8"
FILES = ("model.safetensors", "model.ema.safetensors", "checkpoint-6/optimizer.safetensors")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return write_linear_store(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture(scope="module")
def roomy(store: EmbeddingStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(config_for(store, tmp_path_factory.mktemp("run") / "roomy", **EVERY))


def short_of_memory(
    monkeypatch: pytest.MonkeyPatch,
    most: int,
    *,
    step: int = 3,
    every: int = 1,
    backward: bool = False,
    error: Callable[[], BaseException],
) -> list[int]:
    """From this step on each pass, or every so many, of more samples than `most` fails, when it begins or
    halfway through its backward pass. Returns how many samples each pass had."""
    plain, passes, lacks = BLIP3oTrainer.compute_loss, [], [False]

    def fail(gradient: torch.Tensor) -> torch.Tensor:
        if lacks[0]:
            raise error()
        return gradient

    def compute_loss(self: BLIP3oTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        passes.append(len(inputs["index"]))
        lacks[0] = self.state.global_step >= step - 1 and passes[-1] > most and not len(passes) % every
        if not backward:
            fail(inputs["eva"])
        elif len(passes) == 1:
            model.dit.blocks[0].attn1.to_q.weight.register_hook(fail)
        return plain(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(BLIP3oTrainer, "compute_loss", compute_loss)
    return passes


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_run_goes_on_as_one_of_smaller_batches_and_more_accumulation(
    store: EmbeddingStore,
    roomy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    accumulation: int,
) -> None:
    """To the bit from the step on in which memory ran out, and within rounding as one that had the memory."""
    size = dict(batch_size=8 // accumulation, gradient_accumulation_steps=accumulation)
    smaller = EVERY | dict(batch_size=4 // accumulation, gradient_accumulation_steps=2 * accumulation)
    whole = roomy if accumulation == 1 else train(config_for(store, tmp_path / "roomy", **(EVERY | size)))
    expected = train(
        config_for(store, tmp_path / "smaller", **smaller), resume=continued(whole, 2, tmp_path / "smaller")
    )
    with monkeypatch.context() as patch:
        passes = short_of_memory(
            patch,
            4 // accumulation,
            every=accumulation,
            backward=accumulation == 1,
            error=lambda: RuntimeError(LACK),
        )
        run = train(config_for(store, tmp_path / "run", **(EVERY | size)))
    assert same_files(run, expected, *FILES)
    assert logged(run) == logged(expected)
    assert passes[-1] == 4 // accumulation and passes[2 * accumulation] == 8 // accumulation
    assert caplog.text.count("not enough memory") == 1
    line = f"from here on a batch of {size['batch_size']} samples is taken in 2 passes of {4 // accumulation}"
    assert f"step 3: not enough memory for its passes ({LACK}): {line}" in caplog.text
    for name, tensor in load_file(whole / "model.safetensors").items():
        torch.testing.assert_close(load_file(run / "model.safetensors")[name], tensor, rtol=1e-3, atol=1e-5)

    if accumulation > 1:
        return
    again = train(
        config_for(store, tmp_path / "again", **(EVERY | size)), resume=continued(run, 4, tmp_path / "again")
    )
    assert same_files(again, expected, *FILES)  # with memory for more, too
    for step, pieces in ((2, None), (4, 2)):
        progress = json.loads((run / f"checkpoint-{step}" / "progress.json").read_text())
        assert progress.get("pieces") == pieces


def test_batches_are_cut_until_passes_fit(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A GPU's own error; a batch that has no half; at last single samples, and then there is no way."""
    settings = EVERY | dict(batch_size=6, max_steps=2)

    def lack() -> BaseException:
        return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore")

    with monkeypatch.context() as patch:
        passes = short_of_memory(patch, 1, step=2, error=lack)
        train(config_for(store, tmp_path / "run", **settings))
        assert passes == [6, 6, 3, *[1] * 6]
    short_of_memory(monkeypatch, 0, step=2, error=lack)
    assert run_command(lambda: train(config_for(store, tmp_path / "none", **settings))) == USER_ERROR
    shown = capsys.readouterr().err.splitlines()[-1]
    assert shown.startswith(
        "error: step 2: expected memory for a pass of one sample, found CUDA out of memory"
    )
    assert "less is taken with --memory low" in shown


def test_without_it_and_for_other_errors_the_run_ends(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for changes, error in ((dict(auto_micro_batch=False), RuntimeError(LACK)), ({}, RuntimeError("size 3"))):
        with monkeypatch.context() as patch:
            passes = short_of_memory(patch, 4, step=1, error=lambda error=error: error)
            trainer = make_trainer(store, tmp_path, **(EVERY | changes))
            with pytest.raises(RuntimeError, match=r"DefaultCPU|size 3"):
                trainer.train()
            assert passes == [8]


def test_a_step_that_is_taken_again_is_checked_and_recorded_passes_are_dropped(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first losses are forgotten, also those that were not looked at yet."""
    short_of_memory(monkeypatch, 4, step=2, error=MemoryError)
    trainer, dropped = make_trainer(store, tmp_path, **EVERY), []
    trainer.losses._deferred = True
    trainer._drop_recordings = lambda: dropped.append(trainer.state.global_step)
    plain = trainer.losses.withdraw

    def withdraw(step: int) -> None:
        plain(step)
        assert not trainer.losses._pending and not trainer.losses.inputs_of(step)

    trainer.losses.withdraw = withdraw  # type: ignore[method-assign]
    trainer.unwrapped_model.dit.norm_out.linear_2.bias.register_hook(
        lambda gradient: gradient * float("nan") if trainer.state.global_step == 3 else gradient
    )
    with pytest.raises(NonFiniteLossError, match="step 4: expected finite gradients"):
        trainer.train()
    assert dropped == [1]
    found = json.loads((tmp_path / "diagnosis.json").read_text())
    assert len(found["samples"]) == 8  # of both passes


def test_where_it_is_on(store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_lengths(config_for(store, tmp_path), 40)
    asked, not_asked = (replace(config, auto_micro_batch=value) for value in (True, False))
    assert [may_cut(each, 1) for each in (config, asked, not_asked)] == [True, True, False]
    assert [may_cut(each, 2) for each in (config, asked, not_asked)] == [False, True, False]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "1")
    assert not may_cut(config, 1)
    with pytest.raises(ValueError, match="--auto_micro_batch: expected a run without FSDP"):
        training_arguments(asked, evaluate=False)


def test_errors_that_say_so_and_numbers_of_pieces() -> None:
    assert is_lack_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert not is_lack_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert [next_divisor(12, n) for n in (1, 2, 4, 6, 12)] == [2, 4, 12, 12, 0]
    assert [next_divisor(7, n) for n in (1, 7)] == [7, 0]


def test_a_run_that_goes_on_with_another_batch_size_is_cut_as_much_or_more(
    store: EmbeddingStore, tmp_path: Path
) -> None:
    trainer: ExactResumeTrainer = make_trainer(store, tmp_path, **EVERY)
    cut = trainer.micro_batches
    assert isinstance(cut, MicroBatches)
    for pieces, expected in ((1, 1), (2, 2), (3, 4), (16, 8)):
        cut.go_on(pieces)
        assert cut.pieces == expected
