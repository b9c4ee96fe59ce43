"""What may differ between a run and its continuation; other pictures, towers and folders are refused."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from blip3o_dit.extraction import extractor as engine
from blip3o_dit.extraction.config import ExtractionConfig
from blip3o_dit.extraction.extract import extract
from blip3o_dit.extraction.identity import describe_extraction
from blip3o_dit.extraction.shown_images import pictures_of_store
from blip3o_dit.extraction.vision_towers import tiny_encoder
from blip3o_dit.utils.folder_lock import FolderInUseError, folder_lock
from tests.helpers.extraction import content, settings, write_images


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "pictures", count=8, broken={})


@pytest.fixture
def begun(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExtractionConfig:
    """An extraction that was interrupted after its first unit of two."""
    config = settings(images, tmp_path / "begun")
    write_entry = engine.write_entry

    def interrupting(output: Path, unit: int, *rest: Any) -> None:
        write_entry(output, unit, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine, "write_entry", interrupting)
        with pytest.raises(KeyboardInterrupt):
            extract(config, progress=False)
    return config


@pytest.fixture
def finished(images: Path, tmp_path: Path) -> ExtractionConfig:
    config = settings(images, tmp_path / "finished")
    extract(config, progress=False)
    return config


def repaint(images: Path, size: int = 90) -> None:
    """Other pictures with the same names."""
    for file in images.rglob("*.png"):
        Image.new("RGB", (size, size), "blue").save(file)


@pytest.mark.parametrize("state", ["begun", "finished"])
def test_other_pictures_with_the_same_names(state: str, images: Path, request: Any) -> None:
    config = request.getfixturevalue(state)
    repaint(images)
    with pytest.raises(ValueError, match="the same names: their sizes differ"):
        extract(config, progress=False)


@pytest.mark.parametrize("state", ["begun", "finished"])
def test_a_moved_folder_continues(state: str, images: Path, request: Any, caplog: Any) -> None:
    config = request.getfixturevalue(state)
    moved = images.rename(images.with_name("moved"))
    caplog.set_level(logging.INFO, "blip3o_dit")
    store = extract(replace(config, images=str(moved)), progress=False)
    assert store is not None and store.num_samples == 8
    assert ("complete already" in caplog.text) == (state == "finished")


@pytest.mark.parametrize("state", ["begun", "finished"])
def test_towers_with_other_weights(state: str, request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = request.getfixturevalue(state)

    def retrained(side: str, *, seed: int) -> Any:
        tower = tiny_encoder(side, seed=seed)
        tower.weights = "others"
        return tower

    monkeypatch.setattr("blip3o_dit.extraction.tokens.tiny_encoder", retrained)
    with pytest.raises(ValueError, match=r"towers\.clip\.weights is .* there, .* here"):
        extract(config, progress=False)


def test_towers_are_loaded_after_all_else_was_looked_at(
    images: Path, finished: ExtractionConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "blip3o_dit.extraction.extract.load_towers", lambda *_: pytest.fail("towers were loaded")
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    refused = [
        (replace(finished, tokens=16), r"settings\.tokens is 64 there, 16 here"),
        (replace(finished, output=str(tmp_path / "mine")), r"found other files \['notes\.txt'\]"),
        (replace(finished, images=str(images / "a")), r"pictures\.count is 8 there, 5 here"),
    ]
    for config, message in refused:
        with pytest.raises(ValueError, match=message):
            extract(config, progress=False)


def test_a_finished_one_is_known_by_the_towers_files(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Loading a large tower takes minutes; that its files are the same is seen without."""
    tower = tmp_path / "tower"
    vision = dict(num_attention_heads=2, image_size=16, patch_size=4, hidden_size=8, intermediate_size=16)
    model = CLIPVisionModelWithProjection(
        CLIPVisionConfig(**vision, num_hidden_layers=1, projection_dim=8)  # type: ignore[arg-type]
    )
    model.save_pretrained(tower)
    both = dict(towers_from_scratch=False, eva=str(tower), clip=str(tower), tokens=16)
    config = replace(settings(images, tmp_path / "store"), **both)
    extract(config, progress=False)
    caplog.set_level(logging.INFO, "blip3o_dit")
    with monkeypatch.context() as patch:
        patch.setattr(
            "blip3o_dit.extraction.extract.load_towers", lambda *_: pytest.fail("towers were loaded")
        )
        extract(config, progress=False)
    assert "complete already" in caplog.text
    with torch.no_grad():
        model.visual_projection.weight.mul_(2)
    model.save_pretrained(tower)
    with pytest.raises(ValueError, match=r"towers\.(eva|clip)\.weights is .* there, .* here"):
        extract(config, progress=False)


