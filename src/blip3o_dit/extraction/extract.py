"""From images to an embedding store, resumable and divided among processes.

The list of images is cut into units of `shard_size`; a unit becomes one shard, whichever process works on
it and however often it is interrupted (`resume.py`).
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from blip3o_dit.data.checks import check_pair
from blip3o_dit.data.manifest import check_shard_count
from blip3o_dit.data.store import EmbeddingStore, json_line, write_shard
from blip3o_dit.extraction.config import ExtractionConfig
from blip3o_dit.extraction.decoding import Decoded, decoded_images, stack
from blip3o_dit.extraction.identity import (
    describe_extraction,
    describe_images,
    describe_towers,
    is_of_earlier_version,
    noted_changes,
)
from blip3o_dit.extraction.image_files import ImageRef, list_images
from blip3o_dit.extraction.reading_errors import NOT_READ, Source
from blip3o_dit.extraction.resume import (
    begin,
    find_extraction,
    finish_store,
    forget_entry,
    forget_units_with,
    held_folder,
    is_finished,
    read_entry,
    read_skipped,
    remove_working_files,
    write_entry,
)
from blip3o_dit.extraction.skipping import TOO_LARGE, SkipLimit, Skipped, kind_of
from blip3o_dit.extraction.tokens import Towers, load_towers, storable, tower_tokens
from blip3o_dit.utils.distributed import Processes, join_processes

logger = logging.getLogger(__name__)


@dataclass
class Unit:
    """What a unit has collected so far: tokens by side, table lines, skipped images by index."""

    eva: list[Tensor] = field(default_factory=list)
    clip: list[Tensor] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    skipped: dict[int, Skipped] = field(default_factory=dict)


def extract(config: ExtractionConfig, *, progress: bool = True) -> EmbeddingStore | None:
    """Extract embeddings, or continue an extraction that was interrupted.

    Returns the finished store on the first process, None on the others.

    Raises:
        FileNotFoundError, ValueError, OSError: one line naming what was expected and what was found; also
            for a folder that holds an extraction with other settings.
        ReadError: the images cannot be read now, or a decoding process was lost; what was done is kept.
    """
    processes = join_processes(config.device)
    bars = progress and processes.is_main
    # One process lists: others might see other images, in copies of their own or a folder that is filled.
    images = processes.broadcast(list_images(config.images, progress=bars) if processes.is_main else None)
    if processes.is_main and images.ignored:
        ignored = ", ".join(
            f"{count} {suffix or 'without a suffix'}" for suffix, count in images.ignored.items()
        )
        logger.info("%s: files that are no pictures: %s", config.images, ignored)
    pictures = describe_images(images, images.digest(), progress=bars) if processes.is_main else {}
    job = Job(config, Path(config.output), images, pictures, images.skipped)
    return job.run(processes, bars)


@dataclass
class Job:
    """An extraction into a folder, where it may have begun or ended before.

    Args:
        refs: the images. pictures: what tells them from others (on the first process).
        skipped: what was skipped when they were listed.
    """

    config: ExtractionConfig
    output: Path
    refs: Sequence[ImageRef]
    pictures: dict[str, Any]
    skipped: list[Skipped]

    def run(self, processes: Processes, bars: bool) -> EmbeddingStore | None:
        """The finished store on the first process, None on the others."""
        check_shard_count(self.output, len(self.refs), self.config.shard_size)
        identity = describe_extraction(self.config, self.pictures)
        if processes.is_main:
            find_extraction(
                self.output, identity
            )  # refuses before the towers are loaded, which may take minutes
        if not processes.broadcast(is_finished(self.output)):
            with held_folder(self.output) if processes.is_main else nullcontext():
                self._work(identity, processes, bars)
        elif processes.is_main:
            self._check_finished(identity, load_towers(self.config, processes.device))
        return EmbeddingStore(self.output) if processes.is_main else None

    def _work(self, identity: dict[str, Any], processes: Processes, bars: bool) -> None:
        towers = load_towers(self.config, processes.device)
        identity |= describe_towers(towers)
        if processes.is_main:
            self._begin(identity)
        processes.barrier()
        extractor = Extractor(self.config, self.output, self.refs, towers, processes.device)
        extractor.run(processes.rank, processes.count, progress=bars)
        processes.barrier()
        if processes.is_main:
            self._finish(identity, extractor)

    def _begin(self, identity: dict[str, Any]) -> None:
        found = find_extraction(self.output, identity)
        changes = noted_changes(found, identity) if found else []
        again = {NOT_READ} if self.config.retry_skipped else set()
        if "max_pixels" in changes:
            again.add(TOO_LARGE)
        forget_units_with(self.output, again)
        if "batch_size" in changes:
            logger.warning("%s: begun with another batch_size: last bits may differ", self.output)
        if found is None or changes:
            begin(self.output, identity)

    def _finish(self, identity: dict[str, Any], extractor: Extractor) -> None:
        finish_store(
            self.output,
            extractor.num_units,
            sizes=extractor.sizes,
            dtype=self.config.store_dtype,
            about={
                "encoders": identity["towers"],
                "pooling": _pooling(self.config.tokens, extractor.towers),
                "normalization": "none",
                "extraction": identity,
                "pictures": os.path.abspath(self.config.images),
            },
            more_skipped=self.skipped,
            limit=SkipLimit(self.config, len(self.refs)),
        )
        remove_working_files(self.output)

    def _check_finished(self, identity: dict[str, Any], towers: Towers) -> None:
        """Raises ValueError when other towers made the store, or with --strict when it lacks pictures."""
        found = find_extraction(self.output, identity | describe_towers(towers))
        unknown = " (by an earlier version, which noted neither sizes of pictures nor weights)"
        logger.info(
            "%s: this extraction is complete already%s", self.output, unknown * is_of_earlier_version(found)
        )
        skipped = read_skipped(self.output)
        SkipLimit(replace(self.config, max_skipped=1.0), len(self.refs)).add(skipped)
        if self.config.retry_skipped and any(kind_of(image) == NOT_READ for image in skipped):
            logger.warning("%s: a finished store takes the pictures that it lacks with --append", self.output)
        remove_working_files(self.output)


class Extractor:
    """Extracts the units of one process."""

    def __init__(
        self,
        config: ExtractionConfig,
        output: Path,
        refs: Sequence[ImageRef],
        towers: Towers,
        device: torch.device,
    ) -> None:
        self.config = config
        self.output = output
        self.refs = refs
        self.towers = towers
        self.device = device
        self.sizes = (config.tokens, towers["eva"].width, towers["clip"].width)
        self.num_units = math.ceil(len(refs) / config.shard_size)
        self.limit = SkipLimit(config, len(refs))

    def run(self, rank: int, world_size: int, *, progress: bool) -> None:
        """Write every unfinished unit whose number is `rank` modulo `world_size`."""
        units = range(rank, self.num_units, world_size)
        unfinished = self._unfinished(units, progress=progress)
        indices = [index for unit in unfinished for index in self._indices(unit)]
        total = sum(len(self._indices(unit)) for unit in units)
        bar = tqdm(total=total, initial=total - len(indices), unit="picture", disable=not progress)
        written = 0
        with bar:
            for number, decoded in itertools.groupby(self._decoded(indices), key=self._unit_of):
                written += self._write_unit(number, self._encode(decoded, bar))
                bar.set_postfix_str(f"{written / 2**20:.1f} MiB written")

    def _unfinished(self, units: Sequence[int], *, progress: bool) -> list[int]:
        """Those without an entry, or with other files than were written; what the others skipped counts."""
        unfinished = []
        for unit in tqdm(units, desc="what is there", unit="shard", delay=2, disable=not progress):
            entry = read_entry(self.output, unit, verify=True)
            if entry is None:
                unfinished.append(unit)
            else:
                self.limit.add(entry["skipped"])
        return unfinished

    def _indices(self, unit: int) -> range:
        start = unit * self.config.shard_size
        return range(start, min(start + self.config.shard_size, len(self.refs)))

    def _unit_of(self, decoded: Decoded) -> int:
        return decoded.index // self.config.shard_size

    def _decoded(self, indices: Sequence[int]) -> Iterator[Decoded]:
        """The images in order, decoded ahead of the towers by worker processes."""
        if not indices:
            return iter(())
        return decoded_images(
            self.refs,
            indices,
            {side: tower.preprocessing for side, tower in self.towers.items()},
            source=Source.of(self.refs),
            max_pixels=self.config.max_pixels,
            workers=self.config.workers,
        )

    def _encode(self, decoded: Iterable[Decoded], bar: tqdm) -> Unit:
        unit = Unit()
        batch: list[Decoded] = []
        for image in decoded:
            bar.update()
            if image.reason is not None:
                self._skip(unit, image.index, image.reason)
                continue
            batch.append(image)
            if len(batch) == self.config.batch_size:
                self._run_towers(batch, unit)
                batch = []
        if batch:
            self._run_towers(batch, unit)
        return unit

    def _skip(self, unit: Unit, index: int, reason: str) -> None:
        ref = self.refs[index]
        unit.skipped[index] = {"key": ref.key, "location": ref.location, "reason": reason}
        self.limit.add([unit.skipped[index]])

    def _run_towers(self, batch: Sequence[Decoded], unit: Unit) -> None:
        """Tokens of a batch of images, pooled, checked and in the dtype of the store."""
        tokens = {
            side: tower_tokens(tower, side, stack(batch, side), self.config, self.device)
            for side, tower in self.towers.items()
        }
        stored, reasons = storable(self.output, tokens, self.config.store_dtype)
        for row, reason in reasons.items():
            self._skip(unit, batch[row].index, reason)
        kept = [image.index for row, image in enumerate(batch) if row not in reasons]
        records = [_record(self.refs[index]) for index in kept]
        eva, clip = stored["eva"], stored["clip"]
        check_pair(self.output, eva, clip, records, expected=self.sizes)
        unit.eva.append(eva)
        unit.clip.append(clip)
        unit.lines += [json_line(self.output, i, r) for i, r in zip(kept, records, strict=True)]

    def _write_unit(self, number: int, unit: Unit) -> int:
        """The shard, then the entry that makes it count; returns the bytes written."""
        forget_entry(self.output, number)
        shard = None
        if unit.lines:
            shard = write_shard(self.output, number, torch.cat(unit.eva), torch.cat(unit.clip), unit.lines)
        write_entry(self.output, number, shard, [unit.skipped[index] for index in sorted(unit.skipped)])
        return shard["bytes"] if shard else 0


def _pooling(tokens: int, towers: Towers) -> str:
    side = math.isqrt(tokens)
    return ", ".join(f"{name} {t.grid}x{t.grid} -> {side}x{side} mean" for name, t in towers.items())


def _record(ref: ImageRef) -> dict[str, Any]:
    known = {"caption": ref.caption, "label": ref.label}
    return {"key": ref.key} | {name: value for name, value in known.items() if value is not None}
