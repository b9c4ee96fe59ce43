"""Calibration: the scale that is fitted, what it is fitted to, and where it goes."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerState

from blip3o_dit.cli.main import main
from blip3o_dit.data import dataset
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.evaluation.config import EvaluationConfig
from blip3o_dit.evaluation.evaluate import evaluate_models
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.inference.request import differences
from blip3o_dit.metrics.conditional import energy_score, spread_and_error
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.calibration import CALIBRATION_FILE, Calibration, read_calibration
from blip3o_dit.model.config import BLIP3oDiTConfig
from blip3o_dit.model.loading import EMA_FILE
from blip3o_dit.training import finishing
from blip3o_dit.training.calibration import HeldBack, Scores, calibrate, calibrate_model, set_noise_scale
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.training.curves import LOG_FILE, read_log
from blip3o_dit.training.describe import describe, format_description
from blip3o_dit.training.distillation import distill
from blip3o_dit.training.distillation_config import DistillationConfig
from blip3o_dit.training.finishing import ENERGY, EarlyStop
from blip3o_dit.training.run import train
from blip3o_dit.training.trainer import BLIP3oTrainer
from blip3o_dit.utils.checksums import verify
from blip3o_dit.utils.distributed import Processes
from blip3o_dit.utils.errors import WriteError
from tests.conftest import randomize, tiny_config
from tests.helpers.stores import write_linear_store
from tests.helpers.training import config_for, same


def few_are_enough(patch: pytest.MonkeyPatch) -> None:
    """Of 40 samples to train on five are held back."""
    patch.setattr(dataset, "PART_HELD_BACK", 8)
    patch.setattr(dataset, "LEAST_HELD_BACK", 3)
    patch.setattr("blip3o_dit.training.calibration.LEAST_HELD_BACK", 3)


@pytest.fixture(autouse=True)
def _few_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    few_are_enough(monkeypatch)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return write_linear_store(tmp_path_factory.mktemp("data") / "store", samples=48)


@dataclass
class Drawn:
    """Stands for `HeldBack`: the truth is N(0, 1) in `width` numbers, the draws are N(0, (own scale)^2)."""

    own: float
    width: int = 8
    hard: float = 1.0  # the deviation of every fifth truth
    indices: Any = field(default_factory=lambda: np.arange(600))

    def scores(self, model: Any, noise_scale: float = 1.0) -> Scores:
        generator = torch.Generator().manual_seed(0)
        truth = torch.randn(600, self.width, generator=generator)
        truth[::5] *= self.hard
        draws = noise_scale * self.own * torch.randn(2, 600, self.width, generator=generator)
        found = spread_and_error(draws, truth)
        return Scores(energy_score(draws, truth), found.spread, found.error)


@pytest.mark.parametrize("own", [0.6, 0.85, 1.0, 1.3])
def test_the_scale_makes_a_sampler_as_sure_as_it_is_right(own: float) -> None:
    found = calibrate(None, Drawn(own))  # type: ignore[arg-type]
    assert own * found.noise_scale == pytest.approx(1.0, abs=0.05)
    assert found.after["spread_error_ratio"] == pytest.approx(1.0, abs=0.05)
    assert found.after["energy_score"] <= found.before["energy_score"]
    assert found.samples == 600


def test_where_some_are_harder_the_spread_still_fits_the_error() -> None:
    """The energy score alone would have the spread at 0.84 of the error."""
    found = calibrate(None, Drawn(3.0, hard=4.0))  # type: ignore[arg-type]
    assert found.after["spread_error_ratio"] == pytest.approx(0.95, abs=0.01)
    assert found.after["energy_score"] < found.before["energy_score"]
    # What would fit the error scores worse than none: it stays.
    found = calibrate(None, Drawn(1.7, hard=4.0))  # type: ignore[arg-type]
    assert found.noise_scale == 1.0 and found.after == found.before


def test_noise_is_not_fitted() -> None:
    """Of a curve that does not depend on the scale but for noise."""

    class Flat(Drawn):
        def scores(self, model: Any, noise_scale: float = 1.0) -> Scores:
            generator = torch.Generator().manual_seed(round(1000 * noise_scale))
            ones = torch.ones(600, dtype=torch.float64)
            return Scores(torch.rand(600, generator=generator).double(), ones, ones)

    found = calibrate(None, Flat(1.0))  # type: ignore[arg-type]
    assert found.noise_scale == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    "rule", [{"eval_split": 0.2}, {"eval_split": 8}, {"eval_split": 0.2, "split_by": "key_hash"}]
)
def test_what_is_held_back_was_to_be_trained_on(store: EmbeddingStore, rule: dict[str, Any]) -> None:
    plain, split = TrainingConfig(calibrate=False, **rule).split(store), TrainingConfig(**rule).split(store)
    np.testing.assert_array_equal(split.eval, plain.eval)
    assert 2 <= len(split.held_back) <= 8 and not set(split.held_back) & set(split.train)
    np.testing.assert_array_equal(np.union1d(split.train, split.held_back), plain.train)
    assert not len(plain.held_back)


def test_nothing_is_held_back_of_few_samples_or_where_nothing_is_evaluated(
    store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not len(TrainingConfig(eval_split=0).split(store).held_back)
    monkeypatch.setattr(dataset, "LEAST_HELD_BACK", 6)
    assert len(TrainingConfig().split(store).held_back) == 0
    assert len(TrainingConfig().split(store).train) == 43


# From a guess that is too sure of itself: the scale that is found is not 1.
SETTINGS: dict[str, Any] = dict(max_steps=6, eval_steps=2, save_steps=2, learning_rate=0.01, source="ridge")


@pytest.fixture(scope="module")
def trained(store: EmbeddingStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        few_are_enough(patch)
        return train(config_for(store, tmp_path_factory.mktemp("trained") / "model", **SETTINGS))


@pytest.fixture
def model(trained: Path, tmp_path: Path) -> Path:
    """A copy, which a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "model"))