@pytest.mark.parametrize(
    "changes",
    [{"strict": True}, {"workers": 1}, {"batch_size": 2}, {"max_skipped": 0.5}, {"max_pixels": 10**6}],
)
def test_what_may_change(
    begun: ExtractionConfig, finished: ExtractionConfig, changes: dict[str, Any], caplog: Any
) -> None:
    store = extract(replace(begun, **changes), progress=False)
    assert store is not None and store.num_samples == 8
    assert ("last bits may differ" in caplog.text) == ("batch_size" in changes)
    extract(replace(finished, **changes), progress=False)


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"dtype": "bfloat16"}, {"store_dtype": "float32"}, {"shard_size": 7}]
)
def test_what_may_not_change(begun: ExtractionConfig, changes: dict[str, Any]) -> None:
    name = next(iter(changes))
    with pytest.raises(ValueError, match=rf"settings\.{name} is .*overwrite=True"):
        extract(replace(begun, **changes), progress=False)


def test_the_seed_matters_to_towers_from_scratch_only() -> None:
    config = ExtractionConfig(images="a", output="b", seed=3)
    assert "seed" not in describe_extraction(config, {})["settings"]
    assert describe_extraction(replace(config, towers_from_scratch=True), {})["settings"]["seed"] == 3


def test_pictures_above_another_limit_are_tried_again(images: Path, tmp_path: Path) -> None:
    Image.new("RGB", (300, 300)).save(images / "a" / "00.png")
    (images / "b" / "07.png").write_bytes(b"broken")
    config = settings(images, tmp_path / "store", max_pixels=50_000, shard_size=2)
    with pytest.raises(ValueError, match=r"07\.png.*--strict"):
        extract(replace(config, strict=True, max_pixels=10**6), progress=False)
    (tmp_path / "store" / "shard-00000.entry.json").unlink()
    with pytest.raises(ValueError, match=r"00\.png: too large.*--strict"):
        extract(replace(config, strict=True), progress=False)
    with pytest.raises(ValueError, match="found 1"):
        extract(replace(config, max_skipped=0), progress=False)
    store = extract(replace(config, max_pixels=10**6), progress=False)
    assert store is not None and store.num_samples == 7


def test_a_unit_whose_shard_was_altered_is_done_again(
    begun: ExtractionConfig, finished: ExtractionConfig
) -> None:
    shard = Path(begun.output) / "shard-00000.safetensors"
    shard.write_bytes(bytes(shard.stat().st_size))
    extract(begun, progress=False)
    assert content(Path(begun.output)) == content(Path(finished.output))


def as_an_earlier_version(identity: dict[str, Any]) -> dict[str, Any]:
    """What version 0.1 wrote at first: no sizes, no weights, and settings that are not compared now."""
    pictures = {name: identity["pictures"][name] for name in ("count", "sha256")}
    names = ("name", "revision", "width", "grid", "tokens", "meaningful", "preprocessing")
    towers = {side: {name: tower[name] for name in names} for side, tower in identity["towers"].items()}
    old = {"eva": "BAAI/EVA-CLIP-8B", "clip": "x", "strict": False, "eva_revision": None}
    return {"settings": identity["settings"] | old, "pictures": pictures, "towers": towers}


