"""What a person sees of a training: short lines on standard error, and about how long it will take."""

from __future__ import annotations

import logging
import re
import shlex
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from blip3o_dit.cli.train import main
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.training.console import COLUMNS, ConsoleCallback, estimate, evaluations_left, log_line
from blip3o_dit.training.curves import LOG_FILE, read_log
from blip3o_dit.training.stopping import StopRequest
from tests.helpers.stores import write_linear_store

pytestmark = pytest.mark.usefixtures("no_curves")


def training(**changes: float | None) -> dict[str, Any]:
    logs = dict(loss=1.5932, cosine_similarity=0.9041, r2=0.8203, seconds_per_step=0.4212)
    return logs | dict(flow_matching_loss=1.5932, grad_norm=0.2073, learning_rate=8e-5, mfu=0.2) | changes


def held_out(**changes: float | None) -> dict[str, Any]:
    logs = dict(eval_loss=1.658, eval_cosine_similarity_mean=0.6557, eval_r2=0.3114, eval_runtime=2.9)
    return logs | changes


LINES: list[tuple[tuple[Any, ...], str]] = [
    ((4, 12, training(), 3.0), "step 4/12  loss 1.593  cosine 0.904  R2 0.820  0.42 s/step  3 s left"),
    ((4, 12, training(), None), "step 4/12  loss 1.593  cosine 0.904  R2 0.820  0.42 s/step"),
    (
        (1234567, 9999999, training(), 43000.0),
        "step 1234567/9999999  loss 1.593  cosine 0.904  R2 0.820  0.42 s/step  11.9 h left",
    ),
    ((4, 12, training(r2=None), 3.0), "step 4/12  loss 1.593  cosine 0.904  0.42 s/step  3 s left"),
    ((6, 12, held_out()), "step 6/12  held out: loss 1.658  samples: cosine 0.656  R2 0.311"),
    ((6, 12, dict(eval_loss=1.658)), "step 6/12  held out: loss 1.658"),
    (
        (6, 12, held_out(eval_energy_score=0.2271)),
        "step 6/12  held out: loss 1.658  samples: cosine 0.656  R2 0.311  energy 0.2271",
    ),
]


@pytest.mark.parametrize(("given", "line"), LINES)
def test_a_line_says_what_matters_most(given: tuple[Any, ...], line: str) -> None:
    # What does not fit into the line is left out at its end.
    assert log_line(*given) == (line if len(line) <= COLUMNS else line.rpartition("  ")[0])


@pytest.mark.parametrize("step", [1, 9999999])
@pytest.mark.parametrize("value", [0.0, -1e-9, 1e-30, 0.99999, -9.9999, 123456.7, -3.2e7, 1e300, None])
def test_a_line_is_short_whatever_the_numbers(step: int, value: float | None) -> None:
    for logs in (training(), held_out(eval_energy_score=0.1)):
        worst = log_line(step, 9999999, dict.fromkeys(logs, value), 1e9)
        assert len(worst) <= COLUMNS and worst.startswith(f"step {step}/9999999")
        assert value is None or ("loss" in worst and "cosine" in worst)
        assert value is None or abs(value) > 10 or "R2" in worst


def test_an_estimate_counts_steps_and_evaluations() -> None:
    assert estimate(850, 1.8, 0, 0.0) == "about 26 min to go: 850 steps of 1.8 s"
    assert (
        estimate(847, 1.8, 5, 40.0) == "about 29 min to go: 847 steps of 1.8 s, 5 evaluations of about 40 s"
    )
    assert estimate(9, 0.004, 1, 0.1) == "about 1 s to go: 9 steps of 0.004 s, 1 evaluation of about 1 s"
    args = SimpleNamespace(eval_strategy="steps", eval_steps=60)
    assert [evaluations_left(args, step, 301) for step in (0, 59, 60, 300)] == [6, 6, 5, 1]  # type: ignore[arg-type]
    assert evaluations_left(SimpleNamespace(eval_strategy="no", eval_steps=60), 0, 300) == 0  # type: ignore[arg-type]


