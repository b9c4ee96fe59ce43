"""Tokens that a store cannot hold, and towers that fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.extraction.encoders import ClipEncoder, VisionEncoder
from blip3o_dit.extraction.extract import extract
from blip3o_dit.extraction.resume import SKIPPED_FILE
from blip3o_dit.extraction.tokens import load_towers, storable, tower_tokens
from blip3o_dit.extraction.vision_towers import tiny_encoder
from tests.helpers.extraction import settings, write_images

CPU = torch.device("cpu")
WHERE = Path("store")


def test_only_the_images_that_do_not_fit_are_left_out() -> None:
    eva, clip = torch.randn(5, 4, 3), torch.randn(5, 4, 2)
    eva[1, 2, 0], clip[3, 0, 1], eva[3, 0, 0] = 7e4, torch.nan, -1e6
    kept, reasons = storable(WHERE, {"eva": eva, "clip": clip}, "float16")
    assert torch.equal(kept["eva"], eva[[0, 2, 4]].half()) and torch.equal(
        kept["clip"], clip[[0, 2, 4]].half()
    )
    assert reasons[1].startswith("tokens do not fit: eva: largest value 7e+04 does not fit float16")
    assert reasons[3].startswith("tokens do not fit: clip: NaN or infinity")
    kept, reasons = storable(WHERE, {"eva": eva[:2], "clip": clip[:2]}, "float32")
    assert not reasons and torch.equal(kept["eva"], eva[:2])


def test_they_are_listed_with_their_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_images(tmp_path / "pictures", count=8, broken={})
    run, calls = ClipEncoder.forward, iter(range(100))

    def overflowing(self: ClipEncoder, pixels: Tensor) -> Tensor:
        tokens = run(self, pixels).clone()
        if next(calls) == 1:
            tokens[1, 0, 0] = 1e9
        return tokens

    monkeypatch.setattr(ClipEncoder, "forward", overflowing)
    extract(settings(images, tmp_path / "store", batch_size=3), progress=False)
    skipped = [json.loads(line) for line in (tmp_path / "store" / SKIPPED_FILE).read_text().splitlines()]
    assert [image["key"] for image in skipped] == ["a/04.png"]
    keys = [record["key"] for record in EmbeddingStore(tmp_path / "store").records()]
    assert len(keys) == 7 and "a/04.png" not in keys
    calls = iter(range(100))
    with pytest.raises(ValueError, match=r"04\.png: tokens do not fit: clip: .*\(--strict\)"):
        extract(settings(images, tmp_path / "other", batch_size=3, strict=True), progress=False)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            r"out of memory; try --batch_size 2 or --dtype bfloat16",
        ),
        (MemoryError(), "out of memory; try --batch_size 2"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory; try --batch_size 2"),
        (RuntimeError("mat1 and mat2\nshapes"), "it cannot be run so: mat1 and mat2 shapes"),
        (AttributeError("no attribute 'x'"), "it cannot be run so: no attribute 'x'"),
        (TypeError("missing argument"), "it cannot be run so"),
    ],
)
def test_a_tower_that_fails_is_one_line(error: Exception, message: str, tmp_path: Path) -> None:
    class Failing(VisionEncoder):
        def forward(self, pixels: Tensor) -> Tensor:
            raise error

    about: dict[str, Any] = {"name": "mine", "revision": None, "grid": 16, "width": 4, "tokens": "none"}
    tower = Failing(preprocessing=tiny_encoder("eva").preprocessing, **about)  # it has no parameters
    pixels = torch.zeros(4, 3, 64, 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"^eva tower mine, 4 pictures of 64 pixels in float32: {message}"):
        tower_tokens(tower, "eva", pixels, settings(tmp_path, tmp_path), CPU)


def test_towers_that_do_not_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(VisionEncoder, "to", too_large)
    with pytest.raises(ValueError, match=r"eva tower .*: out of memory; try --dtype bfloat16"):
        load_towers(settings(tmp_path, tmp_path), CPU)


def test_a_tower_of_another_width_than_it_says(tmp_path: Path) -> None:
    tower = tiny_encoder("clip")
    tower.width = 47
    pixels = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"expected tokens of shape \[1, 256, 47\], found \[1, 256, 48\]"):
        tower_tokens(tower, "clip", pixels, settings(tmp_path, tmp_path), CPU)
