"""towers.json beside a model's weights: the towers that made its training data, to read pictures with them.

    encoders        what the store's manifest says of the towers, by side, "eva" and "clip"
    pooling, normalization, num_tokens, condition_dim, target_dim    of the store, too
    dtype           the towers' precision in the extraction

A model that was trained on embeddings that do not say where they come from (a pickle) has no such file.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from blip3o_dit.data.embeddings import Embeddings
from blip3o_dit.data.manifest import DTYPES
from blip3o_dit.utils.checksums import is_sealed, verify
from blip3o_dit.utils.json_files import read_json_object, short_repr

TOWERS_FILE = "towers.json"

_FORMAT = "blip3o-dit towers"
_KEPT = ("encoders", "pooling", "normalization", "num_tokens", "condition_dim", "target_dim")


def towers_of(source: Embeddings) -> dict[str, Any] | None:
    """What embeddings say of the towers that made them; None where they do not name the conditions' tower."""
    manifest: dict[str, Any] = getattr(source, "manifest", {})
    if not isinstance(manifest.get("encoders", {}).get("eva", {}).get("name"), str):
        return None
    found: Any = manifest.get("extraction")
    for name in ("settings", "dtype"):
        found = found.get(name) if isinstance(found, dict) else None
    record = {"format": _FORMAT} | {name: manifest.get(name) for name in _KEPT}
    return record | {"dtype": found if isinstance(found, str) and found in DTYPES else "float32"}


def write_towers(source: Embeddings, folder: Path) -> None:
    """Write what is known of the towers into a model folder, if anything is."""
    record = towers_of(source)
    if record is not None:
        (folder / TOWERS_FILE).write_text(json.dumps(record, indent=2) + "\n")


def copy_towers(source: Path, folder: Path) -> None:
    """The same for a model that takes the conditions of another one."""
    if (source / TOWERS_FILE).is_file():
        shutil.copyfile(source / TOWERS_FILE, folder / TOWERS_FILE)


def read_towers(folder: Path) -> dict[str, Any] | None:
    """The record in a model folder; None where there is none.

    Raises:
        ValueError: when the file was altered, or is not what `write_towers` makes.
    """
    file = folder / TOWERS_FILE
    if not file.is_file():
        return None
    if is_sealed(folder):
        verify(folder, [TOWERS_FILE])
    record = read_json_object(file)
    encoders = record.get("encoders")
    eva = encoders.get("eva") if isinstance(encoders, dict) else None
    if record.get("format") != _FORMAT or not isinstance(eva, dict) or not isinstance(eva.get("name"), str):
        raise ValueError(f"{file}: expected the towers of a store, found {short_repr(record)}")
    if record.get("dtype") not in DTYPES:
        raise ValueError(
            f"{file}: dtype: expected one of {tuple(DTYPES)}, found {short_repr(record.get('dtype'))}"
        )
    for name in ("revision", "commit"):
        if not isinstance(eva.get(name), str | None):
            raise ValueError(f"{file}: {name}: expected text, found {short_repr(eva[name])}")
    return record
