"""Checksums of a folder, by which it can tell that it is whole.

    checksums.json    sizes and SHA-256 of the files beside it, written last

A folder without it was not finished, or was made by something else.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from blip3o_dit.utils.json_files import read_json, short_repr
from blip3o_dit.utils.recognise import instead_of

CHECKSUMS_FILE = "checksums.json"

MAX_NAME_LENGTH = 200

_FORMAT = "blip3o-dit checksums"


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


def resealed(folder: Path, content: Mapping[str, bytes]) -> bytes:
    """The checksums of a sealed folder in which these files are replaced."""
    known = {
        name: {"bytes": size, "sha256": digest} for name, (size, digest) in _read_checksums(folder).items()
    }
    for name, new in content.items():
        known[name] = {"bytes": len(new), "sha256": hashlib.sha256(new).hexdigest()}
    return json.dumps({"format": _FORMAT, "files": dict(sorted(known.items()))}, indent=1).encode()


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
        _check_size(file, size)
        if sha256(file) != digest:
            raise ValueError(f"{file}: its SHA-256 is not that of {CHECKSUMS_FILE}: the file was altered")


def check_sizes(folder: Path) -> None:
    """As `verify` for all files, but without reading them: they are there, in their sizes."""
    for name, (size, _) in _read_checksums(folder).items():
        _check_size(folder / name, size)


def _check_size(file: Path, size: int) -> None:
    if not file.is_file():
        raise ValueError(f"{file.parent}: expected {file.name}, found none")
    if file.stat().st_size != size:
        raise ValueError(
            f"{file}: expected {size} bytes, found {file.stat().st_size}"
            f"{instead_of(file) or ': truncated or altered'}"
        )


def digests_of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of files in a folder: what its checksums say, where it is sealed, else as they are read."""
    known = _read_checksums(folder) if is_sealed(folder) else {}
    return {name: known[name][1] if name in known else sha256(folder / name) for name in names}


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


def sealed_names(folder: Path) -> set[str]:
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
        if Path(name).is_absolute() or ".." in Path(name).parts or len(name) > MAX_NAME_LENGTH:
            raise ValueError(f"{file}: expected names of files in the folder, found {short_repr(name)}")
        if not isinstance(entry, dict) or {type(entry.get("bytes")), type(entry.get("sha256"))} != {int, str}:
            raise ValueError(
                f"{file}: {short_repr(name)}: expected bytes and sha256, found {short_repr(entry)}"
            )
    return {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
