"""A store's folder: only an empty one or a store of ours is taken; it is the old or the new one, always."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blip3o_dit.cli.command import INPUT_OUTPUT, exit_status
from blip3o_dit.data import store_folder
from blip3o_dit.data.convert import convert_pickle
from blip3o_dit.data.manifest import MANIFEST, STORE_ASIDE
from blip3o_dit.data.store import EmbeddingStore, StoreWriter
from blip3o_dit.model.loading import finish_model
from blip3o_dit.utils import atomic
from blip3o_dit.utils.checksums import CHECKSUMS_FILE, verify
from blip3o_dit.utils.errors import WriteError
from blip3o_dit.utils.folder_lock import folder_lock
from tests.data.test_pickle_format import documented, dump
from tests.data.test_store import SIZES, refused, samples, write


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["shard-00000.jsonl"], "found ['shard-00000.jsonl']"),
        (["notes.txt"], "found ['notes.txt']"),
        (["photos/a.png"], "found ['photos']"),
        (["manifest.json"], "found ['manifest.json']"),
        (["extraction.json", "shard-00000.safetensors"], "found an unfinished extraction"),
        (["shard-00000.entry.json"], "found an unfinished extraction"),
    ],
)
def test_what_is_not_ours_is_refused_and_untouched(
    tmp_path: Path, files: list[str], found: str, overwrite: bool
) -> None:
    for name in files:
        (tmp_path / "s" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "s" / name).write_text('{"mine": 1}')
    before = contents(tmp_path / "s")
    assert found in refused(lambda: write(tmp_path / "s", overwrite=overwrite))
    assert contents(tmp_path / "s") == before


def test_shards_that_the_store_does_not_list_are_not_replaced(tmp_path: Path) -> None:
    write(tmp_path / "s", 7)
    (tmp_path / "s" / "shard-00009.jsonl").write_text("mine")
    assert "found ['shard-00009.jsonl']" in refused(lambda: write(tmp_path / "s", overwrite=True))
    assert EmbeddingStore(tmp_path / "s").num_samples == 7


def test_what_file_managers_leave_does_not_count_and_stays(tmp_path: Path) -> None:
    (tmp_path / "s" / "lost+found").mkdir(parents=True)
    for name in (".DS_Store", ".gitkeep", "Thumbs.db"):
        (tmp_path / "s" / name).write_text(name)
    with folder_lock(tmp_path / "s", "a test"):
        write(tmp_path / "s", 7)
    write(tmp_path / "s", 2, overwrite=True)
    assert {".DS_Store", ".gitkeep", "Thumbs.db", "lost+found"} < {f.name for f in (tmp_path / "s").iterdir()}
    assert EmbeddingStore(tmp_path / "s").num_samples == 2


def test_a_broken_link_and_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "file").write_text("mine")
    for name in ("link", "file"):
        assert "found a file or a broken link" in refused(lambda name=name: write(tmp_path / name))


@pytest.mark.parametrize("name", [".", "../here", "../link", "a/../new", "deep/er/new"])
def test_any_way_to_name_a_folder_works(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("here", "target"):
        (tmp_path / folder).mkdir()
    (tmp_path / "link").symlink_to("target")
    monkeypatch.chdir(tmp_path / "here")
    os.makedirs("a") if name == "a/../new" else None
    for seed in (0, 1):
        write(Path(name), seed=seed, overwrite=bool(seed))
    assert torch.equal(EmbeddingStore(name).fetch([0])[0], samples(7, 1)[0][:1])
    assert (tmp_path / "link").is_symlink()


def test_a_value_that_does_not_fit_leaves_the_old_store(tmp_path: Path) -> None:
    good, bad = dump(tmp_path / "a.pkl", documented()), documented()
    bad["eva_blip3o_embeddings"][-1, -1, -1] = 70000.0
    convert_pickle(good, tmp_path / "s", dtype="float32")
    before = contents(tmp_path / "s")
    path = dump(tmp_path / "b.pkl", bad)
    assert "does not fit float16" in refused(lambda: convert_pickle(path, tmp_path / "s", overwrite=True))
    assert contents(tmp_path / "s") == before


def test_a_full_disk_has_its_exit_status_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write(tmp_path / "old")
    before = contents(tmp_path)
    for target in ("safetensors.torch.save_file", "os.fsync", "os.replace"):
        for name in ("old", "new"):
            with monkeypatch.context() as patch:
                patch.setattr(target, full)
                with pytest.raises(OSError, match="No space left") as caught:
                    fill(tmp_path / name, overwrite=name == "old")
            assert exit_status(caught.value) == INPUT_OUTPUT
            assert contents(tmp_path) == before
    assert not (tmp_path / "new").exists()


def fill(path: Path, **options: Any) -> None:
    with StoreWriter(path, **SIZES, dtype="float32", shard_size=3, **options) as writer:
        writer.append(*samples(7, seed=1))


def test_an_error_of_safetensors_is_one_of_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise atomic.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(WriteError, match=r"shard-00000.safetensors: expected to write it.*No space left"):
        fill(tmp_path / "s")


class Killed(BaseException): ...


def killed_before(call: int, work: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether `work` was stopped before its n-th change of a file's name; no later one is made either."""
    left = [call]

    def counted(plain: Callable[..., Any]) -> Callable[..., Any]:
        def change(*arguments: Any, **options: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            plain(*arguments, **options)

        return change

    with monkeypatch.context() as patch:
        for name in ("replace", "unlink", "rmdir"):
            patch.setattr(os, name, counted(getattr(os, name)))
        patch.setattr("shutil.rmtree", counted(shutil.rmtree))
        try:
            work()
        except Killed:
            return True
    return False


def test_a_store_is_the_old_or_the_new_one_wherever_its_writer_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, counts = tmp_path / "s", []

    def overwrite() -> None:
        with StoreWriter(path, **SIZES, dtype="float32", shard_size=4, overwrite=True) as writer:
            writer.append(*samples(7, seed=1))

    while True:
        write(path, 9, overwrite=bool(counts))
        killed = killed_before(len(counts), overwrite, monkeypatch)
        store = EmbeddingStore(path)
        store.verify()
        counts.append(store.num_samples)
        expected = samples(9) if counts[-1] == 9 else samples(7, seed=1)
        assert torch.equal(store.fetch(range(counts[-1]))[0], expected[0])
        assert write(path, 3, seed=2, overwrite=True).num_samples == 3
        assert {file.name for file in path.iterdir()} == store_folder.stored_files(path)
        if not killed:
            break
    assert counts == sorted(counts, reverse=True) and set(counts) == {7, 9} and len(counts) > 15


def test_an_interrupt_while_files_move_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "s", 9)
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "move_files", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fill(tmp_path / "s", overwrite=True)
    assert not (tmp_path / "s" / MANIFEST).exists()
    assert torch.equal(EmbeddingStore(tmp_path / "s").fetch(range(7))[0], samples(7, seed=1)[0])
    assert not (tmp_path / "s" / STORE_ASIDE).exists()


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_have_the_permissions_that_others_get(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path / "s")
        with atomic.written_aside(tmp_path / "model") as aside:
            from safetensors.torch import save_file

            save_file({"a": torch.zeros(2)}, aside / "model.safetensors")
    finally:
        os.umask(before)
    for file in (*(tmp_path / "s").iterdir(), *(tmp_path / "model").iterdir()):
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask, file


