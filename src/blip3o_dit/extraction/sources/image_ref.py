"""One image that is listed but not read yet."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

from blip3o_dit.data.checks import Record
from blip3o_dit.extraction.sources.reading import read_cell, read_file, read_stream, stream_opener

# What can be wrong with one file of a disk that works.
OF_ONE_FILE = frozenset(
    [errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP]
)

# Of an image, enough to tell it from another of its name and size.
START_BYTES = 2**16


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Small and picklable: what is the same for many images is one object that they share.

    `key` is unique in its list and valid Unicode. `folder` and `name` together are the file, as the disk
    names it. `offset` and `size` say which bytes of a tar it is (offset -1: the whole file), `row` and
    `column` which cell of a table. `size` is the image's, or its table's file's, when it was listed.
    """

    key: str
    caption: str | None
    label: str | None
    folder: str
    name: str
    size: int
    member: str = ""
    offset: int = -1
    row: int = -1
    column: str = ""

    @property
    def file(self) -> str:
        return os.path.join(self.folder, self.name)

    @property
    def is_read_in_order(self) -> bool:
        """Whether reading it reads what lies before it: a row of a table, a member of a compressed tar."""
        return self.row >= 0 or (self.offset >= 0 and stream_opener(self.name) is not None)

    @property
    def location(self) -> str:
        """For people."""
        part = f"row {self.row}" if self.row >= 0 else self.member
        return f"{self.file}:{part}" if part else self.file

    @property
    def record(self) -> Record:
        """What a store keeps of it beside its tokens: the key, and caption and label where they are known."""
        known = {"caption": self.caption, "label": self.label}
        return {"key": self.key} | {name: value for name, value in known.items() if value is not None}

    def read(self) -> bytes:
        """The image's bytes. Raises OSError when reading fails, ValueError for content that is no image."""
        if self.row >= 0:
            return read_cell(self.file, self.row, self.column)
        if self.offset < 0:
            return read_file(self.file)
        if stream_opener(self.name) is not None:
            return read_stream(self.file, self.offset, self.size)
        return read_file(self.file, self.offset, self.size)

    def start(self) -> bytes:
        """Its first bytes, or its file's where only reading in order leads to it; none where that fails."""
        at = 0 if self.is_read_in_order else max(self.offset, 0)
        try:
            descriptor = os.open(self.file, os.O_RDONLY | os.O_NONBLOCK)
            with open(descriptor, "rb") as file:
                file.seek(at)
                return file.read(min(self.size, START_BYTES))
        except OSError:
            return b""


def is_fault_of_file(error: OSError, root: Path) -> bool:
    """Whether a reading error is about this one file, and not about the disk below `root` or the machine."""
    return error.errno in {*OF_ONE_FILE, errno.EINVAL} and root.exists()
