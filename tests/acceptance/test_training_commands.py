"""The specification's other training commands: every flag at once, debug, dry run, what is refused."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from safetensors.torch import load_file

from blip3o_dit.model import layers
from tests.acceptance.commands import (
    SMALL_AND_QUICK,
    assert_whole_run,
    json_of,
    log_of,
    run_command,
    run_here,
    snapshot,
    words,
)
from tests.acceptance.specification import DEBUG, DRY_RUN, FULL_CONFIGURATION

pytestmark = pytest.mark.usefixtures("without_a_gpu", "console_restored")

HAS_GPU = torch.cuda.is_available()


@pytest.mark.slow
@pytest.mark.parametrize(
    "precision",
    ["--bf16", pytest.param("--fp16", marks=pytest.mark.skipif(not HAS_GPU, reason="needs a GPU"))],
)
def test_full_configuration(folder: Path, precision: str) -> None:
    """All flags at once; Weights & Biases has no key, so it records offline and says so."""
    home = folder / "home"
    home.mkdir()
    variables = {"HOME": str(home), "NETRC": str(home / "netrc")}
    if precision == "--fp16":
        variables["CUDA_VISIBLE_DEVICES"] = "0"
    command = words(FULL_CONFIGURATION.replace("--fp16", precision), folder)
    few = shlex.split("--logging_steps 2 --max_steps 4")
    result = run_command([*command, *SMALL_AND_QUICK, *few], home, **variables)
    assert result.returncode == 0, result.stderr
    output = folder / "checkpoints/blip3o-dit-large"
    assert_whole_run(output)

    asked = dict(
        num_epochs=20,
        batch_size=16,
        eval_batch_size=32,
        gradient_accumulation_steps=4,
        gradient_checkpointing=True,
        learning_rate=5e-5,
        weight_decay=0.01,
        warmup_steps=2000,
        sigma_min=1e-4,
        sigma_max=1.0,
        prediction_type="v_prediction",
        regularization_weight=0.0,
        eval_split=0.1,
        normalize_embeddings=True,
        num_workers=4,
        fp16=precision == "--fp16",
        bf16=precision == "--bf16",
        save_steps=1000,
        eval_steps=1000,
        wandb_project="blip3o-experiments",
        wandb_run_name="large-model-v1",
    )
    config = json_of(output / "training_config.json")
    assert {name: config[name] for name in asked} == asked
    assert json_of(output / "config.json")["normalize_embeddings"] is True

    # 22 samples in batches of 16 are two batches a pass, which make one optimizer step.
    training = [entry for entry in log_of(output) if "loss" in entry]
    assert [(entry["step"], entry["epoch"]) for entry in training] == [(2, 2), (4, 4)]
    assert training[-1]["learning_rate"] == pytest.approx(5e-5 * 3 / 2000)
    assert [entry["step"] for entry in log_of(output) if "eval_loss" in entry] == [4]

    said = [line for line in result.stderr.splitlines() if "recording offline" in line]
    assert len(said) == 1 and "no API key" in said[0]
    (record,) = output.glob("wandb/offline-run-*/run-*.wandb")
    recorded = record.read_bytes()
    # The run's project and name are fields 3 and 8 of its protobuf record; the command line is in it too.
    assert b"\x1a\x12blip3o-experiments" in recorded and b"\x42\x0elarge-model-v1" in recorded
    assert b"flow_matching_loss" in recorded
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_gradient_checkpointing_is_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No file of a run shows it: count the calls, one a block, in a dry run of the full configuration."""
    calls = []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return torch.utils.checkpoint.checkpoint(*arguments, **options)

    monkeypatch.setattr(layers, "checkpoint", counted)
    monkeypatch.setattr("blip3o_dit.training.run.QUICK", 0.0)  # the step is taken once
    block = FULL_CONFIGURATION.replace("--fp16", "--bf16")
    flags = shlex.split("--num_layers 3 --num_workers 0 --dry_run")
    assert run_here(block, folder, *SMALL_AND_QUICK, *flags) == 0
    assert len(calls) == 3
    assert "20 steps of 64 samples, 20 passes, warm-up 2000;" in caplog.text


def test_fp16_without_a_gpu_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, before anything else is said (of Weights & Biases, which has no key) or written."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.setenv(name, "")  # so that what the command sets is taken back after the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("NETRC", str(folder / "netrc"))
    before = snapshot(folder)
    status = run_here(FULL_CONFIGURATION, folder, *SMALL_AND_QUICK)
    said = capsys.readouterr().err.splitlines()
    assert status != 0
    assert "--fp16" in said[-1] and "--bf16" in said[-1]
    assert snapshot(folder) == before
    assert len(said) == 1, said


@pytest.mark.slow
def test_debug_then_dry_run(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The two debug blocks, one after the other into the same folder."""
    assert run_here(DEBUG, folder, "--source", "noise") == 0
    output = folder / "debug"
    assert_whole_run(output)
    steps = json_of(output / "trainer_state.json")["global_step"]
    assert 1 <= steps <= 50
    assert sum(tensor.numel() for tensor in load_file(output / "model.safetensors").values()) < 5e6
    log = log_of(output)
    assert any("loss" in entry for entry in log) and any("eval_r2" in entry for entry in log)

    before = snapshot(folder)
    caplog.clear()
    assert run_here(DRY_RUN, folder, "--source", "noise") == 0
    assert "nothing was trained or written" in caplog.text
    assert snapshot(folder) == before
    # What cannot work fails in the dry run as it would in the run.
    assert run_here(DRY_RUN, folder, "--source", "noise", "--num_heads", "5") != 0
    assert "num_heads" in capsys.readouterr().err
