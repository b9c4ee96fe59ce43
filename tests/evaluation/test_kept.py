"""An evaluation that was stopped goes on with the same command, to the same figures."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blip3o_dit.cli.main import main
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.evaluation import evaluate, kept, report
from blip3o_dit.evaluation.baselines import BaselineSampler, TrainingMean
from blip3o_dit.evaluation.config import EvaluationConfig
from blip3o_dit.evaluation.evaluate import evaluate_models
from blip3o_dit.evaluation.samplers import ModelSampler
from blip3o_dit.utils import kept_state
from blip3o_dit.utils.folder_lock import FolderInUseError, folder_lock
from tests.helpers.evaluation import small_evaluation
from tests.helpers.stores import write_linear_store
from tests.helpers.training import train_model

MODELS = ("a", "b")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, their store, and an uninterrupted evaluation in `out`."""
    root = tmp_path_factory.mktemp("kept")
    store = write_linear_store(root / "store", samples=30)
    train_model(store, root / "a", max_steps=2)
    shutil.copytree(root / "a", root / "b", ignore=shutil.ignore_patterns("checkpoint-*"))
    (root / "b" / "model.ema.safetensors").unlink()
    (root / "b" / "checksums.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        cheap(patch)
        samples = Samples(patch, -1)
        run(root, root / "out")
        assert samples.count == 28  # of each model 3 batches and 4 points of a curve, 2 samples each
    return root


@pytest.fixture(autouse=True)
def _keep_at_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    cheap(monkeypatch)
    caplog.set_level("INFO", logger="blip3o_dit")


def cheap(patch: pytest.MonkeyPatch) -> None:
    """One baseline, no figures, and everything is kept, as in an evaluation that takes long."""

    def fit(source: Any, train: Any, **_: Any) -> list[BaselineSampler]:
        return [BaselineSampler("training mean", "", TrainingMean.fit(source, train), None)]

    patch.setattr(evaluate, "fit_baselines", fit)
    patch.setattr(report, "write_report", lambda result, folder, samples: None)
    patch.setattr(kept_state, "KEEP_EVERY", 0.0)
    patch.setattr(kept_state, "KEEP_SHARE", 0)


def config(**changes: Any) -> EvaluationConfig:
    how: dict[str, Any] = dict(num_inference_steps=1, solver="euler", batch_size=4, curve_calls=(1, 2))
    how |= dict(curve_samples=4, split="eval", draw_samples=12, gallery_samples=4)
    return small_evaluation(**(how | changes))


def run(root: Path, output: Path, *, models: tuple[str, ...] = MODELS, **changes: Any) -> dict[str, Any]:
    folders = [root / name for name in models]
    return evaluate_models(folders, root / "store", output, config(**changes), progress=False)


def figures(output: Path) -> dict[str, Any]:
    """All of metrics.json but for times and memory."""
    content: dict[str, Any] = json.loads((output / "metrics.json").read_text())
    for method in content["methods"]:
        method["cost"] = {"network_calls": method["cost"]["network_calls"]}
    for points in content["curve"].values():
        for point in points:
            point.pop("milliseconds_per_sample")
    summary = [re.sub(r"[\d.e+]+ ms", "", line) for line in content["summary"]]
    return content | {"command": None, "summary": summary}


class Samples:
    """Counts the batches that models sample, and interrupts instead of one."""

    def __init__(self, patch: pytest.MonkeyPatch, before: int) -> None:
        self.count = 0
        whole = ModelSampler.sample

        def sample(*arguments: Any) -> Any:
            if self.count == before:
                raise KeyboardInterrupt
            self.count += 1
            return whole(*arguments)

        patch.setattr(ModelSampler, "sample", sample)


def stop(root: Path, output: Path, before: int, **changes: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Samples(patch, before)
        with pytest.raises(KeyboardInterrupt):
            run(root, output, **changes)


@pytest.mark.parametrize("before", [3, 5, 8, 13, 21, 27])
def test_an_interrupted_evaluation_goes_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int, caplog: Any
) -> None:
    """In the first model, in the second, in the curves."""
    stop(root, tmp_path / "out", before)
    assert not (tmp_path / "out" / "metrics.json").exists()
    samples = Samples(monkeypatch, -1)
    run(root, tmp_path / "out")
    # Only the batch, or the point of a curve, that was interrupted is sampled again.
    assert 28 - before <= samples.count <= 28 - before + 2
    assert "going on with an evaluation that was stopped" in caplog.text
    assert figures(tmp_path / "out") == figures(root / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"metrics.json", "README.md"}


def test_an_old_report_stays_until_the_new_one_is_whole(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "out", tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    for samples in (3, 6):
        stop(root, tmp_path / "out", samples, seed=1)
        assert before == {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir() if f.is_file()}
    run(root, tmp_path / "out", seed=1)
    assert figures(tmp_path / "out")["settings"]["seed"] == 1
    assert not (tmp_path / "out" / kept.PARTS_FOLDER).exists()


def nothing(patch: pytest.MonkeyPatch, store: Path) -> None: ...


def other_data(patch: pytest.MonkeyPatch, store: Path) -> None:
    patch.setattr(EmbeddingStore, "fingerprint", lambda self: "other")


def other_code(patch: pytest.MonkeyPatch, store: Path) -> None:
    patch.setattr(kept, "_digest_of_code", lambda: "other")


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (nothing, {"seed": 1}, "seed is 0 there, 1 here"),
        (nothing, {"num_inference_steps": 2}, "num_inference_steps is 1 there, 2 here"),
        (nothing, {"guidance_scale": 2.0}, "guidance_scale is 1.0 there, 2.0 here"),
        (nothing, {"num_samples": 5}, "samples is 12 there, 5 here"),
        (nothing, {"models": ("b", "a")}, "another model"),
        (other_data, {}, "other data"),
        (other_code, {}, "another version of the code"),
    ],
)
def test_another_request_begins_anew(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[pytest.MonkeyPatch, Path], None],
    options: dict[str, Any],
    message: str,
) -> None:
    stop(root, tmp_path / "out", 3)
    change(monkeypatch, root / "store")
    stop(root, tmp_path / "out", 0, **options)
    assert message in caplog.messages[-1] and "begun anew, not continued" in caplog.messages[-1]
    assert not list((tmp_path / "out").iterdir())  # nothing was kept


