"""The specification's quick start and what is done with its model, which is trained once for these tests."""

from __future__ import annotations

import json
import math
import pickle
import shlex
import shutil
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.acceptance.commands import (
    HELD_OUT,
    SAMPLES,
    SMALL,
    assert_whole_run,
    json_of,
    log_of,
    placed,
    run_here,
    snapshot,
)
from tests.acceptance.specification import BATCH_GENERATION, MODEL_EVALUATION, PYTHON_API, QUICK_START, RESUME

pytestmark = pytest.mark.usefixtures("without_a_gpu", "console_restored")

STEPS = 30
FIDELITY = (
    "cosine_similarity_mean",
    "cosine_similarity_std",
    "pooled_cosine_similarity_mean",
    "l2_distance_mean",
    "l2_distance_std",
    "norm_ratio_mean",
    "r2",
)


@pytest.fixture(scope="session")
def quick_start(shared: Path) -> SimpleNamespace:
    """The one trained model: ten passes of three steps, checkpoints in the middle of a pass."""
    flags = shlex.split("--batch_size 8 --logging_steps 2 --save_steps 10 --eval_steps 10")
    said = StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(said):
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert run_here(QUICK_START, shared, *SMALL, *flags) == 0, said.getvalue()
    return SimpleNamespace(folder=shared, output=shared / "checkpoints/blip3o-dit", said=said.getvalue())


@pytest.mark.slow
def test_quick_start(quick_start: SimpleNamespace) -> None:
    assert_whole_run(quick_start.output)
    config = json_of(quick_start.output / "training_config.json")
    assert (config["num_epochs"], config["learning_rate"], config["batch_size"]) == (10, 1e-4, 8)
    assert json_of(quick_start.output / "trainer_state.json")["global_step"] == STEPS
    checkpoints = sorted(path.name for path in quick_start.output.glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-10", "checkpoint-20", "checkpoint-30"]
    assert f"{SAMPLES} samples of 64 tokens, 1280 -> 768 wide" in quick_start.said
    assert "1 process(es)" in quick_start.said


@pytest.mark.slow
def test_monitoring(quick_start: SimpleNamespace) -> None:
    """The documented series are in the log, also without Weights & Biases."""
    log = log_of(quick_start.output)
    training = [entry for entry in log if "loss" in entry]
    assert [entry["step"] for entry in training] == list(range(2, STEPS + 1, 2))
    named = (
        "loss",
        "flow_matching_loss",
        "regularization_loss",
        "cosine_similarity",
        "l2_distance",
        "snr_db",
        "output_norm",
        "grad_norm",
        "learning_rate",
        "epoch",
    )
    for entry in training:
        assert all(math.isfinite(entry[name]) for name in named)
    evaluations = [entry for entry in log if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [10, 20, 30]
    for entry in evaluations:
        assert all(math.isfinite(entry[f"eval_{name}"]) for name in ("loss", *FIDELITY))
    # On the same draws each time; those of a training step are its own.
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]


@pytest.mark.slow
def test_resume(quick_start: SimpleNamespace, folder: Path) -> None:
    """An interrupted run goes on from its checkpoint, sizes included, and ends as if uninterrupted."""
    output = folder / "checkpoints/blip3o-dit"
    checkpoint = output / "checkpoint-10"
    shutil.copytree(quick_start.output / "checkpoint-10", checkpoint)
    whole_log = log_of(quick_start.output)
    logged = [entry for entry in whole_log if entry["step"] <= 16]  # the last six steps are lost
    (output / "training_log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in logged))
    before = snapshot(checkpoint)

    assert run_here(RESUME.replace("checkpoint-5000", "checkpoint-10"), folder) == 0
    assert_whole_run(output)
    assert snapshot(checkpoint) == before
    assert json_of(output / "trainer_state.json")["global_step"] == STEPS
    assert sorted(path.name for path in output.glob("checkpoint-*")) == [
        "checkpoint-10",
        "checkpoint-20",
        "checkpoint-30",
    ]
    assert json_of(output / "config.json") == json_of(quick_start.output / "config.json")

    series = ("step", "loss", "grad_norm", "learning_rate", "eval_loss", "eval_r2")
    log, expected = (
        [{name: entry.get(name) for name in series} for entry in whole if "train_runtime" not in entry]
        for whole in (log_of(output), whole_log)
    )
    assert log == expected
    for file in ("model.safetensors", "model.ema.safetensors"):
        resumed, uninterrupted = load_file(output / file), load_file(quick_start.output / file)
        assert resumed.keys() == uninterrupted.keys()
        assert all(torch.equal(resumed[name], uninterrupted[name]) for name in resumed)


@pytest.mark.slow
def test_python_api(quick_start: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(placed(PYTHON_API, quick_start.folder), names)
    generated = names["generated_clip"]
    assert generated.shape == (4, 64, 768) and generated.dtype == torch.float32
    assert generated.isfinite().all() and generated.std() > 0
    assert "Generated CLIP embeddings: torch.Size([4, 64, 768])" in capsys.readouterr().out


@pytest.mark.slow
def test_batch_generation_and_evaluation(
    quick_start: SimpleNamespace, content: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The data set has fewer than the 100 samples asked for: all of them."""
    names: dict[str, Any] = {}
    exec(placed(BATCH_GENERATION, quick_start.folder), names)
    results = names["results"]
    with open(quick_start.folder / "results/generated_samples.pkl", "rb") as file:
        written = pickle.load(file)
    arrays = ("generated_clip_embeddings", "target_clip_embeddings", "eva_embeddings")
    generated, target, eva = (results[name] for name in arrays)
    for name in arrays:
        np.testing.assert_array_equal(written[name], results[name])
    assert generated.shape == (SAMPLES, 64, 768)
    np.testing.assert_array_equal(target, content["clip_blip3o_embeddings"])
    np.testing.assert_array_equal(eva, content["eva_blip3o_embeddings"])
    assert written["keys"] == results["keys"] == content["keys"]
    assert written["captions"] == content["captions"]
    metrics = results["generation_metrics"]
    assert set(metrics) == set(FIDELITY) and written["generation_metrics"] == metrics
    lengths = np.linalg.norm(generated, axis=-1) * np.linalg.norm(target, axis=-1)
    cosine = ((generated * target).sum(-1) / lengths).mean()
    assert metrics["cosine_similarity_mean"] == pytest.approx(cosine, abs=1e-5)
    distance = np.linalg.norm(generated - target, axis=-1).mean()
    assert metrics["l2_distance_mean"] == pytest.approx(distance, rel=1e-5)
    assert f"Generation metrics: {metrics}" in capsys.readouterr().out

    exec(placed(MODEL_EVALUATION, quick_start.folder), names)
    evaluation = names["eval_metrics"]
    assert set(evaluation) == {"flow_matching_loss", "num_samples", *FIDELITY}
    assert evaluation["num_samples"] == HELD_OUT
    assert all(math.isfinite(value) for value in evaluation.values())
    assert evaluation["flow_matching_loss"] > 0
    assert f"Evaluation metrics: {evaluation}" in capsys.readouterr().out
