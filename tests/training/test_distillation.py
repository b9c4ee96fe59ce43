"""Distillation: what a student is taught, and that it learns it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from blip3o_dit.cli.main import main
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.flow.config import FlowMatchingConfig
from blip3o_dit.flow.path import make_path
from blip3o_dit.flow.predictions import convert_prediction
from blip3o_dit.flow.solvers import integrate
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.loading import EMA_FILE
from blip3o_dit.training.config import DistillationConfig, TrainingConfig
from blip3o_dit.training.distillation import train_student, trajectory_targets
from blip3o_dit.utils.checksums import verify
from tests.conftest import randomize, tiny_config
from tests.helpers.stores import write_linear_store
from tests.helpers.training import train_model


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_lessons_are_average_velocities_along_the_teachers_path(steps: int) -> None:
    """dx/dt = x: x(t) = x_0 e^t, so each lesson is (e^t1 - e^t0) / (t1 - t0) x_0."""
    x_0 = torch.randn(5, 3)
    targets = trajectory_targets(lambda x, t: x, x_0, student_steps=steps, teacher_steps=40)
    assert len(targets) == steps
    for k, target in enumerate(targets):
        low, high = k / steps, (k + 1) / steps
        torch.testing.assert_close(target.x_t, math.exp(low) * x_0, rtol=1e-3, atol=1e-3)
        slope = (math.exp(high) - math.exp(low)) * steps
        torch.testing.assert_close(target.velocity, slope * x_0, rtol=1e-3, atol=1e-3)
        assert target.t.tolist() == pytest.approx([low] * 5)


def test_a_student_of_euler_steps_that_says_its_lessons_is_the_teacher() -> None:
    x = x_0 = torch.randn(4, 3)
    targets = trajectory_targets(
        lambda x, t: torch.sin(3 * t)[:, None] * x, x_0, student_steps=3, teacher_steps=50, time_shift=2.0
    )
    times = [float(target.t[0]) for target in targets] + [1.0]
    for target, start, end in zip(targets, times[:-1], times[1:], strict=True):
        x = x + (end - start) * target.velocity
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
    student, average = train_student(teacher, store, np.arange(48), config, progress=False)
    assert average is None
    assert error(student) < 0.5 * error(teacher)
    assert (student.config.default_solver, student.config.default_steps) == ("euler", 1)
    assert teacher.config.default_steps == 50
    again, _ = train_student(teacher, store, np.arange(48), config, progress=False)
    assert torch.equal(again.generate(eva), student.generate(eva))


def test_the_student_of_a_bfloat16_teacher_learns_in_float32(tmp_path: Path) -> None:
    """Where --memory low saves bfloat16: most updates are smaller than half a step of such a weight."""
    store = write_linear_store(tmp_path / "store")
    teacher = BLIP3oDiTModel(tiny_config()).bfloat16().eval()
    randomize(teacher)
    config = DistillationConfig(steps=1, train_steps=3, batch_size=8, learning_rate=1e-5)
    student, average = train_student(teacher, store, np.arange(8), config, progress=False)
    assert teacher.dtype == torch.bfloat16 and student.dtype == torch.float32 and average is not None
    name = "dit.layers.0.feed_forward.linear_2.weight"
    start = teacher.get_parameter(name).float()
    assert (student.get_parameter(name) != start).float().mean() > 0.9
    assert (average.weights[name] != start).float().mean() > 0.9
    model = tmp_path / "teacher"
    teacher.save_pretrained(model)
    (model / "training_config.json").write_bytes(TrainingConfig(eval_split=0.25).to_json())
    words = ["distill", str(model), str(store.path), "--steps", "1", "--train_steps", "1", "--device", "cpu"]
    assert main(words) == 0
    for file in ("model.safetensors", EMA_FILE):
        weights = load_file(tmp_path / "teacher-1-steps" / file)
        assert weights[name].dtype == torch.bfloat16 and weights["target_mean"].dtype == torch.float32


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = write_linear_store(tmp_path / "store")
    model = train_model(store, tmp_path / "teacher")
    words = ["distill", str(model), str(store.path), "--steps", "2", "--train_steps", "3", "--device", "cpu"]
    assert main(words) == 0
    student = BLIP3oInference(tmp_path / "teacher-2-steps", device="cpu")
    assert student.model.config.default_steps == 2 and student.weights == "ema"
    assert student.generate(torch.randn(2, 9, 12)).shape == (2, 9, 8)
    assert student.evaluate_model(store.path, progress=False)["r2"] < 1
    for asked in ({"num_inference_steps": 4}, {"solver": "heun"}, {"solver": "dopri5"}):
        with pytest.raises(ValueError, match="expected 2 with solver euler, which this model was taught"):
            student.generate(torch.randn(2, 9, 12), **asked)
    with pytest.raises(ValueError, match="guidance_scale: expected 1"):
        student.generate(torch.randn(2, 9, 12), guidance_scale=2.0)
    with pytest.raises(ValueError, match="expected a teacher that is not distilled, found a student of 2"):
        train_student(student.model, store, np.arange(8), DistillationConfig(steps=1), progress=False)
    assert main(words) == 2
    assert "expected no model there, found one" in capsys.readouterr().err
    assert main([*words, "--overwrite_output_dir"]) == 0
    verify(tmp_path / "teacher-2-steps")
    assert main(["distill", str(tmp_path / "none"), str(store.path), "--steps", "1"]) == 2
    assert "expected a model folder" in capsys.readouterr().err
    narrow = write_linear_store(tmp_path / "narrow", condition=11)
    assert main(["distill", str(model), str(narrow.path), "--steps", "1", "--overwrite_output_dir"]) == 2
    assert "expected (tokens, eva width, clip width) (9, 12, 8)" in capsys.readouterr().err
    assert main(["distill", str(model), str(store.path), "--steps", "0", "--overwrite_output_dir"]) == 2
    assert "steps: expected at least 1, found 0" in capsys.readouterr().err


def test_a_student_is_evaluated_by_its_own_steps(tmp_path: Path) -> None:
    store = write_linear_store(tmp_path / "store")
    model = train_model(store, tmp_path / "teacher")
    words = [str(model), str(store.path), "--steps", "1", "--train_steps", "2", "--device", "cpu"]
    assert main(["distill", *words]) == 0
    student = tmp_path / "teacher-1-steps"
    quick = ["--device", "cpu", "--curve_calls", "2", "--bootstrap", "20"]
    assert main(["evaluate", str(model), str(store.path), "--compare", str(student), *quick]) == 0
    found = json.loads((model / "metrics.json").read_text())
    points = found["curve"]["teacher-1-steps"]
    assert [(point["solver"], point["network_calls"]) for point in points] == [("euler", 1)]
    (described,) = (method for method in found["methods"] if method["name"] == "teacher-1-steps")
    assert described["cost"]["network_calls"] == 1 and "best_guess" not in described["metrics"]


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_student_that_adds_nothing_samples_the_gaussian_in_few_steps(steps: int, shift: float) -> None:
    flow = FlowMatchingConfig(
        prediction_type="preconditioned", student_steps=steps, time_shift=shift, sigma_min=0.0
    )
    path, noise = make_path(flow), torch.randn(5, 3)

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        zero = torch.zeros_like(x)
        return convert_prediction(zero, x, t, path, from_type="preconditioned", to_type="v_prediction")

    x = integrate(velocity, noise, num_steps=steps, solver="euler", time_shift=shift)
    torch.testing.assert_close(x, noise, rtol=1e-4, atol=1e-4)  # the flow of N(0, I) onto itself


def test_a_teacher_of_noise_is_refused(tmp_path: Path) -> None:
    store = EmbeddingStore(write_linear_store(tmp_path / "s").path)
    teacher = BLIP3oDiTModel(tiny_config(flow_matching={"prediction_type": "epsilon"}))
    with pytest.raises(ValueError, match="does not predict the noise"):
        train_student(teacher, store, np.arange(8), DistillationConfig(steps=1), progress=False)
