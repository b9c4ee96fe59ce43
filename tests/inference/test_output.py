"""What `generate` may write to: looked at before a model is loaded or anything sampled."""

from __future__ import annotations

import inspect
import json
import os
import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blip3o_dit.cli import generate as command
from blip3o_dit.cli.main import main
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.inference import output as module
from blip3o_dit.inference.generated_store import GeneratedStore
from blip3o_dit.inference.output import check_output, write_arrays
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.training.memory import Room
from blip3o_dit.utils.folder_lock import FolderInUseError, folder_lock
from tests.helpers.stores import write_linear_store

SIZES = (9, 12, 8)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """One of each thing that may stand where the output shall be."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "old.pkl").write_bytes(pickle.dumps("mine"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "shard-00000.jsonl").write_text("mine")
    (tmp_path / "folder.pkl").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"format": "of somebody else"}')
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed").chmod(0o500)
    write_linear_store(tmp_path / "store", samples=4)
    return tmp_path


REFUSED = {
    "file": "expected a folder to write to, found a file",
    "old.pkl": "expected no file there, found one (--overwrite replaces it)",
    "folder": "expected an empty folder, or a store to replace, found",
    "folder.pkl": "expected a file to write, found a folder",
    "other": "expected an empty folder, or a store to replace, found",
    "store": "expected no store there, found one (--overwrite replaces it)",
    "file/out": "expected a folder that can be written, found",
    "file/out.pkl": "expected a folder that can be written, found",
}
REPLACED = {"old.pkl", "store"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", [*REFUSED, "empty", "new", "new.npz", "missing/new", "missing/new.pkl"])
def test_what_is_there_is_looked_at_before_the_model(
    place: Path, name: str, overwrite: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """No model is there: whoever gets as far as that says so."""
    before = {file: file.is_file() and file.read_bytes() for file in place.rglob("*")}
    words = ["generate", str(place / "no-model"), str(place / "store"), str(place / name)]
    assert main([*words, *(["--overwrite"] if overwrite else [])]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    refused = name in REFUSED and not (overwrite and name in REPLACED)
    assert (REFUSED[name] if refused else "no-model: expected a model folder") in error
    assert before == {file: file.is_file() and file.read_bytes() for file in place.rglob("*")}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_closed_folder_is_refused(place: Path) -> None:
    with pytest.raises(ValueError, match="expected a folder that can be written, found"):
        check_output(place / "closed" / "out")


def test_a_file_system_is_not_replaced(place: Path) -> None:
    with pytest.raises(ValueError, match="expected an empty folder, or a store to replace"):
        check_output(Path("/proc"))


def test_the_data_is_not_replaced_by_what_is_generated_from_it(
    tiny_model: BLIP3oDiTModel, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model.save_pretrained(place / "model")
    words = ["generate", str(place / "model"), str(place / "store"), f"{place}/empty/../store", "--overwrite"]
    assert main(words) == 2
    assert "expected another place than that of the data" in capsys.readouterr().err.splitlines()[-1]


def test_an_error_leaves_what_was_there(place: Path) -> None:
    """The old store is replaced by a whole one or not at all."""
    old = EmbeddingStore(place / "store").fetch(range(4))
    store = GeneratedStore(place / "store", SIZES)

    def interrupted() -> None:
        with store.claimed({}, 4, overwrite=True):
            (store.aside / "shard-00000.safetensors").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not store.aside.exists()
    assert all(
        (a == b).all() for a, b in zip(old, EmbeddingStore(place / "store").fetch(range(4)), strict=True)
    )


def test_what_another_writer_left_goes_and_nothing_else(place: Path) -> None:
    store = GeneratedStore(place / "new", SIZES)
    store.aside.mkdir(parents=True)
    (store.aside / "shard-00007.jsonl").write_text("left")

    def interrupted() -> None:
        with store.claimed({}, 4):
            assert not list(store.aside.iterdir())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list((place / "new").iterdir())
    (place / "new" / "mine.txt").write_text("mine")
    with pytest.raises(
        ValueError, match=r"expected an empty folder, or a store to replace, found \['mine.txt'\]"
    ):
        store.claimed({}, 4).__enter__()
    assert [file.name for file in (place / "new").iterdir()] == ["mine.txt"]


def test_two_generations_of_one_store(place: Path) -> None:
    store = GeneratedStore(place / "new", SIZES)
    (place / "new").mkdir()
    with folder_lock(place / "new", "generation"), pytest.raises(FolderInUseError, match="generation by"):
        store.claimed({}, 4).__enter__()


def test_a_file_that_memory_does_not_hold_is_refused(
    tiny_model: BLIP3oDiTModel,
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny_model.save_pretrained(place / "model")
    monkeypatch.setattr("blip3o_dit.training.memory.room_on", lambda _: Room(size=2000, where="here"))
    monkeypatch.setattr("blip3o_dit.training.memory.resident", lambda: 1000)
    words = ["generate", str(place / "model"), str(place / "store")]
    assert main([*words, str(place / "new.pkl"), "--device", "cpu"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "4 samples in one file take 0.0 GiB of memory, found 0.0 GiB here: give a folder's name" in error
    assert main([*words, str(place / "new"), "--device", "cpu", "--num_inference_steps", "1"]) == 0
    small = ["--pooled", "--num_samples", "1", "--num_inference_steps", "1"]
    assert main([*words, str(place / "new.npz"), "--device", "cpu", *small]) == 0


@pytest.mark.parametrize("pooled", [False, True])
def test_the_forecast_is_the_size_of_the_arrays(pooled: bool) -> None:
    shapes = [(5, 8)] if pooled else [(5, 9, 12), (5, 9, 8), (5, 9, 8)]
    sizes = [np.empty(shape, dtype=np.float32).nbytes for shape in shapes]
    expected = sum(sizes) + max(sizes)
    assert module.bytes_in_file(5, SIZES, pooled=pooled, true_tokens=True) == expected


def test_npz_holds_no_objects(tmp_path: Path) -> None:
    keys = ["a", "\udce9.png", "", "\x1b[31m", "x" * 10_000]
    results: dict[str, Any] = {
        "pooled_clip_embeddings": np.ones((5, 2), np.float32),
        "keys": keys,
        "config": None,
    }
    write_arrays(tmp_path / "a.npz", results)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert json.loads(bytes(file["keys"])) == keys and json.loads(bytes(file["config"])) is None
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]


def test_flags_are_arguments_of_the_library() -> None:
    names = set(inspect.signature(BLIP3oInference.generate_from_dataset).parameters)
    assert {option.name for option in fields(command.GenerationConfig)} <= names
