"""Zero-shot classification: class names through CLIP's text tower, and where they go in an evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from blip3o_dit.cli.main import main
from blip3o_dit.data.store import EmbeddingStore, StoreWriter
from blip3o_dit.evaluation.evaluate import evaluate_models
from blip3o_dit.evaluation.reference import ClassTexts
from blip3o_dit.extraction.text_tower import class_vectors, read_class_names
from tests.data.test_store import refused
from tests.helpers.evaluation import small_evaluation
from tests.helpers.training import train_model

NAMES = ["cat", "dog", "bird"]
WIDTH = 8


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP with a tokenizer of letters."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    CLIPTokenizer({word: number for number, word in enumerate(words)}, []).save_pretrained(folder)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    text = sizes | dict(vocab_size=len(words), bos_token_id=0, eos_token_id=1, projection_dim=WIDTH)
    vision = sizes | dict(image_size=8, patch_size=4, projection_dim=WIDTH)
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)).save_pretrained(
        folder
    )
    return folder


def test_names_are_read_as_clip_reads_them(clip: Path) -> None:
    found = class_vectors(NAMES, str(clip))
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    words = tokenizer([f"a photo of a {name}" for name in NAMES], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model.text_model(**words).pooler_output
        expected = F.normalize(model.text_projection(hidden), dim=-1)
    torch.testing.assert_close(found, expected)
    assert found.std(dim=0).min() > 1e-4  # other names, other vectors


def test_what_is_no_text_tower_is_refused(clip: Path, tmp_path: Path) -> None:
    for file in clip.iterdir():
        if file.name not in ("vocab.json", "tokenizer.json"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert "expected a tokenizer beside the text tower, found none" in refused(
        lambda: class_vectors(NAMES, str(tmp_path))
    )
    names = tmp_path / "names.txt"
    names.write_text("cat\n\n cat \n")
    assert "expected two or more classes, each once, found 2 lines" in refused(
        lambda: read_class_names(names)
    )
    names.write_bytes(b"\xff\xfe\x00")
    assert "expected lines of text in UTF-8" in refused(lambda: read_class_names(names))
    names.write_text("cat\n\n  dog \n")
    assert read_class_names(names) == ["cat", "dog"]


def known_store(path: Path, vectors: torch.Tensor, labels: list[Any]) -> EmbeddingStore:
    """Targets are near the text of their class, but for every eighth, which has the next one's."""
    generator = torch.Generator().manual_seed(0)
    count, classes = 48, torch.arange(48) % len(vectors)
    shown = torch.where(torch.arange(count) % 8 == 0, (classes + 1) % len(vectors), classes)
    clip = vectors[shown][:, None] + 0.01 * torch.randn(count, 1, WIDTH, generator=generator)
    eva = torch.randn(count, 1, 5, generator=generator)
    records = [{"key": str(row), "label": labels[int(classes[row])]} for row in range(count)]
    writer = StoreWriter(path, num_tokens=1, condition_dim=5, target_dim=WIDTH, dtype="float32")
    with writer:
        writer.append(eva, clip, records)
    return EmbeddingStore(path)


def test_accuracies_that_are_known(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """42 of 48 true targets lie at the text of their label; by its number or by its own text."""
    vectors = torch.eye(3, WIDTH)
    store = known_store(tmp_path / "store", vectors, [0, 1, 2])
    model = train_model(store, tmp_path / "model")
    config = small_evaluation(num_inference_steps=2, split="all", fit_on=str(store.path))
    for labels, lines in (([0, 1, 2], NAMES), (NAMES, NAMES)):
        named = known_store(tmp_path / f"named {labels[0]}", vectors, labels)
        texts = ClassTexts(lines, vectors)
        result = evaluate_models([model], named, tmp_path / "out", config, texts=texts, progress=False)
        assert result["data"]["zero_shot_accuracy_of_truth"]["value"] == 42 / 48
        used = {method["name"]: method["metrics"]["use"] for method in result["methods"]}
        assert 0 <= used["DiT"]["zero_shot_accuracy"]["value"] <= 1
        assert used["training mean"]["zero_shot_accuracy"]["value"] == pytest.approx(1 / 3, abs=0.06)
    own = small_evaluation(num_inference_steps=2)
    result = evaluate_models([model], store, tmp_path / "own", own, progress=False)
    assert result["data"]["zero_shot_accuracy_of_truth"] is None
    assert result["data"]["prototype_accuracy_of_truth"]["value"] > 0.6
    assert "prototype_accuracy" in result["methods"][0]["metrics"]["use"]
    assert "found no line for the label '2'" in refused(
        lambda: evaluate_models(
            [model], store, tmp_path / "x", own, texts=ClassTexts(["a", "b"], vectors[:2])
        )
    )
    assert "expected texts 8 wide, as the tokens, found 3" in refused(
        lambda: evaluate_models([model], store, tmp_path / "x", own, texts=ClassTexts(NAMES, torch.eye(3)))
    )
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    words = ["evaluate", str(model), str(store.path), "--output_dir", str(tmp_path / "cli"), "--draws=2"]
    words += ["--curve_calls", "1", "--class_names", str(tmp_path / "names.txt")]
    assert main(words) == 2
    assert "expected --class_names and --clip together" in capsys.readouterr().err
    assert main([*words, "--clip", str(clip), "--num_inference_steps=1", "--bootstrap=4"]) == 0
    found = json.loads((tmp_path / "cli" / "metrics.json").read_text())
    assert "zero_shot_accuracy" in found["methods"][0]["metrics"]["use"]
    assert "zero-shot accuracy" in (tmp_path / "cli" / "report.html").read_text()
