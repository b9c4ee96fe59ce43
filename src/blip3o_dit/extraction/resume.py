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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blip3o_dit.data.kept_vectors import kept_widths
from blip3o_dit.data.manifest import MANIFEST, STORE_ASIDE, check_shard_entry, write_manifest
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.data.store_folder import IGNORED, check_is_folder
from blip3o_dit.extraction.identity import differences, is_of_earlier_version
from blip3o_dit.extraction.skipping import NO_FIT, SkipLimit, Skipped, kind_of, summary
from blip3o_dit.utils.atomic import ASIDE, finish_publishing, remove_files_and_folders, write_atomically
from blip3o_dit.utils.checksums import sha256
from blip3o_dit.utils.json_files import printable, read_json, short_repr, show_names

SETTINGS_FILE = "extraction.json"
SKIPPED_FILE = "skipped.jsonl"

logger = logging.getLogger(__name__)


def find_extraction(output: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The identity of the extraction in the folder, finished or not; None for a folder that is free.

    `wanted` is the identity of this one, or what is known of it.

    Raises:
        ValueError: for a folder with other files, or an extraction of other pictures or with other settings.
    """
    check_is_folder(output)
    finish_publishing(output / STORE_ASIDE, output, MANIFEST)
    finished = is_finished(output)
    if not finished and not is_begun(output):
        others = other_files(output)
        if others:
            raise ValueError(
                f"{output}: expected an empty folder or a begun extraction, found other files "
                f"{show_names(others)}"
            )
        return None
    found = EmbeddingStore(output).manifest.get("extraction") if finished else _read(output / SETTINGS_FILE)
    different = differences(found, wanted)
    if not different and not finished and is_of_earlier_version(found):
        different = ["it was begun by an earlier version, which did not note sizes and weights"]
    if different:
        adds = finished and all("pictures." in one or "limit" in one for one in different)
        raise ValueError(
            f"{output}: holds another extraction ({'; '.join(different[:4])}): repeat its command, "
            f"{'add the pictures that it lacks (--append), ' * adds}choose another folder (--output), or "
            "replace it (overwrite=True)"
        )
    return found


def other_files(output: Path) -> set[str]:
    """What is in the folder, but for what counts as nothing."""
    names = {file.name for file in output.iterdir()} if output.is_dir() else set()
    return {name for name in names if name not in IGNORED and not name.endswith(ASIDE)}


def is_finished(output: Path) -> bool:
    return (output / MANIFEST).is_file()


def is_begun(output: Path) -> bool:
    return (output / SETTINGS_FILE).is_file()


def begin(output: Path, identity: dict[str, Any]) -> None:
    """Make the folder, which is held, this extraction's."""
    write_atomically(output / SETTINGS_FILE, json.dumps(identity, indent=2).encode())


def forget_entry(output: Path, unit: int) -> None:
    """Before a unit is done again: its files will not be those that the entry tells of."""
    _entry_file(output, unit).unlink(missing_ok=True)


def forget_units_with(output: Path, kinds: set[str]) -> None:
    """Have units done again that skipped an image for a reason of one of these kinds."""
    for file in output.glob("shard-*.entry.json") if kinds else ():
        entry = _read(file)
        skipped = entry.get("skipped") if isinstance(entry, dict) else None
        if isinstance(skipped, list):
            _check_skipped(file, skipped)
            if any(kind_of(image) in kinds for image in skipped):
                file.unlink()


def write_entry(output: Path, unit: int, shard: dict[str, Any] | None, skipped: list[Skipped]) -> None:
    """Declare a unit finished. `shard` is its manifest entry, None when no image of it was readable."""
    content = json.dumps({"shard": shard, "skipped": skipped})
    write_atomically(_entry_file(output, unit), content.encode())


def read_entry(output: Path, unit: int, *, verify: bool = False) -> dict[str, Any] | None:
    """What a finished unit left, or None when it must be done (again); `verify` reads all of it."""
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
    if whole and verify:
        whole = sha256(file) == shard["sha256"] and sha256(table) == shard["table_sha256"]
        if not whole:
            logger.warning("%s: not what was written there; unit %d is done again", file, unit)
    return entry if whole else None


def finish_store(
    output: Path,
    num_units: int,
    *,
    sizes: tuple[int, int, int],
    dtype: str,
    about: dict[str, Any],
    more_skipped: Sequence[Skipped],
    limit: SkipLimit,
    may_be_empty: bool,
) -> None:
    """Write the list of skipped images, then the manifest, and sum up the skipped ones in one line.

    Args:
        about: how the tokens were made, for the manifest.
        more_skipped: what was skipped when images were listed. limit: how many may be skipped.
        may_be_empty: write no manifest then.

    Raises:
        ValueError: when a unit is unfinished, or no image was readable.
    """
    entries = [read_entry(output, unit) for unit in range(num_units)]
    missing = [unit for unit, entry in enumerate(entries) if entry is None]
    if missing:
        raise ValueError(f"{output}: expected {num_units} finished units, found {missing[:5]} unfinished")
    skipped = [*more_skipped, *(image for entry in entries if entry for image in entry["skipped"])]
    shards = [entry["shard"] for entry in entries if entry and entry["shard"]]
    limit.add(skipped)
    write_skipped(output, skipped)
    if not shards and may_be_empty:
        return
    if not shards:
        raise ValueError(
            f"{output}: expected at least one readable picture, found none of {len(skipped)}, "
            f"the first {printable(skipped[0]['location'])}: {skipped[0]['reason']}"
        )
    kept = kept_widths(output / shards[0]["file"])
    about = about | ({"kept": kept} if kept else {})
    write_manifest(output, sizes, dtype, shards, about | {"skipped": len(skipped)})
    remove_working_files(output)
    _log_skipped(skipped, output)


def read_skipped(output: Path) -> list[Skipped]:
    """The skipped images of a finished store."""
    file = output / SKIPPED_FILE
    if not file.is_file():
        return []
    skipped = [json.loads(line) for line in file.read_bytes().splitlines()]
    _check_skipped(file, skipped)
    return skipped


def write_skipped(output: Path, skipped: Sequence[Skipped]) -> None:
    lines = "".join(json.dumps(image) + "\n" for image in skipped)
    write_atomically(output / SKIPPED_FILE, lines.encode())


def remove_working_files(output: Path) -> None:
    """Remove what only an unfinished extraction needs."""
    patterns = ("shard-*.entry.json", f"shard-*{ASIDE}", f"*.json{ASIDE}", f"*.jsonl{ASIDE}")
    remove_files_and_folders(file for pattern in patterns for file in output.glob(pattern))
    (output / SETTINGS_FILE).unlink(missing_ok=True)


def unfinished_files(output: Path) -> set[str]:
    """The files of an extraction that was begun, shards among them."""
    if not is_begun(output):
        return set()
    return {SETTINGS_FILE, *(file.name for file in output.glob("shard-*") if file.is_file())}


def _log_skipped(skipped: Sequence[Skipped], output: Path) -> None:
    if not skipped:
        return
    kinds = Counter(map(kind_of, skipped))
    logger.warning("%d pictures skipped (%s): see %s", len(skipped), summary(kinds), output / SKIPPED_FILE)
    if NO_FIT in kinds:
        logger.warning("%s: --store_dtype float32 holds larger and smaller tokens", output)


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
