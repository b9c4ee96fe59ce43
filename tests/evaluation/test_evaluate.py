"""blip3o-dit evaluate: the files it writes, what it refuses, and the page in a browser."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from blip3o_dit.cli.arguments import use_tf32
from blip3o_dit.cli.main import main
from blip3o_dit.data import store as store_module
from blip3o_dit.data.store import EmbeddingStore, StoreWriter
from blip3o_dit.evaluation import evaluate, metric_tables, scores
from blip3o_dit.evaluation.config import EvaluationConfig
from blip3o_dit.evaluation.evaluate import evaluate_models
from blip3o_dit.evaluation.reference import collect_reference
from blip3o_dit.evaluation.report import write_report
from blip3o_dit.evaluation.samplers import ModelSampler
from blip3o_dit.evaluation.samples import check_comparable, fitting_samples
from blip3o_dit.evaluation.summary import compare
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.inference.request import choose_indices
from blip3o_dit.metrics.downstream import retrieval_ranks
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.training.resolve import resolve_config
from blip3o_dit.utils.checksums import seal
from blip3o_dit.utils.stateless_random import stateless_choice
from tests.helpers.evaluation import small_evaluation
from tests.helpers.stores import write_linear_store
from tests.helpers.training import train_model

QUICK = ["--num_inference_steps", "2", "--curve_calls", "1", "2", "--bootstrap", "50", "--device", "cpu"]


def labelled_store(path: Path) -> EmbeddingStore:
    """As `write_linear_store`, with labels that the tokens tell."""
    plain = write_linear_store(path.with_name("plain"), samples=80)
    eva, clip = plain.fetch(range(80))
    labels = ["high" if value > 0 else "low" for value in clip.mean(dim=(1, 2)) - clip.mean()]
    records = [{"key": f"k{i}", "label": label} for i, label in enumerate(labels)]
    with StoreWriter(path, num_tokens=9, condition_dim=12, target_dim=8, dtype="float32") as writer:
        writer.append(eva, clip, records)
    return EmbeddingStore(path)


def small(models: list[Path], store: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """An evaluation that takes little: two solver steps, and see `small_evaluation`."""
    config = small_evaluation(**(dict(num_inference_steps=2, gallery_samples=16) | changes))
    return evaluate_models(models, store, output, config, progress=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trained models `a` and `b`, their store, and one evaluation of both in `out`."""
    root = tmp_path_factory.mktemp("evaluate")
    store = labelled_store(root / "store")
    for name, changes in (("a", {"source": "noise"}), ("b", {"max_steps": 6})):
        train_model(store, root / name, **changes)
    words = ["evaluate", str(root / "a"), str(store.path), "--compare", str(root / "b")]
    assert main([*words, "--output_dir", str(root / "out"), "--regression_steps", "3", *QUICK]) == 0
    return root


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "metrics.json").read_text())


def test_every_method_is_there_with_every_figure(result: dict[str, Any]) -> None:
    names = [method["name"] for method in result["methods"]]
    baselines = ["training mean", "position mean", "ridge", "ridge 3x3", "procrustes", "nearest neighbours"]
    assert names == ["a", "b", *baselines, "network regression"]
    groups = {"sample", "best_guess", "use", "tokens", "pooled", "conditional"}
    for method in result["methods"]:
        assert set(method["metrics"]) == groups
        assert method["metrics"]["use"]["probe_accuracy"]["value"] >= 0
        assert len(method["maps"]["cosine"]) == len(method["maps"]["r2"]) == 9
        for group in method["metrics"].values():
            for name, figure in group.items():
                assert set(figure) == {"value", "low", "high"}, name
                assert isinstance(figure["value"], float), name
    assert result["data"]["num_samples"] == 32
    assert result["floor"]["samples"] == 32


def test_the_schema_is_documented(result: dict[str, Any]) -> None:
    text = Path(__file__).parents[2].joinpath("docs", "evaluation.md").read_text()
    method = result["methods"][0]
    names = {*result, *result["data"], *method, *method["cost"], *result["curve"]["a"][0]}
    names |= {name for group in method["metrics"].values() for name in group} | set(method["metrics"])
    missing = {name for name in names if f"`{name}`" not in text}
    assert not missing


