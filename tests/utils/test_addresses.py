"""Addresses as paths, and what is said when nothing comes from them."""

from __future__ import annotations

import errno
import pickle
import threading
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from blip3o_dit.utils import addresses
from blip3o_dit.utils.addresses import Address, RemoteFolder, cache_folder, located
from blip3o_dit.utils.errors import ReadError


@pytest.mark.parametrize(
    "address", ["s3://bucket/a/b", "hf://datasets/owner/name", "file:///tmp/a", "memory://a"]
)
def test_an_address_is_a_path_with_two_slashes(address: str) -> None:
    for given in (address, Path(address), located(address), f"{address}/"):
        found = located(given)
        assert isinstance(found, Address) and str(found) == address and found.resolve() == found
    assert str(located(address) / "manifest.json") == f"{address}/manifest.json"
    assert str(pickle.loads(pickle.dumps(located(address)))) == address
    assert located(address).name == address.rpartition("/")[2]


def test_what_is_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3:" / "bucket").mkdir(parents=True)
    for path in ("embeddings/store", "C:/store", "/a/b", "a b:/c", "s3://bucket", "s3:"):
        assert type(located(path)) is type(Path())
    assert isinstance(located("s3://other"), Address)


def test_files_are_listed_and_read() -> None:
    folder = RemoteFolder(located("memory://listed/there"))
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/listed/there/a", b"0123456789")
    memory.pipe_file("/listed/there/below/b", b"0")
    assert folder.sizes() == {"a": 10} and folder.read("a") == b"0123456789"
    assert folder.ranges([("a", 2, 4), ("a", 9, 10), ("below/b", 0, 1)]) == [b"23", b"9", b"0"]
    assert folder.ranges([]) == []
    with pytest.raises(ValueError, match=r"^memory://listed/there/a: expected 3 bytes from 9 on, found 1$"):
        folder.ranges([("a", 9, 12)])


def test_a_file_comes_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_BLOCK", 4)
    fsspec.filesystem("memory").pipe_file("/blocks/a", b"0123456789")
    assert list(RemoteFolder(located("memory://blocks")).blocks("a", 10)) == [b"0123", b"4567", b"89"]


class _Failing:
    """A file system's method that fails so many times, then goes on as before."""

    def __init__(self, patch: pytest.MonkeyPatch, *errors: Exception) -> None:
        own, self.left = MemoryFileSystem.cat_file, list(errors)

        def fail(files: MemoryFileSystem, *arguments: object, **named: object) -> bytes:
            if self.left:
                raise self.left.pop(0)
            return own(files, *arguments, **named)

        patch.setattr(MemoryFileSystem, "cat_file", fail)


def test_a_lost_connection_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.filesystem("memory").pipe_file("/lost/a", b"0")
    waited: list[float] = []
    monkeypatch.setattr(addresses.time, "sleep", waited.append)
    folder, down = RemoteFolder(located("memory://lost")), OSError(errno.ECONNRESET, "Connection reset")
    _Failing(monkeypatch, down, TimeoutError())
    assert folder.read("a") == b"0" and waited == [1.0, 4.0]
    _Failing(monkeypatch, *[down] * 4)
    with pytest.raises(ReadError, match=r"^memory://lost/a: the connection is lost: .*Connection reset$"):
        folder.read("a")
    assert waited == [1.0, 4.0, 1.0, 4.0, 25.0]


def test_what_no_further_try_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RemoteFolder(located("memory://refused"))
    with pytest.raises(FileNotFoundError, match=r"^memory://refused/a: expected a file or folder there"):
        folder.read("a")
    _Failing(monkeypatch, PermissionError(errno.EACCES, "Access Denied"))
    with pytest.raises(
        ValueError, match=r"^memory://refused/a: expected to be let in, found no permission: "
    ):
        folder.read("a")


def test_protocols_that_cannot_be_read() -> None:
    with pytest.raises(
        ValueError, match=r"^gs://bucket/x: .* that reads gs://, found none: `pip install gcsfs`$"
    ):
        RemoteFolder(located("gs://bucket/x")).sizes()
    with pytest.raises(ValueError, match=r"^nothing://x: expected an address that fsspec reads: .*nothing"):
        RemoteFolder(located("nothing://x")).sizes()


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BLIP3O_DIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/blip3o-dit")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == Path.home() / ".cache" / "blip3o-dit"
    monkeypatch.setenv("BLIP3O_DIT_CACHE", "/mine")
    assert cache_folder() == Path("/mine")


def test_memory_is_read_by_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file there has one position for all who read it."""
    readers: set[int] = set()
    own = MemoryFileSystem.open

    def opened(files: MemoryFileSystem, *arguments: object, **named: object) -> object:
        readers.add(threading.get_ident())
        return own(files, *arguments, **named)

    fsspec.filesystem("memory").pipe_file("/turns/a", bytes(range(200)))
    monkeypatch.setattr(MemoryFileSystem, "open", opened)
    wanted = [("a", start, start + 1) for start in range(200)]
    assert RemoteFolder(located("memory://turns")).ranges(wanted) == [bytes([n]) for n in range(200)]
    assert readers == {threading.get_ident()}