def test_two_evaluations_into_one_folder(root: Path, tmp_path: Path) -> None:
    parts = tmp_path / "out" / kept.PARTS_FOLDER
    parts.mkdir(parents=True)
    with folder_lock(parts, "evaluation"), pytest.raises(FolderInUseError, match="evaluation by"):
        run(root, tmp_path / "out")


def test_the_command_says_what_it_does_and_how_to_go_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    words = ["evaluate", str(root / "a"), str(root / "store"), "--output_dir", str(tmp_path / "out")]
    words += ["--num_inference_steps", "1", "--solver", "euler", "--curve_calls", "1", "--draws", "2"]
    words += ["--batch_size", "4", "--bootstrap", "4", "--shown", "0", "--device", "cpu"]
    with monkeypatch.context() as patch:
        Samples(patch, 3)
        assert main(words) == 75
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"stopped: {tmp_path / 'out'}: what is measured is kept: the same command goes on"
    )
    assert main(words) == 0
    out, err = capsys.readouterr()
    slow = ("blip3o-dit evaluate: starting", "loading the model", "drawing the figures")  # said if they last
    lines = [line for line in err.replace("\r", "\n").splitlines() if line and not line.startswith(slow)]
    assert re.sub(r"about \d+", "about 1", "\n".join(lines)).splitlines() == [
        f"{tmp_path / 'out'}: going on with an evaluation that was stopped",
        "sampling 24 times, 1 network call each, and a cost curve: about 1 s",
        f"the report: {tmp_path / 'out' / 'report.html'}",
    ]
    assert out and "sampling" not in out
