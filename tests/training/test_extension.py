"""A run trained further than planned: its schedule, its order of data, stopping and continuing inside it."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.model.loading import EMA_FILE
from blip3o_dit.training.checkpoint import checkpoints
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.training.curves import LOG_FILE, read_log
from blip3o_dit.training.resolve import resolve_config
from blip3o_dit.training.run import train
from blip3o_dit.training.trainer import BLIP3oTrainer
from tests.helpers.stores import write_linear_store
from tests.helpers.training import config_for, same

pytestmark = pytest.mark.usefixtures("no_curves")

# 40 samples to train on, 5 steps a pass.
SETTINGS = dict(num_epochs=2, logging_steps=1, save_steps=6, eval_steps=100, eval_samples=0)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return write_linear_store(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture(scope="module")
def finished(store: EmbeddingStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(config_for(store, tmp_path_factory.mktemp("run") / "finished", **SETTINGS))


@pytest.fixture(scope="module")
def extended(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two passes more, steps 11 to 20."""
    run = Path(shutil.copytree(finished, tmp_path_factory.mktemp("run") / "extended"))
    return go_on(run, run / "checkpoint-10", extend_epochs=2.0, warmup_steps=2)


def go_on(run: Path, checkpoint: Path, **given: Any) -> Path:
    config = resolve_config({"output_dir": str(run), **given}, debug=False, resume=checkpoint)
    return train(config, resume=checkpoint)


def rates(run: Path) -> dict[int, float]:
    return {e["step"]: e["learning_rate"] for e in read_log(run / LOG_FILE) if "learning_rate" in e}


def test_an_extension_warms_up_from_where_the_rate_was_and_ends_at_zero(extended: Path) -> None:
    found, peak = rates(extended), 1e-3
    assert list(found) == list(range(1, 21))
    assert [found[step] for step in (11, 12, 13)] == pytest.approx([0.0, peak / 2, peak])
    expected = [peak / 2 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert [found[step] for step in range(13, 21)] == pytest.approx(expected)


def test_the_data_go_on_with_the_next_pass(
    finished: Path, store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a run that was planned to be longer, each with its noise: of (seed, pass, sample index)."""
    seen: list[tuple[int, list[int]]] = []
    plain = BLIP3oTrainer.compute_loss

    def compute_loss(self: BLIP3oTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((inputs["epoch"], inputs["index"]))
        return plain(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(BLIP3oTrainer, "compute_loss", compute_loss)
    train(config_for(store, tmp_path / "long", **(SETTINGS | dict(num_epochs=3, save_steps=100))))
    planned = seen[10:]
    seen.clear()
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    go_on(run, run / "checkpoint-10", extend_epochs=1)
    assert seen == planned and {epoch for epoch, _ in seen} == {2}


@pytest.mark.parametrize("again", [{}, {"extend_epochs": 2.0, "warmup_steps": 2}])
def test_a_stopped_extension_continues_exactly(extended: Path, tmp_path: Path, again: dict[str, Any]) -> None:
    """With plain auto, or with the command that began it."""
    run = tmp_path / "again"
    for step in (12, 10):
        shutil.copytree(extended / f"checkpoint-{step}", run / f"checkpoint-{step}")
    shutil.copy(extended / LOG_FILE, run)
    go_on(run, run / "checkpoint-12", **again)
    for file in ("model.safetensors", EMA_FILE, "checkpoint-20/optimizer.safetensors"):
        assert same(load_file(extended / file), load_file(run / file)), file
    for file in ("checkpoint-20/optimizer.json", "checkpoint-20/progress.json"):
        assert (extended / file).read_text() == (run / file).read_text()
    assert rates(run) == rates(extended)


def test_an_extension_is_extended_with_another_peak_and_schedule(extended: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(extended, tmp_path / "twice"))
    go_on(run, run / "checkpoint-20", extend_steps=4, learning_rate=2e-3, lr_scheduler_type="linear")
    saved = TrainingConfig.from_folder(run)
    assert (saved.extended_at, saved.extended_to, saved.extended_warmup) == (20, 24, 0)
    assert (saved.extend_epochs, saved.extend_steps, saved.num_epochs) == (None, 4, 2)
    assert list(rates(run).values())[-4:] == pytest.approx([2e-3, 1.5e-3, 1e-3, 0.5e-3])
    assert checkpoints(run)[0].name == "checkpoint-24"


def test_a_run_that_was_not_done_is_extended_from_its_rate(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "checkpoint-6", tmp_path / "run" / "checkpoint-6")
    was = rates(finished)[7]
    run = go_on(tmp_path / "run", tmp_path / "run" / "checkpoint-6", extend_steps=4, warmup_steps=2)
    found = [rate for step, rate in rates(run).items() if step > 6]
    assert found == pytest.approx([was, (was + 1e-3) / 2, 1e-3, 0.5e-3])
    assert checkpoints(run)[0].name == "checkpoint-10"


def test_what_cannot_be_extended_is_refused(finished: Path, tmp_path: Path) -> None:
    checkpoint = finished / "checkpoint-10"
    with pytest.raises(ValueError, match="expected at most one of them, found both"):
        resolve_config({"extend_epochs": 1, "extend_steps": 2}, debug=False, resume=checkpoint)
    with pytest.raises(ValueError, match=r"expected a run to train further .*--init_from"):
        resolve_config({"extend_epochs": 1.0}, debug=False, resume=None)
    with pytest.raises(ValueError, match=r"weight_decay was 0.0, now 0.1: a new run can start"):
        resolve_config({"extend_epochs": 1.0, "weight_decay": 0.1}, debug=False, resume=checkpoint)
    copy = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint-10"))
    (copy / "trainer_state.json").write_text('{"global_step": 3, "epoch": 0}')
    with pytest.raises(ValueError, match=r"state.json: expected a step and an epoch above 0, found 3 and 0"):
        resolve_config({"extend_steps": 1}, debug=False, resume=copy)
