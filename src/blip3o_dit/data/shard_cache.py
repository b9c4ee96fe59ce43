"""What was read of shards that lie elsewhere, on this disk: at most so many bytes, shared by all processes.

    <folder>/used          how many bytes the others take; locked while that changes
             <key>.shard   a shard's own bytes, with holes, then one more for each sample: 1 if it is there
             <key>.table   a shard's table

A sample is there when it was written before its byte was. What is mapped stays readable when its file goes.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from blip3o_dit.utils.addresses import cache_folder

# Gigabytes, where BLIP3O_DIT_CACHE_GB does not say.
DEFAULT_GB = 20.0
# Seconds: a shard that was opened since is in use, and stays; so long a full cache is not asked again.
IN_USE, ASK_AGAIN = 600.0, 60.0


class CachedShard:
    """One shard's file: its bytes, mapped, and which of its samples are there."""

    def __init__(self, path: Path, size: int) -> None:
        self._file: BinaryIO = open(path, "r+b", buffering=0)  # noqa: SIM115
        os.utime(self._file.fileno())
        self._size = size
        self.bytes = mmap.mmap(self._file.fileno(), 0)  # writable, for torch; written by calls that can fail
        self._here = np.frombuffer(self.bytes, dtype=np.uint8, offset=size)

    def has(self, sample: int) -> bool:
        return bool(self._here[sample])

    def put(self, first: int, samples: int, parts: Mapping[int, bytes | bytearray]) -> None:
        """Samples in a row, whose bytes are these parts by where they begin in the shard.

        Raises:
            OSError: as when the disk is full; the samples do not count as being there.
        """
        for start, content in parts.items():
            os.pwrite(self._file.fileno(), content, start)
        os.pwrite(self._file.fileno(), b"\1" * samples, self._size + first)


class ShardCache:
    """The folder. Small and picklable.

    Args:
        folder, bound: None is what the environment says, BLIP3O_DIT_CACHE and BLIP3O_DIT_CACHE_GB.
    """

    def __init__(self, folder: Path | None = None, bound: int | None = None) -> None:
        self.folder = folder or cache_folder() / "shards"
        self.bound = _bound() if bound is None else bound
        self._full_until = 0.0
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._used() as used:
            used[0] = sum(_size_of(file) for file in self.folder.iterdir())

    def take(self, *sizes: int) -> int:
        """How many of these, from the first on, there is room for, which then count: bytes.

        What is not in use goes for them.
        """
        if time.monotonic() < self._full_until:
            return 0
        fitting = 0
        with self._used() as used:
            more = used[0] + sum(sizes) - self.bound
            used[0] -= self._drop(more) if more > 0 else 0
            while fitting < len(sizes) and used[0] + sizes[fitting] <= self.bound:
                used[0] += sizes[fitting]
                fitting += 1
        if fitting < len(sizes):
            self.is_full()
        return fitting

    def is_full(self) -> None:
        """The disk is: nothing more is kept for a while."""
        self._full_until = time.monotonic() + ASK_AGAIN

    def add(self, name: str, size: int, parts: Mapping[int, bytes]) -> Path:
        """A file of `size` bytes: parts, by where they begin, and holes. One that is there stays."""
        path = self.folder / name
        if not path.exists():
            aside = self.folder / f"{name}.{os.getpid()}"
            with open(aside, "wb") as file:
                file.truncate(size)
                for start, content in parts.items():
                    file.seek(start)
                    file.write(content)
            with suppress(FileExistsError):  # another process was quicker, and may have written to it
                os.link(aside, path)
            aside.unlink()
        return path

    def _drop(self, needed: int) -> int:
        """Remove what was not used for longest until so many bytes are free; returns how many are."""
        files = [(file.stat().st_mtime, file) for file in self.folder.iterdir() if file.suffix in _KEPT]
        freed = 0
        for used_at, file in sorted(files):
            if freed >= needed or time.time() - used_at < IN_USE:
                break
            freed += _size_of(file)
            file.unlink(missing_ok=True)
        return freed

    @contextmanager
    def _used(self) -> Iterator[np.ndarray]:
        """The count of bytes, to read and change; nobody else does meanwhile."""
        with open(self.folder / "used", "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            used = np.frombuffer(file.read(8).ljust(8, b"\0"), dtype="<i8").copy()
            yield used
            file.truncate(0)
            file.write(used.tobytes())


_KEPT = (".shard", ".table")


def _size_of(file: Path) -> int:
    """Bytes that a file takes on the disk, which its holes do not."""
    try:
        return 512 * file.stat().st_blocks
    except FileNotFoundError:
        return 0


def _bound() -> int:
    given = os.environ.get("BLIP3O_DIT_CACHE_GB", "")
    try:
        gigabytes = float(given or DEFAULT_GB)
    except ValueError:
        gigabytes = -1.0
    if not 0 <= gigabytes < 1e9:
        raise ValueError(f"BLIP3O_DIT_CACHE_GB: expected gigabytes, found {given!r}")
    return int(gigabytes * 1e9)