def rewrite(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def test_folders_of_an_earlier_version(
    begun: ExtractionConfig, finished: ExtractionConfig, caplog: Any
) -> None:
    rewrite(Path(begun.output, "extraction.json"), as_an_earlier_version)
    with pytest.raises(ValueError, match="begun by an earlier version"):
        extract(begun, progress=False)
    rewrite(
        Path(finished.output, "manifest.json"),
        lambda manifest: manifest | {"extraction": as_an_earlier_version(manifest["extraction"])},
    )
    caplog.set_level(logging.INFO, "blip3o_dit")
    extract(finished, progress=False)
    assert "complete already (by an earlier version" in caplog.text
    with pytest.raises(ValueError, match=r"settings\.tokens is 64 there, 16 here"):
        extract(replace(finished, tokens=16), progress=False)


def test_a_folder_in_use(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "store"
    output.mkdir()
    with (
        folder_lock(output, "extraction"),
        pytest.raises(FolderInUseError, match="found extraction by process"),
    ):
        extract(settings(images, output), progress=False)
    extract(settings(images, output), progress=False)


def test_what_counts_as_an_empty_folder(images: Path, tmp_path: Path) -> None:
    for name in (".DS_Store", ".gitkeep", "Thumbs.db"):
        (tmp_path / "store" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "store" / name).touch()
    (tmp_path / "store" / "lost+found").mkdir()
    extract(settings(images, tmp_path / "store"), progress=False)
    assert {".DS_Store", ".gitkeep", "manifest.json"} <= set(os.listdir(tmp_path / "store"))
    shutil.rmtree(tmp_path / "store")
    (tmp_path / "store").symlink_to("nowhere")
    with pytest.raises(ValueError, match="found a file or a broken link"):
        extract(settings(images, tmp_path / "store"), progress=False)


@pytest.mark.parametrize("state", ["begun", "finished"])
def test_other_pictures_with_the_same_names_and_sizes(
    state: str, images: Path, request: Any, tmp_path: Path
) -> None:
    """As uncompressed pictures of two data sets are."""
    for file in images.rglob("*.png"):
        Image.new("RGB", (40, 50), "red").save(file.with_suffix(".bmp"))
        file.unlink()
    config = request.getfixturevalue(state)
    for file in images.rglob("*.bmp"):
        Image.new("RGB", (40, 50), "blue").save(file)
    with pytest.raises(ValueError, match=r"another extraction \(another set .* names and sizes\): repeat"):
        extract(config, progress=False)


def test_what_cannot_be_looked_into_is_not_compared(
    images: Path, finished: ExtractionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blip3o_dit.extraction.sources.image_ref.ImageRef.start", lambda _: b"")
    extract(finished, progress=False)


class TestLimit:
    def test_the_first_pictures_and_the_others_later(self, images: Path, tmp_path: Path) -> None:
        some = settings(images, tmp_path / "store", limit=3)
        store = extract(some, progress=False)
        assert store is not None and len(store) == 3
        before = content(tmp_path / "store")
        extract(some, progress=False)  # is complete
        extract(replace(some, limit=3, images=str(images)), progress=False)
        assert content(tmp_path / "store") == before
        with pytest.raises(
            ValueError, match=r"another extraction .*settings\.limit is 3 there, None here.*--append"
        ):
            extract(replace(some, limit=None), progress=False)
        more = extract(replace(some, limit=6, append=True), progress=False)
        assert more is not None and len(more) == 6
        whole = extract(replace(some, limit=None, append=True), progress=False)
        assert whole is not None and len(whole) == 8

    def test_one_that_cuts_nothing_is_none(self, images: Path, finished: ExtractionConfig) -> None:
        before = content(Path(finished.output))
        extract(replace(finished, limit=99), progress=False)
        assert content(Path(finished.output)) == before

    def test_it_continues(self, begun: ExtractionConfig, images: Path) -> None:
        with pytest.raises(ValueError, match=r"settings\.limit is None there, 7 here"):
            extract(replace(begun, limit=7), progress=False)
        store = extract(replace(begun, limit=8), progress=False)
        assert store is not None and len(store) == 8

    def test_the_pictures_of_such_a_store_are_shown(self, images: Path, tmp_path: Path) -> None:
        store = extract(settings(images, tmp_path / "store", limit=3), progress=False)
        assert store is not None
        assert pictures_of_store(store.manifest)(["a/01.png", "b/07.png"])[0] is not None


def test_several_places_are_one_extraction(images: Path, tmp_path: Path) -> None:
    both = (str(images / "a"), str(images / "b"))
    config = replace(settings(images, tmp_path / "store"), images=both)
    store = extract(config, progress=False)
    assert store is not None and len(store) == 8
    assert store.manifest["pictures"] == list(both)
    assert pictures_of_store(store.manifest)(["b/05.png"])[0] is not None
    extract(config, progress=False)
    write_images(tmp_path / "more", count=9, broken={})
    more = extract(replace(config, images=str(tmp_path / "more"), append=True), progress=False)
    assert more is not None and len(more) == 9
