"""Folders that fsspec reads and writes: `s3://bucket/folder`, `gs://`, `hf://datasets/owner/name`, `memory://`.

Credentials, servers and other options are those of each protocol's own library: the environment, its
configuration files, and fsspec's (`FSSPEC_S3_ENDPOINT_URL`, ~/.config/fsspec).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from blip3o_dit.utils.atomic import atomic_file
from blip3o_dit.utils.errors import RETRY_AFTER, ReadError
from blip3o_dit.utils.json_files import one_line

# Not of web pages, which have no list of what lies below an address.
_SCHEME = re.compile(r"(?!https?:)([a-z][a-z0-9+.-]+):/+(?=[^/])")
# Ranges that are asked for at a time, and bytes of a file that is read whole.
_AT_ONCE, _BLOCK = 32, 2**23
# What libraries raise that is no OSError, where they are loaded; credentials that are missing among it.
_LIBRARY_ERRORS = {
    "aiohttp": "ClientError",
    "botocore.exceptions": "BotoCoreError",
    "gcsfs.retry": "HttpError",
    "google.auth.exceptions": "GoogleAuthError",
    "huggingface_hub.errors": "HTTPError",
}

_OF_THIS_DISK = ("file", "local")
# Nothing is waited for there; and memory:// has one position in a file for all who read it.
_IN_TURN = (*_OF_THIS_DISK, "memory")

T = TypeVar("T")


class Address(type(Path())):  # type: ignore[misc]
    """An address as the path of a folder or file there, for messages and names: `open` does not take it."""

    def __str__(self) -> str:
        scheme, _, rest = super().__str__().partition(":/")
        return f"{scheme}://{'/' if scheme in _OF_THIS_DISK else ''}{rest}"

    def resolve(self, strict: bool = False) -> Address:
        return self


def located(path: str | Path) -> Path:
    """The path, as an `Address` if it is one: `s3://bucket/x`, also after `Path` has taken one slash away.

    What is there on this disk comes first.
    """
    if isinstance(path, Address):
        return path
    is_address = _SCHEME.match(str(path)) is not None and not os.path.lexists(path)
    return Address(str(path)) if is_address else Path(path)


def may_be_there(path: str | Path) -> bool:
    """Whether a path is there; of an address that is not asked."""
    return isinstance(located(path), Address) or Path(path).exists()


def refuse_address(path: Path) -> None:
    """Refuse (ValueError) an address where only a folder of this disk can be written to."""
    if isinstance(located(path), Address):
        raise ValueError(
            f"{located(path)}: expected a path on this disk to write to, found an address: "
            "`blip3o-dit push FOLDER ADDRESS` sends a folder there"
        )


class RemoteFolder:
    """The files below an address. Small and picklable; each process connects for itself.

    What fails for a while is tried again after `RETRY_AFTER`.

    Raises, all of it:
        FileNotFoundError: nothing is there.
        ValueError: a protocol that is not known or has no package here, or no permission.
        ReadError: the connection is lost.
    """

    def __init__(self, address: Path) -> None:
        self.address = address

    def read(self, name: str) -> bytes:
        """A small file's content."""
        return self._retried(name, lambda files, path: files.cat_file(path))

    def ranges(self, wanted: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Bytes [start, stop) of the files named, several at a time."""
        if not wanted:
            return []
        return self._retried(wanted[0][0], lambda files, _: self._ranges(files, wanted))

    def _ranges(self, files: Any, wanted: Sequence[tuple[str, int, int]]) -> list[bytes]:
        paths = [self._path(files, name) for name, _, _ in wanted]
        starts, stops = [start for _, start, _ in wanted], [stop for _, _, stop in wanted]
        if files.async_impl:
            found = files.cat_ranges(paths, starts, stops, batch_size=_AT_ONCE, on_error="raise")
        elif len(wanted) == 1 or str(self.address).partition("://")[0] in _IN_TURN:
            found = [_range(files, *where) for where in zip(paths, starts, stops, strict=True)]
        else:
            with ThreadPoolExecutor(_AT_ONCE) as threads:
                found = list(threads.map(lambda *where: _range(files, *where), paths, starts, stops))
        for (name, start, stop), content in zip(wanted, found, strict=True):
            if len(content) != stop - start:
                raise ValueError(
                    f"{self.address / name}: expected {stop - start} bytes from {start} on, "
                    f"found {len(content)}"
                )
        return [bytes(content) for content in found]

    def blocks(self, name: str, size: int) -> Iterator[bytes]:
        """A file of `size` bytes, piece by piece."""
        for start in range(0, size, _BLOCK):
            yield self.ranges([(name, start, min(start + _BLOCK, size))])[0]

    def sha256(self, name: str, size: int) -> str:
        """Of a file's content, which is read and not kept."""
        digest = hashlib.sha256()
        for block in self.blocks(name, size):
            digest.update(block)
        return digest.hexdigest()

    def sizes(self, *, or_none: bool = False) -> dict[str, int]:
        """The files of the folder, without those in folders below, and how many bytes each has.

        With `or_none` a folder that is not there has none.
        """
        try:
            listed = self._retried("", lambda files, path: files.ls(path, detail=True, refresh=True))
        except FileNotFoundError:
            if not or_none:
                raise
            return {}
        return {
            entry["name"].rpartition("/")[2]: entry["size"] for entry in listed if entry["type"] == "file"
        }

    def folders(self) -> list[str]:
        """The names of folders in it; none where nothing is there."""
        try:
            listed = self._retried("", lambda files, path: files.ls(path, detail=True, refresh=True))
        except FileNotFoundError:
            return []
        return [
            entry["name"].rstrip("/").rpartition("/")[2] for entry in listed if entry["type"] == "directory"
        ]

    def download(self, name: str, path: Path) -> None:
        """A file of any size, to a path of this disk; whole or not there."""
        with atomic_file(path) as file:
            for block in self.blocks(name, self.sizes()[name]):
                file.write(block)

    def send(self, file: Path) -> None:
        """A file of this disk, under its name."""
        self._retried(file.name, lambda files, path: files.put_file(str(file), path))

    def write(self, name: str, content: bytes) -> None:
        """A small file."""
        self._retried(name, lambda files, path: files.pipe_file(path, content))

    def remove(self, name: str) -> None:
        """A file, or a folder and all that is in it."""
        self._retried(name, lambda files, path: files.rm(path, recursive=True))

    def _path(self, files: Any, name: str) -> str:
        return files._strip_protocol(str(self.address / name if name else self.address))

    def _retried(self, name: str, call: Callable[[Any, str], T]) -> T:
        where, waits = self.address / name if name else self.address, list(RETRY_AFTER)
        while True:
            try:
                files = file_system(self.address)
                return call(files, self._path(files, name))
            except _errors() as error:
                _refuse_for_good(where, error)
                if not waits:
                    raise ReadError(f"{where}: the connection is lost: {one_line(error)}") from error
                time.sleep(waits.pop(0))


def file_system(address: Path) -> Any:
    """What fsspec reads this address with; fsspec keeps one for each process.

    Raises:
        ValueError: the protocol is not known, or its package is missing.
    """
    import fsspec
    from fsspec.registry import known_implementations

    protocol = str(address).partition("://")[0]
    try:
        options = {"auto_mkdir": True} if protocol in _OF_THIS_DISK else {}
        return fsspec.url_to_fs(str(address), **options)[0]
    except ImportError as error:
        package = known_implementations.get(protocol, {}).get("class", "").partition(".")[0]
        way = one_line(error) if package in ("", "fsspec") else f"`pip install {package}`"
        raise ValueError(
            f"{address}: expected the package that reads {protocol}://, found none: {way}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{address}: expected an address that fsspec reads: {one_line(error)}") from error


def _range(files: Any, path: str, start: int, stop: int) -> bytes:
    with files.open(path, "rb", cache_type="none") as file:  # others read ahead
        file.seek(start)
        return file.read(stop - start)


def _errors() -> tuple[type[Exception], ...]:
    loaded = [
        (sys.modules[module], name) for module, name in _LIBRARY_ERRORS.items() if module in sys.modules
    ]
    return (OSError, asyncio.TimeoutError, *(getattr(module, name) for module, name in loaded))


def _refuse_for_good(where: Path, error: BaseException) -> None:
    """Raise what no further try changes."""
    if isinstance(error, ReadError):
        raise error
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        raise FileNotFoundError(f"{where}: expected a file or folder there, found none") from error
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        raise ValueError(f"{where}: expected to be let in, found no permission: {one_line(error)}") from error


def cache_folder() -> Path:
    """Where what was read from addresses is kept: BLIP3O_DIT_CACHE, else in the user's own cache."""
    given = os.environ.get("BLIP3O_DIT_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blip3o-dit"
