"""The units of an extraction that one process works on: decoded, through the towers, checked, written."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from blip3o_dit.data.checks import check_pair
from blip3o_dit.data.int8_tokens import width_on_disk
from blip3o_dit.data.shard_writer import json_line, write_shard
from blip3o_dit.extraction.config import ExtractionConfig
from blip3o_dit.extraction.decoding import Decoded, decoded_images, stack
from blip3o_dit.extraction.reading_errors import Source
from blip3o_dit.extraction.resume import forget_entry, read_entry, write_entry
from blip3o_dit.extraction.skipping import SkipLimit, Skipped
from blip3o_dit.extraction.sources.image_ref import ImageRef
from blip3o_dit.extraction.tokens import Towers, storable, tower_tokens
from blip3o_dit.utils.durations import in_words
from blip3o_dit.utils.json_files import escaped

# Of these, all but the first tell how long the others will take.
BATCHES_MEASURED = 3
# Seconds from which on it is said how long an extraction will take.
LONG = 5.0

logger = logging.getLogger(__name__)


@dataclass
class Unit:
    """What a unit has collected so far: tokens of batches by side, with what is kept beside them, table
    lines, skipped images by index."""

    tokens: list[dict[str, Tensor]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    skipped: dict[int, Skipped] = field(default_factory=dict)


@dataclass
class Pace:
    """How long an image takes, from decoding to tokens, once the first batch is through."""

    started: float = field(default_factory=time.monotonic)
    times: list[float] = field(default_factory=list)  # when each of the first batches was through
    counts: list[int] = field(default_factory=list)

    def note(self, images: int) -> None:
        """A batch of so many images is through."""
        if len(self.times) < BATCHES_MEASURED:
            self.times.append(time.monotonic())
            self.counts.append(images)

    @property
    def is_known(self) -> bool:
        return len(self.times) == BATCHES_MEASURED

    @property
    def seconds_per_image(self) -> float:
        """Without the first batch, in which workers start and memory is found, if there is another."""
        if len(self.times) < 2:
            return (self.times[-1] - self.started) / sum(self.counts)
        return (self.times[-1] - self.times[0]) / sum(self.counts[1:])


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
        self.scaled: list[str] = []  # images of more than 8 bits, and how their values were scaled
        self.pace = Pace()

    def run(self, rank: int, world_size: int, *, progress: bool) -> None:
        """Write every unfinished unit whose number is `rank` modulo `world_size`."""
        units = range(rank, self.num_units, world_size)
        unfinished = self._unfinished(units, progress=progress)
        indices = [index for unit in unfinished for index in self._indices(unit)]
        total = sum(len(self._indices(unit)) for unit in units)
        bar = tqdm(total=total, initial=total - len(indices), unit=" pictures", disable=not progress)
        written = 0
        self.pace = Pace()
        with bar:
            for number, decoded in itertools.groupby(self._decoded(indices), key=self._unit_of):
                written += self._write_unit(number, self._encode(decoded, bar))
                bar.set_postfix_str(f"{written / 2**20:.1f} MiB written")
        if self.scaled:
            logger.warning(
                "%d pictures of more than 8 bits were scaled by what they hold, the first %s",
                len(self.scaled),
                escaped(self.scaled[0]),
            )

    def measure(self, indices: Sequence[int]) -> float | None:
        """Seconds an image takes, measured on these; None when none can be read. Nothing is written."""
        self.pace = Pace()
        self._encode(self._decoded(indices), tqdm(disable=True))
        return self.pace.seconds_per_image if self.pace.times else None

    def _unfinished(self, units: Sequence[int], *, progress: bool) -> list[int]:
        """Those without an entry, or with other files than were written; what the others skipped counts."""
        unfinished = []
        for unit in tqdm(units, desc="what is there", unit=" shards", delay=2, disable=not progress):
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
            if image.scaled is not None:
                self.scaled.append(f"{self.refs[image.index].location}: {image.scaled}")
            batch.append(image)
            if len(batch) == self.config.batch_size:
                self._run_towers(batch, unit)
                self._note_pace(len(batch), bar)
                batch = []
        if batch:
            self._run_towers(batch, unit)
            self._note_pace(len(batch), bar)
        return unit

    def _skip(self, unit: Unit, index: int, reason: str) -> None:
        ref = self.refs[index]
        unit.skipped[index] = {"key": ref.key, "location": ref.location, "reason": reason}
        self.limit.add([unit.skipped[index]])

    def _note_pace(self, images: int, bar: tqdm) -> None:
        """Say how long the others will take, once that is known."""
        known = self.pace.is_known
        self.pace.note(images)
        left = (bar.total or 0) - bar.n
        seconds = self.pace.seconds_per_image * left
        if self.pace.is_known and not known and seconds > LONG:
            logger.info("%d pictures left: about %s", left, in_words(seconds))

    def _run_towers(self, batch: Sequence[Decoded], unit: Unit) -> None:
        """Tokens of a batch of images, pooled, checked and in the dtype of the store."""
        tokens: dict[str, Tensor] = {}
        for side, tower in self.towers.items():
            tokens |= tower_tokens(tower, side, stack(batch, side), self.config, self.device)
        stored, reasons = storable(self.output, tokens, self.config.store_dtype)
        for row, reason in reasons.items():
            self._skip(unit, batch[row].index, reason)
        kept = [image.index for row, image in enumerate(batch) if row not in reasons]
        records = [self.refs[index].record for index in kept]
        eva_width, clip_width = (width_on_disk(width, self.config.store_dtype) for width in self.sizes[1:])
        sizes = (self.sizes[0], eva_width, clip_width)
        check_pair(self.output, stored["eva"], stored["clip"], records, expected=sizes)
        unit.tokens.append(stored)
        unit.lines += [json_line(self.output, i, r) for i, r in zip(kept, records, strict=True)]

    def _write_unit(self, number: int, unit: Unit) -> int:
        """The shard, then the entry that makes it count; returns the bytes written."""
        forget_entry(self.output, number)
        shard = None
        if unit.lines:
            tokens = {name: torch.cat([part[name] for part in unit.tokens]) for name in unit.tokens[0]}
            eva, clip = tokens.pop("eva"), tokens.pop("clip")
            shard = write_shard(self.output, number, eva, clip, unit.lines, tokens)
        write_entry(self.output, number, shard, [unit.skipped[index] for index in sorted(unit.skipped)])
        return shard["bytes"] if shard else 0
