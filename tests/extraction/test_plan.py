"""A dry run says what an extraction would do, and does none of it; a run says how long it takes."""

from __future__ import annotations

import itertools
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from blip3o_dit.cli.main import main
from blip3o_dit.extraction import extractor as engine
from blip3o_dit.extraction.config import ExtractionConfig
from blip3o_dit.extraction.extract import extract
from blip3o_dit.extraction.extractor import Pace
from blip3o_dit.extraction.plan import plan
from blip3o_dit.extraction.tokens import load_towers
from tests.helpers.extraction import content, settings, write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_images(tmp_path_factory.mktemp("pictures"), broken={"a/00.png": b"", "b/13.png": b"x"})
    (folder / "readme.md").write_text("x")
    (folder / "drawing.svg").write_text("x")
    return folder


def rows(config: ExtractionConfig) -> dict[str, str]:
    text = plan(config, progress=False)
    assert text is not None
    return {line[:11].strip(): line[11:] for line in text.splitlines()[::-1]}


def test_what_is_there_and_what_would_become_of_it(images: Path, tmp_path: Path) -> None:
    found = rows(settings(images, tmp_path / "deep" / "store"))
    assert found["pictures"] == f"22 in {images}: 22 .png"
    assert found["no picture"] == "1 .md, 1 .svg"
    assert found["captions"] == "1 of 22" and found["first keys"] == "a/00.png: the first picture"
    assert found["eva tower"].endswith("64 pixels, 16x16 -> 8x8 tokens of 64")
    assert found["store"].startswith(f"{tmp_path}/deep/store: 4 shards, about 318 kB (")
    assert found["folder"] == "new, or empty"
    assert "(measured on 22)" in found["time"]
    assert not list(tmp_path.iterdir())
    some = rows(settings(images, tmp_path / "store", limit=3, store_dtype="float32"))
    assert some["pictures"].startswith("3 in ") and "1 shard, about 86.3 kB" in some["store"]


def test_the_size_is_that_of_the_store(images: Path, tmp_path: Path) -> None:
    extract(settings(images, tmp_path / "store"), progress=False)
    shards = [data for name, data in content(tmp_path / "store").items() if name.startswith("shard")]
    assert 0.9 < sum(map(len, shards)) / 318_000 < 1.1


def test_what_the_folder_holds(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.Extractor, "measure", lambda *_: 1.0)
    config = settings(images, tmp_path / "store")
    with monkeypatch.context() as patch:
        patch.setattr(engine, "write_entry", interrupting := Interrupting(engine.write_entry))
        with pytest.raises(KeyboardInterrupt):
            extract(config, progress=False)
    assert interrupting.units == [0]
    assert rows(config)["folder"] == "this extraction, begun: 1 of 4 shards are done"
    before = content(tmp_path / "store")
    assert rows(replace(config, tokens=16))["folder"].startswith("refused, it holds another extraction: sett")
    assert rows(replace(config, overwrite=True))["folder"] == "an unfinished extraction: would be replaced"
    assert content(tmp_path / "store") == before
    extract(config, progress=False)
    before = content(tmp_path / "store")
    assert rows(config)["folder"] == "this extraction, complete already"
    assert "it lacks would be added" in rows(replace(config, append=True))["folder"]
    assert rows(replace(config, overwrite=True))["folder"] == "a finished store: would be replaced"
    assert content(tmp_path / "store") == before
    shutil.rmtree(tmp_path / "store")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "mine.txt").touch()
    assert rows(config)["folder"] == "refused, it holds other files: mine.txt"


class Interrupting:
    def __init__(self, write_entry: Any) -> None:
        self.write_entry, self.units = write_entry, []  # type: ignore[var-annotated]

    def __call__(self, output: Path, unit: int, *rest: Any) -> None:
        self.write_entry(output, unit, *rest)
        self.units.append(unit)
        raise KeyboardInterrupt


