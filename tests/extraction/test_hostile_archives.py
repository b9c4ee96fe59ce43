"""Archives, output folders and tower names that anyone may have written."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from blip3o_dit.cli.main import main
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.extraction.resume import read_entry
from blip3o_dit.extraction.vision_towers import load_encoder
from tests.fuzz.formats import write_store, write_tar

EVIL = ("../../x.png", "../../x.json", "a/../../y.png", "/abs.png", "b/\x1b[2J.png")


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def test_names_in_an_archive_are_keys_and_never_paths(tmp_path: Path, capsys: Any) -> None:
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    write_tar(inside / "evil.tar", EVIL)
    before = files(tmp_path)
    words = ["extract", str(inside / "evil.tar"), "--towers-from-scratch", "--workers=0"]
    assert main([*words, "--output", str(inside / "out" / "data.pkl"), "--format", "pickle"]) == 0
    assert main(["convert", str(inside / "out" / "data.pkl"), str(inside / "out" / "again")]) == 0
    assert main(["inspect", str(inside / "out" / "again"), "--no-picture"]) == 0
    assert {path for path in files(tmp_path) - before if (inside / "out") not in path.parents} == set()
    keys = [record["key"] for record in EmbeddingStore(inside / "out" / "again").records()]
    assert "evil/../../x" in keys and len(keys) == 4
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"shard": 5, "skipped": []}, "file: expected a str, found None"),
        ({"shard": {"file": "../x"}, "skipped": []}, "num_samples: expected a positive int, found None"),
        ({"shard": None, "skipped": 5}, "expected skipped pictures with a reason each, found 5"),
        ({"shard": None, "skipped": [{}]}, "expected skipped pictures with a reason each, found {}"),
    ],
)
def test_an_entry_of_an_unfinished_folder_is_checked(tmp_path: Path, entry: Any, message: str) -> None:
    file = tmp_path / "shard-00000.entry.json"
    file.write_text(json.dumps(entry))
    with pytest.raises(ValueError, match=f"^{file}: {message}"):
        read_entry(tmp_path, 0)
    shard = EmbeddingStore(write_store(tmp_path / "s")).manifest["shards"][0]
    file.write_text(json.dumps({"shard": shard | {"file": "../../x"}, "skipped": []}))
    with pytest.raises(ValueError, match="expected a plain file name"):
        read_entry(tmp_path, 0)
    file.write_text("[" * 9999)
    assert read_entry(tmp_path, 0) is None  # damaged: the unit is done again


def test_a_tower_that_is_not_there_is_not_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "towers").mkdir()
    for name in ("towers/eva", "./eva", "/none/eva", "~/eva", "a/b/c", "eva", ""):
        with pytest.raises((ValueError, OSError), match="expected"):
            load_encoder(name)
