"""Embeddings in .npz, .npy and safetensors files, and in folders of arrays."""

from __future__ import annotations

import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from blip3o_dit.data.array_embeddings import (
    AS_IT_IS,
    CAPTION_NAMES,
    CLIP_NAMES,
    CONFIG,
    EVA_NAMES,
    HAS_CAPTION,
    KEY_NAMES,
    LABEL_NAMES,
    RECORDS,
    Arrangement,
    ArrayEmbeddings,
    raw_from_content,
)
from blip3o_dit.data.pickle_format import PickledEmbeddings
from blip3o_dit.utils.json_files import one_line, parse_json, read_json, short_repr, show_names
from blip3o_dit.utils.recognise import EMBEDDINGS, recognise, refusal

_OF_RECORDS = (*KEY_NAMES, *CAPTION_NAMES, *LABEL_NAMES, HAS_CAPTION, RECORDS)
KNOWN_NAMES = (*EVA_NAMES, *CLIP_NAMES, *_OF_RECORDS, CONFIG)

# A compressed array may be so many times its size in the file, and this much in any case.
MOST_INFLATED, INFLATED_FREE = 8, 2**26

# What zipfile raises on bytes that it cannot read.
_ZIP_ERRORS = (zipfile.BadZipFile, ValueError, OSError, RuntimeError, struct.error)
# What NumPy raises on a header that it cannot read.
_HEADER_ERRORS = (ValueError, EOFError, SyntaxError, tokenize.TokenError, OverflowError, MemoryError)


def open_file(path: Path, arrangement: Arrangement = AS_IT_IS) -> ArrayEmbeddings:
    """A file of embeddings, whose content says which format it has.

    Raises:
        FileNotFoundError, ValueError: one line naming the file, what was expected and what was found.
    """
    kind = recognise(path).kind
    if kind in ("npz", "zip", "pickle in a zip"):
        names = _zip_names(path)
        if any(name.endswith(".npy") for name in names):
            return _open_npz(path, arrangement)
        kind = "pickle" if kind != "zip" or any(name.endswith("data.pkl") for name in names) else kind
    if kind == "parquet":
        from blip3o_dit.data.table_files import open_parquet  # needs pyarrow

        return open_parquet(path, [path], arrangement)
    if kind == "safetensors":
        return _open_safetensors(path, arrangement)
    if kind == "pickle":
        return PickledEmbeddings(path, arrangement)
    raise refusal(path, EMBEDDINGS)


def open_folder(path: Path, arrangement: Arrangement = AS_IT_IS) -> ArrayEmbeddings | None:
    """A folder of .npy or parquet files, or a saved dataset; None for any other.

    Raises:
        ValueError: for one that is recognised and cannot be read.
    """
    names = {file.name for file in path.iterdir()}
    if "dataset_dict.json" in names:
        splits = read_json(path / "dataset_dict.json")
        shown = show_names(splits.get("splits", []) if isinstance(splits, dict) else [])
        raise ValueError(f"{path}: expected one split of a saved dataset, found several: name one of {shown}")
    if "state.json" in names:
        from blip3o_dit.data.table_files import open_saved_dataset

        return open_saved_dataset(path, arrangement)
    arrays = {Path(name).stem for name in names if name.endswith(".npy")}
    if arrays & {*EVA_NAMES, *CLIP_NAMES}:
        return _open_npy_folder(path, arrays & set(KNOWN_NAMES), arrangement)
    parquet = sorted(name for name in names if name.endswith(".parquet"))
    if parquet:
        from blip3o_dit.data.table_files import open_parquet

        return open_parquet(path, [path / name for name in parquet], arrangement)
    return None


def open_pair(first: Path, second: Path, arrangement: Arrangement = AS_IT_IS) -> ArrayEmbeddings:
    """Two .npy files, of which one has "eva" in its name, or the first is eva's."""
    named = ["eva" in path.stem.lower() for path in (first, second)]
    eva, clip = (second, first) if named == [False, True] else (first, second)
    content = {EVA_NAMES[0]: load_npy(eva), CLIP_NAMES[0]: load_npy(clip)}
    return ArrayEmbeddings(raw_from_content(eva, [eva, clip], content, in_memory=False), arrangement)