def test_the_figures_are_those_of_the_inference_class(folder: Path, result: dict[str, Any]) -> None:
    inference = BLIP3oInference(folder / "a", device="cpu")
    metrics = inference.evaluate_model(folder / "store", num_inference_steps=2, progress=False)
    for name, estimate in result["methods"][0]["metrics"]["sample"].items():
        assert estimate["value"] == pytest.approx(metrics[name], rel=1e-6), name
    generated = inference.generate_from_dataset(
        folder / "store", split="eval", num_inference_steps=2, progress=False
    )
    assert generated["generation_metrics"] == pytest.approx(
        {name: metrics[name] for name in generated["generation_metrics"]}, rel=1e-6
    )


def test_ridge_beats_an_untrained_model_and_the_summary_says_so(result: dict[str, Any]) -> None:
    first = result["summary"][0]
    assert first.startswith("a is worse than ridge") and "train longer" in first
    assert any("a is " in line and " b by energy score" in line for line in result["summary"])
    assert any("Only 32 samples" in line for line in result["summary"])


def test_the_curve_counts_network_calls(result: dict[str, Any]) -> None:
    points = [(point["solver"], point["network_calls"]) for point in result["curve"]["a"]]
    assert points == [("euler", 1), ("euler", 2), ("midpoint", 2), ("heun", 2)]


def test_the_line_of_the_curve_is_measured_on_the_samples_of_the_curve(
    folder: Path, result: dict[str, Any]
) -> None:
    """Else a line of easier samples would lie too low."""
    scored = {
        method["name"]: method["metrics"]["conditional"]["energy_score"]["value"]
        for method in result["methods"]
        if not method["is_model"]
    }
    assert result["curve_baseline"]["name"] == min(scored, key=lambda name: scored[name])
    asked: list[int] = []

    def sample(eva: torch.Tensor, indices: list[int], sample_number: int) -> torch.Tensor:
        asked.extend(indices)
        return torch.zeros(len(indices), 9, 8)

    indices = np.arange(32) + 40
    reference = collect_reference(
        EmbeddingStore(folder / "store"),
        indices,
        mean=torch.zeros(8),
        std=torch.ones(8),
        config=small_evaluation(curve_samples=16),
        progress=lambda items, _: items,
    )
    found = scores.curve_energy_score(SimpleNamespace(sample=sample), reference)  # type: ignore[arg-type]
    chosen = indices[stateless_choice(32, 16, seed=0, stream="curve samples")]
    assert asked == [*chosen, *chosen] and found["value"] > 0 and found["low"] is None


def test_paired_differences_between_models(result: dict[str, Any]) -> None:
    a, b = (m["metrics"]["conditional"]["energy_score"]["value"] for m in result["methods"][:2])
    found = result["differences"]["a"]["b"]["conditional.energy_score"]
    assert found["value"] == pytest.approx(a - b, abs=1e-9)
    assert result["differences"]["b"]["a"]["conditional.energy_score"]["value"] == pytest.approx(
        b - a, abs=1e-9
    )


