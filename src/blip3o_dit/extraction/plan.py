"""`extract --dry_run`: what an extraction would do, how long it would take and how large it would get."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from blip3o_dit.data.manifest import MANIFEST, sample_bytes
from blip3o_dit.extraction.config import DEFAULT_CLIP, DEFAULT_EVA, ExtractionConfig
from blip3o_dit.extraction.extract import list_for
from blip3o_dit.extraction.extractor import Extractor
from blip3o_dit.extraction.identity import describe_extraction, describe_images, differences
from blip3o_dit.extraction.resume import SETTINGS_FILE, is_begun, is_finished, other_files, read_entry
from blip3o_dit.extraction.sources.formats import suffix_of
from blip3o_dit.extraction.sources.image_list import ImageList
from blip3o_dit.extraction.sources.image_ref import ImageRef
from blip3o_dit.extraction.sources.listing import named
from blip3o_dit.extraction.tokens import Towers, load_towers
from blip3o_dit.extraction.vision_towers import local_files
from blip3o_dit.utils.distributed import Processes, join_processes
from blip3o_dit.utils.durations import in_words
from blip3o_dit.utils.json_files import printable, read_json

# Width of the tokens of towers that need not be here for that to be known.
KNOWN_WIDTHS = {DEFAULT_EVA: 1280, DEFAULT_CLIP: 768}
SHOWN = 3
# Seconds that measuring may take, and pictures that it takes at most.
MEASURE_SECONDS, MEASURED = 10.0, 96
# Pictures that are tried until one can be read.
TRIED = 16
# Bytes of a sample's key, checksum and lengths, roughly.
RECORD_BYTES = 100


def plan(config: ExtractionConfig, *, progress: bool = True) -> str | None:
    """The plan as text, on the first process. Nothing is written and nothing is downloaded.

    Towers that are on this disk are loaded, and a few pictures go through them.

    Raises:
        FileNotFoundError, ValueError, OSError: as `extract`, of pictures and towers.
    """
    processes = join_processes(config.device)
    if not processes.is_main:
        return None
    images = list_for(config, progress)
    files = {side: _files(config, side) for side in ("eva", "clip")}
    here = config.towers_from_scratch or None not in files.values()
    towers = load_towers(config, processes.device) if here else None
    rows = [
        *_pictures(config, images),
        *((f"{side} tower", _tower(config, side, files[side], towers)) for side in files),
        *_store(config, images, towers, progress),
        ("time", _time(config, images, towers, processes)),
    ]
    return "".join(f"{name:<11}{printable(text)}\n" for name, text in rows)


def _pictures(config: ExtractionConfig, images: ImageList) -> list[tuple[str, str]]:
    kinds = Counter(map(_kind, images))
    rows = [("pictures", f"{len(images)} in {named(config.images)}: {_counts(kinds)}")]
    if images.ignored:
        rows.append(("no picture", _counts(images.ignored)))
    if images.skipped:
        first = images.skipped[0]
        rows.append(("skipped", f"{len(images.skipped)}, the first {first['key']}: {first['reason']}"))
    captions = sum(ref.caption is not None for ref in images)
    rows.append(("captions", f"{captions} of {len(images)}"))
    for number, ref in enumerate(images[:SHOWN]):
        text = " ".join((f"{ref.key}: {ref.caption}" if ref.caption else ref.key).split())
        rows.append(("first keys" if number == 0 else "", text if len(text) < 68 else f"{text[:65]}..."))
    return rows


def _kind(ref: ImageRef) -> str:
    if ref.row >= 0:
        return f"rows of {suffix_of(ref.name)}"
    return suffix_of(ref.member or ref.name) or "without suffix"


def _counts(kinds: Mapping[str, int]) -> str:
    common = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {kind}" for kind, count in common if count)


def _files(config: ExtractionConfig, side: str) -> list[Path] | None:
    """The weight files of a tower that is on this disk."""
    if config.towers_from_scratch:
        return []
    return local_files(getattr(config, side), getattr(config, f"{side}_revision"))


def _tower(config: ExtractionConfig, side: str, files: list[Path] | None, towers: Towers | None) -> str:
    if files is None:
        return f"{getattr(config, side)}: not on this disk, would be downloaded"
    name = getattr(config, side) if towers is None else towers[side].name
    if towers is None:
        return f"{name}: {_bytes(sum(file.stat().st_size for file in files))}"
    tower = towers[side]
    parameters = sum(each.numel() for each in tower.parameters())
    side_length = math.isqrt(config.tokens)
    return (
        f"{name}: {parameters / 1e6:.3g} M parameters, {tower.preprocessing.size} pixels, "
        f"{tower.grid}x{tower.grid} -> {side_length}x{side_length} tokens of {tower.width}"
    )


def _store(
    config: ExtractionConfig, images: ImageList, towers: Towers | None, progress: bool
) -> list[tuple[str, str]]:
    output = Path(config.output)
    shards = math.ceil(len(images) / config.shard_size)
    size = _size(config, images, towers)
    known = f"about {_bytes(size)}" if size else "of a size that the towers decide"
    there = next(folder for folder in (output, *output.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    enough = ": NOT ENOUGH" if size and size > free else ""
    count = f"{shards} shard{'s' * (shards > 1)}"
    return [
        ("store", f"{output}: {count}, {known} ({_bytes(free)} are free there{enough})"),
        ("folder", _state(config, output, images, shards, progress)),
    ]


def _size(config: ExtractionConfig, images: ImageList, towers: Towers | None) -> int:
    """Bytes of all shards; 0 where the towers' widths are not known."""
    if towers is not None:
        widths = [tower.width for tower in towers.values()]
    else:
        widths = [KNOWN_WIDTHS.get(name, 0) for name in (config.eva, config.clip)]
    if not all(widths):
        return 0
    sizes = config.tokens, widths[0], widths[1]
    return len(images) * (sample_bytes(sizes, config.store_dtype) + RECORD_BYTES)


