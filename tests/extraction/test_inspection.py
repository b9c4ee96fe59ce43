"""Inspection finds what was planted, and nothing else."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blip3o_dit.cli.main import main
from blip3o_dit.data.store import EmbeddingStore, StoreWriter
from blip3o_dit.extraction.inspection import (
    format_inspection,
    inspect_embeddings,
    warnings_of,
)
from blip3o_dit.utils.pca_colors import pca_colors


def write(
    path: Path, eva: torch.Tensor, clip: torch.Tensor, keys: list[str], **about: object
) -> EmbeddingStore:
    sizes = dict(num_tokens=eva.shape[1], condition_dim=eva.shape[2], target_dim=clip.shape[2])
    with StoreWriter(path, **sizes, dtype="float32", shard_size=7, **about) as writer:  # type: ignore[arg-type]
        writer.append(eva, clip, [{"key": key} for key in keys])
    return EmbeddingStore(path)


def test_numbers_equal_numpy_and_planted_outliers_are_found(tmp_path: Path) -> None:
    eva, clip = torch.randn(20, 9, 12), 5 + torch.randn(20, 9, 6)
    eva[:, :, 4] *= 30
    clip[:, 7] *= 10
    store = write(tmp_path / "s", eva, clip, [f"{i}.png" for i in range(20)])
    found = inspect_embeddings(store, batch_size=6)
    norms = np.linalg.norm(clip.numpy().astype(float), axis=-1)
    side = found.sides["clip"]
    assert side.norm_mean == pytest.approx(norms.mean()) and side.norm_std == pytest.approx(norms.std())
    assert (side.norm_min, side.norm_max) == pytest.approx((norms.min(), norms.max()))
    deviations = eva.numpy().astype(float).std(axis=(0, 1))
    assert found.sides["eva"].channel_std_range == pytest.approx((deviations.min(), deviations.max()))
    channel, ratio = found.sides["eva"].outlier_channels[0]
    assert channel == 4 and 20 < ratio < 40
    position, ratio = side.outlier_positions[0]
    assert position == 7 and ratio == pytest.approx(10, rel=0.1)
    assert "row 2 column 1" in format_inspection(found)
    assert warnings_of(found) == ["no NaN, no infinity, no duplicate keys"]


def test_warnings(tmp_path: Path) -> None:
    keys = ["a", "b", "a", "c"]
    about = {"encoders": {"eva": {"name": "random", "meaningful": False}, "clip": {}}}
    store = write(tmp_path / "s", torch.randn(4, 4, 3), torch.randn(4, 4, 3), keys, **about)
    store = store.unverified()
    store._map(0)[1][1, 2, 0] = float("nan")  # as a store of another program might hold
    warnings = warnings_of(inspect_embeddings(store))
    assert warnings == [
        "warning: eva: tower from scratch, these tokens mean nothing",
        "warning: clip: NaN or infinity in 1 samples, first b",
        "warning: 1 keys are there more than once: a",
    ]


def test_pca_colors_tell_tokens_apart_as_the_data_does() -> None:
    tokens = torch.zeros(2, 4, 5)
    tokens[0, 0] = 1.0
    tokens[1, 0] = 1.0
    noisy = (tokens + 1e-3 * torch.randn(2, 4, 5)).numpy()
    colors = pca_colors(noisy, noisy).reshape(2, 2, 2, 3)
    assert colors.shape == (2, 2, 2, 3) and colors.min() >= 0 and colors.max() <= 1
    first = colors.sum(axis=-1)  # the first component is lightness
    assert abs(first[0, 0, 0] - first[1, 0, 0]) < 0.1 < 0.8 < abs(first[0, 0, 0] - first[0, 1, 1])


NAMES = {
    "formula": "$x_1^{2",
    "dollars": "$\\frac{$",
    "Latin-1": os.fsdecode(b"caf\xe9.png"),
    "control": "a\x1b[2J\nb\x00",
    "right to left": "\u202eتصویر",
    "no glyph": "漢字\U0001f600\ue000",
    "long": "x" * 10_000,
}


@pytest.mark.parametrize("name", NAMES)
def test_any_name_and_any_caption_in_the_picture(
    name: str, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    text = NAMES[name]
    with StoreWriter(
        tmp_path / "store $x_1", num_tokens=4, condition_dim=3, target_dim=2, dtype="float32"
    ) as writer:
        records = [{"key": text, "caption": text}, {"key": "other"}, {"key": text}]
        writer.append(torch.randn(3, 4, 3), torch.randn(3, 4, 2), records)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        words = ["inspect", str(tmp_path / "store $x_1"), "--picture", str(tmp_path / "p.png")]
        assert main([*words, "--json", str(tmp_path / "found.json")]) == 0
    assert Image.open(tmp_path / "p.png").size[0] > 500
    printed = capsysbinary.readouterr().out
    assert b"\x1b" not in printed and b"samples 3" in printed
    assert json.loads((tmp_path / "found.json").read_text())["duplicate_examples"] == [text]


def test_what_float16_would_do_to_the_values_is_shown(tmp_path: Path) -> None:
    eva, clip = torch.randn(20, 4, 3), torch.randn(20, 4, 2)
    eva[3, 2, 1] = -70_000.0
    clip[..., 0] = 30 + clip[..., 0] * 0.5
    found = inspect_embeddings(write(tmp_path / "s", eva, clip, [f"{i}.png" for i in range(20)]))
    assert found.sides["eva"].largest == 70_000
    assert found.sides["clip"].mean_to_deviation == pytest.approx(60, rel=0.3)
    assert "largest value 7e+04 (float16 holds up to 65504)" in format_inspection(found)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (20, 30), "red").save(tmp_path / "a.png")
    store = write(tmp_path / "store", torch.randn(3, 4, 5), torch.randn(3, 4, 6), ["a.png", "b", "c"])
    words = ["inspect", str(store.path), "--pictures", str(tmp_path / "a.png").replace("a.png", "list.txt")]
    (tmp_path / "list.txt").write_text("a.png\n")
    assert main([*words, "--json", str(tmp_path / "found.json"), "--samples", "3"]) == 0
    assert "samples 3, tokens 4" in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())["num_samples"] == 3
    image = Image.open(tmp_path / "store_inspection.png")
    assert image.size[0] > 500
    assert (np.asarray(image.convert("RGB")) == (255, 0, 0)).all(
        axis=-1
    ).sum() > 1000  # the red image is shown
