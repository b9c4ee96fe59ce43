"""Resuming: what an unfinished extraction leaves on disk, and how that becomes a store.

    extraction.json           the settings and the images this folder belongs to, while it is unfinished
    shard-00003.entry.json    unit 3 is finished: its manifest entry and the images it skipped
    skipped.jsonl             in the finished store: key, location and reason of every skipped image

An entry is written atomically after its shard, the manifest after all entries. So the finished store is the
same however many processes wrote it, and however often they were killed.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blip3o_dit.data.manifest import MANIFEST, check_shard_entry, write_manifest
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.utils.atomic import ASIDE, remove_files_and_folders, write_atomically
from blip3o_dit.utils.json_files import read_json, short_repr

SETTINGS_FILE = "extraction.json"
SKIPPED_FILE = "skipped.jsonl"

logger = logging.getLogger(__name__)


def claim_folder(output: Path, settings: dict[str, Any]) -> None:
    """Make the folder this extraction's, or see that it is already: begun or finished with these settings.

    Raises:
        ValueError: for a folder with other files, or an extraction with other settings, and shows which.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output}: expected a folder to write to, found a file")
    finished, begun = output / MANIFEST, output / SETTINGS_FILE
    if not finished.is_file() and not begun.is_file():
        if output.is_dir() and any(file.suffix != ".partial" for file in output.iterdir()):
            raise ValueError(f"{output}: expected an empty folder or a begun extraction, found other files")
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(begun, json.dumps(settings, indent=2).encode())
        return
    found = EmbeddingStore(output).manifest.get("extraction") if finished.is_file() else _read(begun)
    wanted = json.loads(json.dumps(settings))
    if found != wanted:
        raise ValueError(
            f"{output}: holds an extraction with other settings ({_difference(found, wanted)}): "
            "repeat its command, or choose another folder"
        )
    if finished.is_file():
        logger.info("%s: this extraction is complete already", output)


def write_entry(output: Path, unit: int, shard: dict[str, Any] | None, skipped: list[dict[str, str]]) -> None:
    """Declare a unit finished. `shard` is its manifest entry, None when no image of it was readable."""
    content = json.dumps({"shard": shard, "skipped": skipped})
    write_atomically(_entry_file(output, unit), content.encode())


def read_entry(output: Path, unit: int) -> dict[str, Any] | None:
    """What a finished unit left, or None when it must be done (again)."""
    file = _entry_file(output, unit)
    entry = _read(file)
    if not isinstance(entry, dict) or not {"shard", "skipped"} <= entry.keys():
        return None
    _check_skipped(file, entry["skipped"])
    shard = entry["shard"]
    if shard is None:
        return entry
    check_shard_entry(file, shard)
    file, table = output / shard["file"], output / shard["table"]
    whole = file.is_file() and table.is_file() and file.stat().st_size == shard["bytes"]
    return entry if whole else None


def finish_store(
    output: Path,
    num_units: int,
    *,
    sizes: tuple[int, int, int],
    dtype: str,
    pooling: str,
    settings: Mapping[str, Any],
    images: str,
) -> None:
    """Write the list of skipped images, then the manifest, and sum up the skipped ones in one line.

    `images` is where the images were read from, for commands that show some of them.

    Raises:
        ValueError: when a unit is unfinished, or no image was readable.
    """
    entries = [read_entry(output, unit) for unit in range(num_units)]
    missing = [unit for unit, entry in enumerate(entries) if entry is None]
    if missing:
        raise ValueError(f"{output}: expected {num_units} finished units, found {missing[:5]} unfinished")
    skipped = [image for entry in entries if entry for image in entry["skipped"]]
    shards = [entry["shard"] for entry in entries if entry and entry["shard"]]
    if not shards:
        raise ValueError(
            f"{output}: expected at least one readable picture, found none of {len(skipped)}, "
            f"the first {skipped[0]['location']}: {skipped[0]['reason']}"
        )
    lines = "".join(json.dumps(image) + "\n" for image in skipped)
    write_atomically(output / SKIPPED_FILE, lines.encode())
    about = {
        "encoders": settings["towers"],
        "pooling": pooling,
        "normalization": "none",
        "skipped": len(skipped),
        "extraction": settings,
        "pictures": images,
    }
    write_manifest(output, sizes, dtype, shards, about)
    _log_skipped(skipped, output)


def remove_working_files(output: Path) -> None:
    """Remove what only an unfinished extraction needs."""
    remove_files_and_folders(
        (*output.glob("shard-*.entry.json"), *output.glob(f"*{ASIDE}"), output / SETTINGS_FILE)
    )


def _log_skipped(skipped: Sequence[Mapping[str, str]], output: Path) -> None:
    if not skipped:
        return
    kinds = Counter(image["reason"].split(":")[0] for image in skipped)
    common = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
    logger.warning("%d pictures skipped (%s): see %s", len(skipped), common, output / SKIPPED_FILE)


def _difference(found: Any, wanted: dict[str, Any]) -> str:
    if not isinstance(found, dict):
        return "it was not written by this command"
    there, here = _flat(found), _flat(wanted)
    names = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    return "; ".join(
        f"{name} is {short_repr(there.get(name))} there, {short_repr(here.get(name))} here"
        for name in names[:4]
    )


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix.rstrip("."): values}
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.")
    return flat


def _entry_file(output: Path, unit: int) -> Path:
    return output / f"shard-{unit:05d}.entry.json"


def _check_skipped(file: Path, skipped: Any) -> None:
    expected = {"key", "location", "reason"}
    for image in skipped if isinstance(skipped, list) else [skipped]:
        if not isinstance(image, dict) or not all(isinstance(image.get(name), str) for name in expected):
            raise ValueError(
                f"{file}: expected skipped pictures with a reason each, found {short_repr(image)}"
            )


def _read(file: Path) -> Any:
    """JSON of a file, None when it is missing or damaged."""
    try:
        return read_json(file)
    except (OSError, ValueError):
        return None