def _open_npy_folder(path: Path, names: set[str], arrangement: Arrangement) -> ArrayEmbeddings:
    content = {name: load_npy(path / f"{name}.npy") for name in names}
    files = [path / f"{name}.npy" for name in sorted(names)]
    for name in (*KEY_NAMES, *CAPTION_NAMES, *LABEL_NAMES):
        if (path / f"{name}.json").is_file():
            content[name] = read_json(path / f"{name}.json")
            files.append(path / f"{name}.json")
    return ArrayEmbeddings(raw_from_content(path, files, content, in_memory=False), arrangement)


def load_npy(path: Path) -> np.ndarray:
    """The array, mapped."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, *_HEADER_ERRORS) as error:
        raise ValueError(f"{path}: not a readable array: {_plain(error)}") from error
    if not isinstance(found, np.ndarray):
        raise ValueError(f"{path}: expected one array, found a zip archive of several")
    return found


def _plain(error: BaseException) -> str:
    said = one_line(error)
    return "expected numbers or text, found Python objects" if "bject" in said else said


def _zip_names(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except _ZIP_ERRORS as error:
        raise ValueError(f"{path}: not a readable zip file: {one_line(error)}") from error


def read_npz(path: Path, known: Container[str] | None = None) -> dict[str, Any]:
    """The arrays of a .npz file that holds no objects, by name; None for those of names that are not known.

    Raises:
        ValueError: one line: what cannot be read, or says that it holds more than its bytes can.
    """
    content: dict[str, Any] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                wanted = known is None or name in known
                content[name] = _read_member(archive, member) if wanted else None
    except (*_ZIP_ERRORS, *_HEADER_ERRORS, zlib.error) as error:
        raise ValueError(f"{path}: not a readable .npz file: {_plain(error)}") from error
    return content


def _open_npz(path: Path, arrangement: Arrangement) -> ArrayEmbeddings:
    content = read_npz(path, KNOWN_NAMES)
    return ArrayEmbeddings(raw_from_content(path, [path], content, in_memory=True), arrangement)


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """An array of a zip file; what it takes is known before any of it is made."""
    if member.file_size > MOST_INFLATED * member.compress_size + INFLATED_FREE:
        raise ValueError(
            f"{short_repr(member.filename)}: expected at most {MOST_INFLATED} times the compressed size, "
            f"found {member.file_size} bytes in {member.compress_size}"
        )
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read_header = np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
        if dtype.hasobject:
            raise ValueError(f"{short_repr(member.filename)}: found Python objects")
        expected = math.prod(shape) * dtype.itemsize
        if not 0 <= expected == member.file_size - file.tell():
            raise ValueError(
                f"{short_repr(member.filename)}: expected {expected} bytes for {list(shape)} of {dtype}, "
                f"found {member.file_size - file.tell()}"
            )
        data = file.read(expected)
    if len(data) != expected:
        raise ValueError(f"{short_repr(member.filename)}: expected {expected} bytes, found {len(data)}")
    if not dtype.itemsize:
        raise ValueError(f"{short_repr(member.filename)}: expected numbers or text, found items of no size")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _open_safetensors(path: Path, arrangement: Arrangement) -> ArrayEmbeddings:
    try:
        with safe_open(path, framework="pt") as tensors:
            names = list(tensors.keys())
            content = {name: tensors.get_tensor(name) if name in KNOWN_NAMES else None for name in names}
            about = tensors.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file: {one_line(error)}") from error
    if not {*EVA_NAMES, *CLIP_NAMES} & set(names):
        raise ValueError(f"{refusal(path, EMBEDDINGS)} with other tensors, {show_names(names)}")
    for name in (*KEY_NAMES, *CAPTION_NAMES, *LABEL_NAMES):
        if name in about and name not in content:
            content[name] = parse_json(f"{path}: {name}", about[name].encode(errors="surrogatepass"))
    return ArrayEmbeddings(raw_from_content(path, [path], content, in_memory=False), arrangement)
