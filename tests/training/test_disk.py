"""Disk space is counted before anything is built."""

from __future__ import annotations

import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blip3o_dit.cli.train import main
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.training import disk
from blip3o_dit.training.disk import check_disk, checkpoint_bytes, model_bytes
from blip3o_dit.training.lengths import with_lengths
from blip3o_dit.training.run import train
from tests.helpers.stores import write_linear_store
from tests.helpers.training import tiny_training

pytestmark = pytest.mark.usefixtures("no_curves")
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return write_linear_store(tmp_path_factory.mktemp("data") / "store")


def free(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: Usage(10**12, 0, int(size)))


@pytest.mark.parametrize("changes", [{}, dict(ema_decay=0.0)])
def test_a_checkpoint_is_as_large_as_it_was_said_to_be(
    store: EmbeddingStore, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = tiny_training(
        store.path, tmp_path / "run", model_dim=128, max_steps=1, eval_split=0.0, source="noise", **changes
    )
    train(config)
    model = config.model(num_tokens=9, condition_dim=12, target_dim=8)
    for folder, said in ((tmp_path / "run/checkpoint-1", checkpoint_bytes), (tmp_path / "run", model_bytes)):
        written = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        assert said(config, model) == pytest.approx(written, rel=0.03)


def test_a_run_that_does_not_fit_is_refused_before_the_work(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    free(monkeypatch, 1000)
    monkeypatch.setattr("blip3o_dit.training.run.build_trainer", lambda *a, **k: pytest.fail("built"))
    run = ["--embeddings_path", str(store.path), "--output_dir", str(tmp_path / "run"), "--size", "tiny"]
    for more in ([], ["--dry_run"]):
        assert main([*run, "--device", "cpu", *more]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "of free disk for a checkpoint and the model, found 0.0 GiB: give an --output_dir on" in error
    assert not (tmp_path / "run").exists()


def test_checkpoints_that_do_not_fit_together_are_warned_of(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = with_lengths(tiny_training(store.path, tmp_path / "new" / "run", max_steps=100), 40)
    model = config.model(num_tokens=9, condition_dim=12, target_dim=8)
    each = checkpoint_bytes(config, model)
    free(monkeypatch, 4 * each)
    check_disk(config, model, steps=100)  # five of them
    assert len(caplog.messages) == 1 and "5 checkpoints of 0.0 GiB do not fit" in caplog.messages[0]
    check_disk(replace(config, save_total_limit=1), model, steps=100)
    check_disk(config, model, steps=40)
    free(monkeypatch, 8 * each)
    check_disk(config, model, steps=100)
    assert len(caplog.messages) == 1
    assert shutil.disk_usage(tmp_path).free == 8 * each
