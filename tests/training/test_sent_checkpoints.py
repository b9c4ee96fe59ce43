"""Checkpoints at an address: a run that goes on from there, on another machine, has the same bits."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import load_file

from blip3o_dit.cli.main import main
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.training.run import train
from blip3o_dit.training.sent_checkpoints import (
    SendCheckpoints,
    check_send_to,
    checkpoints_at,
    fetch_checkpoint,
)
from blip3o_dit.utils import addresses
from tests.helpers.stores import write_linear_store
from tests.helpers.training import same, tiny_training

SETTINGS = dict(max_steps=6, batch_size=12, eval_split=0.25, eval_samples=2, source="noise", save_steps=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps that kept and sent the checkpoints of steps 4 and 6."""
    root = tmp_path_factory.mktemp("run")
    store = write_linear_store(root / "store")
    settings = SETTINGS | {"save_total_limit": 2, "send_to": f"memory://{root.name}"}
    return train(tiny_training(store.path, root / "run", **settings))


def test_each_whole_checkpoint_is_sent(run: Path) -> None:
    address = f"memory://{run.parent.name}"
    assert checkpoints_at(addresses.located(address)) == ["checkpoint-6", "checkpoint-4"]
    files = fsspec.filesystem("memory")
    for file in (run / "checkpoint-4").iterdir():
        assert files.cat_file(f"/{run.parent.name}/checkpoint-4/{file.name}") == file.read_bytes()
    with pytest.raises(ValueError, match=r"expected no run there, found checkpoint-6: give --resume_from_"):
        check_send_to(address, resumes=False)
    check_send_to(address, resumes=True)
    with pytest.raises(ValueError, match="expected an address such as s3://bucket/run, found runs/a"):
        check_send_to("runs/a", resumes=False)


def test_going_on_elsewhere_has_the_same_bits(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLIP3O_DIT_CACHE", str(tmp_path / "cache"))
    address = f"memory://{tmp_path.name}"
    SendCheckpoints(address).send(run)
    files = fsspec.filesystem("memory")
    files.rm(f"/{tmp_path.name}/checkpoint-6/checksums.json")  # as one that was being sent
    output = tmp_path / "elsewhere"
    words = ["train", "--output_dir", str(output), "--resume_from_checkpoint"]
    assert main([*words, "auto", "--send_to", address]) == 0
    for name in ("model.safetensors", "model.ema.safetensors", "checkpoint-6/optimizer.safetensors"):
        assert same(load_file(output / name), load_file(run / name)), name
    assert (output / "training_log.jsonl").read_text().count('"step": 2') == 1
    assert BLIP3oInference(address, device="cpu").model.config.model_dim == 16
    shutil.rmtree(output)
    (output).mkdir()
    assert fetch_checkpoint(f"{address}/checkpoint-4", output) == output / "checkpoint-4"
    assert main([*words, "memory://nothing-here"]) == 2


def test_a_lost_connection_does_not_end_the_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def lost(*_: object, **__: object) -> None:
        raise ConnectionError("reset")

    monkeypatch.setattr(addresses, "RETRY_AFTER", ())
    callback = SendCheckpoints(f"memory://{tmp_path.name}")
    arguments, state = type("A", (), {"output_dir": str(run)}), type("S", (), {"is_world_process_zero": True})
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(MemoryFileSystem, "put_file", lost)
        callback.on_save(arguments, state)  # type: ignore[arg-type]
    assert "not sent, which the next checkpoint tries again: memory://" in caplog.text
    callback.on_save(arguments, state)  # type: ignore[arg-type]
    assert len(checkpoints_at(callback.address)) == 2
