"""The folder of one run: it can be written, and nobody else works in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blip3o_dit.utils.addresses import refuse_address
from blip3o_dit.utils.folder_lock import held_folder


@contextmanager
def output_folder(folder: Path, what: str, *, dry_run: bool = False) -> Iterator[None]:
    """Make the folder and hold it while the block runs; of several processes the first one does.

    With `dry_run` it is only checked. A folder that was made here and is still empty in the end, as after a
    refusal, is removed.

    Raises:
        ValueError, OSError: one line: a file, read-only, or another run works there (`FolderInUseError`).
    """
    _check_writable(folder)
    if dry_run or os.environ.get("RANK", "0") != "0":
        yield
        return
    with held_folder(folder, what):
        yield


def _check_writable(folder: Path) -> None:
    """Refuse (ValueError, PermissionError) a folder that cannot be made or written to."""
    refuse_address(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder to write to, found a file")
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder}: expected a folder that can be written, found it read-only")
