"""Files and folders that are whole or not there: written under another name, flushed to the disk, renamed."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from blip3o_dit.utils.checksums import CHECKSUMS_FILE, flush, seal, sealed_names
from blip3o_dit.utils.errors import WriteError
from blip3o_dit.utils.json_files import one_line

# What is added to the name of a file or folder that is being written, and of a folder that is being replaced.
ASIDE, REPLACED = ".partial", ".replaced"


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
    for name in {*sealed_names(folder), *replaces} - set(names):
        (folder / name).unlink(missing_ok=True)
    (folder / CHECKSUMS_FILE).unlink(missing_ok=True)
    for name in (*names, CHECKSUMS_FILE):
        os.replace(aside / name, folder / name)
    flush(folder)
    aside.rmdir()


def remove_files_and_folders(paths: Iterable[Path]) -> None:
    """Remove those that are there, folders with all that is in them."""
    for path in paths:
        if path.is_dir():
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
    aside.unlink(missing_ok=True)
    with open(aside, "xb") as file:  # a link that somebody left there would lead out of the folder
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
