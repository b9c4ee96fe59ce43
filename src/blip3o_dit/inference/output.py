"""Where generated tokens go: claimed before anything is sampled, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from blip3o_dit.data.array_embeddings import GENERATED, POOLED_VECTORS
from blip3o_dit.data.manifest import MANIFEST, STORE_ASIDE
from blip3o_dit.data.safe_unpickler import load_pickle
from blip3o_dit.data.store_folder import GENERATION_PARTS, check_claim
from blip3o_dit.utils.atomic import atomic_file, dump_atomically, finish_publishing
from blip3o_dit.utils.json_files import read_json

PICKLE_SUFFIXES, NPZ_SUFFIX = (".pkl", ".pickle"), ".npz"

# Arrays [n, ...] with the samples in the first place; everything else of the results is small.
TOKENS, POOLED = GENERATED, POOLED_VECTORS


def is_file_output(path: Path) -> bool:
    """Whether a name asks for one file of arrays, a pickle or .npz; every other name asks for a store."""
    return path.suffix in (*PICKLE_SUFFIXES, NPZ_SUFFIX)


def finished_generation(path: Path) -> dict[str, Any] | None:
    """`request` and `metrics` of the generation that wrote what is there; None without."""
    try:
        if path.is_dir():
            finish_publishing(path / STORE_ASIDE, path, MANIFEST)
            found = read_json(path / MANIFEST).get("generation")
        elif path.suffix == NPZ_SUFFIX:
            with np.load(path, allow_pickle=False) as file:
                config, metrics = (json.loads(bytes(file[name])) for name in ("config", "generation_metrics"))
            found = {"request": config["request"], "metrics": metrics}
        else:
            content: Any = load_pickle(path)
            found = {"request": content["config"]["request"], "metrics": content["generation_metrics"]}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, BadZipFile):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("request"), dict) else None


def check_output(path: Path, *, overwrite: bool = False, pooled: bool = False) -> None:
    """Refuse, before hours of sampling, what could not be written after them or would replace something else.

    With `overwrite` a file may be replaced by a file, and a store by a store.

    Raises:
        ValueError: one line naming what was expected and found.
    """
    if pooled and not is_file_output(path):
        raise ValueError(f"{path}: expected a .npz or .pkl file for one vector a picture, found another name")
    check_writable(path)
    if is_file_output(path):
        check_file(path, overwrite)
    else:
        _check_folder(path, overwrite)


def check_writable(path: Path) -> None:
    """Raises ValueError for a device, and where a file or folder of this name cannot be made."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{path}: expected a file or folder to write, found a device")
    existing = path.parent
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: expected a folder that can be written, found {existing}")


def check_file(path: Path, overwrite: bool) -> None:
    """Raises ValueError for a folder, and for a file that is not to be replaced."""
    if path.is_dir():
        raise ValueError(f"{path}: expected a file to write, found a folder")
    if path.exists() and not overwrite:
        raise ValueError(f"{path}: expected no file there, found one (overwrite=True replaces it)")


def bytes_in_file(count: int, sizes: tuple[int, int, int], *, pooled: bool, true_tokens: bool) -> int:
    """Memory that one file of so many samples takes: its arrays, and once more the largest, to be pickled."""
    tokens, condition, target = sizes
    widths = [target] if pooled else [condition * tokens, target * tokens, *[target * tokens] * true_tokens]
    return 4 * count * (sum(widths) + max(widths))


def write_arrays(path: Path, results: Mapping[str, Any]) -> None:
    """Results as a pickle of plain arrays or, by its name, as .npz, which holds no objects.

    In .npz the keys, captions and everything else that is no array are JSON text in UTF-8.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != NPZ_SUFFIX:
        dump_atomically(path, dict(results))
        return
    arrays = {
        name: value if isinstance(value, np.ndarray) else np.frombuffer(json.dumps(value).encode(), np.uint8)
        for name, value in results.items()
    }
    with atomic_file(path) as file:
        np.savez(file, allow_pickle=False, **arrays)


def _check_folder(path: Path, overwrite: bool) -> None:
    """A store may take the place of an empty folder, or of a store when that is asked for."""
    if path.is_file():
        raise ValueError(f"{path}: expected a folder to write to, found a file")
    if os.fsencode(path).decode(errors="replace") != str(path):
        raise ValueError(f"{path}: expected a name in UTF-8, which all tools can read shards from")
    if path.is_dir():
        check_claim(path, overwrite, GENERATION_PARTS)
