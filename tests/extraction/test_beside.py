"""Extractions beside a store: one that takes its place, and one that adds to it."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.extraction import extractor
from blip3o_dit.extraction.config import ExtractionConfig
from blip3o_dit.extraction.extract import extract
from blip3o_dit.extraction.resume import SKIPPED_FILE
from tests.helpers.extraction import content, settings, write_images


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "pictures", count=8, broken={"b/06.png": b"broken"})


@pytest.fixture
def config(images: Path, tmp_path: Path) -> ExtractionConfig:
    config = settings(images, tmp_path / "store")
    extract(config, progress=False)
    return config


def interrupted(config: ExtractionConfig, monkeypatch: pytest.MonkeyPatch, after: int = 0) -> None:
    write_entry = extractor.write_entry

    def interrupting(output: Path, unit: int, *rest: Any) -> None:
        write_entry(output, unit, *rest)
        if unit == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(extractor, "write_entry", interrupting)
        with pytest.raises(KeyboardInterrupt):
            extract(config, progress=False)


def keys(store: EmbeddingStore | None) -> list[str]:
    assert store is not None
    return [record["key"] for record in store.records()]


class TestOverwrite:
    def test_what_is_there_stays_until_the_new_store_is_whole(
        self, config: ExtractionConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        output = Path(config.output)
        (output / "notes.txt").write_text("mine")
        other = replace(config, tokens=16, overwrite=True)
        before = content(output)
        interrupted(other, monkeypatch)
        assert content(output) == before
        extract(config, progress=False)  # complete already: the one that was begun stays as well
        monkeypatch.setattr(extractor, "write_entry", spy := Spy(extractor.write_entry))
        extract(other, progress=False)
        assert spy.units == [1]
        extract(replace(other, overwrite=False, output=str(tmp_path / "fresh")), progress=False)
        expected = content(tmp_path / "fresh") | {"notes.txt": b"mine"}
        assert content(output) == expected

    def test_another_extraction_that_was_begun_aside_gives_way(
        self, config: ExtractionConfig, monkeypatch: pytest.MonkeyPatch, caplog: Any
    ) -> None:
        interrupted(replace(config, tokens=16, overwrite=True), monkeypatch)
        caplog.set_level(logging.INFO, "blip3o_dit")
        store = extract(replace(config, tokens=4, overwrite=True), progress=False)
        assert store is not None and store.num_tokens == 4
        assert "begun anew, not continued" in caplog.text

    def test_an_unfinished_extraction(
        self, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = settings(images, tmp_path / "store", shard_size=2)
        interrupted(config, monkeypatch, after=2)
        other = replace(config, shard_size=6, overwrite=True)
        extract(other, progress=False)
        extract(replace(other, overwrite=False, output=str(tmp_path / "fresh")), progress=False)
        assert content(tmp_path / "store") == content(tmp_path / "fresh")

    def test_nothing_else_is_replaced(self, images: Path, tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "shard-00000.jsonl").write_text("mine")
        with pytest.raises(ValueError, match="a store to replace"):
            extract(settings(images, tmp_path / "mine", overwrite=True), progress=False)
        assert content(tmp_path / "mine") == {"shard-00000.jsonl": b"mine"}
        store = extract(settings(images, tmp_path / "new", overwrite=True), progress=False)
        assert len(keys(store)) == 7


class TestAppend:
    def test_only_new_pictures_are_extracted(
        self,
        config: ExtractionConfig,
        images: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: Any,
    ) -> None:
        whole = write_images(tmp_path / "whole", count=15, broken={"b/06.png": b"broken", "b/11.png": b""})
        more = replace(config, images=str(whole), append=True)
        interrupted(more, monkeypatch)
        assert len(keys(EmbeddingStore(config.output))) == 7
        monkeypatch.setattr(extractor, "write_entry", spy := Spy(extractor.write_entry))
        caplog.set_level(logging.INFO, "blip3o_dit")
        store = extract(more, progress=False)
        assert store is not None
        assert spy.units == [1]
        assert "7 of 15 pictures are in the store already" in caplog.text
        assert keys(store)[7:] == [f"b/{index:02d}.png" for index in (8, 9, 10, 12, 13, 14)]
        store.verify()
        alone = extract(replace(more, append=False, output=str(tmp_path / "alone")), progress=False)
        assert alone is not None
        order = [keys(alone).index(key) for key in keys(store)]
        for ours, theirs in zip(store.fetch(range(len(store))), alone.fetch(order), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-3)
        skipped = [
            json.loads(line)["key"] for line in Path(config.output, SKIPPED_FILE).read_text().splitlines()
        ]
        assert sorted(skipped) == ["b/06.png", "b/11.png"]
        assert store.manifest["skipped"] == 2
        assert not Path(config.output, "more.partial").exists()

    def test_skipped_pictures_that_can_be_read_now(self, config: ExtractionConfig, images: Path) -> None:
        before = content(Path(config.output))
        extract(replace(config, append=True), progress=False)  # the broken one is tried again
        assert content(Path(config.output)) == before
        (images / "b" / "06.png").write_bytes((images / "b" / "07.png").read_bytes())
        store = extract(replace(config, append=True), progress=False)
        assert keys(store)[7:] == ["b/06.png"]
        assert Path(config.output, SKIPPED_FILE).read_text() == ""
        extract(replace(config, append=True), progress=False)
        assert len(keys(EmbeddingStore(config.output))) == 8

    def test_retry_skipped_adds_those_and_no_others(self, config: ExtractionConfig, images: Path) -> None:
        again = replace(config, retry_skipped=True)
        before = content(Path(config.output))
        extract(again, progress=False)
        assert content(Path(config.output)) == before
        (images / "b" / "06.png").write_bytes((images / "b" / "07.png").read_bytes())
        assert keys(extract(again, progress=False))[7:] == ["b/06.png"]
        assert Path(config.output, SKIPPED_FILE).read_text() == ""
        write_images(images, count=9, broken={})
        with pytest.raises(ValueError, match=r"found 1 others, the first b/08\.png: --append adds them"):
            extract(again, progress=False)

    @pytest.mark.parametrize("changes", [{"seed": 1}, {"tokens": 16}, {"store_dtype": "float32"}])
    def test_other_towers_tokens_or_numbers(
        self, config: ExtractionConfig, tmp_path: Path, changes: dict[str, Any]
    ) -> None:
        whole = write_images(tmp_path / "whole", count=9, broken={})
        before = content(Path(config.output))
        with pytest.raises(ValueError, match=r"expected .* this store"):
            extract(replace(config, images=str(whole), append=True, **changes), progress=False)
        assert content(Path(config.output)) == before

    def test_a_folder_without_a_store(self, images: Path, tmp_path: Path) -> None:
        assert len(keys(extract(settings(images, tmp_path / "new", append=True), progress=False))) == 7

    def test_not_both(self, images: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="--append or --overwrite, found both"):
            settings(images, tmp_path, append=True, overwrite=True)


class Spy:
    """Notes which units are written."""

    def __init__(self, write_entry: Any) -> None:
        self.write_entry = write_entry
        self.units: list[int] = []

    def __call__(self, output: Path, unit: int, *rest: Any) -> None:
        self.units.append(unit)
        self.write_entry(output, unit, *rest)
