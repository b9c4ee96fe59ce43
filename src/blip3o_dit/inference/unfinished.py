"""What an unfinished generation leaves beside its output, and how the same command goes on with it.

    OUTPUT/generation.parts/    for a store          OUTPUT.npz.parts/    for a file
        request.json              what was asked for, and how many samples a shard has
        shard-00003.entry.json    shard 3 is whole: its manifest entry
        *.safetensors             samples that are in no shard yet

It goes when the output is whole, and also when a generation ends before it has kept anything.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from blip3o_dit.data.store_folder import GENERATION_PARTS
from blip3o_dit.inference.output import is_file_output
from blip3o_dit.inference.request import differences, noted_changes
from blip3o_dit.utils.atomic import remove_files_and_folders, write_atomically
from blip3o_dit.utils.folder_lock import LOCK_FILE, held_folder
from blip3o_dit.utils.json_files import read_json, show_names

REQUEST_FILE = "request.json"

logger = logging.getLogger(__name__)


class Unfinished:
    """The folder of what is generated so far for an output, beside it if it is a file."""

    def __init__(self, output: Path, *, file: bool = False) -> None:
        self.output = output
        parts = output.with_name(f"{output.name}.parts")
        self.folder = parts if file or is_file_output(output) else output / GENERATION_PARTS

    def find(self, request: dict[str, Any], *, overwrite: bool = False) -> dict[str, Any] | None:
        """The record of the unfinished generation that this request continues; None where there is none.

        Raises:
            ValueError: for another request, unless what is there may be replaced, and for others' files.
        """
        names = self._names()
        found = self._read()
        if found is None and names - {REQUEST_FILE}:
            raise ValueError(
                f"{self.folder}: expected no folder of this name, or an unfinished generation's, found "
                f"{show_names(names)}"
            )
        if found is None:
            return None
        different = differences(found.get("request"), request)
        if different and not overwrite:
            raise ValueError(
                f"{self.output}: holds an unfinished generation with another request "
                f"({'; '.join(different[:4])}): repeat its command, choose another output, or begin anew "
                "(--overwrite)"
            )
        return None if different else found

    @contextmanager
    def going_on(self, found: dict[str, Any] | None, request: dict[str, Any], *, size: int) -> Iterator[int]:
        """While the block runs what it generates is kept here; yields how many samples a shard has.

        Args:
            found: what `find` returned. size: samples of a shard, of a generation that begins.
        """
        try:
            if found is None:
                if self.has_samples():
                    logger.info("%s: begun anew: what there is belongs to another request", self.output)
                self.clear()
                self.folder.mkdir(parents=True, exist_ok=True)
                record = {"request": request, "size": size}
                write_atomically(self.folder / REQUEST_FILE, json.dumps(record, indent=2).encode())
            else:
                for change in noted_changes(found["request"], request):
                    logger.warning("%s: %s: last bits may differ", self.output, change)
            yield size if found is None else found["size"]
        except BaseException:
            if not self.has_samples():
                self.clear()
            raise
        self.clear()

    def has_samples(self) -> bool:
        """Whether anything is kept that the same command would go on with."""
        return any(name.endswith((".entry.json", ".safetensors")) for name in self._names())

    def clear(self) -> None:
        """Remove what is kept, and the folder unless it is held."""
        remove_files_and_folders(self.folder / name for name in self._names())
        with suppress(OSError):
            self.folder.rmdir()

    def _names(self) -> set[str]:
        if self.folder.exists() and not self.folder.is_dir():
            return {self.folder.name}
        return {file.name for file in self.folder.iterdir()} - {LOCK_FILE} if self.folder.is_dir() else set()

    def _read(self) -> dict[str, Any] | None:
        """None for what `going_on` did not write."""
        try:
            found = read_json(self.folder / REQUEST_FILE)
        except (OSError, ValueError):
            return None
        size = found.get("size") if isinstance(found, dict) else None
        return (
            found if isinstance(size, int) and size > 0 and isinstance(found.get("request"), dict) else None
        )


@contextmanager
def file_claimed(output: Path, request: dict[str, Any], *, overwrite: bool, size: int) -> Iterator[None]:
    """Hold a file's place while the block generates and writes it; what it generates is kept beside it.

    Raises:
        ValueError: see `Unfinished.find`; also when another process generates for the same file.
    """
    unfinished = Unfinished(output, file=True)
    unfinished.find(request, overwrite=overwrite)  # before a folder is made
    try:
        with held_folder(unfinished.folder, "generation"):
            found = unfinished.find(request, overwrite=overwrite)
            with unfinished.going_on(found, request, size=size):
                yield
    finally:
        with suppress(OSError):  # a stopped one's, which this one went on with
            unfinished.folder.rmdir()
