"""One run per folder: a lock file with host and process, which a run that died does not keep.

    .blip3o-dit.lock    {"host": ..., "pid": ..., "started": ..., "what": ...}; touched while its owner lives

The file is made with O_EXCL, which holds on shared file systems too. Its owner is dead when the same host has
no such process, or when another host's has not touched it for `SILENT_AFTER` seconds.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from blip3o_dit.utils.json_files import read_json

LOCK_FILE = ".blip3o-dit.lock"
TOUCH_EVERY, SILENT_AFTER = 10.0, 60.0  # seconds

logger = logging.getLogger(__name__)


class FolderInUseError(ValueError):
    """Another process works on the folder; the message says which one."""


@contextmanager
def folder_lock(folder: Path, what: str) -> Iterator[None]:
    """Hold a folder, which must exist, while the block runs.

    Args:
        what: what is being done, for the message that others get: "training", "extraction".

    Raises:
        FolderInUseError: another process, which lives, works on it. One of another host that seems dead is
            waited for, at most `SILENT_AFTER` seconds.
    """
    file = folder / LOCK_FILE
    _acquire(file, what)
    released = threading.Event()
    threading.Thread(target=_keep_touching, args=(file, released), daemon=True).start()
    try:
        yield
    finally:
        released.set()
        file.unlink(missing_ok=True)


@contextmanager
def held_folder(folder: Path, what: str) -> Iterator[None]:
    """Make a folder and those above it, and hold it; what was made here and is empty in the end goes again.

    Raises:
        FolderInUseError: as `folder_lock`.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with folder_lock(folder, what):
            yield
    finally:
        with suppress(OSError):  # the first that holds something, and those above it, stay
            for path in made:
                path.rmdir()


def _acquire(file: Path, what: str) -> None:
    owner = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _start_of(os.getpid()),
        "what": what,
    }
    while True:
        try:
            with open(file, "x", encoding="utf-8") as lock:
                json.dump(owner, lock)
            return
        except FileExistsError:
            _refuse_living_owner(file)
        # Two processes may find the same dead owner: only one of them can rename its file.
        dead = file.with_name(f"{file.name}.dead-{owner['host']}-{os.getpid()}")
        with suppress(FileNotFoundError):
            os.rename(file, dead)
            dead.unlink()


def _refuse_living_owner(file: Path) -> None:
    """Return when the owner of the lock is dead; raise FolderInUseError when it lives."""
    owner = _read(file)
    if owner.get("host") == socket.gethostname():
        if _start_of(owner.get("pid")) == owner.get("started") is not None:
            raise FolderInUseError(_in_use(file, owner))
        return
    first = last = _touched(file)
    if first is not None and time.time() - first < SILENT_AFTER:
        logger.info("%s: waiting up to %.0f s for a sign of life of its owner", file, SILENT_AFTER)
    while last is not None and time.time() - last < SILENT_AFTER:
        if last != first:
            raise FolderInUseError(_in_use(file, owner))
        time.sleep(1.0)
        last = _touched(file)


def _in_use(file: Path, owner: dict[str, Any]) -> str:
    return (
        f"{file.parent}: expected no other run in this folder, found {owner.get('what')} by process "
        f"{owner.get('pid')} on {owner.get('host')}: wait for it, or choose another folder"
    )


def _read(file: Path) -> dict[str, Any]:
    """The owner; nothing when the lock has gone, or its owner died while writing it."""
    try:
        owner = read_json(file)
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _touched(file: Path) -> float | None:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return None


def _keep_touching(file: Path, released: threading.Event) -> None:
    while not released.wait(TOUCH_EVERY):
        with suppress(OSError):
            os.utime(file)


def _start_of(pid: Any) -> str | None:
    """When a process of this host began, which tells it from a later one of its number."""
    if not isinstance(pid, int) or pid < 1:
        return None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]  # dead, though nobody has asked for its status
    except (OSError, IndexError):
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)  # no /proc: the number alone has to do
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return "unknown"
