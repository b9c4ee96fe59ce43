"""One run per folder: a second one is refused before it does anything, one that was killed does not count."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from blip3o_dit.cli.command import INTERRUPTED, USER_ERROR
from blip3o_dit.cli.train import main
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.training import distillation
from blip3o_dit.training.distillation import distill
from blip3o_dit.training.distillation_config import DistillationConfig
from blip3o_dit.training.output_folder import output_folder
from blip3o_dit.training.run import train
from blip3o_dit.training.trainer import BLIP3oTrainer
from blip3o_dit.utils.errors import StoppedEarly
from blip3o_dit.utils.folder_lock import LOCK_FILE, FolderInUseError, folder_lock
from tests.helpers.stores import write_linear_store
from tests.helpers.training import config_for, train_model

pytestmark = pytest.mark.usefixtures("no_curves")

QUICK: dict[str, Any] = dict(max_steps=2, save_steps=1, eval_split=0.0, source="noise", ema_decay=0.0)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return write_linear_store(tmp_path_factory.mktemp("data") / "store")


def during_a_step(monkeypatch: pytest.MonkeyPatch, action: Any) -> None:
    plain = BLIP3oTrainer.compute_loss

    def compute_loss(self: BLIP3oTrainer, *args: Any, **kwargs: Any) -> Any:
        action(self.state.global_step)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(BLIP3oTrainer, "compute_loss", compute_loss)


@pytest.mark.parametrize("flags", [[], ["--resume_from_checkpoint", "auto"], ["--overwrite_output_dir"]])
def test_a_second_run_in_the_folder_is_refused_and_the_first_one_ends_well(
    store: EmbeddingStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
) -> None:
    """In the second step, when there is a checkpoint, from which the second run would start."""
    output, statuses = tmp_path / "run", []

    def start_another(step: int) -> None:
        if step == 1:
            (output / "checkpoint-1.partial").mkdir()
            again = ["--embeddings_path", "nowhere", "--output_dir", str(output), *flags]
            statuses.append(main(again))
            (output / "checkpoint-1.partial").rmdir()  # it was not tidied away

    during_a_step(monkeypatch, start_another)
    train(config_for(store, output, **QUICK))
    error = capsys.readouterr().err
    assert statuses == [USER_ERROR]
    assert (
        f"{output}: expected no other run in this folder, found a training by process {os.getpid()}" in error
    )
    assert (output / "model.safetensors").is_file() and not (output / LOCK_FILE).exists()


def test_a_killed_run_does_not_keep_its_folder(store: EmbeddingStore, tmp_path: Path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    child = os.fork()
    if not child:
        with folder_lock(output, "a training"):
            os.kill(os.getpid(), signal.SIGKILL)
    while (output / LOCK_FILE).exists() is False or _state(child) != "Z":
        pass
    train(config_for(store, output, **QUICK))  # nobody has asked for its exit status: it is there as a zombie
    os.waitpid(child, 0)
    assert not (output / LOCK_FILE).exists()


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_run_that_is_stopped_refused_or_tried_leaves_no_lock(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    with pytest.raises(ValueError, match="expected at most"):  # memory
        train(config_for(store, output, **QUICK, model_dim=2**19, num_heads=2))
    assert not output.exists()
    train(config_for(store, output, **QUICK), dry_run=True)
    assert not output.exists()
    during_a_step(monkeypatch, lambda step: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(StoppedEarly):
        train(config_for(store, output, **QUICK))
    assert (output / "checkpoint-1").is_dir() and not (output / LOCK_FILE).exists()


def test_control_c_before_training_leaves_nothing(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        assert (tmp_path / "run" / LOCK_FILE).is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr("blip3o_dit.training.run.open_embeddings", interrupt)
    assert main(["--embeddings_path", str(store.path), "--output_dir", str(tmp_path / "run")]) == INTERRUPTED
    assert not (tmp_path / "run").exists()


def test_a_distillation_holds_its_folder(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = train_model(store, tmp_path / "teacher", max_steps=1)
    student, config = tmp_path / "student", DistillationConfig(steps=1, train_steps=1, batch_size=2)
    found = []

    def note(*args: Any, **kwargs: Any) -> Any:
        found.append(json.loads((student / LOCK_FILE).read_text())["what"])
        with pytest.raises(FolderInUseError):
            distill(teacher, store.path, student, config, overwrite=True)
        return plain(*args, **kwargs)

    plain = distillation.teach
    monkeypatch.setattr(distillation, "teach", note)
    distill(teacher, store.path, student, config, progress=False)
    assert found == ["a distillation"] and not (student / LOCK_FILE).exists()


def test_only_the_first_process_holds_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with output_folder(tmp_path / "run", "a training"):
        assert not (tmp_path / "run").exists()
