"""Sources of pictures, written file by file. What a picture holds does not matter to who lists it."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from blip3o_dit.extraction.sources.listing import list_images
from blip3o_dit.extraction.sources.options import ListingOptions

Listed = list[tuple[str, str | None, bytes]]


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def write_raw(folder: Path, name: bytes, data: bytes) -> None:
    """A file whose name is no UTF-8."""
    with open(os.path.join(os.fsencode(folder), name), "wb") as file:
        file.write(data)


def tar(path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w") -> Path:
    """Members in this order; the same name may come twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def listed(where: Path | str, **options: Any) -> Listed:
    return [(ref.key, ref.caption, ref.read()) for ref in list_images(where, ListingOptions(**options))]


def keys(where: Path | str, **options: Any) -> list[str]:
    return [ref.key for ref in list_images(where, ListingOptions(**options))]


def reasons(where: Path | str, **options: Any) -> dict[str, str]:
    """Key and reason of what was skipped."""
    skipped = list_images(where, ListingOptions(**options)).skipped
    return {entry["key"]: entry["reason"] for entry in skipped}
