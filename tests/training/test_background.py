"""Checkpoints that are written while the run goes on are those that stop it, and are whole or not there."""

from __future__ import annotations

import logging
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from blip3o_dit.cli.command import INPUT_OUTPUT
from blip3o_dit.cli.train import main
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.training import background
from blip3o_dit.training.arguments import training_arguments
from blip3o_dit.training.background import LEFT_FREE, CheckpointFiles, Staging, may_go_on
from blip3o_dit.training.checkpoint import checkpoints, newest_whole
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.training.lengths import with_lengths
from blip3o_dit.training.memory import GIB, Room
from blip3o_dit.training.run import train
from blip3o_dit.training.trainer import BLIP3oTrainer
from blip3o_dit.utils.errors import StoppedEarly, WriteError
from tests.helpers.forks import forked
from tests.helpers.stores import write_linear_store
from tests.helpers.training import config_for, same

pytestmark = pytest.mark.usefixtures("no_curves")

CPU = torch.device("cpu")
EVERY: dict[str, Any] = dict(max_steps=7, logging_steps=4, save_steps=2, eval_steps=100, eval_samples=0)
# In which the run's own settings are, or how long it took.
DIFFER = ("trainer_state.json", "training_config.json", "training_log.jsonl", "checksums.json")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return write_linear_store(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture(scope="module")
def stopping(store: EmbeddingStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(config_for(store, tmp_path_factory.mktemp("run") / "stopping", **EVERY))


def slowed(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Files are written later than the run goes on, and a part of one is there in the meantime."""
    plain = background._write

    def write(tensors: Any, path: Path, metadata: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            path.write_bytes(b"half")
            time.sleep(seconds)
        plain(tensors, path, metadata)

    monkeypatch.setattr(background, "_write", write)


def as_late_as_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written before the run waits for it."""
    write, wait, needed = background._write, CheckpointFiles.wait, threading.Event()

    def wait_for_it(files: CheckpointFiles, meanwhile: str = "") -> None:
        needed.set()
        wait(files, meanwhile)
        needed.clear()

    def write_late(tensors: Any, path: Path, metadata: Any) -> None:
        assert threading.current_thread() is threading.main_thread() or needed.wait(20)
        write(tensors, path, metadata)

    monkeypatch.setattr(background, "_write", write_late)
    monkeypatch.setattr(CheckpointFiles, "wait", wait_for_it)


def contents(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.iterdir() if file.is_file() and file.name not in DIFFER]
    return {file.name: file.read_bytes() for file in files}


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[BLIP3oTrainer], None]) -> None:
    plain = BLIP3oTrainer.compute_loss

    def compute_loss(self: BLIP3oTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step - 1:
            action(self)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(BLIP3oTrainer, "compute_loss", compute_loss)


@pytest.mark.parametrize("changes", [{}, dict(memory="split", source="noise")])
def test_files_are_those_of_a_run_that_stops_for_them(
    store: EmbeddingStore,
    stopping: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
) -> None:
    """Where steps are taken before anything is written."""
    settings = EVERY | changes
    at_once = train(config_for(store, tmp_path / "at_once", **settings)) if changes else stopping
    as_late_as_may_be(monkeypatch)
    run = train(config_for(store, tmp_path / "run", **settings, async_checkpoints=True))
    names = [path.name for path in checkpoints(run)]
    assert names == [path.name for path in checkpoints(at_once)] == [f"checkpoint-{i}" for i in (7, 6, 4, 2)]
    for name in (*names, "."):
        found, expected = contents(run / name), contents(at_once / name)
        assert found.keys() == expected.keys()
        assert [file for file in found if found[file] != expected[file]] == []


def test_weights_are_written_as_the_model_itself_writes_them(stopping: Path, tmp_path: Path) -> None:
    model = BLIP3oDiTModel.from_pretrained(stopping / "checkpoint-6", torch_dtype=torch.float32)
    model.save_pretrained(tmp_path)
    name = "model.safetensors"
    assert (tmp_path / name).read_bytes() == (stopping / "checkpoint-6" / name).read_bytes()


def test_the_run_goes_on_meanwhile_and_the_next_checkpoint_waits(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    as_late_as_may_be(monkeypatch)
    seen = []
    at_step(monkeypatch, 3, lambda trainer: seen.append([p.name for p in tmp_path.glob("run/checkpoint-*")]))
    with caplog.at_level(logging.INFO):
        run = train(config_for(store, tmp_path / "run", **EVERY, async_checkpoints=True, save_total_limit=1))
    assert seen == [["checkpoint-2.partial"]]
    assert "checkpoint-4 waits until checkpoint-2 is written" in caplog.text
    assert [path.name for path in checkpoints(run)] == ["checkpoint-7"]


def test_killed_while_one_is_written_the_one_before_is_whole(
    store: EmbeddingStore, stopping: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three times in one run, each at a random moment of a later checkpoint's writing."""
    slowed(monkeypatch, 0.05)
    output, moments = tmp_path / "run", random.Random(0)
    config = config_for(store, output, **EVERY, async_checkpoints=True)
    for being_written, left in ((4, 2), (6, 4), (6, 4)):
        resume = newest_whole(output)
        child = forked(lambda: train(config, resume=resume))  # noqa: B023 - it runs now
        partial = output / f"checkpoint-{being_written}.partial"
        while not partial.exists():
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
            time.sleep(0.001)
        time.sleep(moments.uniform(0.0, 0.15))
        os.killpg(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        assert newest_whole(output) == output / f"checkpoint-{left}"
    train(config, resume=newest_whole(output))
    assert same(load_file(output / "model.safetensors"), load_file(stopping / "model.safetensors"))
    assert contents(output / "checkpoint-7") == contents(stopping / "checkpoint-7")


@pytest.mark.parametrize("failing", [1, 4], ids=["the run goes on", "the run has ended"])
def test_a_full_disk_ends_the_run_as_it_did(
    store: EmbeddingStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failing: int,
) -> None:
    """In the step after, or after the last one."""
    plain, written = background._write, []

    def write(tensors: Any, path: Path, metadata: Any) -> None:
        written.append(path.parent)
        if len(set(written)) > failing:
            raise OSError(28, "No space left on device")
        plain(tensors, path, metadata)

    monkeypatch.setattr(background, "_write", write)
    config = config_for(store, tmp_path / "run", **(EVERY | dict(max_steps=9)), async_checkpoints=True)
    words = ["--embeddings_path", config.embeddings_path, "--output_dir", config.output_dir]
    for name in (*EVERY, "model_dim", "num_layers", "num_heads", "batch_size", "device", "eval_split"):
        words += [f"--{name}", str(getattr(config, name))]
    assert main([*words, "--async_checkpoints"]) == INPUT_OUTPUT
    step = 2 * (failing + 1) if failing < 4 else 9
    shown = capsys.readouterr().err
    line = f"checkpoint-{step}: expected to write it whole, found: No space left on device"
    assert line in shown.splitlines()[-1]
    assert "Traceback" not in shown
    left = sorted(path.name for path in (tmp_path / "run").glob("checkpoint*"))
    assert left == [f"checkpoint-{i}" for i in (2, 4, 6, 8)[:failing]]


def test_a_stop_waits_for_what_is_being_written(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowed(monkeypatch, 0.1)
    at_step(monkeypatch, 3, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(StoppedEarly, match="stopped after step 3 of 7 and saved it"):
        train(config_for(store, tmp_path / "run", **EVERY, async_checkpoints=True))
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-3", "checkpoint-2"]
    assert newest_whole(tmp_path / "run") == tmp_path / "run" / "checkpoint-3"


def test_a_run_that_fails_leaves_the_checkpoint_that_was_under_way(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(trainer: BLIP3oTrainer) -> None:
        raise ZeroDivisionError

    slowed(monkeypatch, 0.05)
    at_step(monkeypatch, 3, fail)
    config = config_for(store, tmp_path / "run", **EVERY, async_checkpoints=True)
    with pytest.raises(ZeroDivisionError):
        train(config)
    assert newest_whole(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"

    def full(*args: Any) -> None:
        raise WriteError("no room")

    monkeypatch.setattr(background, "_finish", full)
    with pytest.raises(ZeroDivisionError):  # and not what its end finds out
        train(config, overwrite=True)
    assert "no room" in caplog.text


def test_staged_tensors_are_copies_in_the_same_memory_each_time() -> None:
    staging = Staging(pinned=False)
    staging.reserve(1000)
    given = {
        "a": torch.arange(6.0).reshape(2, 3).t(),
        "b": torch.tensor(7, dtype=torch.int16),
        "c": torch.zeros(0),
    }
    given["d"] = torch.randn(300).bfloat16()  # which the first block has no room for
    copies = staging.copied(given, first=True)
    copies |= staging.copied({"e": torch.ones(5, dtype=torch.bool)}, first=False)
    expected = {
        **{name: tensor.clone() for name, tensor in given.items()},
        "e": torch.ones(5, dtype=torch.bool),
    }
    for tensor in given.values():
        tensor.zero_()
    for name, tensor in expected.items():
        assert copies[name].dtype == tensor.dtype and torch.equal(copies[name], tensor), name
    again = staging.copied(given, first=True)
    assert [again[name].data_ptr() for name in given] == [copies[name].data_ptr() for name in given]


def test_where_a_copy_does_not_fit_the_run_stops_for_its_checkpoints(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given, size, gpu = dict(model_dim=16, num_layers=1), 20 * GIB, torch.device("cuda")
    asked, default, not_asked = (TrainingConfig(**given, async_checkpoints=x) for x in (True, None, False))
    model = asked.model(num_tokens=4, condition_dim=4, target_dim=4)
    monkeypatch.setattr(background, "checkpoint_bytes", lambda *_: size)
    monkeypatch.setattr(background, "resident", lambda: 0)
    with caplog.at_level(logging.INFO):
        for free, fits in ((size + LEFT_FREE, True), (size + LEFT_FREE - 1, False)):
            monkeypatch.setattr(background, "room_on", lambda _, free=free: Room(size=free, where="free"))
            for config, device, expected in (
                (asked, gpu, fits),
                (default, gpu, fits),
                (not_asked, gpu, False),
                (asked, CPU, True),
                (default, CPU, False),
            ):
                assert may_go_on(config, model, device, 1) == expected
    line = "the run waits for its checkpoints: a copy of one takes 20.0 GiB of memory, 20.0 GiB are left"
    assert caplog.text.count(line) == 2
    monkeypatch.setattr(background, "room_on", lambda _: Room(size=size, where="free"))
    assert not may_go_on(asked, model, CPU, 1)  # a step needs memory too
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "1")
    assert not may_go_on(default, model, gpu, 1)
    with pytest.raises(ValueError, match="--async_checkpoints: expected a run without FSDP"):
        training_arguments(replace(with_lengths(asked, 10), device="cpu", output_dir="none"), evaluate=False)
