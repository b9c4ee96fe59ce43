"""Weight files of a checkpoint folder: found, looked at before they are loaded, told apart by a digest."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor, nn

from blip3o_dit.utils.json_files import one_line, show_names, weight_files_of
from blip3o_dit.utils.validation import damage_refused

# A file up to WHOLE bytes is digested whole, a larger one in so many blocks from its start to its end
WHOLE, BLOCKS, BLOCK = 2**22, 64, 2**16
_LFS_POINTER = b"version https://git-lfs"
# Weights that are not read: their authors' own, TensorFlow's, Flax's, ...
_OTHERS = (".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
_PAGE = (b"<!doctype", b"<html", b"<?xml")


def weight_files(folder: Path) -> list[Path]:
    """safetensors if there are any, else .bin, as transformers chooses; each file is looked at.

    Raises:
        ValueError: one line: there are none, or one is missing, or is not what its name says.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            files = [folder / name]
        elif index.is_file():
            refuse_impostor(index)
            files = weight_files_of(index)
        else:
            continue
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(
                f"{index}: expected {len(files)} files, found {len(missing)} missing: {show_names(missing)}: "
                "download them again"
            )
        for file in files:
            refuse_impostor(file)
        return files
    raise ValueError(
        f"{folder}: expected model.safetensors or pytorch_model.bin (or their index.json), found "
        + (other_layout(folder) or "neither")
    )


def refuse_impostor(file: Path) -> None:
    """Raise ValueError for a file that is not what its name says, and say what it is and what to do."""
    with file.open("rb") as content:
        start = content.read(512)
    found = None
    if not start:
        found = "an empty file: download it again"
    elif start.startswith(_LFS_POINTER):
        found = "a git-lfs pointer to the content: fetch it with `git lfs pull`"
    elif start.lstrip().lower().startswith(_PAGE):
        found = "a web page: download the file itself (on the hub, its 'resolve' address)"
    elif file.suffix == ".safetensors":
        found = _cut_safetensors(file)
    elif start.startswith(b"PK") and not zipfile.is_zipfile(file):
        found = f"a file of {file.stat().st_size} bytes that was cut: download it again"
    if found:
        raise ValueError(f"{file}: expected {'JSON' if file.suffix == '.json' else 'weights'}, found {found}")


def weights_digest(files: Sequence[Path]) -> str:
    """Tells weights apart without reading all of them: sizes, safetensors headers and blocks of each file."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{size}\n".encode())
        with file.open("rb") as content:
            if size <= WHOLE:
                digest.update(content.read())
                continue
            if file.suffix == ".safetensors":
                digest.update(content.read(8 + _header_length(content)))
            for block in range(BLOCKS):
                content.seek((size - BLOCK) * block // (BLOCKS - 1))
                digest.update(content.read(BLOCK))
    return digest.hexdigest()


def parameters_digest(module: nn.Module) -> str:
    """The same for a module in memory: names, shapes and every so-many-th value."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        values = tensor.detach().flatten()[:: max(1, tensor.numel() // 1024)]
        digest.update(values.double().cpu().numpy().tobytes())
    return digest.hexdigest()


def read_tensors(folder: Path) -> Iterable[tuple[str, Tensor]]:
    """Tensors of a checkpoint folder, file by file."""
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            with damage_refused(file), safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    yield name, tensors.get_tensor(name)
        else:
            yield from _read_bin(file)


def _read_bin(file: Path) -> Iterable[tuple[str, Tensor]]:
    try:
        state_dict = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise ValueError(f"{file}: not readable weights: {one_line(error)}") from error
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file}: refused: it holds more than weights") from error
    yield from state_dict.items()


def _header_length(content: BinaryIO) -> int:
    length = int.from_bytes(content.read(8), "little")
    content.seek(0)
    return length


def _cut_safetensors(file: Path) -> str | None:
    """What is wrong with the length of a safetensors file; None where nothing is."""
    size = file.stat().st_size
    with file.open("rb") as content:
        length = _header_length(content)
        if 8 + length > size:
            return f"{size} bytes that are no safetensors file, or the start of one: download it again"
        content.seek(8)
        header = content.read(min(length, 2**26))
    try:
        tensors = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
        expected = 8 + length + max((entry["data_offsets"][1] for entry in tensors), default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return "bytes that are no safetensors file: download it again"
    return None if size >= expected else f"{size} of its {expected} bytes (cut): download it again"


def other_layout(folder: Path, names: Sequence[str] = ()) -> str | None:
    """Weights of a layout that is not read, in a folder or these of its files, and what to do; None: none."""
    beside = sorted(os.listdir(folder))
    shown = [
        name for name in names or beside if names or name.endswith(_OTHERS) or name.startswith("open_clip")
    ]
    if not shown:
        return None
    if any(name.startswith("open_clip") for name in (*names, *beside)):
        return (
            f"{show_names(shown)}, in open_clip's layout: name the tower open_clip:ARCHITECTURE/TAG instead"
        )
    return (
        f"{show_names(shown)}, in a layout that is not read: take the tower's folder or id on the hub, "
        "such as BAAI/EVA-CLIP-8B or openai/clip-vit-large-patch14"
    )


def count_parameters(files: Sequence[Path]) -> int:
    """Of safetensors files that were looked at, by their headers; 0 for other files."""
    count = 0
    for file in files:
        if file.suffix == ".safetensors":
            with damage_refused(file), safe_open(file, framework="pt") as tensors:
                count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return count