def test_the_estimate_comes_after_the_third_step_and_the_first_one_does_not_count(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="blip3o_dit")
    times = iter([100.0, 101.0, 102.0])
    monkeypatch.setattr("blip3o_dit.training.console.time.monotonic", lambda: next(times))
    args: Any = SimpleNamespace(eval_strategy="steps", eval_steps=50)
    state: Any = SimpleNamespace(global_step=0, max_steps=100, is_world_process_zero=True)
    console = ConsoleCallback(evaluation_cost=10.0)
    console.on_train_begin(args, state)
    for step in range(1, 6):
        state.global_step = step
        console.on_step_end(args, state)
        assert bool(caplog.messages) == (step >= 3)
    assert caplog.messages == ["about 2 min to go: 97 steps of 1 s, 2 evaluations of about 10 s"]


SMALL = "--model_dim 16 --num_layers 1 --batch_size 8 --device cpu"
RUN = shlex.split(f"{SMALL} --max_steps 6 --logging_steps 2")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return write_linear_store(tmp_path_factory.mktemp("data") / "store")


def test_a_run_says_little_and_on_standard_error_alone(
    store: EmbeddingStore, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = ["--embeddings_path", str(store.path), "--output_dir", str(tmp_path / "run")]
    assert main([*data, *RUN, "--dry_run"]) == 0
    tried = capfd.readouterr()
    assert main([*data, *RUN]) == 0
    ran = capfd.readouterr()
    assert tried.out == ran.out == ""
    assert "\r" not in tried.err + ran.err and "%|" not in tried.err + ran.err
    plan = "6 steps of 8 samples, 1 passes, warm-up 0; log every 2, evaluate 10, save 10"
    for said in (tried.err, ran.err):
        assert plan in said.splitlines()
        assert re.search(r"about \d+ s to go: \d steps of [\d.]+ s, 1 evaluation of about \d+ s\n", said)
    assert "at most together" in tried.err and re.search(r"memory: at most [\d.]+ of ", ran.err)

    lines = [line for line in ran.err.splitlines() if line.startswith("step ")]
    assert [line.split("  ")[0] for line in lines] == ["step 2/6", "step 4/6", "step 6/6", "step 6/6"]
    assert all(len(line) <= COLUMNS and line.count("loss") == 1 for line in lines)
    assert "flow_matching_loss" not in ran.err
    entry = read_log(tmp_path / "run" / LOG_FILE)[0]
    assert {"loss", "flow_matching_loss", "r2", "seconds_per_step", "snr_db"} <= set(entry)
    figures = f"loss {entry['loss']:.4g}  cosine {entry['cosine_similarity']:.3f}  R2 {entry['r2']:.3f}"
    assert lines[0].startswith(f"step 2/6  {figures}  ")

    assert main([*data, "--resume_from_checkpoint", "auto", "--device", "cpu"]) == 0
    assert "all 6 steps were taken already; nothing was left to train" in capfd.readouterr().err


def test_control_c_before_the_first_step_says_what_to_do(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("blip3o_dit.training.run.streamed_statistics", interrupt)
    data = ["--embeddings_path", str(store.path), "--output_dir", str(tmp_path / "run")]
    assert main([*data, *RUN]) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (
        "stopped: interrupted before the first step; nothing was trained yet: give the same command again"
    )


def test_a_signal_after_the_last_step_says_what_is_left(
    capfd: pytest.CaptureFixture[str],
) -> None:
    for step, said in ((9, "saving after this step"), (10, "all steps are taken: writing the model")):
        request = StopRequest(None)
        state: Any = SimpleNamespace(global_step=step, max_steps=10)
        request.on_step_end(None, state, SimpleNamespace())  # type: ignore[arg-type]
        request._on_signal(signal.SIGINT, None)
        assert f"SIGINT received: {said}" in capfd.readouterr().err


def test_wandb_that_is_not_installed_is_asked_for_before_anything_is_read(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("blip3o_dit.training.wandb_setup.importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("blip3o_dit.training.run.open_embeddings", lambda *a, **k: pytest.fail("read"))
    data = ["--embeddings_path", str(store.path), "--output_dir", str(tmp_path / "run")]
    assert main([*data, *RUN, "--wandb_project", "p"]) == 2
    assert "wandb" in capsys.readouterr().err and not (tmp_path / "run").exists()