def test_a_training_ends_calibrated(store: EmbeddingStore, model: Path) -> None:
    scale, found = BLIP3oDiTConfig.from_pretrained(model).flow.noise_scale, read_calibration(model)
    assert found is not None and scale == found.noise_scale != 1.0
    split = TrainingConfig.from_folder(model).split(store)
    assert found.samples == len(split.held_back) == 5 and found.steps == 6
    logged = [(entry["step"], entry[ENERGY]) for entry in read_log(model / LOG_FILE) if ENERGY in entry]
    assert logged == [tuple(pair) for pair in found.energy_scores] and [step for step, _ in logged] == [
        2,
        4,
        6,
    ]
    verify(model)
    assert f"noise x {scale:.4g}" in " ".join(format_description(describe(model)).split())
    # What it says of the samples is what they give.
    inference = BLIP3oInference(model, device="cpu", dtype=torch.float32)
    held_back = HeldBack(store, split.held_back, seed=42, batch_size=3)
    assert held_back.scores(inference.model, scale).means == pytest.approx(found.after, rel=1e-5)
    assert held_back.scores(inference.model).means == pytest.approx(found.before, rel=1e-5)
    # Generation starts from so much noise, unless it is told otherwise.
    eva = store.fetch([0, 1])[0]
    assert torch.equal(inference.generate(eva), inference.generate(eva, noise_scale=scale))
    assert not torch.equal(inference.generate(eva), inference.generate(eva, noise_scale=1.0))
    # Continued from a checkpoint, which does not know of it, it ends with the same bits.
    again = train(config_for(store, model, **SETTINGS), resume=model / "checkpoint-2")
    assert read_calibration(again) == found


def test_without_calibration_nothing_is_held_back_or_written(store: EmbeddingStore, tmp_path: Path) -> None:
    folder = train(config_for(store, tmp_path / "model", calibrate=False, **SETTINGS))
    assert BLIP3oDiTConfig.from_pretrained(folder).flow.noise_scale == 1.0
    assert not (folder / CALIBRATION_FILE).exists()
    assert not any(ENERGY in entry for entry in read_log(folder / LOG_FILE))


def test_a_folder_of_an_earlier_version_was_trained_on_all(model: Path, store: EmbeddingStore) -> None:
    file = model / "training_config.json"
    values = json.loads(file.read_text())
    del values["calibrate"], values["early_stop"]
    (model / "checksums.json").unlink()
    file.write_text(json.dumps(values))
    assert not len(TrainingConfig.from_folder(model).split(store).held_back)


