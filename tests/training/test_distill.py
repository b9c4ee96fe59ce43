"""Distillation: what a student is taught, and that it learns it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from blip3o_dit.cli.main import main
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.flow.distillation import trajectory_lessons
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.training.distill import DistillationConfig, teach
from tests.conftest import randomize, tiny_config
from tests.inference.test_evaluate import train_model
from tests.stores import write_linear_store


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_lessons_are_average_velocities_along_the_teachers_path(steps: int) -> None:
    """dx/dt = x: x(t) = x_0 e^t, so each lesson is (e^t1 - e^t0) / (t1 - t0) x_0."""
    x_0 = torch.randn(5, 3)
    lessons = trajectory_lessons(lambda x, t: x, x_0, student_steps=steps, teacher_steps=40)
    assert len(lessons) == steps
    for k, lesson in enumerate(lessons):
        low, high = k / steps, (k + 1) / steps
        torch.testing.assert_close(lesson.x, math.exp(low) * x_0, rtol=1e-3, atol=1e-3)
        slope = (math.exp(high) - math.exp(low)) * steps
        torch.testing.assert_close(lesson.velocity, slope * x_0, rtol=1e-3, atol=1e-3)
        assert lesson.t.tolist() == pytest.approx([low] * 5)


def test_a_student_of_euler_steps_that_says_its_lessons_is_the_teacher() -> None:
    x = x_0 = torch.randn(4, 3)
    lessons = trajectory_lessons(
        lambda x, t: torch.sin(3 * t)[:, None] * x, x_0, student_steps=3, teacher_steps=50, time_shift=2.0
    )
    times = [float(lesson.t[0]) for lesson in lessons] + [1.0]
    for lesson, start, end in zip(lessons, times[:-1], times[1:], strict=True):
        x = x + (end - start) * lesson.velocity
    expected = x_0 * math.exp((1 - math.cos(3)) / 3)
    torch.testing.assert_close(x, expected, rtol=1e-3, atol=1e-3)


def test_a_student_learns_to_do_in_one_call_what_its_teacher_does_in_many(tmp_path: Path) -> None:
    store = write_linear_store(tmp_path / "s", samples=64)
    teacher = BLIP3oDiTModel(tiny_config()).eval()
    randomize(teacher, scale=0.15)
    eva = store.fetch(range(48, 64))[0]
    expected = teacher.generate(eva, num_inference_steps=32, solver="heun")

    def error(model: BLIP3oDiTModel) -> float:
        return float((model.generate(eva, num_inference_steps=1, solver="euler") - expected).square().mean())

    config = DistillationConfig(steps=1, train_steps=60, batch_size=16, learning_rate=2e-3, ema_decay=0.0)
    student, average = teach(teacher, store, np.arange(48), config, progress=False)
    assert average is None
    assert error(student) < 0.5 * error(teacher)
    assert (student.config.default_solver, student.config.default_steps) == ("euler", 1)
    assert teacher.config.default_steps == 50
    again, _ = teach(teacher, store, np.arange(48), config, progress=False)
    assert torch.equal(again.generate(eva), student.generate(eva))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = write_linear_store(tmp_path / "store")
    model = train_model(store, tmp_path / "teacher")
    words = ["distill", str(model), str(store.path), "--steps", "2", "--train_steps", "3", "--device", "cpu"]
    assert main(words) == 0
    student = BLIP3oInference(tmp_path / "teacher-2-steps", device="cpu")
    assert student.model.config.default_steps == 2 and student.weights == "ema"
    assert student.generate(torch.randn(2, 9, 12)).shape == (2, 9, 8)
    assert student.evaluate_model(store.path, progress=False)["r2"] < 1
    assert main(words) == 2
    assert "expected no model there, found one" in capsys.readouterr().err
    assert main([*words, "--overwrite_output_dir"]) == 0
    assert main(["distill", str(tmp_path / "none"), str(store.path), "--steps", "1"]) == 2
    assert "expected a model folder" in capsys.readouterr().err
    narrow = write_linear_store(tmp_path / "narrow", condition=11)
    assert main(["distill", str(model), str(narrow.path), "--steps", "1", "--overwrite_output_dir"]) == 2
    assert "expected (tokens, eva width, clip width) (9, 12, 8)" in capsys.readouterr().err
    assert main(["distill", str(model), str(store.path), "--steps", "0", "--overwrite_output_dir"]) == 2
    assert "steps: expected at least 1, found 0" in capsys.readouterr().err


def test_a_teacher_of_noise_is_refused(tmp_path: Path) -> None:
    store = EmbeddingStore(write_linear_store(tmp_path / "s").path)
    teacher = BLIP3oDiTModel(tiny_config(flow_matching={"prediction_type": "epsilon"}))
    with pytest.raises(ValueError, match="does not predict the noise"):
        teach(teacher, store, np.arange(8), DistillationConfig(steps=1), progress=False)
