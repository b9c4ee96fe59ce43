"""Files and folders that are whole or not there: written under another name, flushed to the disk, renamed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from safetensors import SafetensorError

from blip3o_dit.utils.checksums import (
    CHECKSUMS_FILE,
    flush,
    is_sealed,
    resealed,
    seal,
    sealed_names,
)
from blip3o_dit.utils.errors import WriteError
from blip3o_dit.utils.json_files import is_plain_name, one_line, read_json, short_repr

if TYPE_CHECKING:
    from torch import Tensor

# What is added to the name of a file or folder that is being written, and of a folder that is being replaced.
ASIDE, REPLACED = ".partial", ".replaced"
# The folder of files that are being moved into the one around it, and in it the names that go for them.
MODEL_ASIDE, REPLACES_FILE = f"model{ASIDE}", "replaces.json"


@contextmanager
def written_aside(final: Path, *, files_only: bool = False, replaces: Iterable[str] = ()) -> Iterator[Path]:
    """A new folder to fill, which takes the name `final` when it is whole; after an error it is removed.

    With `files_only` its files move into `final`, which may hold others, see `publish_files`.

    Raises:
        WriteError: when the disk is full or the folder cannot be written.
    """
    aside = final / MODEL_ASIDE if files_only else final.with_name(final.name + ASIDE)
    try:
        with _write_errors(final):
            if files_only:
                finish_publishing(aside, final)
            remove_files_and_folders([aside])
            aside.mkdir(parents=True)
            yield aside
            _open_to_others(aside)
            seal(aside)
            if files_only:
                publish_files(aside, final, {*sealed_names(final), *replaces})
            else:
                publish(aside, final)
    except BaseException:
        abandon_files(aside, final, CHECKSUMS_FILE)
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


def replace_files(folder: Path, content: Mapping[str, bytes]) -> None:
    """Give files of a folder another content, all of them or none; a sealed folder stays sealed.

    Raises:
        WriteError: when the disk is full or the folder cannot be written.
    """
    aside = folder / MODEL_ASIDE
    if is_sealed(folder):
        content = {**content, CHECKSUMS_FILE: resealed(folder, content)}
    try:
        with _write_errors(folder):
            remove_files_and_folders([aside])
            aside.mkdir()
            for name, new in content.items():
                write_atomically(aside / name, new)
            publish_files(aside, folder)
    except BaseException:
        abandon_files(aside, folder, CHECKSUMS_FILE)
        raise


def publish_files(
    aside: Path, folder: Path, replaces: Iterable[str] = (), last: str = CHECKSUMS_FILE
) -> None:
    """Move the files of a whole folder into the one around it, each by one rename, the file `last` last.

    What `folder` held under the names in `replaces` goes; other files stay. While files move, `last` is away:
    `folder` does not pass for whole. If this is killed, `finish_publishing` goes on with it.
    """
    stale = sorted(set(replaces) - {file.name for file in aside.iterdir()})
    write_atomically(aside / REPLACES_FILE, json.dumps(stale).encode())
    (folder / last).unlink(missing_ok=True)
    finish_publishing(aside, folder, last)


def finish_publishing(aside: Path, folder: Path, last: str = CHECKSUMS_FILE) -> None:
    """Move what `publish_files` began to move; nothing when it did not begin, or has ended.

    Raises:
        ValueError: when the files cannot be moved, or it is not known which of them go.
    """
    if not _is_publishing(aside, folder, last):
        return
    stale = read_json(aside / REPLACES_FILE)
    if not isinstance(stale, list) or not all(
        isinstance(name, str) and is_plain_name(name) for name in stale
    ):
        raise ValueError(f"{aside / REPLACES_FILE}: expected a list of file names, found {short_repr(stale)}")
    try:
        for name in stale:
            (folder / name).unlink(missing_ok=True)
        move_files(aside, folder, last)
    except OSError as error:
        raise ValueError(
            f"{folder}: its files were being replaced when a process was killed, and they cannot be moved "
            f"here ({one_line(error)}): open it where it can be written to"
        ) from error


def abandon_files(aside: Path, folder: Path, last: str) -> None:
    """Remove what was written aside, unless it is whole and its files are being moved already."""
    if not _is_publishing(aside, folder, last):
        remove_files_and_folders([aside])


def _is_publishing(aside: Path, folder: Path, last: str) -> bool:
    return (aside / REPLACES_FILE).is_file() and not (folder / last).exists()


def move_files(aside: Path, folder: Path, last: str) -> None:
    """Move the files of `aside` into `folder`, `last` last, and remove `aside`; several processes may."""
    names = [file.name for file in aside.iterdir() if file.name not in (last, REPLACES_FILE)]
    for name in (*sorted(names), last):
        with suppress(FileNotFoundError):  # another process was quicker
            os.replace(aside / name, folder / name)
    flush(folder)
    shutil.rmtree(aside, ignore_errors=True)


def remove_files_and_folders(paths: Iterable[Path]) -> None:
    """Remove those that are there, folders with all that is in them."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


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


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """A safetensors file that is whole or not there, with the permissions that other files get.

    safetensors itself writes through a private file of a random name, which a killed process leaves behind.

    Raises:
        WriteError: when the disk is full or the folder cannot be written.
    """
    from safetensors.torch import save_file  # imports torch, which takes seconds

    with files_aside(path) as folder:
        save_file(dict(tensors), folder / path.name, metadata=dict(metadata) if metadata else None)


@contextmanager
def files_aside(path: Path) -> Iterator[Path]:
    """A new folder for the file `path`, and others beside it, for a library that wants a name to write to.

    They take their places when the block ends well, `path` last: where it needs others, it is away while they
    change.

    Raises:
        WriteError: when the disk is full or the folder cannot be written.
    """
    aside = path.with_name(path.name + ASIDE)
    try:
        with _write_errors(path):
            remove_files_and_folders([aside])
            aside.mkdir()
            yield aside
            _open_to_others(aside)
            others = sorted({file.name for file in aside.iterdir()} - {path.name})
            for name in (*others, path.name):
                flush(aside / name)
            if others:
                path.unlink(missing_ok=True)
            for name in (*others, path.name):
                os.replace(aside / name, path.with_name(name))
            aside.rmdir()
            flush(path.parent)
    except BaseException:
        remove_files_and_folders([aside])
        raise


def _open_to_others(folder: Path) -> None:
    """Give the files below a folder that was made here the permissions of files that Python makes."""
    permissions = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(permissions)


def write_atomically(path: str | Path, content: bytes) -> None:
    """All of the content or the previous file, never a part: write aside, flush, rename."""
    with atomic_file(Path(path)) as file:
        file.write(content)


def dump_atomically(path: str | Path, content: object) -> None:
    """The same with a pickle of the content."""
    with atomic_file(Path(path)) as file:
        pickle.dump(content, file, protocol=4)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes its name when the block ends well."""
    if path.exists() and not path.is_file():  # a rename would put a file in the place of /dev/null
        raise ValueError(f"{path}: expected a file to write, found a folder or a device")
    aside = path.with_name(path.name + ASIDE)
    remove_files_and_folders([aside])
    try:
        with open(aside, "xb") as file:  # a link that somebody left there would lead out of the folder
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    flush(path.parent)