def best_after(step: int, log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A log in which the energy score was lowest after this step."""
    return [
        entry | {ENERGY: 0.1 if entry["step"] == step else 9.0} if ENERGY in entry else entry for entry in log
    ]


@pytest.mark.parametrize("better", [True, False])
def test_the_best_averages_are_the_models(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, better: bool
) -> None:
    """If they are the best still when they are calibrated as the last ones are."""
    energies = iter([0.5, 0.4 if better else 0.6])

    def found(*_: Any) -> Calibration:
        after = {"energy_score": next(energies), "spread_error_ratio": 1.0}
        return Calibration(noise_scale=0.9, samples=5, before=after, after=after, energy_scores=[])

    monkeypatch.setattr("blip3o_dit.training.finishing.calibrate", found)
    plain = finishing._choose_weights

    def choose(trainer: Any, held_back: HeldBack) -> Calibration:
        trainer.state.log_history = best_after(4, trainer.state.log_history)
        return plain(trainer, held_back)

    monkeypatch.setattr(finishing, "_choose_weights", choose)
    folder = train(config_for(store, tmp_path / "model", **SETTINGS))
    step = 4 if better else 6
    averaged = load_file(folder / EMA_FILE)
    assert same(averaged, load_file(folder / f"checkpoint-{step}" / EMA_FILE))
    assert same(
        load_file(folder / "model.safetensors"), load_file(folder / "checkpoint-6" / "model.safetensors")
    )
    about = read_calibration(folder)
    assert about is not None and about.weights_of == step
    assert "should have stopped after step 4 of 6" in about.sentences()[1]
    assert f"averaged weights of step {step}" in about.sentences()[1]


def test_a_run_stops_early_and_stays_stopped(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {2: 0.5, 4: 0.6, 6: 0.7, 8: 0.8}
    plain = BLIP3oTrainer.log

    def log(self: BLIP3oTrainer, logs: dict[str, float], *args: Any) -> None:
        if ENERGY in logs:
            logs[ENERGY] = scores[self.state.global_step]
        plain(self, logs, *args)

    monkeypatch.setattr(BLIP3oTrainer, "log", log)
    changes = dict(max_steps=9, save_steps=100, early_stop=2)  # it ends with a checkpoint in any case
    config = config_for(store, tmp_path / "model", **SETTINGS | changes)
    folder = train(config)
    assert max(entry["step"] for entry in read_log(folder / LOG_FILE)) == 6
    before = {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}
    train(config, resume=folder / "checkpoint-6")
    assert before == {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}
    assert not (folder / "checkpoint-8").exists()
    assert describe(folder)["progress"]["finished"]
    assert not describe(folder / "checkpoint-6")["progress"]["finished"]


def test_patience_counts_evaluations_since_the_best_one() -> None:
    log = [{"step": step, ENERGY: score} for step, score in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.0))]
    state: Any = TrainerState(log_history=log)
    assert not EarlyStop(None)._is_over(state) and not EarlyStop(3)._is_over(state)
    assert EarlyStop(2)._is_over(state)
    assert not EarlyStop(2, since=2)._is_over(state)  # extended after the second step
    with pytest.raises(ValueError, match="early_stop: expected calibrate and an eval_split above 0"):
        TrainingConfig(early_stop=1, calibrate=False)


def test_nothing_to_stop_by_is_refused_before_anything_is_built(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "LEAST_HELD_BACK", 6)
    config = config_for(store, tmp_path / "model", early_stop=1)
    with pytest.raises(ValueError, match=r"early_stop: expected at least .* training samples"):
        train(config)


def test_a_model_that_is_there_is_calibrated(
    store: EmbeddingStore, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_training = read_calibration(model)
    assert main(["calibrate", str(model), str(store.path), "--device", "cpu", "--seed", "42"]) == 0
    found, config = read_calibration(model), BLIP3oDiTConfig.from_pretrained(model)
    assert found is not None and by_training is not None
    assert found.noise_scale == pytest.approx(by_training.noise_scale, abs=2e-3) == config.flow.noise_scale
    assert (found.energy_scores, found.weights_of) == (by_training.energy_scores, 6)
    verify(model)
    assert sorted(file.name for file in model.glob("*.partial")) == []
    # Also by what evaluations measure, and a checkpoint, which continues as before.
    for place in (model, model / "checkpoint-4"):
        words = [str(place), str(store.path), "--split", "eval", "--device", "cpu"]
        assert main(["calibrate", *words]) == 0
        verify(place)
    resumed = train(config_for(store, model, **SETTINGS), resume=model / "checkpoint-4")
    assert read_calibration(resumed) == by_training
    # What it was trained on is refused.
    assert main(["calibrate", str(model), str(store.path), "--split", "all"]) == 2
    assert "expects embeddings that the model was not trained on" in capsys.readouterr().err


def test_a_calibration_that_cannot_be_written_changes_nothing(
    store: EmbeddingStore, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file.name: file.read_bytes() for file in model.iterdir() if file.is_file()}

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("blip3o_dit.utils.atomic.write_atomically", full)
    with pytest.raises(WriteError, match="what was there before is untouched"):
        calibrate_model(model, store.path, split="eval", device="cpu")
    assert before == {file.name: file.read_bytes() for file in model.iterdir() if file.is_file()}


def test_models_without_training_settings_or_samples_say_what_helps(
    store: EmbeddingStore, tmp_path: Path
) -> None:
    folder = train(config_for(store, tmp_path / "model", calibrate=False, **SETTINGS))
    with pytest.raises(ValueError, match="num_samples: expected an integer >= 3, found 2"):
        calibrate_model(folder, store.path, num_samples=2, device="cpu")
    with pytest.raises(ValueError, match=r"expected at least 3 samples to calibrate by .*--split all"):
        calibrate_model(folder, store.path, device="cpu")


def test_a_report_says_what_was_found(store: EmbeddingStore, model: Path, tmp_path: Path) -> None:
    config = EvaluationConfig(
        curve_calls=(), shown=0, device="cpu", draws=2, distribution_samples=64, bootstrap=20, half_samples=4
    )
    result = evaluate_models([model], store.path, tmp_path / "report", config, progress=False)
    found = read_calibration(model)
    assert found is not None and result["models"][0]["calibration"] == asdict(found)
    assert result["summary"][-2:] == found.sentences()
    assert f"noise x {found.noise_scale:.3g}" in result["methods"][0]["about"]
    assert "Sampling starts from" in (tmp_path / "report" / "report.html").read_text()


def test_generation_with_another_scale_is_another_generation(
    store: EmbeddingStore, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        str(model),
        str(store.path),
        str(tmp_path / "tokens.npz"),
        "--num_samples",
        "4",
        "--device",
        "cpu",
    ]
    assert main(["generate", *words]) == 0
    assert main(["generate", *words, "--no-calibrate"]) == 2
    assert "noise_scale is" in capsys.readouterr().err
    # An output of a version that did not note the scale has one of 1.
    request = {"sampling": {"solver": "euler"}}
    assert not differences(request, {"sampling": {"solver": "euler", "noise_scale": 1.0}})
    assert differences(request, {"sampling": {"solver": "euler", "noise_scale": 0.9}})


@pytest.mark.parametrize("source", ["noise", "ridge", "ridge_context_spread"])
def test_the_scale_is_of_the_noise_alone(source: str) -> None:
    """An untrained network of the preconditioned kind carries x_0 = R(c) + s eps to nearly itself."""
    components = 2 if source == "ridge_context_spread" else 0
    flow = dict(source=source, source_components=components, prediction_type="v_prediction")
    model = BLIP3oDiTModel(tiny_config(flow_matching=flow)).eval()
    eva = torch.randn(3, 9, 12)
    noise, twice, none = (
        model.generate(eva, num_inference_steps=1, noise_scale=scale) for scale in (1.0, 2.0, 0.0)
    )
    torch.testing.assert_close(twice - none, 2 * (noise - none))
    assert torch.equal(noise, model.generate(eva, num_inference_steps=1))
    mean = model.predict_mean(eva)
    set_noise_scale(model, 2.0)
    assert torch.equal(twice, model.generate(eva, num_inference_steps=1))
    assert torch.equal(mean, model.predict_mean(eva))


def test_a_student_has_its_own(store: EmbeddingStore, model: Path, tmp_path: Path) -> None:
    config = DistillationConfig(steps=1, train_steps=2, teacher_steps=1)
    student = distill(model, store.path, tmp_path / "student", config, progress=False)
    found = read_calibration(student)
    assert found is not None and found.energy_scores == [] and len(found.sentences()) == 1
    assert BLIP3oDiTConfig.from_pretrained(student).flow.noise_scale == found.noise_scale
    # With nothing held back for it, its teacher's.
    (model / "checksums.json").unlink()
    settings = json.loads((model / "training_config.json").read_text())
    (model / "training_config.json").write_text(json.dumps(settings | {"calibrate": False}))
    other = distill(model, store.path, tmp_path / "other", config, progress=False)
    assert read_calibration(other) is None
    scales = [BLIP3oDiTConfig.from_pretrained(folder).flow.noise_scale for folder in (model, other)]
    assert scales[0] == scales[1] != 1.0


def test_any_number_of_processes_finds_the_same(store: EmbeddingStore) -> None:
    model = BLIP3oDiTModel(tiny_config()).eval()
    randomize(model)

    class Other(Processes):
        def sum(self, tensor: Tensor) -> Tensor:
            return tensor

    indices = np.arange(7)
    alone = HeldBack(store, indices, batch_size=2).scores(model)
    parts = [
        HeldBack(store, indices, batch_size=2, processes=Other(rank, 3)).scores(model) for rank in range(3)
    ]
    for name in ("energy", "spread", "error"):
        assert torch.equal(sum(getattr(part, name) for part in parts), getattr(alone, name))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"noise_scale": None}, "noise_scale: expected"),
        ({"before": {}}, "before: expected energy_score and spread_error_ratio"),
        ({"energy_scores": [[1]]}, "energy_scores: expected pairs"),
        ({"more": 1}, "unknown 'more'|unknown \\['more'\\]"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    figures = {"energy_score": 0.5, "spread_error_ratio": 1.0}
    good = Calibration(noise_scale=1.0, samples=5, before=figures, after=figures, energy_scores=[])
    values = json.loads(good.to_json())
    (tmp_path / CALIBRATION_FILE).write_text(json.dumps(values))
    assert read_calibration(tmp_path) == good
    (tmp_path / CALIBRATION_FILE).write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=said):
        read_calibration(tmp_path)
