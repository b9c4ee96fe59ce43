from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from blip3o_dit.utils import folder_lock as module
from blip3o_dit.utils.folder_lock import LOCK_FILE, FolderInUseError, folder_lock, held_folder


def test_a_folder_is_held_by_one(tmp_path: Path) -> None:
    with (
        folder_lock(tmp_path, "training"),
        pytest.raises(FolderInUseError) as refused,
        folder_lock(tmp_path, "training"),
    ):
        raise AssertionError("held twice")
    message = str(refused.value)
    assert str(os.getpid()) in message and socket.gethostname() in message and "\n" not in message
    assert not list(tmp_path.iterdir())
    with folder_lock(tmp_path, "training"):
        pass


def test_a_killed_owner_does_not_keep_it(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from blip3o_dit.utils.folder_lock import folder_lock\n"
        "with folder_lock(Path(sys.argv[1]), 'training'): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert (tmp_path / LOCK_FILE).is_file()
    with folder_lock(tmp_path, "training"):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_a_later_process_with_the_same_number_is_another(tmp_path: Path) -> None:
    write_owner(tmp_path, host=socket.gethostname(), pid=os.getpid(), started="1")
    with folder_lock(tmp_path, "training"):
        pass


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_a_damaged_lock_ends_when_nobody_touches_it(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SILENT_AFTER", 0.5)
    (tmp_path / LOCK_FILE).write_bytes(content)
    with folder_lock(tmp_path, "training"):
        pass


def test_another_host_that_is_silent_is_dead(tmp_path: Path) -> None:
    write_owner(tmp_path, host="elsewhere", pid=1, started="1")
    old = time.time() - 2 * module.SILENT_AFTER
    os.utime(tmp_path / LOCK_FILE, (old, old))
    with folder_lock(tmp_path, "training"):
        pass


def test_another_host_that_touches_its_lock_lives(tmp_path: Path) -> None:
    write_owner(tmp_path, host="elsewhere", pid=7, started="1")
    timer = threading.Timer(1.5, os.utime, [tmp_path / LOCK_FILE])
    timer.start()
    with pytest.raises(FolderInUseError, match="process 7 on elsewhere"), folder_lock(tmp_path, "training"):
        raise AssertionError("taken from one that lives")
    timer.join()


def test_the_owner_touches_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOUCH_EVERY", 0.05)
    with folder_lock(tmp_path, "training"):
        os.utime(tmp_path / LOCK_FILE, (1, 1))
        time.sleep(0.5)
        assert (tmp_path / LOCK_FILE).stat().st_mtime > 1


def write_owner(folder: Path, **owner: object) -> None:
    (folder / LOCK_FILE).write_text(json.dumps({"what": "training"} | owner))


def test_folders_made_for_a_lock_go_unless_they_are_used(tmp_path: Path) -> None:
    with held_folder(tmp_path / "a" / "b", "training"):
        assert (tmp_path / "a" / "b" / LOCK_FILE).is_file()
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    with held_folder(tmp_path / "mine", "training"), held_folder(tmp_path / "c" / "d", "training"):
        (tmp_path / "c" / "x").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["c", "mine", "x"]
