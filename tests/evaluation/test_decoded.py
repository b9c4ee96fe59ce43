"""evaluate --decoder: predicted tokens as pictures, on the page and in metrics.json."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from blip3o_dit.cli.main import main
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.decoder.folder import load_decoder, save_decoder
from blip3o_dit.decoder.pictures import quality
from blip3o_dit.evaluation.baselines import PositionMean
from blip3o_dit.evaluation.decoded import check_decoder
from blip3o_dit.training.config import SPLIT_SETTINGS, TrainingConfig
from tests.helpers.painted import painted_store, random_decoder
from tests.helpers.training import train_model

FEW = ["--num_inference_steps=1", "--curve_calls", "--bootstrap=4", "--draws=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, its pictures, a model, a decoder and an evaluation with it."""
    folder = tmp_path_factory.mktemp("decoded")
    store, images = painted_store(folder)
    train_model(store, folder / "model", num_epochs=1, eval_samples=0)
    decoder, run = random_decoder(), TrainingConfig.from_folder(folder / "model")
    decoder.about = {
        "settings": {name: getattr(run, name) for name in SPLIT_SETTINGS},
        "held_out": {"decoder": {"psnr": 21.5, "l1": 0.1}},
    }
    save_decoder(decoder, folder / "decoder")
    words = ["evaluate", str(folder / "model"), str(store.path), "--decoder", str(folder / "decoder")]
    words += ["--pictures", str(images), "--output_dir", str(folder / "out"), "--shown=2", *FEW]
    assert main([*words, "--device=cpu"]) == 0
    return folder


def test_every_method_is_measured(folder: Path) -> None:
    metrics = json.loads((folder / "out" / "metrics.json").read_text())
    decoded, decoder = metrics["decoded"], load_decoder(folder / "decoder")
    assert list(decoded["methods"]) == [method["name"] for method in metrics["methods"]]
    assert (decoded["picture_size"], decoded["true_tokens_psnr"]) == (12, 21.5)
    assert [name for name, method in decoded["methods"].items() if method["is_model"]] == ["DiT"]
    store = EmbeddingStore(folder / "store")
    split = TrainingConfig.from_folder(folder / "model").split(store)
    assert decoded["samples"] == len(split.eval)
    true = decoder.decode(store.fetch(split.eval)[1])
    mean = PositionMean.fit(store, split.train).mean.expand(len(true), -1, -1)
    expected = quality(decoder.decode(mean), true)
    found = decoded["methods"]["position mean"]["best_guess"]
    for figure in ("psnr", "l1"):
        assert found[figure]["value"] == pytest.approx(expected[figure].mean(), rel=0.02)
    said = next(line for line in metrics["summary"] if line.startswith("Decoded to pictures"))
    psnr = decoded["methods"]["DiT"]["sample"]["psnr"]["value"]
    assert f"DiT {psnr:.1f} dB" in said and "ridge" in said and f"{len(true)} samples" in said


def test_the_page_shows_them(folder: Path) -> None:
    page = (folder / "out" / "report.html").read_text()
    strips = re.findall(r'<div class="strip"><span>(.*?)</span>(.*?)</div>', page, flags=re.DOTALL)
    shown = {name: cells.count("data:image/jpeg") for name, cells in strips}
    for name in ("true tokens", "DiT, sample 1", "DiT, best guess", "ridge, best guess", "position mean"):
        assert shown[f"{name}, decoded"] == 2
    assert list(shown).index("true tokens, decoded") > next(
        at for at, name in enumerate(shown) if "found by its name" in name
    )
    assert "<h2>Decoded to pictures</h2>" in page
    assert "The decoder is small" in page and "a PSNR of 21.5 dB" in page


def loaded(folder: Path, *, normalize: bool = False) -> Any:
    config = SimpleNamespace(normalize_embeddings=normalize)
    return [SimpleNamespace(model_path=folder / "model", model=SimpleNamespace(config=config))]


def test_a_decoder_that_does_not_fit_is_refused(
    folder: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    store = EmbeddingStore(folder / "store")
    with pytest.raises(ValueError, match=r"expected 9 tokens of 7 numbers, .* found 9 of 8"):
        check_decoder(random_decoder(channels=7), loaded(folder), store)
    with pytest.raises(ValueError, match=r"L2-normalised tokens .* \(train-decoder --normalize_embeddings\)"):
        check_decoder(random_decoder(), loaded(folder, normalize=True), store)
    decoder = load_decoder(folder / "decoder")
    with caplog.at_level(logging.WARNING):
        check_decoder(decoder, loaded(folder), store)
        assert not caplog.text
        decoder.about["settings"]["seed"] = 7
        check_decoder(decoder, loaded(folder), store)
    assert "was trained on another split (seed 7, not 42) than the model" in caplog.text
    words = ["evaluate", str(folder / "model"), str(folder / "store"), "--decoder", str(folder / "model")]
    assert main(words) == 2
    assert "expected a decoder's folder, found a trained model" in capsys.readouterr().err
