"""Checksums taken once on a machine, by whoever needs them first: a process, a loader worker, an earlier run.

    <temporary directory>/blip3o-dit-<user>/    mode 0700
      <hash of a folder's path>                 32 bytes for each file of it, by its number

Those 32 bytes are a hash of the file's path and identity (device, inode, size, times of its last change) and
of the checksum it was found to have: they say nothing of a file that changed since. A process holds a lock on
its file's 32 bytes while it reads the file, so others wait for it instead of reading it as well.

A record is believed because nobody else can have written it: the directory and its files must belong to this
user and be closed to everybody else. Where it is not, or there is none, each process reads for itself.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from blip3o_dit.utils.checksums import sha256

if os.name == "posix":
    import fcntl

logger = logging.getLogger(__name__)

# Seconds since a file's last change before a record of it is kept: clocks of file systems tick so slowly that
# a second change might leave the same time behind.
SETTLED_AFTER = 2.0

_SLOT = 32  # bytes of a record

Identity = tuple[int, ...]


def identity(file: Path) -> Identity:
    """What changes with a file's content. Raises FileNotFoundError when there is none."""
    status = os.stat(file)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def check_once(file: Path, number: int, expected: str) -> Identity:
    """Refuse a file whose SHA-256 is not `expected`; reads it unless that was done before on this machine.

    Args:
        number: the file's number in its folder; others of the folder have other ones.

    Returns: what was verified.

    Raises:
        ValueError: naming the file.
    """
    before = identity(file)
    settled = time.time() - before[-1] / 1e9 > SETTLED_AFTER
    known = hashlib.sha256(repr((os.path.realpath(file), before, expected)).encode()).digest()
    with _record(file.parent, number, wanted=settled) as record:
        if record is None or os.pread(record, _SLOT, number * _SLOT) != known:
            if sha256(file) != expected or identity(file) != before:
                raise ValueError(f"{file}: its SHA-256 is not the manifest's: the file was altered")
            if record is not None:
                with suppress(OSError):  # no space left: nothing is lost but the time
                    os.pwrite(record, known, number * _SLOT)
    return before


@contextmanager
def _record(folder: Path, number: int, *, wanted: bool) -> Iterator[int | None]:
    """The open file of a folder's records, this file's part of it locked; None where none can be kept."""
    record = _open_record(folder) if wanted else None
    if record is None:
        yield None
        return
    try:
        with suppress(OSError):  # where files cannot be locked, two processes may read the same one
            fcntl.lockf(record, fcntl.LOCK_EX, _SLOT, number * _SLOT)
        yield record
    finally:
        os.close(record)  # which unlocks


def _open_record(folder: Path) -> int | None:
    if os.name != "posix":
        return None
    directory = directory_of_records()
    name = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        if _is_ours_alone(os.lstat(directory), stat.S_ISDIR):
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            record = os.open(directory / name, flags, 0o600)
            if _is_ours_alone(os.fstat(record), stat.S_ISREG):
                return record
            os.close(record)
    except OSError as error:
        _say_once(f"{directory}: {error.strerror}")
        return None
    _say_once(f"{directory}: expected a directory of this user's with files of this user's, closed to others")
    return None


def directory_of_records() -> Path:
    """Where this user's records are; the directory of temporary files is each machine's own."""
    return Path(tempfile.gettempdir(), f"blip3o-dit-{os.geteuid()}")


def _is_ours_alone(status: os.stat_result, of_kind: Callable[[int], bool]) -> bool:
    """Whether nobody but this user can have written there; a link is of neither kind."""
    closed = not stat.S_IMODE(status.st_mode) & 0o077
    return of_kind(status.st_mode) and status.st_uid == os.geteuid() and closed


@cache
def _say_once(why: str) -> None:
    logger.warning("checksums are taken in every process anew: %s", why)
