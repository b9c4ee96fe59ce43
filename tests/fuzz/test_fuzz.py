"""At least 10,000 damaged inputs: each is borne, and the judge would tell if it were not."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from blip3o_dit.data.store import EmbeddingStore
from tests.fuzz.formats import read_embeddings, write_store
from tests.fuzz.judge import Trial, run_trials
from tests.fuzz.makers import MAKERS
from tests.fuzz.mutators import flip_bytes

# Most where an input takes milliseconds.
COUNTS = {
    "pickle": 2600,
    "manifest": 1900,
    "shard": 400,
    "table": 300,
    "arrays": 300,
    "config": 1500,
    "training_config": 1500,
    "checkpoint": 300,
    "pictures": 300,
    "source": 300,
    "model": 300,
    "cli": 300,
}
SEED = 20


def test_there_are_ten_thousand_inputs_of_every_format() -> None:
    assert COUNTS.keys() == MAKERS.keys()
    assert sum(COUNTS.values()) >= 10_000
    assert min(COUNTS.values()) >= 300


@pytest.mark.parametrize("name", MAKERS)
def test_every_input_is_borne(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    tally = run_trials(name, SEED, range(COUNTS[name]), MAKERS[name](tmp_path, SEED))
    assert not tally.findings, "\n".join(map(str, tally.findings[:10]))
    assert tally.total == COUNTS[name]
    assert tally.accepted > 0.02 * tally.total  # else nothing behind the first check is reached
    assert tally.refused > 0.2 * tally.total


# The judge itself


def _outside(folder: Path) -> object:
    return (folder.parent / "outside").write_text("x")


def _several_lines(folder: Path) -> object:
    raise ValueError(f"{folder}: one\ntwo")


def _unnamed(folder: Path) -> object:
    raise ValueError("something is wrong")


def _exits(folder: Path) -> object:
    raise SystemExit(1)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "an error of ours": (lambda folder: {}["key"], "exception"),
    "a message of two lines": (_several_lines, "message"),
    "a message that names no file": (_unnamed, "message"),
    "another exit status": (_exits, "exit"),
    "a hang": (lambda folder: time.sleep(10), "hang"),
    "death": (lambda folder: os.abort(), "died"),
    "memory": (lambda folder: bytearray(1 << 28), "exception"),
    "memory, by torch": (lambda folder: torch.empty(1 << 28), "exception"),
    "a file outside": (_outside, "act"),
    "a program": (lambda folder: os.system("true"), "act"),
    "a connection": (lambda folder: socket.create_connection(("127.0.0.1", 9), 0.1), "act"),
    "a file that says it ran": (lambda folder: (folder / "canary").write_text("x"), "executed"),
}


@pytest.mark.parametrize("case", BAD)
def test_the_judge_sees(case: str, tmp_path: Path) -> None:
    act, kind = BAD[case]
    folder = tmp_path / "scratch"
    folder.mkdir()

    def make(number: int) -> Trial:
        good = number != 1
        return Trial(
            (lambda: None) if good else (lambda: act(folder)),
            size=100,
            scratch=folder,
            outputs=(folder,),
            canary=folder / "canary" if not good else None,
        )

    tally = run_trials("x", 0, range(3), make, seconds=0.5)
    assert [(finding.number, finding.kind) for finding in tally.findings] == [(1, kind)]
    assert tally.accepted == 2


def test_a_memory_error_that_was_caught_is_a_finding_too(tmp_path: Path) -> None:
    def act() -> None:
        try:
            bytearray(1 << 28)
        except MemoryError as error:
            raise ValueError(f"{tmp_path}: not readable: MemoryError") from error

    tally = run_trials("x", 0, range(1), lambda number: Trial(act, 100, tmp_path))
    assert [finding.kind for finding in tally.findings] == ["memory"]


# Flipped bytes


def test_a_flipped_byte_of_a_store_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    path = write_store(tmp_path / "store", 20)
    before = {file: file.read_bytes() for file in path.iterdir()}
    whole = EmbeddingStore(path)
    eva, clip = whole.fetch(range(20))
    records, refused, files = whole.records(), 0, set()
    for file, _ in flip_bytes(path, 500, seed=0):
        files.add(file)
        try:
            store = EmbeddingStore(path)
            got, found = store.fetch(range(20)), store.records()
            read_embeddings(path)
        except ValueError as error:
            refused += 1
            assert str(error).startswith(str(path))  # noqa: PT017
            continue
        assert file.name == "manifest.json"  # which says a little that is only told to people
        assert torch.equal(got[0], eva) and torch.equal(got[1], clip) and found == records
    assert files == set(before)
    assert refused > 400
    assert {file: file.read_bytes() for file in path.iterdir()} == before
