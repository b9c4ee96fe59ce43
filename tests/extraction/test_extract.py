"""The extraction engine: what it writes, what it skips, and that interruptions leave no trace."""

from __future__ import annotations

import copy
import json
import os
import pickle
import resource
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from blip3o_dit.cli.main import main
from blip3o_dit.data.embeddings import open_embeddings
from blip3o_dit.data.pooling import pool_tokens
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.extraction import extractor as engine
from blip3o_dit.extraction.config import ExtractionConfig
from blip3o_dit.extraction.extract import extract
from blip3o_dit.extraction.extractor import Extractor
from blip3o_dit.extraction.image_decoding import decode_image
from blip3o_dit.extraction.resume import SKIPPED_FILE, read_entry
from blip3o_dit.extraction.sources.listing import list_images
from blip3o_dit.extraction.tokens import load_towers
from blip3o_dit.extraction.vision_towers import tiny_encoder
from blip3o_dit.utils.distributed import Processes
from tests.helpers.extraction import BROKEN, COUNT, content, extract_silently, settings, write_images
from tests.helpers.forks import forked
from tests.helpers.processes import SEVERAL, launch

TINY = ["--towers-from-scratch", "--batch_size", "4", "--shard_size", "6", "--device", "cpu"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted extraction on one process."""
    output = tmp_path_factory.mktemp("whole") / "store"
    extract(settings(images, output), progress=False)
    return output


def test_tokens_are_those_of_the_towers(images: Path, whole: Path) -> None:
    store = EmbeddingStore(whole)
    keys = [record["key"] for record in store.records()]
    expected = sorted(path.relative_to(images).as_posix() for path in images.rglob("*.png"))
    assert keys == [key for key in expected if key not in BROKEN]
    assert store.records([0])[0]["caption"] == "the first picture"
    assert "caption" not in store.records([1])[0]
    image = decode_image((images / keys[9]).read_bytes())
    found = dict(zip(("eva", "clip"), store.fetch([9]), strict=True))
    for side, tokens in found.items():
        tower = tiny_encoder(side).eval()
        with torch.no_grad():
            direct = pool_tokens(tower(tower.preprocessing(image)[None]), 64)
        torch.testing.assert_close(tokens, direct, rtol=2e-3, atol=2e-3)
        assert tokens.std() > 0.01


def test_the_skip_list_is_exact(whole: Path) -> None:
    skipped = [json.loads(line) for line in (whole / SKIPPED_FILE).read_text().splitlines()]
    assert {image["key"] for image in skipped} == set(BROKEN)
    assert all(image["reason"] and image["location"] for image in skipped)
    manifest = EmbeddingStore(whole).manifest
    assert (manifest["skipped"], manifest["num_samples"]) == (2, COUNT - 2)


def test_the_finished_store_holds_nothing_of_its_making(whole: Path) -> None:
    shards = {f"shard-{i:05d}.{kind}" for i in range(4) for kind in ("safetensors", "jsonl")}
    assert set(content(whole)) == shards | {"manifest.json", SKIPPED_FILE}
    assert str(whole.parent) not in (whole / "manifest.json").read_text()
    manifest = EmbeddingStore(whole).manifest
    assert manifest["encoders"]["eva"]["meaningful"] is False
    assert "16x16 -> 8x8" in manifest["pooling"]


@pytest.mark.parametrize("interrupted_at", [0, 1, 3])
def test_an_interrupted_extraction_continues_to_the_same_bytes(
    images: Path, whole: Path, tmp_path: Path, interrupted_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_entry = engine.write_entry
    done: list[int] = []

    def failing(output: Path, unit: int, *rest: Any) -> None:
        if unit == interrupted_at and interrupted_at not in done:
            done.append(unit)
            raise KeyboardInterrupt
        done.append(unit)
        write_entry(output, unit, *rest)

    monkeypatch.setattr(engine, "write_entry", failing)
    config = settings(images, tmp_path / "store")
    with pytest.raises(KeyboardInterrupt):
        extract(config, progress=False)
    with pytest.raises(ValueError, match="found an unfinished extraction"):
        EmbeddingStore(tmp_path / "store")
    extract(replace(config, workers=1), progress=False)
    assert done == [*range(interrupted_at + 1), *range(interrupted_at, 4)]  # finished units were not redone
    assert content(tmp_path / "store") == content(whole)


@pytest.mark.slow
def test_killed_and_started_again_it_writes_the_same_bytes(images: Path, whole: Path, tmp_path: Path) -> None:
    words = ["extract", str(images), "--output", str(tmp_path / "store"), "--workers", "1", *TINY]
    first = forked(lambda: main(words))
    started = time.monotonic()
    while not list(tmp_path.glob("store/shard-*.safetensors")) and time.monotonic() - started < 60:
        time.sleep(0.002)
    os.killpg(first, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(first, 0)[1]) == signal.SIGKILL
    assert not (tmp_path / "store" / "manifest.json").exists()
    assert main(words) == 0
    assert content(tmp_path / "store") == content(whole)


@pytest.mark.slow
def test_several_processes_write_the_same_bytes(images: Path, whole: Path, tmp_path: Path) -> None:
    launch(extract_silently, SEVERAL, settings(images, tmp_path / "store"), method="fork")
    assert content(tmp_path / "store") == content(whole)


def test_each_process_writes_its_own_units_only(images: Path, tmp_path: Path) -> None:
    config = settings(images, tmp_path)
    towers = load_towers(config, torch.device("cpu"))
    extractor = Extractor(config, tmp_path, list_images(images), towers, torch.device("cpu"))
    extractor.run(1, 2, progress=False)
    assert [unit for unit in range(4) if read_entry(tmp_path, unit)] == [1, 3]


class InThread(Processes):
    """One of several processes, as a thread."""

    meeting, box = threading.Barrier(2), {}  # type: ignore[var-annotated]

    def broadcast(self, value: Any) -> Any:
        if self.is_main:
            self.box["value"] = pickle.dumps(value)
        self.meeting.wait(60)
        sent = pickle.loads(self.box["value"])
        self.meeting.wait(60)
        return sent

    def barrier(self) -> None:
        self.meeting.wait(60)


def test_the_first_process_lists_for_all(
    images: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = threading.local()
    module = "blip3o_dit.extraction.extract"
    monkeypatch.setattr(f"{module}.join_processes", lambda _: InThread(rank.number, 2))

    def listed(*arguments: Any, **options: Any) -> Any:
        assert rank.number == 0
        return list_images(*arguments, **options)

    def process(number: int) -> None:
        rank.number = number
        extract(settings(images, tmp_path / "store"), progress=False)

    monkeypatch.setattr(f"{module}.list_images", listed)
    # Made once: threads share the generator that random weights come from.
    towers = load_towers(settings(images, tmp_path), torch.device("cpu"))
    monkeypatch.setattr(f"{module}.load_towers", lambda *_: copy.deepcopy(towers))
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(process, range(2)))
    assert content(tmp_path / "store") == content(whole)


def test_a_full_disk_has_its_status_and_the_run_continues(
    images: Path, whole: Path, tmp_path: Path, capsys: Any
) -> None:
    words = ["extract", str(images), "--output", str(tmp_path / "store"), "--workers", "0", *TINY]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        assert main(words) == 74
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "shard-00000.safetensors: expected to write it whole" in capsys.readouterr().err
    assert main(words) == 0
    assert content(tmp_path / "store") == content(whole)


def test_keeping_every_patch_token(images: Path, tmp_path: Path) -> None:
    store = extract(settings(images / "a", tmp_path / "store", tokens=256), progress=False)
    assert store is not None and (store.num_samples, store.num_tokens) == (5, 256)


def test_repeating_a_finished_command_changes_nothing(images: Path, whole: Path) -> None:
    before = {name: (whole / name).stat().st_mtime_ns for name in content(whole)}
    extract(settings(images, whole), progress=False)
    assert {name: (whole / name).stat().st_mtime_ns for name in content(whole)} == before


class TestRefusals:
    def test_another_command_on_the_same_folder(self, images: Path, whole: Path) -> None:
        with pytest.raises(ValueError, match=r"settings\.tokens is 64 there, 16 here"):
            extract(settings(images, whole, tokens=16), progress=False)

    def test_other_images(self, images: Path, whole: Path) -> None:
        with pytest.raises(ValueError, match=r"pictures\.count is 22 there, 5 here"):
            extract(settings(images / "a", whole), progress=False)

    def test_a_folder_with_other_files(self, images: Path, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(ValueError, match="expected an empty folder or a begun extraction"):
            extract(settings(images, tmp_path), progress=False)
        assert (tmp_path / "notes.txt").read_text() == "mine"

    def test_strict(self, images: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"b/07\.png.*--strict"):
            extract(settings(images, tmp_path / "store", strict=True), progress=False)

    def test_no_readable_image(self, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "a.png").write_bytes(b"")
        with pytest.raises(ValueError, match="expected at least one readable picture, found none of 1"):
            extract(settings(tmp_path / "in", tmp_path / "out"), progress=False)

    @pytest.mark.parametrize("tokens", [60, 49, 1024])
    def test_tokens_that_do_not_pool(self, images: Path, tmp_path: Path, tokens: int) -> None:
        with pytest.raises(ValueError, match=str(tokens)):
            extract(settings(images, tmp_path / "out", tokens=tokens), progress=False)
        assert not (tmp_path / "out").exists()

    def test_bad_settings(self) -> None:
        with pytest.raises(ValueError, match="batch_size: expected an integer >= 1, found 0"):
            ExtractionConfig(images="a", output="b", batch_size=0)
        with pytest.raises(ValueError, match="store_dtype: expected one of"):
            ExtractionConfig(images="a", output="b", store_dtype="int4")


def test_the_command_writes_the_documented_pickle(images: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "embeddings" / "blip3o_grid_embeddings.pkl"
    words = ["extract", str(images), "--output", str(output), "--format", "pickle", *TINY]
    assert main([*words, "--workers", "0"]) == 0
    documented = pickle.loads(output.read_bytes())
    assert documented["eva_blip3o_embeddings"].shape == (20, 64, 64)
    assert documented["clip_blip3o_embeddings"].shape == (20, 64, 48)
    assert documented["captions"][0] == "the first picture"
    read, store = open_embeddings(output), EmbeddingStore(whole)
    for ours, theirs in zip(read.fetch(range(20)), store.fetch(range(20)), strict=True):
        assert torch.equal(ours, theirs)