def test_the_page_stands_alone(folder: Path, result: dict[str, Any]) -> None:
    page = (folder / "out" / "report.html").read_text()
    assert "<script" not in page
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", page)
    assert not re.findall(r"url\((?!#)", page)
    assert not re.findall(r"https?://", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for name in ("viewport", "color-scheme: light", "@media print", "@media (max-width: 40rem)"):
        assert name in page
    images = re.findall(r"<img [^>]*>", page)
    assert len(images) == 6 * 8 + 5 and all(re.search(r' alt="[^"]+"', image) for image in images)
    assert len(page) < 400_000


def test_page_console_and_card_say_what_metrics_json_says(
    folder: Path, result: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page, card = ((folder / "out" / name).read_text() for name in ("report.html", "README.md"))
    for line in result["summary"]:
        assert f"<p>{line}</p>" in html.unescape(page)
        assert f"* {line}" in card.replace("\\", "")
    monkeypatch.setattr(evaluate, "evaluate_models", lambda *_, **__: result)
    assert main(["evaluate", str(folder / "a"), str(folder / "store")]) == 0
    assert capsys.readouterr().out.splitlines() == result["summary"]
    row = next(line for line in card.splitlines() if line.startswith("| ridge 3x3"))
    assert row.count(" to ") >= 3  # intervals
    assert "num_inference_steps" not in card  # a student has its own


def test_the_plots_are_whole_svgs_that_stand_alone(folder: Path) -> None:
    page = (folder / "out" / "report.html").read_text()
    plots = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]+)" alt="[^"]+"', page)
    assert len(plots) == page.count("<figure") == 5  # the curve, two maps of each; no spread plot: 32 samples
    names = ("2000/svg", "1999/xlink", "Graphics/SVG/1.1/DTD/svg11.dtd")  # of formats: nothing is loaded
    for plot in plots:
        text = base64.b64decode(plot).decode()
        for address in re.findall(r"https?://[^\s\"'<>]+", text):
            assert address in [f"http://www.w3.org/{name}" for name in names], address
        root = ElementTree.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", text)
        assert not re.findall(r"url\((?!#)", text)
        assert len(list(root.iter())) > 50


@pytest.mark.parametrize("samples", [99, 100])
def test_spread_is_plotted_where_it_means_something(
    result: dict[str, Any], tmp_path: Path, samples: int
) -> None:
    turned = json.loads(json.dumps(result))
    turned["data"] |= {"num_samples": 200, "drawn_samples": samples}
    write_report(turned, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert ("Spread against error" in page) == (samples >= 100)
    assert "Quality against cost, lower is better, on all 200 samples" in page


def test_names_are_escaped(folder: Path, tmp_path: Path) -> None:
    strange = tmp_path / "<b>model & co"
    shutil.copytree(folder / "a", strange)
    words = ["evaluate", str(strange), str(folder / "store"), "--output_dir", str(tmp_path / "out")]
    assert main([*words, "--num_samples", "5", *QUICK]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<b>model" not in page and "&lt;b&gt;model &amp; co" in page


def test_the_model_card_has_the_hubs_metadata(folder: Path) -> None:
    text = (folder / "out" / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["library_name"] == "blip3o-dit"
    metrics = header["model-index"][0]["results"][0]["metrics"]
    assert "conditional.energy_score" in [metric["type"] for metric in metrics]
    assert "## How good it is" in text


def test_a_readme_that_is_not_ours_is_kept(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    words = ["evaluate", str(folder / "a"), str(folder / "store"), "--output_dir", str(tmp_path)]
    assert main([*words, "--num_samples", "5", *QUICK]) == 0
    assert (tmp_path / "README.md").read_text() == "mine"
    assert (tmp_path / "report.html").is_file()


def test_by_default_the_files_lie_beside_the_weights(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "a", tmp_path / "a")
    assert main(["evaluate", str(tmp_path / "a"), str(folder / "store"), "--num_samples", "5", *QUICK]) == 0
    assert {"metrics.json", "report.html", "README.md"} <= {f.name for f in (tmp_path / "a").iterdir()}


def test_the_same_command_gives_the_same_figures(folder: Path, tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        words = ["evaluate", str(folder / "a"), str(folder / "store"), "--output_dir", str(tmp_path / name)]
        assert main([*words, *QUICK]) == 0
        content = json.loads((tmp_path / name / "metrics.json").read_text())
        for method in content["methods"]:
            method.pop("cost")
        found.append([content["methods"], content["floor"], content["differences"]])
    assert found[0] == found[1]


def test_other_embeddings_are_measured_with_the_baselines_of_the_training_ones(
    folder: Path, tmp_path: Path
) -> None:
    other = write_linear_store(tmp_path / "other", samples=30)
    words = ["evaluate", str(folder / "a"), str(other.path), "--split", "all"]
    assert main([*words, "--output_dir", str(tmp_path / "out"), *QUICK]) == 0
    content = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert content["data"]["num_samples"] == 30
    assert content["methods"][3]["name"] == "ridge"


def test_normalized_embeddings_are_compared_as_trained(folder: Path, tmp_path: Path) -> None:
    store = EmbeddingStore(folder / "store")
    model = train_model(store, tmp_path / "n", normalize_embeddings=True)
    assert main(["evaluate", str(model), str(store.path), *QUICK]) == 0
    content = json.loads((model / "metrics.json").read_text())
    by_name = {method["name"]: method for method in content["methods"]}
    assert by_name["ridge"]["metrics"]["best_guess"]["norm_ratio_mean"]["value"] == pytest.approx(1, abs=0.1)
    metrics = BLIP3oInference(model, device="cpu").evaluate_model(
        store.path, num_inference_steps=2, progress=False
    )
    assert by_name["DiT"]["metrics"]["sample"]["r2"]["value"] == pytest.approx(metrics["r2"], rel=1e-6)
    words = ["evaluate", str(folder / "a"), str(store.path), "--compare", str(model)]
    assert main([*words, *QUICK]) == 2


def error_of(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    assert main(words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error


def test_mistakes_are_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, store = str(folder / "a"), str(folder / "store")
    narrow = write_linear_store(tmp_path / "narrow", condition=11)
    assert "expected (tokens, eva width, clip width) (9, 12, 8)" in error_of(
        capsys, ["evaluate", model, str(narrow.path), *QUICK]
    )
    one = write_linear_store(tmp_path / "one", samples=1)
    assert "expected at least 2 samples to evaluate, found 1" in error_of(
        capsys, ["evaluate", model, str(one.path), "--split", "all", *QUICK]
    )
    assert "num_samples: expected at least 2, found 1" in error_of(
        capsys, ["evaluate", model, store, "--num_samples", "1", *QUICK]
    )
    assert "measure baselines on samples they were fitted on" in error_of(
        capsys, ["evaluate", model, store, "--split", "all", *QUICK]
    )
    assert "expected different models" in error_of(
        capsys, ["evaluate", model, store, "--compare", model, *QUICK]
    )
    assert "draws: expected at least 2, found 1" in error_of(
        capsys, ["evaluate", model, store, "--draws", "1", *QUICK]
    )
    assert "expected a model folder with config.json" in error_of(
        capsys, ["evaluate", str(tmp_path / "nothing"), store, *QUICK]
    )
    other = train_model(EmbeddingStore(folder / "store"), tmp_path / "c", seed=9)
    assert "expected seed 42" in error_of(capsys, ["evaluate", model, store, "--compare", str(other), *QUICK])
    assert not (tmp_path / "out").exists()


def test_nan_in_the_data_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pickle

    eva, clip = EmbeddingStore(folder / "store").fetch(range(80))
    clip[5, 0, 0] = float("nan")
    content = {"eva_blip3o_embeddings": eva.numpy(), "clip_blip3o_embeddings": clip.numpy()}
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(content))
    error = error_of(capsys, ["evaluate", str(folder / "a"), str(tmp_path / "bad.pkl"), *QUICK])
    assert "NaN or infinity in 1 samples, first in sample 5" in error
    (tmp_path / "empty.pkl").write_bytes(pickle.dumps({name: values[:0] for name, values in content.items()}))
    error = error_of(capsys, ["evaluate", str(folder / "a"), str(tmp_path / "empty.pkl"), *QUICK])
    assert "expected at least one sample" in error


def test_differences_are_read_by_their_interval() -> None:
    assert compare({"value": -1.0, "low": -2.0, "high": -0.5}) == "better"
    assert compare({"value": 1.0, "low": 0.5, "high": 2.0}) == "worse"
    assert compare({"value": 1.0, "low": 0.5, "high": 2.0}, lower=False) == "better"
    assert compare({"value": 1.0, "low": -0.5, "high": 2.0}) == "equal"
    assert compare({"value": 1.0, "low": None, "high": None}) == "equal"


def test_baselines_are_not_measured_on_what_they_were_fitted_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--split train: they are fitted on the held-out side, and refused where there is none."""
    measured, fitted = [], []

    def gather(source: Any, indices: np.ndarray, **options: Any) -> Any:
        measured.append(indices)
        return collect_reference(source, indices, **options)

    def fit(source: Any, train: np.ndarray, **options: Any) -> Any:
        fitted.append(train)
        return []

    monkeypatch.setattr(evaluate, "collect_reference", gather)
    monkeypatch.setattr(evaluate, "fit_baselines", fit)
    store = folder / "store"
    found = small([folder / "a"], store, tmp_path / "out", split="train")
    assert len(measured[0]) == 48 and len(fitted[0]) == 32 and not set(measured[0]) & set(fitted[0])
    assert found["data"]["fitted_samples"] == found["floor"]["samples"] == 32
    assert found["floor"]["tokens"]["frechet"]["value"] > 0
    whole = tmp_path / "whole"
    shutil.copytree(folder / "a", whole)
    run = json.loads((whole / "training_config.json").read_text())
    (whole / "training_config.json").write_text(json.dumps(run | {"eval_split": 0.0}))
    seal(whole)
    refused = error_of(capsys, ["evaluate", str(whole), str(store), "--split", "train", *QUICK])
    assert "nothing was held out (eval_split 0); expected other embeddings in --fit_on" in refused
    other = str(write_linear_store(tmp_path / "other", samples=30).path)
    found = small([whole], store, tmp_path / "out", split="train", fit_on=other)
    assert found["data"]["fitted_on"] == other and len(fitted[-1]) == 30


def test_every_command_holds_out_the_groups_of_the_run(tmp_path: Path) -> None:
    """Evaluation on both sides, generation, a student and a resumed run; other groups are not comparable."""
    store = write_linear_store(tmp_path / "store")
    groups = {"split_by": "group", "group_pattern": r"(\d)$", "eval_split": 0.4}
    models = []
    for name, changes in (("a", {}), ("b", {"group_pattern": r"-(\d)"})):
        run = TrainingConfig(embeddings_path=str(store.path), output_dir="x", **(groups | changes))
        (tmp_path / name).mkdir()
        (tmp_path / name / "training_config.json").write_bytes(run.to_json())
        model = SimpleNamespace(config=SimpleNamespace(normalize_embeddings=False))
        models.append(SimpleNamespace(model=model, model_path=tmp_path / name, open=lambda source: source))
    split = TrainingConfig.from_folder(tmp_path / "a").split(store)
    last_digits = [{index % 10 for index in side} for side in (split.train, split.eval)]
    assert not last_digits[0] & last_digits[1] and all(last_digits)
    for side, other in (("eval", split.train), ("train", split.eval)):
        config = EvaluationConfig(split=side)
        _, fitted, numbers = fitting_samples(models[:1], store, config)  # type: ignore[arg-type]
        assert np.array_equal(fitted, other) and np.array_equal(numbers, split.groups)
        chosen = choose_indices(tmp_path / "a", store, side)
        assert sorted([*chosen, *other]) == list(range(48))
    with pytest.raises(ValueError, match=r"expected group_pattern \(\\d\)\$ as in .*found -\(\\d\)"):
        check_comparable(models, EvaluationConfig())  # type: ignore[arg-type]
    resumed = resolve_config({}, debug=False, resume=tmp_path / "a")
    assert (resumed.split_by, resumed.group_pattern) == ("group", r"(\d)$")
    with pytest.raises(ValueError, match="cannot resume with other settings: group_pattern was"):
        resolve_config({"group_pattern": "x"}, debug=False, resume=tmp_path / "a")


def test_baselines_see_as_many_samples_as_the_models_own_source(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "MIN_FIT_SAMPLES", 10)
    run = json.loads((folder / "b" / "training_config.json").read_text())
    shutil.copytree(folder / "b", tmp_path / "b")
    (tmp_path / "b" / "training_config.json").write_text(json.dumps(run | {"source_samples": 24}))
    seal(tmp_path / "b")
    monkeypatch.setattr(
        evaluate, "fit_baselines", lambda *_, max_samples, **__: asked.append(max_samples) or []
    )
    asked: list[int] = []
    found = {
        wanted: small(
            [tmp_path / "b"], folder / "store", tmp_path / "out", fit_samples=wanted, draw_samples=20
        )
        for wanted in (None, 12)
    }
    assert asked == [24, 12]
    unfair = "The baselines were fitted on 12 samples, the model's own ridge source on 24"
    assert not any("own ridge source" in line for line in found[None]["summary"])
    assert any(line.startswith(unfair) for line in found[12]["summary"])


def test_what_is_measured_is_bounded_and_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def ranks(queries: Any, gallery: Any) -> Any:
        sizes.append((len(queries), len(gallery)))
        return retrieval_ranks(queries, gallery)

    monkeypatch.setattr(metric_tables, "retrieval_ranks", ranks)
    monkeypatch.setattr(evaluate, "fit_baselines", lambda *_, **__: [])
    counts = dict(num_samples=25, gallery_samples=20, draw_samples=20)
    data = small([folder / "a"], folder / "store", tmp_path, **counts)["data"]
    assert set(sizes) == {(20, 20)}
    assert (data["num_samples"], data["available_samples"], data["gallery_samples"]) == (25, 32, 20)
    page, card = ((tmp_path / name).read_text() for name in ("report.html", "README.md"))
    assert "25 of 32 samples" in page and "25 of 32 samples" in card
    assert "among those of 20 held-out samples" in page
    assert "finds its own picture first among 20 " in page


def test_the_number_of_samples_has_a_default(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(evaluate, "evaluate_models", lambda *arguments, **_: asked.append(arguments[3]) or {})
    words = ["evaluate", str(folder / "a"), str(folder / "store")]
    for more in ([], ["--num_samples", "all"], ["--num_samples", "7"]):
        assert main([*words, *more]) == 0
    assert [config.num_samples for config in asked] == [20_000, None, 7]
    assert {config.gallery_samples for config in asked} == {5000}


def test_embeddings_are_opened_once_and_pictures_looked_for_at_the_end(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A pickle of gigabytes takes minutes to open; pictures that nobody asked for are no reason to stop."""
    shutil.copytree(folder / "store", tmp_path / "store")
    manifest = tmp_path / "store" / "manifest.json"
    about = {
        "pictures": "images",
        "extraction": {"pictures": {"count": 1, "sha256": "x", "content_sha256": "x"}},
    }
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | about))
    opened: list[Path] = []
    read = store_module.read_manifest
    monkeypatch.setattr(
        store_module, "read_manifest", lambda path, **how: opened.append(path) or read(path, **how)
    )
    words = ["evaluate", str(folder / "a"), str(tmp_path / "store"), "--compare", str(folder / "b")]
    less = ["--curve_calls", "--draws", "2", "--draw_samples", "4", "--bootstrap", "2", "--shown", "1"]
    output = ["--output_dir", str(tmp_path / "out"), "--num_inference_steps", "1", "--device", "cpu"]
    assert main([*words, *less, *output]) == 0
    assert len(opened) == 1
    (line,) = [r.getMessage() for r in caplog.records if "pictures" in r.getMessage()]
    assert "images: the store does not say which they were" in line
    Image.new("RGB", (9, 9)).save(tmp_path / "k1.png")
    caplog.clear()
    for where in (tmp_path / "none", tmp_path / "k1.png"):
        assert main([*words, *less, *output, "--pictures", str(where)]) == 2
    assert len(opened) == 3  # nothing was measured


def test_bfloat16_gives_nearly_the_figures_of_float32(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not the processor multiplies bfloat16 itself."""
    monkeypatch.setattr(evaluate, "fit_baselines", lambda *_, **__: [])
    (expected,) = small([folder / "b"], folder / "store", tmp_path)["methods"]
    for regime in ("native", "emulated"):
        monkeypatch.setenv("BLIP3O_DIT_BFLOAT16", regime)
        options: dict[str, Any] = dict(dtype="bfloat16", curve_calls=(2,))
        content = small([folder / "b"], folder / "store", tmp_path, **options)
        assert content["models"][0]["dtype"] == "bfloat16"
        found = content["methods"][0]["metrics"]
        for group, name in (("sample", "r2"), ("best_guess", "r2"), ("conditional", "energy_score")):
            wanted = expected["metrics"][group][name]["value"]
            assert found[group][name]["value"] == pytest.approx(wanted, abs=0.02), (regime, name)
        assert np.isfinite(content["curve"]["DiT"][0]["r2"])


def test_models_of_other_embeddings_need_fit_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else the baselines would be those of whichever model is named first."""
    shutil.copytree(folder / "b", tmp_path / "b")
    run = json.loads((tmp_path / "b" / "training_config.json").read_text())
    (tmp_path / "b" / "training_config.json").write_text(json.dumps(run | {"embeddings_path": "elsewhere"}))
    seal(tmp_path / "b")
    other = str(write_linear_store(tmp_path / "other", samples=30).path)
    words = ["evaluate", str(folder / "a"), other, "--compare", str(tmp_path / "b"), "--split", "all"]
    assert "(--fit_on), found none; the models were trained on" in error_of(capsys, [*words, *QUICK])


def test_tf32_is_refused_where_there_is_none(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [str(folder / "a"), str(folder / "store")]
    for command in (["evaluate", *words], ["generate", *words, str(folder / "g.pkl")]):
        assert "--tf32: expected a GPU" in error_of(capsys, [*command, "--device", "cpu", "--tf32"])
    assert torch.get_float32_matmul_precision() == "highest"
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    for capability, expected in (((7, 5), []), ((9, 0), ["high"])):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        if expected:
            use_tf32("auto")
        else:
            with pytest.raises(ValueError, match=r"expected compute capability 8.0 or newer, found 7.5"):
                use_tf32("auto")
        assert asked == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generate_computes_in_the_dtype_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    models = []
    load = BLIP3oDiTModel.load_for_inference
    monkeypatch.setattr(
        BLIP3oDiTModel, "load_for_inference", lambda *a, **k: models.append(load(*a, **k)) or models[-1]
    )
    words = ["generate", str(folder / "a"), str(folder / "store"), str(tmp_path / "out")]
    assert main([*words, "--num_samples", "3", "--dtype", dtype, "--device", "cpu"]) == 0
    assert [str(model.dtype) for model in models] == [f"torch.{dtype}"]
    assert EmbeddingStore(tmp_path / "out").num_samples == 3


def browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


@pytest.fixture
def server(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The page over HTTP, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder / "out"))) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_address[1]}", asked
        http.shutdown()


@pytest.mark.skipif(browser() is None, reason="no Chromium on this machine")
def test_the_page_in_a_real_browser(server: tuple[str, list[str]], tmp_path: Path) -> None:
    """On a phone's width: nothing but the page is asked for, nothing is said on the console."""
    address, asked = server
    picture = tmp_path / "page.png"
    done = subprocess.run(
        [
            *(browser() or "", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
            *("--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}"),
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            *("--window-size=390,3000", f"--screenshot={picture}", f"{address}/report.html"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert picture.is_file(), done.stderr[-500:]
    assert "CONSOLE" not in done.stderr, done.stderr
    assert asked == ["/report.html"]
    assert np.asarray(Image.open(picture).convert("L")).std() > 10


def test_one_network_call_estimates_the_average_answer(tiny_model: Any) -> None:
    eva = torch.randn(3, 9, 12)
    estimate = tiny_model.predict_mean(eva, seed=1)
    one_step = tiny_model.generate(eva, num_inference_steps=1, seed=1)
    # Euler's single step from t = 0 to 1 lands on x_0 + v, the estimate but for sigma_min
    torch.testing.assert_close(estimate, one_step, rtol=1e-3, atol=1e-3)
    other = tiny_model.generate(eva, num_inference_steps=1, seed=1, sample_number=1)
    assert not torch.allclose(other, one_step)


def test_the_draws_of_a_model_differ_and_its_settings_reach_the_solver(tiny_model: Any) -> None:
    eva, indices = torch.randn(3, 9, 12), [4, 5, 6]
    method = ModelSampler(tiny_model, seed=3).with_calls("heun", 6)
    assert method.calls == 6 and method.num_inference_steps == 3
    options = dict(num_inference_steps=3, solver="heun", seed=3, sample_index=indices)
    draws = [method.sample(eva, indices, sample_number) for sample_number in range(2)]
    for sample_number, found in enumerate(draws):
        assert torch.equal(found, tiny_model.generate(eva, sample_number=sample_number, **options))
    assert (draws[0] - draws[1]).abs().mean() > 0.1
