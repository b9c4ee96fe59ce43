"""Folders that are whole or not there: written aside, flushed, checksummed, renamed.

    checksums.json    sizes and SHA-256 of the files beside it, written last

A folder without it was not finished, or was made by something else.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from blip3o_dit.utils.errors import WriteError
from blip3o_dit.utils.json_files import one_line, read_json, short_repr

CHECKSUMS_FILE = "checksums.json"
ASIDE, REPLACED = ".partial", ".replaced"

LONGEST_NAME = 200

_FORMAT = "blip3o-dit checksums"


@contextmanager
def written_aside(final: Path, *, files_only: bool = False, replaces: Iterable[str] = ()) -> Iterator[Path]:
    """A new folder to fill, which takes the name `final` when it is whole; after an error it is removed.

    With `files_only` its files move into `final`, which may hold others, see `publish_files`.

    Raises:
        WriteError: when the disk is full or the folder cannot be written.
    """
    aside = final / f"model{ASIDE}" if files_only else final.with_name(final.name + ASIDE)
    try:
        with _write_errors(final):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            yield aside
            seal(aside)
            if files_only:
                publish_files(aside, final, replaces)
            else:
                publish(aside, final)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def publish(aside: Path, final: Path) -> None:
    """Rename a whole folder to its name; one that has the name already is moved out of the way first."""
    old = final.with_name(final.name + REPLACED)
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
    os.rename(aside, final)
    flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore_replaced(final: Path) -> None:
    """Give a folder its name back that `publish`, killed between two renames, left without one."""
    old = final.with_name(final.name + REPLACED)
    if old.is_dir() and not final.exists():
        with suppress(FileNotFoundError):  # another process was quicker
            os.rename(old, final)


def publish_files(aside: Path, folder: Path, replaces: Iterable[str] = ()) -> None:
    """Move the files of a sealed folder into another one, each by one rename, the checksums last.

    What `folder` held before goes: the files under its checksums, and those named by `replaces`. Others stay.
    While files move, the checksums are away: `folder` does not pass for whole.
    """
    names = [file.name for file in aside.iterdir() if file.name != CHECKSUMS_FILE]
    for name in {*_sealed_names(folder), *replaces} - set(names):
        (folder / name).unlink(missing_ok=True)
    (folder / CHECKSUMS_FILE).unlink(missing_ok=True)
    for name in (*names, CHECKSUMS_FILE):
        os.replace(aside / name, folder / name)
    flush(folder)
    aside.rmdir()


def seal(folder: Path) -> None:
    """Flush every file below the folder to the disk and write their checksums."""
    files = {}
    for file in _files(folder):
        flush(file)
        name = file.relative_to(folder).as_posix()
        files[name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    sums = folder / CHECKSUMS_FILE
    sums.write_text(json.dumps({"format": _FORMAT, "files": files}, indent=1))
    flush(sums)
    flush(folder)


def is_sealed(folder: Path) -> bool:
    return (folder / CHECKSUMS_FILE).is_file()


def verify(folder: Path, names: Iterable[str] | None = None) -> None:
    """Check the files of a sealed folder, or those of them that are named, against its checksums.

    Raises:
        ValueError: naming the first file that is missing, cut short or altered.
    """
    known = _read_checksums(folder)
    for name in known if names is None else names:
        if name not in known:
            raise ValueError(
                f"{folder / CHECKSUMS_FILE}: expected the checksum of {short_repr(name)}, found none"
            )
        size, digest = known[name]
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{folder}: expected {name}, found none")
        if file.stat().st_size != size:
            raise ValueError(
                f"{file}: expected {size} bytes, found {file.stat().st_size}: truncated or altered"
            )
        if sha256(file) != digest:
            raise ValueError(f"{file}: its SHA-256 is not that of {CHECKSUMS_FILE}: the file was altered")


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS_FILE)


def _sealed_names(folder: Path) -> set[str]:
    """The files in a folder that are under its checksums; none where these are missing or unreadable."""
    try:
        known = _read_checksums(folder)
    except ValueError:
        return set()
    return {name for name in known if Path(name).name == name and (folder / name).is_file()}


def _read_checksums(folder: Path) -> dict[str, tuple[int, str]]:
    file = folder / CHECKSUMS_FILE
    if not file.is_file():
        raise ValueError(f"{folder}: expected {CHECKSUMS_FILE}, found none: the folder was not finished")
    content = read_json(file)
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict):
        raise ValueError(f"{file}: expected sizes and checksums of files, found {short_repr(content)}")
    for name, entry in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts or len(name) > LONGEST_NAME:
            raise ValueError(f"{file}: expected names of files in the folder, found {short_repr(name)}")
        if not isinstance(entry, dict) or {type(entry.get("bytes")), type(entry.get("sha256"))} != {int, str}:
            raise ValueError(
                f"{file}: {short_repr(name)}: expected bytes and sha256, found {short_repr(entry)}"
            )
    return {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}


@contextmanager
def _write_errors(target: Path) -> Iterator[None]:
    """Whatever a library makes of a full disk, as one kind of error."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, WriteError):
            raise
        found = getattr(error, "strerror", None) or one_line(error)
        raise WriteError(
            f"{target}: expected to write it whole, found: {found}; what was there before is untouched"
        ) from error


def write_atomically(path: str | Path, content: bytes) -> None:
    """All of the content or the previous file, never a part: write aside, flush, rename."""
    with _atomic_file(Path(path)) as file:
        file.write(content)


def dump_atomically(path: str | Path, content: object) -> None:
    """The same with a pickle of the content."""
    with _atomic_file(Path(path)) as file:
        pickle.dump(content, file, protocol=4)


@contextmanager
def _atomic_file(path: Path) -> Iterator[BinaryIO]:
    if path.exists() and not path.is_file():  # a rename would put a file in the place of /dev/null
        raise ValueError(f"{path}: expected a file to write, found a folder or a device")
    aside = path.with_name(path.name + ".partial")
    aside.unlink(missing_ok=True)
    with open(aside, "xb") as file:  # a link that somebody left there would lead out of the folder
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
