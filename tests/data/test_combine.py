"""Stores put together: nothing twice, nothing lost, nothing that does not belong; the commands too."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from blip3o_dit.cli.main import main
from blip3o_dit.data.combine import append_store, merge_stores
from blip3o_dit.data.manifest import MANIFEST
from blip3o_dit.data.store import EmbeddingStore, StoreWriter
from blip3o_dit.data.store_folder import stored_files
from blip3o_dit.utils.folder_lock import folder_lock
from tests.data.test_store import SIZES, flip_last_byte, refused, samples, write
from tests.data.test_store_folder import contents, killed_before
from tests.helpers.stores import without_sample_checksums


def store_of(path: Path, rows: range, *, seed: int = 0, **options: Any) -> EmbeddingStore:
    """Samples with these numbers, the same for each number."""
    eva, clip, records = samples(40, seed)
    with StoreWriter(path, **(SIZES | dict(dtype="float32", shard_size=3) | options)) as writer:
        writer.append(
            eva[rows.start : rows.stop], clip[rows.start : rows.stop], records[rows.start : rows.stop]
        )
    return EmbeddingStore(path)


def holds(store: EmbeddingStore, rows: list[int]) -> bool:
    eva, clip, records = samples(40)
    store.verify()
    found = store.fetch(range(len(store)))
    return (
        store.records() == [records[row] for row in rows]
        and torch.equal(found[0], eva[rows])
        and torch.equal(found[1], clip[rows])
    )


def test_merged_stores_hold_each_sample_once(tmp_path: Path) -> None:
    store_of(tmp_path / "a", range(5))
    store_of(tmp_path / "b", range(3, 9), shard_size=2)
    without_sample_checksums(store_of(tmp_path / "c", range(20, 24)).path)
    store, added, passed_over = merge_stores([tmp_path / name for name in "abc"], tmp_path / "out")
    assert (added, passed_over) == (13, 2)
    assert holds(store, [*range(9), *range(20, 24)])


def test_appended_samples_come_after_those_that_are_there(tmp_path: Path) -> None:
    base = store_of(tmp_path / "a", range(5))
    before = contents(base.path)
    store_of(tmp_path / "b", range(3, 9))
    store, added, passed_over = append_store(base.path, tmp_path / "b", about={"note": "more"})
    assert (added, passed_over) == (4, 2)
    assert holds(store, list(range(9))) and store.manifest["note"] == "more"
    assert store.manifest["pooling"] == base.manifest["pooling"]
    after = contents(base.path)
    assert {name: after[name] for name in before if name != MANIFEST} == {
        name: content for name, content in before.items() if name != MANIFEST
    }
    assert append_store(base.path, tmp_path / "b")[1:] == (0, 6)
    assert contents(base.path) == after
    assert store.fingerprint() != base.fingerprint()


def test_an_older_store_with_gaps_can_be_appended_to(tmp_path: Path) -> None:
    path = without_sample_checksums(store_of(tmp_path / "a", range(6)).path)
    manifest = json.loads((path / MANIFEST).read_text())
    for entry in manifest["shards"][1:]:
        for name in ("file", "table"):
            renamed = entry[name].replace("00001", "00007")
            os.rename(path / entry[name], path / renamed)
            entry[name] = renamed
    (path / MANIFEST).write_text(json.dumps(manifest))
    store_of(tmp_path / "b", range(6, 8))
    store = append_store(path, tmp_path / "b").store
    assert holds(store, list(range(8)))
    assert store.manifest["shards"][-1]["file"] == "shard-00008.safetensors"


@pytest.mark.parametrize("what", ["tokens", "record"])
def test_two_different_samples_of_one_key_are_refused_or_the_first_is_kept(tmp_path: Path, what: str) -> None:
    store_of(tmp_path / "a", range(5))
    if what == "tokens":
        store_of(tmp_path / "b", range(4, 8), seed=1)
    else:
        eva, clip, records = samples(40)
        with StoreWriter(tmp_path / "b", **SIZES, dtype="float32") as writer:
            writer.append(eva[4:8], clip[4:8], [{"key": record["key"]} for record in records[4:8]])
    before = contents(tmp_path / "a")
    for call in (
        lambda: append_store(tmp_path / "a", tmp_path / "b"),
        lambda: merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "out"),
    ):
        message = refused(call)
        assert message.startswith(f"{tmp_path / 'b'}: sample 0: expected the key 'k4' once")
        assert f"sample 4 of {tmp_path / 'a'}" in message
    assert contents(tmp_path / "a") == before and not (tmp_path / "out").exists()
    store, added, passed_over = append_store(tmp_path / "a", tmp_path / "b", keep_first=True)
    assert (added, passed_over, len(store)) == (3, 1, 8)
    assert torch.equal(store.fetch([4])[0], samples(40)[0][4:5])


UNLIKE: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"dtype": "float16"}, "dtype: expected 'float32' as in"),
    "pooling": ({"pooling": "max"}, "pooling: expected 'mean' as in"),
    "normalization": ({"normalization": "l2"}, "normalization: expected 'none' as in"),
    "tower": ({"encoders": {"eva": {"name": "y", "new": 1}}}, "eva tower: name: expected 'x' as in"),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_stores_that_do_not_belong_together_are_refused(tmp_path: Path, name: str) -> None:
    options, message = UNLIKE[name]
    about = {"pooling": "mean", "encoders": {"eva": {"name": "x", "revision": None}}}
    store_of(tmp_path / "a", range(5), **about)
    store_of(tmp_path / "b", range(5, 8), **(about | options))
    assert message in refused(lambda: append_store(tmp_path / "a", tmp_path / "b"))
    assert message in refused(lambda: merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "out"))


def test_what_one_store_does_not_say_is_taken_from_the_other(tmp_path: Path) -> None:
    store_of(
        tmp_path / "a", range(5), encoders={"eva": {"name": "x", "revision": None}, "converted_from": "p"}
    )
    about = {"eva": {"name": "x", "revision": "r", "weights": "w"}, "clip": {"name": "z"}}
    store_of(tmp_path / "b", range(5, 8), encoders=about, pooling="mean")
    merged = merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "out").store.manifest
    assert merged["encoders"]["eva"]["weights"] == "w" and merged["encoders"]["clip"] == {"name": "z"}
    assert merged["pooling"] == "mean"


def test_other_sizes_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a")
    with StoreWriter(tmp_path / "b", num_tokens=4, condition_dim=5, target_dim=3, dtype="float32") as writer:
        writer.append(torch.ones(1, 4, 5), torch.ones(1, 4, 3), [{"key": "x"}])
    message = refused(lambda: append_store(tmp_path / "a", tmp_path / "b"))
    assert message == f"{tmp_path / 'b'}: condition_dim: expected 6 as in {tmp_path / 'a'}, found 5"


def test_a_store_is_the_old_or_the_longer_one_wherever_append_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_of(tmp_path / "b", range(5, 12))
    counts: list[int] = []
    while True:
        path = store_of(tmp_path / "a", range(5), overwrite=bool(counts)).path
        killed = killed_before(len(counts), lambda path=path: append_store(path, tmp_path / "b"), monkeypatch)
        store = EmbeddingStore(path)
        counts.append(len(store))
        assert holds(store, list(range(counts[-1])))
        assert holds(append_store(path, tmp_path / "b").store, list(range(12)))
        assert {file.name for file in path.iterdir()} == stored_files(path)
        if not killed:
            break
    assert set(counts) == {5, 12} and counts == sorted(counts)


def test_damage_in_what_is_appended_stops_it(tmp_path: Path) -> None:
    store_of(tmp_path / "a", range(5))
    store_of(tmp_path / "b", range(5, 8))
    before = contents(tmp_path / "a")
    flip_last_byte(tmp_path / "b" / "shard-00000.safetensors")
    assert "altered" in refused(lambda: append_store(tmp_path / "a", tmp_path / "b"))
    assert contents(tmp_path / "a") == before


# The commands


def test_merge_append_and_verify(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, out = (str(tmp_path / name) for name in ("a", "b", "out"))
    store_of(Path(a), range(5))
    store_of(Path(b), range(3, 9))
    caplog.set_level("INFO")
    assert main(["merge", a, b, out]) == 0
    assert "9 samples of 2 stores, 2 passed over" in caplog.text
    assert main(["merge", a, b, out]) == 2
    assert main(["merge", a, b, out, "--overwrite"]) == 0
    assert main(["append", a, b]) == 0 and main(["append", a, b]) == 0
    assert "0 samples added" in caplog.text and holds(EmbeddingStore(a), list(range(9)))
    assert main(["verify", a]) == 0 and "9 samples in 3 shards, all whole" in caplog.text
    flip_last_byte(Path(a) / "shard-00000.safetensors")
    (Path(a) / "shard-00002.jsonl").unlink()
    capsys.readouterr()
    assert main(["verify", a]) == 2
    assert "shard-00000.safetensors: its SHA-256" in caplog.text and "shard-00002.jsonl" in caplog.text
    assert "2 of 6 files are damaged" in capsys.readouterr().err


def test_two_writers_of_one_folder_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (str(store_of(tmp_path / name, range(5)).path) for name in "ab")
    with folder_lock(Path(a), "a test"):
        assert main(["append", a, b]) == 2
        assert main(["merge", b, a, "--overwrite"]) == 2
    assert capsys.readouterr().err.count("expected no other run in this folder, found a test") == 2
    assert main(["append", str(tmp_path / "none"), b]) == 2
    assert not (tmp_path / "none").exists()
