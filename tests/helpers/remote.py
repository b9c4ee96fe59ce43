"""Stores at an address in this process's memory, and how many bytes are read from there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blip3o_dit.utils import addresses


def in_memory(folder: Path, name: str) -> str:
    """A copy of a folder's files at an address; returns it."""
    import fsspec

    files = fsspec.filesystem("memory")
    for file in folder.iterdir():
        files.pipe_file(f"/{name}/{file.name}", file.read_bytes())
    return f"memory://{name}"


class Traffic:
    """What was read from addresses."""

    def __init__(self) -> None:
        self.bytes = self.requests = 0


@contextmanager
def counted() -> Iterator[Traffic]:
    """Counts what `RemoteFolder` gets from a file system while the block runs."""
    traffic = Traffic()

    def count(owner: object, name: str, patch: pytest.MonkeyPatch) -> None:
        own = getattr(owner, name)

        def counting(*arguments: object, **named: object) -> object:
            found = own(*arguments, **named)
            for content in found if isinstance(found, list) else [found]:
                traffic.bytes += len(content)
                traffic.requests += 1
            return found

        patch.setattr(owner, name, counting)

    with pytest.MonkeyPatch.context() as patch:
        count(addresses.RemoteFolder, "_ranges", patch)
        count(addresses.RemoteFolder, "read", patch)
        yield traffic
