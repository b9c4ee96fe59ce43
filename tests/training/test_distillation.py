"""Distillation: what a student is taught, and that it learns it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import get_cosine_schedule_with_warmup

from blip3o_dit.cli.command import INPUT_OUTPUT, STOPPED
from blip3o_dit.cli.main import main
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.flow.config import FlowMatchingConfig
from blip3o_dit.flow.path import expand_times, make_path, step_ends, time_grid
from blip3o_dit.flow.predictions import convert_prediction
from blip3o_dit.flow.solvers import Velocity, integrate
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.loading import EMA_FILE
from blip3o_dit.training.checkpoint import TRAINER_STATE_FILE, checkpoints
from blip3o_dit.training.config import SPLIT_SETTINGS, TrainingConfig
from blip3o_dit.training.curves import CURVES_FILE, LOG_FILE, read_log
from blip3o_dit.training.distillation import _samples_seen, distill, student_trainer, train_student
from blip3o_dit.training.distillation_config import DISTILLATION_CONFIG_FILE, DistillationConfig
from blip3o_dit.training.ema import ExponentialMovingAverage
from blip3o_dit.training.student import StudentTrainer, student_of, teacher_path, whole_and_random
from blip3o_dit.utils import atomic
from blip3o_dit.utils.checksums import verify
from blip3o_dit.utils.stateless_random import stateless_normal, stateless_permutation, stateless_uniform
from tests.conftest import randomize, tiny_config
from tests.helpers.curves import curves_drawn
from tests.helpers.forks import forked
from tests.helpers.stores import write_linear_store
from tests.helpers.training import same, train_model


def taught(
    teacher: BLIP3oDiTModel, store: EmbeddingStore, config: DistillationConfig, output: Path
) -> StudentTrainer:
    """The trainer of a student that has learned from the first 48 samples."""
    return train_student(
        teacher, store, np.arange(48), config, TrainingConfig(output_dir=str(output), device="cpu")
    )


def gaussian_flow(mean: float, deviation: float) -> tuple[Velocity, Callable[..., torch.Tensor]]:
    """Of paths from N(0, 1) to N(mean, deviation^2): the velocity, and x(t) = t mean + d(t) x_0."""

    def spread(t: torch.Tensor) -> torch.Tensor:
        return ((t * deviation) ** 2 + (1 - t) ** 2).sqrt()

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        t = expand_times(t, x)
        return mean + (t * deviation**2 - (1 - t)) / spread(t) ** 2 * (x - t * mean)

    return velocity, lambda x_0, t: t * mean + spread(t) * x_0


@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_lessons_are_average_velocities_along_the_teachers_path(shift: float) -> None:
    """The whole of each path and a random piece, all pieces as often as each other."""
    velocity, exact = gaussian_flow(mean=0.7, deviation=0.3)
    x_0, grid = torch.randn(10, 3), time_grid(4, shift)
    points = teacher_path(velocity, x_0, time_grid(160, shift))[::40]
    pieces = whole_and_random(points, grid, (torch.arange(10) + 0.5) / 10)  # ten pieces between five times
    assert pieces.t[:10].tolist() == [0.0] * 10 and pieces.end[:10].tolist() == [1.0] * 10
    drawn = set(zip(pieces.t[10:].tolist(), pieces.end[10:].tolist(), strict=True))
    assert drawn == set(combinations(grid.tolist(), 2))
    t, end = pieces.t[:, None], pieces.end[:, None]
    before, after = exact(x_0.repeat(2, 1), t), exact(x_0.repeat(2, 1), end)
    torch.testing.assert_close(pieces.x_t, before, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(pieces.velocity, (after - before) / (end - t), rtol=2e-3, atol=2e-3)


def test_a_students_network_says_at_first_what_its_teachers_does() -> None:
    teacher = BLIP3oDiTModel(tiny_config()).eval()
    randomize(teacher, scale=0.15)
    student = student_of(teacher, 1)
    x, condition, t = torch.randn(2, 9, 8), torch.randn(2, 9, 12), torch.tensor([0.0, 0.5])
    with torch.no_grad():
        expected, found = teacher(x, t, condition), student(x, t, condition, step_end=t + 0.5)
        torch.testing.assert_close(found, expected)
        randomize(student, scale=0.15)
        ends = [student(x, t, condition, step_end=t + length) for length in (0.1, 0.5)]
    assert not torch.allclose(*ends)


def test_a_student_learns_to_do_in_one_call_what_its_teacher_does_in_many(tmp_path: Path) -> None:
    store = write_linear_store(tmp_path / "s", samples=64)
    teacher = BLIP3oDiTModel(tiny_config()).eval()
    randomize(teacher, scale=0.15)
    eva = store.fetch(range(48, 64))[0]
    expected = teacher.generate(eva, num_inference_steps=32, solver="heun")

    def error(model: BLIP3oDiTModel) -> float:
        return float((model.generate(eva, num_inference_steps=1, solver="euler") - expected).square().mean())

    config = DistillationConfig(
        steps=1, train_steps=60, batch_size=16, learning_rate=2e-3, ema_decay=0.0, teacher_steps=3
    )
    trainer = taught(teacher, store, config, tmp_path / "student")
    student = trainer.unwrapped_model.eval()
    assert trainer.ema is None
    assert error(student) < 0.5 * error(teacher)
    assert (student.config.default_solver, student.config.default_steps) == ("euler", 1)
    assert teacher.config.default_steps == 50


def test_the_trainer_gives_the_bits_of_a_plain_loop(tmp_path: Path) -> None:
    """Each step has a batch of a shuffled pass, whose rest is left out, and noise by (seed, step, sample)."""
    store = write_linear_store(tmp_path / "s")
    flow = dict(source="ridge_context_spread", source_components=2, prediction_type="preconditioned")
    teacher = BLIP3oDiTModel(tiny_config(flow_matching=flow)).eval()
    randomize(teacher, scale=0.15)
    config = DistillationConfig(
        steps=2, train_steps=7, batch_size=20, seed=3, warmup_steps=2, teacher_steps=2
    )
    trainer = taught(teacher, store, config, tmp_path / "student")
    model = student_of(teacher, 2).train()
    assert trainer.noise.stream == "distillation"
    average = ExponentialMovingAverage(model, 0.999)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 2, 7)
    for step in range(7):
        order = stateless_permutation(48, seed=3, stream="distillation order", counter=step // 2)
        index = order[20 * (step % 2) :][:20]
        noise = stateless_normal(index.tolist(), (9, 8), seed=3, stream="distillation noise", counter=step)
        u_time = stateless_uniform(index.tolist(), seed=3, stream="distillation time", counter=step)
        loss = trainer._loss(model, {"eva": store.fetch(index)[0], "noise": noise, "u_time": u_time})
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update(model, step + 1)
    assert same(model.state_dict(), trainer.unwrapped_model.state_dict())
    assert trainer.ema is not None and same(average.weights, trainer.ema.weights)


def test_the_student_of_a_bfloat16_teacher_learns_in_float32(tmp_path: Path) -> None:
    """Where --memory low saves bfloat16: most updates are smaller than half a step of such a weight."""
    store = write_linear_store(tmp_path / "store")
    teacher = BLIP3oDiTModel(tiny_config()).bfloat16().eval()
    randomize(teacher)
    name = "dit.layers.0.feed_forward.linear_2.weight"
    config = DistillationConfig(steps=1, train_steps=3, batch_size=8, learning_rate=1e-5, save_steps=2)
    run = TrainingConfig(output_dir=str(tmp_path / "student"), device="cpu", memory="low", ema_decay=0.0)
    trainer = train_student(teacher, store, np.arange(8), config, run)
    assert trainer.ema is not None
    change = trainer.ema.weights[name] - teacher.get_parameter(name).float()
    assert (change != 0).float().mean() > 0.9
    for file in ("model.safetensors", EMA_FILE):
        weights = load_file(tmp_path / "student" / file)
        assert weights[name].dtype == torch.bfloat16 and weights["target_mean"].dtype == torch.float32


@pytest.mark.parametrize("asked", [False, True])
def test_deterministic_is_the_distillations_own_setting(
    store: EmbeddingStore, tmp_path: Path, asked: bool
) -> None:
    lessons = DistillationConfig(steps=1, train_steps=1, batch_size=8, deterministic=asked)
    run = TrainingConfig(output_dir=str(tmp_path / "student"), device="cpu", deterministic=not asked)
    trainer = student_trainer(BLIP3oDiTModel(tiny_config()), store, np.arange(8), lessons, run)
    assert trainer.config.deterministic == asked
    older = json.loads(lessons.to_json())
    del older["deterministic"]
    (tmp_path / DISTILLATION_CONFIG_FILE).write_text(json.dumps(older))
    assert not lessons.differences(tmp_path)


def test_a_deterministic_distillation_asks_for_it_first(
    teacher: Path, store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_deterministic() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("blip3o_dit.training.distillation.make_deterministic", make_deterministic)
    words = ["distill", str(teacher), str(store.path), "--output_dir", str(tmp_path / "student")]
    with pytest.raises(ZeroDivisionError):
        main([*words, "--device", "cpu", "--steps", "1", "--deterministic"])


def test_the_command(
    teacher: Path, store: EmbeddingStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "student"
    words = ["distill", str(teacher), str(store.path), "--output_dir", str(output), "--device", "cpu"]
    quick = [*words, "--steps", "2", "--train_steps", "3"]
    assert main(quick) == 0
    shown = capsys.readouterr().err
    assert "student: 3 steps x batch 8; network calls in each: teacher 16, student 2\n" in shown
    assert "Writing model shards" not in shown
    student = BLIP3oInference(output, device="cpu")
    assert student.model.config.default_steps == 2 and student.weights == "ema"
    assert student.generate(torch.randn(2, 9, 12)).shape == (2, 9, 8)
    assert student.evaluate_model(store.path, progress=False)["r2"] < 1
    few, many = (student.generate(torch.zeros(2, 9, 12), num_inference_steps=n) for n in (1, 5))
    assert few.shape == many.shape and not np.allclose(few, many)
    for solver in ("heun", "dopri5"):
        with pytest.raises(ValueError, match="expected any with solver euler, which this model was taught"):
            student.generate(torch.randn(2, 9, 12), solver=solver)
    with pytest.raises(ValueError, match="guidance_scale: expected 1"):
        student.generate(torch.randn(2, 9, 12), guidance_scale=2.0)
    with curves_drawn():
        assert main([*quick, "--overwrite_output_dir"]) == 0
    verify(output)
    assert not checkpoints(output)
    assert {(output / name).is_file() for name in (LOG_FILE, CURVES_FILE, TRAINER_STATE_FILE)} == {True}


def test_what_cannot_be_done_is_refused_before_the_work(
    teacher: Path, store: EmbeddingStore, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    narrow = write_linear_store(tmp_path / "narrow", condition=11)
    noise = train_model(store, tmp_path / "noise", max_steps=1, prediction_type="epsilon", source="noise")
    shutil.copytree(teacher, tmp_path / "running")
    (tmp_path / "running" / "config.json").unlink()
    running, whole_command = tmp_path / "running", [str(whole), "--steps", "1"]
    refused = {
        "expected a model folder": [str(tmp_path / "none"), "--steps", "1"],
        "steps: expected at least 1, found 0": [str(teacher), "--steps", "0"],
        "expected a teacher that is not distilled, found a student of any steps": whole_command,
        "expected a teacher that does not predict the noise, found epsilon": [str(noise), "--steps", "1"],
        "expected another folder than the teacher's": [
            *(str(teacher), "--steps", "1", "--overwrite_output_dir", "--output_dir", str(teacher)),
        ],
        "found the teacher": [
            *(str(running / "checkpoint-4"), "--steps", "1", "--overwrite_output_dir"),
            *("--output_dir", str(running)),
        ],
        "expected no model there, found one: it is no distillation's: give --overwrite to replace it": [
            *(str(teacher), "--steps", "1", "--output_dir", str(noise)),
        ],
        "expected no model there, found one: train_steps was 10, now 11; teacher_steps was": [
            *(str(teacher), "--steps", "2", "--train_steps", "11", "--output_dir", str(whole)),
        ],
        "expected no unfinished run there, found one: it is no distillation's": [
            *(str(teacher), "--steps", "1", "--output_dir", str(running)),
        ],
    }
    capsys.readouterr()
    for message, (model, *words) in refused.items():
        message = message.replace("found the teacher", f"found {running / 'checkpoint-4'} in it")
        assert main(["distill", model, str(store.path), "--device", "cpu", *words]) == 2
        assert message in capsys.readouterr().err
    assert main(["distill", str(teacher), str(narrow.path), "--steps", "1", "--device", "cpu"]) == 2
    assert "expected (tokens, eva width, clip width) (9, 12, 8)" in capsys.readouterr().err
    verify(running / "checkpoint-4")
    verify(whole)


# A distillation that was stopped


def command_of(teacher: Path, store: EmbeddingStore, output: Path) -> list[str]:
    """Ten steps, of which 3, 6 and 9 have a checkpoint inside a pass and an interval of logging."""
    return [
        *("distill", str(teacher), str(store.path), "--output_dir", str(output), "--device", "cpu"),
        *("--steps", "2", "--train_steps", "10", "--save_steps", "3", "--logging_steps", "4"),
        *("--teacher_steps", "2", "--ema_decay", "0.5"),
    ]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return write_linear_store(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture(scope="module")
def teacher(store: EmbeddingStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_model(store, tmp_path_factory.mktemp("run") / "teacher")


@pytest.fixture(scope="module")
def whole(teacher: Path, store: EmbeddingStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run") / "whole"
    assert main(command_of(teacher, store, output)) == 0
    return output


def assert_same_student(a: Path, b: Path) -> None:
    for file in ("model.safetensors", EMA_FILE):
        assert same(load_file(a / file), load_file(b / file)), file
    assert [entry.get("loss") for entry in read_log(a / LOG_FILE)] == [
        entry.get("loss") for entry in read_log(b / LOG_FILE)
    ]
    assert not checkpoints(b)
    verify(b)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], Any]) -> None:
    """Do something in the middle of an optimizer step."""
    plain = StudentTrainer.compute_loss

    def compute_loss(self: StudentTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step - 1:
            action()
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(StudentTrainer, "compute_loss", compute_loss)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_continues(
    teacher: Path,
    store: EmbeddingStore,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    words = command_of(teacher, store, tmp_path / "student")
    at_step(monkeypatch, 5, lambda: os.kill(os.getpid(), number))
    assert main(words) == STOPPED
    said = "received: stopped after step 5 of 10 and saved it: the same command continues"
    assert said in capsys.readouterr().err
    assert [path.name for path in checkpoints(tmp_path / "student")] == ["checkpoint-5"]
    BLIP3oInference(tmp_path / "student" / "checkpoint-5", device="cpu")
    monkeypatch.undo()
    assert main([*words, "--overwrite_output_dir"]) == 0  # which the first command may have needed
    shown = capsys.readouterr().err
    assert f"continuing from {tmp_path / 'student' / 'checkpoint-5'}" in shown and "one map" not in shown
    assert_same_student(whole, tmp_path / "student")


def test_a_kill_a_full_disk_and_a_time_limit_cost_no_bit(
    teacher: Path,
    store: EmbeddingStore,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "student"
    words = command_of(teacher, store, output)
    at_step(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGKILL))
    killed = forked(lambda: main(words))
    assert os.WTERMSIG(os.waitpid(killed, 0)[1]) == signal.SIGKILL
    monkeypatch.undo()
    assert [path.name for path in checkpoints(output)] == ["checkpoint-3"]
    (output / "checkpoint-6.partial").mkdir()

    assert main([*words, "--max_hours", "1e-9"]) == STOPPED
    assert "--max_hours 1e-09 are over: stopped after step 4 of 10" in capsys.readouterr().err

    monkeypatch.setattr(atomic, "seal", lambda folder: errno_28())
    assert main(words) == INPUT_OUTPUT
    assert "checkpoint-6: expected to write it whole, found: No space left" in capsys.readouterr().err
    monkeypatch.undo()

    at_step(monkeypatch, 5, lambda: errno_28())  # as a control-C before the first step would
    monkeypatch.setattr("blip3o_dit.training.distillation.teach", interrupted)
    assert main(words) == STOPPED
    stays = f"stopped: interrupted: {output / 'checkpoint-4'} stays, and the same command continues"
    assert stays in capsys.readouterr().err
    monkeypatch.undo()

    assert main(words) == 0
    assert_same_student(whole, output)
    written = (output / "model.safetensors").stat().st_mtime_ns
    shutil.copytree(whole, output / "checkpoint-10")  # of a run that was killed before it removed it
    assert main(words) == 0
    assert f"{output}: this student is finished; --overwrite" in capsys.readouterr().err
    assert (output / "model.safetensors").stat().st_mtime_ns == written and not checkpoints(output)


def errno_28() -> None:
    raise OSError(28, "No space left on device")


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_another_distillation_is_not_continued(
    teacher: Path,
    store: EmbeddingStore,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "student"
    words = command_of(teacher, store, output)
    assert main([*words, "--learning_rate", "1e-2", "--max_hours", "1e-9"]) == STOPPED
    capsys.readouterr()
    assert main(words) == 2
    refusal = (
        f"{output}: expected no unfinished run there, found one: learning_rate was 0.01, now 0.001: give "
    )
    assert refusal + "--overwrite to replace it" in capsys.readouterr().err
    other = write_linear_store(tmp_path / "other", samples=52)
    words[2] = str(other.path)
    assert main([*words, "--learning_rate", "1e-2"]) == 2
    assert re.search(r"found one: data_fingerprint was '\w+', now '\w+': give", capsys.readouterr().err)
    words[2] = str(store.path)
    assert main([*words, "--overwrite_output_dir", "--logging_steps", "4"]) == 0
    assert_same_student(whole, output)


# What is done when nothing is said


@pytest.mark.parametrize(
    ("seen", "run", "given", "expected"),
    [
        # a training of 300 steps x 32: a third of its samples
        (9600, dict(batch_size=32, warmup_steps=15), {}, (100, 32, 5)),
        (9600, dict(batch_size=32, warmup_steps=60), {}, (100, 32, 20)),  # the teacher's share of warm-up
        (9600, dict(batch_size=16), dict(batch_size=64), (50, 64, 2)),
        (9600, dict(batch_size=8, gradient_accumulation_steps=4), {}, (400, 8, 20)),
        (160, dict(batch_size=8), {}, (50, 8, 2)),  # a teacher of --debug
        (1e9, dict(batch_size=32, warmup_steps=1000), {}, (1000, 32, 50)),
        (1e9, dict(batch_size=4096), {}, (1000, 2000, 50)),  # all samples there are
        (9600, dict(batch_size=32, warmup_steps=15), dict(train_steps=60), (60, 32, 3)),
        (9600, dict(batch_size=32), dict(train_steps=60, warmup_steps=0), (60, 32, 0)),
    ],
)
def test_lengths_follow_the_teachers(
    seen: float, run: dict[str, Any], given: dict[str, Any], expected: tuple[int, int, int]
) -> None:
    config = DistillationConfig(steps=1, **given)
    found = config.resolved(TrainingConfig(**run), samples=2000, samples_seen=seen)
    assert (found.train_steps, found.batch_size, found.warmup_steps) == expected
    assert found == found.resolved(TrainingConfig(**run), samples=2000, samples_seen=0.0)


def test_what_came_in_for_the_defaults_is_written_beside_the_student(
    teacher: Path, store: EmbeddingStore, tmp_path: Path
) -> None:
    config = DistillationConfig(steps=1, teacher_steps=1, save_steps=50)
    student = distill(teacher, store.path, tmp_path / "student", config, progress=False)
    found = json.loads((student / DISTILLATION_CONFIG_FILE).read_text())
    assert (found["train_steps"], found["batch_size"], found["warmup_steps"]) == (50, 8, 2)
    assert found["teacher"] == str(teacher) and found["data_fingerprint"] == store.fingerprint()
    run, teachers = TrainingConfig.from_folder(student), TrainingConfig.from_folder(teacher)
    assert (run.max_steps, run.solver, run.num_inference_steps) == (50, "euler", 1)
    assert all(getattr(run, name) == getattr(teachers, name) for name in SPLIT_SETTINGS)
    for name, passes in ((TRAINER_STATE_FILE, 20.0), ("none", 4 * 8 / 29)):
        moved = tmp_path / name
        moved.mkdir()
        (moved / name).write_text(json.dumps({"epoch": 20.0}))
        assert _samples_seen(moved, teachers, 29) == pytest.approx(passes * 29)


def test_a_student_is_evaluated_by_its_own_steps(
    teacher: Path, store: EmbeddingStore, tmp_path: Path
) -> None:
    model = shutil.copytree(teacher, tmp_path / "teacher")
    words = [str(model), str(store.path), "--steps", "1", "--train_steps", "2", "--device", "cpu"]
    assert main(["distill", *words]) == 0
    student = tmp_path / "teacher-1-steps"
    quick = ["--device", "cpu", "--curve_calls", "2", "--bootstrap", "20"]
    assert main(["evaluate", str(model), str(store.path), "--compare", str(student), *quick]) == 0
    found = json.loads((model / "metrics.json").read_text())
    points = found["curve"]["teacher-1-steps"]
    assert [(point["solver"], point["network_calls"]) for point in points] == [("euler", 2)]
    (described,) = (method for method in found["methods"] if method["name"] == "teacher-1-steps")
    assert described["cost"]["network_calls"] == 1 and "best_guess" not in described["metrics"]


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_student_that_adds_nothing_samples_the_gaussian_in_few_steps(steps: int, shift: float) -> None:
    flow = FlowMatchingConfig(prediction_type="preconditioned", time_shift=shift, sigma_min=0.0)
    path, grid, noise = make_path(flow), time_grid(steps, shift), torch.randn(5, 3)

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        types = {"from_type": "preconditioned", "to_type": "v_prediction"}
        return convert_prediction(torch.zeros_like(x), x, t, path, end=step_ends(t, grid), **types)

    x = integrate(velocity, noise, num_steps=steps, solver="euler", time_shift=shift)
    torch.testing.assert_close(x, noise, rtol=1e-4, atol=1e-4)  # the flow of N(0, I) onto itself


def test_a_student_of_an_older_version_takes_its_own_steps() -> None:
    flow = {"prediction_type": "preconditioned", "student_steps": 2, "condition_dropout": 0.0}
    model = BLIP3oDiTModel(tiny_config(flow_matching=flow, default_steps=2)).eval()
    randomize(model, scale=0.15)
    assert model.dit.step_embedder is None
    assert model.generate(torch.randn(2, 9, 12)).shape == (2, 9, 8)
    with pytest.raises(
        ValueError, match="expected 2 with solver euler, which this model was taught, found 4"
    ):
        model.generate(torch.randn(2, 9, 12), num_inference_steps=4)