def _state(config: ExtractionConfig, output: Path, images: ImageList, shards: int, progress: bool) -> str:
    """What the folder holds, and what the command would do about it."""
    finished, begun = is_finished(output), is_begun(output)
    if not finished and not begun:
        others = sorted(other_files(output))
        return f"refused, it holds other files: {', '.join(others[:SHOWN])}" if others else "new, or empty"
    if config.append and finished:
        return "a finished store: pictures with keys that it lacks would be added"
    if config.overwrite:
        return f"{'a finished store' if finished else 'an unfinished extraction'}: would be replaced"
    found: Any = read_json(output / (MANIFEST if finished else SETTINGS_FILE))
    found = found.get("extraction") if finished else found
    wanted = describe_extraction(config, describe_images(images, progress=progress))
    different = differences(found, wanted)
    if different:
        return f"refused, it holds another extraction: {'; '.join(different[:2])}"
    if finished:
        return "this extraction, complete already"
    done = sum(read_entry(output, unit) is not None for unit in range(shards))
    return f"this extraction, begun: {done} of {shards} shards are done"


def _time(config: ExtractionConfig, images: ImageList, towers: Towers | None, processes: Processes) -> str:
    if towers is None:
        return "is measured where the towers are on this disk, or with towers from scratch"
    tolerant = replace(config, strict=False, max_skipped=1.0)

    def measured(indices: Sequence[int], workers: int) -> float | None:
        changed = replace(tolerant, workers=workers)
        return Extractor(changed, Path(config.output), images, towers, processes.device).measure(indices)

    some = range(min(len(images), TRIED))
    one = next(filter(None, (measured([index], 0) for index in some)), None)
    if one is None:
        return f"not known: none of the first {len(some)} pictures can be read"
    count = min(len(images), MEASURED, max(1, int(MEASURE_SECONDS / one)))
    pace = measured(range(count), config.workers) or one
    seconds = pace * len(images) / processes.count
    return (
        f"about {in_words(seconds)} for all, {1 / pace:.3g} pictures a second in a process on "
        f"{processes.device} (measured on {count})"
    )


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"