def test_no_tower_is_downloaded(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tokens.load_encoder", "vision_towers.download"):
        monkeypatch.setattr(f"blip3o_dit.extraction.{module}", lambda *_, **__: pytest.fail("it was"))
    config = replace(settings(images, tmp_path / "store"), towers_from_scratch=False)
    found = rows(config)
    assert found["eva tower"] == "BAAI/EVA-CLIP-8B: not on this disk, would be downloaded"
    assert "about 5.77 MB" in found["store"]  # of towers whose widths are known
    assert "is measured where the towers are" in found["time"]
    assert "of a size that the towers decide" in rows(replace(config, eva="some/other"))["store"]
    with pytest.raises(FileNotFoundError, match="expected a model folder or a hub id"):
        plan(replace(config, eva="typo"), progress=False)


def test_no_space_is_said(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    assert "(1 kB are free there: NOT ENOUGH)" in rows(settings(images, tmp_path / "store"))["store"]


def test_pictures_that_cannot_be_read_give_no_time(tmp_path: Path) -> None:
    broken = write_images(tmp_path / "pictures", count=2, broken={"a/00.png": b"", "a/01.png": b""})
    assert rows(settings(broken, tmp_path / "store"))["time"].startswith("not known: none of the first 2")


def test_the_command_answers_on_standard_output(images: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["extract", str(images), "--output", str(tmp_path / "store"), "--workers", "0", "--device", "cpu"]
    words += ["--towers_from_scratch", "--limit", "2", "--max_skipped", "1"]
    assert main([*words, "--dry_run"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("pictures   2 in ") and "a dry run: nothing is written" in shown.err
    assert not (tmp_path / "store").exists()
    assert main(words) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{tmp_path}/store: 1 pictures, 64 tokens of 64 and 48\n"
    assert "ignored: 1 .md, 1 .svg" in shown.err and "the first 2 pictures (--limit)" in shown.err


def test_control_c_says_how_to_continue(
    images: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "write_entry", Interrupting(engine.write_entry))
    words = ["extract", str(images), "--output", str(tmp_path / "store"), "--workers", "0", "--device", "cpu"]
    assert main([*words, "--towers_from_scratch", "--batch_size", "4"]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "stopped: interrupted: what was done is kept, the same command continues"


class TestPace:
    def test_the_first_batch_is_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = iter([110.0, 112.0, 114.0, 200.0])
        monkeypatch.setattr(engine.time, "monotonic", lambda: next(clock))
        pace = Pace(started=100.0)
        pace.note(4)
        assert pace.seconds_per_image == 2.5 and not pace.is_known
        pace.note(4)
        assert pace.seconds_per_image == 0.5
        pace.note(4)
        pace.note(4)
        assert pace.seconds_per_image == 0.5 and pace.is_known

    def test_a_long_run_says_how_long(
        self, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
    ) -> None:
        clock = itertools.count(step=40)
        monkeypatch.setattr(engine.time, "monotonic", lambda: float(next(clock)))
        caplog.set_level(logging.INFO, "blip3o_dit")
        extract(settings(images, tmp_path / "store", batch_size=2), progress=True)
        said = [record.getMessage() for record in caplog.records if "about" in record.getMessage()]
        assert said == ["16 pictures left: about 7 min"]


def test_every_tower_is_named_while_it_is_loaded(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    caplog.set_level(logging.INFO, "blip3o_dit")
    module = "blip3o_dit.extraction.tokens"
    monkeypatch.setattr(f"{module}.local_files", lambda name, _: [] if "clip" in name else None)
    monkeypatch.setattr(f"{module}.load_encoder", lambda *_, **__: pytest.fail("enough"))
    config = replace(settings(images, tmp_path), towers_from_scratch=False, eva="some/eva")
    with pytest.raises(pytest.fail.Exception):
        load_towers(config, torch.device("cpu"))
    assert caplog.messages == ["loading the eva tower some/eva (from the hub)"]
