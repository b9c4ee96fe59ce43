"""What `inspect` says of models, checkpoints and runs, against the objects that they were made of."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from blip3o_dit.cli.main import main
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.training import checkpoint, config, describe
from blip3o_dit.training.curves import LOG_FILE
from blip3o_dit.training.describe import format_description
from blip3o_dit.training.distillation import distill
from blip3o_dit.training.distillation_config import DistillationConfig
from blip3o_dit.training.run import train
from tests.helpers.stores import write_linear_store
from tests.helpers.training import config_for


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return write_linear_store(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, store: EmbeddingStore) -> Path:
    """Ten steps, two passes, checkpoints after 5 and 10."""
    return train(config_for(store, tmp_path_factory.mktemp("runs") / "run"))


def unfinished(run: Path, folder: Path) -> Path:
    """As the run was after its first checkpoint, when its log was some steps further."""
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "checkpoint-10")
    for file in folder.iterdir():
        if file.is_file() and file.name not in ("training_config.json", LOG_FILE):
            file.unlink()
    lines = (folder / LOG_FILE).read_text().splitlines(keepends=True)
    (folder / LOG_FILE).write_text("".join(line for line in lines if json.loads(line)["step"] <= 8))
    return folder


def flowing(about: dict[str, Any]) -> str:
    """The text without its line breaks."""
    return " ".join(format_description(about).split())


def test_a_finished_run(run: Path, store: EmbeddingStore) -> None:
    about = describe.describe(run)
    model = BLIP3oDiTModel.from_pretrained(run)
    assert about["kind"] == "a trained model"
    assert about["network"] == {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **{name: getattr(model.config, name) for name in describe.NETWORK},
        "tokens": 9,
        "condition_width": 12,
        "target_width": 8,
    }
    recipe = about["recipe"]
    assert (recipe["prediction_type"], recipe["source"]) == ("preconditioned", "ridge_context")
    assert (recipe["batch_size"], recipe["processes"], recipe["precision"]) == (8, 1, "float32")
    assert recipe["learning_rate"] == 1e-3
    progress = about["progress"]
    assert (progress["step"], progress["of"], progress["finished"]) == (10, 10, True)
    assert (progress["passes"], progress["of_passes"]) == (2.0, 2.0)
    log = [json.loads(line) for line in (run / LOG_FILE).read_text().splitlines()]
    losses = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    assert about["held_out"]["last"]["loss"] == losses[10]
    assert about["held_out"]["best"]["loss"] == min(losses.values())
    assert [entry["averaged"] for entry in about["weights"]] == [False, True]
    assert about["data"]["fingerprint"] == store.fingerprint() and about["data"]["samples"] == 48
    assert about["data"]["path"] == str(store.path) and about["data"]["there"] is True
    assert [(entry["name"], entry["whole"]) for entry in about["checkpoints"]] == [
        ("checkpoint-10", True),
        ("checkpoint-5", True),
    ]


def test_the_command_that_is_named_goes_on(run: Path, tmp_path: Path) -> None:
    """Of an unfinished run, from a copy that was moved, and of a checkpoint."""
    moved = unfinished(run, tmp_path / "moved here")
    about = describe.describe(moved)
    assert about["kind"] == "a run that is not finished"
    progress = about["progress"]
    assert (progress["step"], progress["of"], progress["logged"]) == (5, 10, 8)
    assert not progress["finished"] and (progress["passes"], progress["of_passes"]) == (1.0, 2.0)
    assert about["network"]["parameters"] and about["go_on"].endswith("--resume_from_checkpoint auto")
    assert main([*shlex.split(about["go_on"])[1:], "--device=cpu"]) == 0
    assert describe.describe(moved)["progress"]["finished"]
    one = describe.describe(run / "checkpoint-5")
    assert one["kind"] == "a checkpoint of a run" and one["held_out"]["last"]["step"] == 5
    assert one["go_on"] == f"blip3o-dit train --resume_from_checkpoint {run / 'checkpoint-5'}"
    assert describe.describe(run)["go_on"].endswith("--resume_from_checkpoint auto --extend_epochs N")


def test_a_finished_run_that_is_trained_further_is_not_finished(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    later = Path(shutil.copytree(folder / "checkpoint-10", folder / "checkpoint-13"))
    (folder / "checkpoint-10").rename(folder / "old")
    state = json.loads((later / "trainer_state.json").read_text())
    (later / "trainer_state.json").write_text(json.dumps(state | {"global_step": 13, "max_steps": 20}))
    checkpoint_sums = later / "checksums.json"
    sums = json.loads(checkpoint_sums.read_text())
    sums["files"]["trainer_state.json"]["bytes"] = (later / "trainer_state.json").stat().st_size
    checkpoint_sums.write_text(json.dumps(sums))
    progress = describe.describe(folder)["progress"]
    assert (progress["step"], progress["of"], progress["finished"]) == (13, 20, False)


def test_a_run_that_was_killed_before_its_model_was_saved_is_not_finished(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    for name in ("config.json", "model.safetensors", "model.ema.safetensors", "trainer_state.json"):
        (folder / name).unlink()
    about = describe.describe(folder)
    assert about["progress"]["step"] == about["progress"]["of"] == 10
    assert not about["progress"]["finished"] and about["go_on"].endswith(" auto")


def test_a_damaged_checkpoint_is_said_and_not_counted_on(run: Path, tmp_path: Path) -> None:
    folder = unfinished(run, tmp_path / "run")
    broken = folder / "checkpoint-7"
    shutil.copytree(folder / "checkpoint-5", broken)
    (broken / "optimizer.safetensors").write_bytes(b"cut short")
    about = describe.describe(folder)
    assert about["progress"]["step"] == 5
    assert [entry["whole"] for entry in about["checkpoints"]] == [False, True]
    assert "truncated or altered" in about["checkpoints"][0]["problem"]
    assert "checkpoint-7: damaged (" in flowing(about)
    shutil.rmtree(folder / "checkpoint-5")
    assert describe.describe(folder)["go_on"] is None


def test_a_student(run: Path, store: EmbeddingStore, tmp_path: Path) -> None:
    student = distill(
        run, store.path, tmp_path / "s", DistillationConfig(steps=2, train_steps=2), progress=False
    )
    student = tmp_path / "s"
    (student / describe.DISTILLATION).write_text(json.dumps({"teacher": str(run), "steps": 2}))
    about = describe.describe(student)
    assert about["kind"] == "a distilled model (any steps)"
    assert about["student"] == {"steps": "any", "default_steps": 2, "teacher": str(run)}
    assert about["go_on"] is None
    assert "network calls a sample: any, by default 2, from " in flowing(about)


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Text of at most 80 columns but for what stays whole, JSON alone, JSON beside it; no picture."""
    before = sorted(run.rglob("*"))
    assert main(["inspect", str(run)]) == 0
    text = capsys.readouterr().out
    whole = (str(run), "to go on", "blip3o-dit train", "/")
    assert all(len(line) <= 80 or any(part in line for part in whole) for line in text.splitlines())
    for part in ("preconditioned", "width 32", "step 10 of 10, pass 2 of 2: finished", "checkpoint-5: whole"):
        assert part in text
    assert main(["inspect", str(run), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert main(["inspect", str(run), "--json", str(tmp_path / "x.json")]) == 0
    assert json.loads((tmp_path / "x.json").read_text()) == about == describe.describe(run)
    assert capsys.readouterr().out == text
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("training_config.json", {"learning_rate": [1] * 99, "batch_size": "\x1b[2J", "best_metric": []}),
        ("training_config.json", {"embeddings_path": {"a": 1}, "eval_split": "x"}),
        ("config.json", {"input_size": "x", "flow_matching": [], "num_heads": None}),
        ("progress.json", {"run": [1]}),
        ("progress.json", {"run": {"global_batch": -1, "fingerprint": 5}}),
        ("trainer_state.json", {"global_step": 10**30, "epoch": None, "log_history": 3}),
        (
            "trainer_state.json",
            {"log_history": [3, {"step": 1, "eval_loss": "x"}, {"step": 2, "eval_loss": 1}]},
        ),
    ],
)
def test_odd_values_are_shown_and_nothing_breaks(
    run: Path, name: str, change: dict[str, Any], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(run / "checkpoint-5", tmp_path / "odd"))
    values = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(values | change))
    about = describe.describe(folder)
    assert format_description(about).replace("\n", "").isprintable() and json.dumps(about)


def test_the_names_are_those_that_training_writes() -> None:
    assert describe.STATE == checkpoint.TRAINER_STATE_FILE
    assert (describe.PROGRESS, describe.SETTINGS) == (checkpoint.PROGRESS_FILE, config.TRAINING_CONFIG_FILE)


def test_no_weights_are_loaded_and_no_torch(run: Path) -> None:
    code = (
        "import sys, blip3o_dit.cli.plot, blip3o_dit.training.curves; from pathlib import Path; "
        "from blip3o_dit.training.describe import describe; "
        "describe(Path(sys.argv[1])); heavy = {'torch', 'transformers'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, str(run)], check=True)