def test_what_a_killed_writer_of_a_shard_left_goes(tmp_path: Path) -> None:
    left = tmp_path / "shard-00000.safetensors.partial"
    left.mkdir()
    (left / ".tmpAbCdEf").write_bytes(b"half")
    atomic.save_tensors({"a": torch.zeros(2)}, tmp_path / "shard-00000.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["shard-00000.safetensors"]


def test_shard_table_and_folder_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    plain = os.fsync

    def fsync(descriptor: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write(tmp_path / "s", 3)
    assert {"shard-00000.safetensors", "shard-00000.jsonl.partial", STORE_ASIDE, "s"} <= set(flushed)


# A model's folder


def publish_model(folder: Path, names: str, content: str) -> None:
    with atomic.written_aside(folder, files_only=True, replaces=["ema"]) as aside:
        for name in names:
            (aside / name).write_text(content)


def test_a_model_is_the_old_or_the_new_one_wherever_its_writer_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, found = tmp_path / "m", []
    while True:
        publish_model(model, "abc", "old")
        killed = killed_before(len(found), lambda: publish_model(model, "ab", "new"), monkeypatch)
        finish_model(model)
        verify(model)
        found.append({file.name: file.read_text() for file in model.iterdir() if file.name in "abc"})
        if not killed:
            break
    old, new = {"a": "old", "b": "old", "c": "old"}, {"a": "new", "b": "new"}
    assert [here for here in found if here not in (old, new)] == []
    assert found[0] == old and found[-1] == new and len(found) > 7


def test_a_model_half_moved_by_an_older_version_is_refused(tmp_path: Path) -> None:
    publish_model(tmp_path / "m", "ab", "old")
    publish_model(tmp_path / "m" / atomic.MODEL_ASIDE, "ab", "new")
    os.unlink(tmp_path / "m" / CHECKSUMS_FILE)
    with pytest.raises(ValueError, match="expected one model, found another half moved into it"):
        finish_model(tmp_path / "m")


def test_a_folder_that_cannot_be_finished_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    publish_model(tmp_path / "m", "ab", "old")
    os.rename(tmp_path / "m", tmp_path / atomic.MODEL_ASIDE)
    (tmp_path / atomic.MODEL_ASIDE / atomic.REPLACES_FILE).write_text("[]")
    monkeypatch.setattr(os, "replace", read_only)
    with pytest.raises(ValueError, match="open it where it can be written to"):
        finish_model(tmp_path)


@pytest.mark.parametrize("content", ['{"a": 1}', '"name"', "[5]", "[null]", '["../x"]', '["a/b"]', "5", "{"])
def test_a_damaged_list_of_what_goes_is_refused_and_nothing_goes(tmp_path: Path, content: str) -> None:
    (tmp_path / "x").touch()
    store = tmp_path / "store"
    (store / STORE_ASIDE).mkdir(parents=True)
    (store / STORE_ASIDE / atomic.REPLACES_FILE).write_text(content)
    (store / "a").touch()
    with pytest.raises(ValueError, match=re.escape(atomic.REPLACES_FILE)):
        EmbeddingStore(store)
    assert (store / "a").exists() and (tmp_path / "x").exists()
