"""From images to an embedding store, resumable and divided among processes.

The list of images is cut into units of `shard_size`; a unit becomes one shard, whichever process works on
it and however often it is interrupted (`resume.py`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from blip3o_dit.data.checks import check_pair
from blip3o_dit.data.manifest import DTYPES, MANIFEST, check_shard_count
from blip3o_dit.data.store import EmbeddingStore, json_line, to_disk, write_shard
from blip3o_dit.extraction.config import RESUMABLE_CHANGES, ExtractionConfig
from blip3o_dit.extraction.image_decoding import UnreadableImageError, decode_image
from blip3o_dit.extraction.resume import (
    claim_folder,
    finish_store,
    read_entry,
    remove_working_files,
    write_entry,
)
from blip3o_dit.extraction.sources.image_ref import ImageRef
from blip3o_dit.extraction.sources.listing import list_images
from blip3o_dit.extraction.vision_towers import (
    Preprocessing,
    VisionEncoder,
    load_encoder,
    pool_tokens,
    tiny_encoder,
)
from blip3o_dit.utils.distributed import join_processes

DECODE_BATCH = 16

logger = logging.getLogger(__name__)

# By side, "eva" and "clip"
Towers = dict[str, VisionEncoder]


@dataclass(frozen=True)
class Decoded:
    """An image ready for both towers ([3, size, size] each), or the reason why it is not."""

    index: int
    eva: Tensor | None = None
    clip: Tensor | None = None
    reason: str | None = None


@dataclass
class Unit:
    """What a unit has collected so far: tokens by side, table lines, skipped images."""

    eva: list[Tensor] = field(default_factory=list)
    clip: list[Tensor] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)


def extract(config: ExtractionConfig, *, progress: bool = True) -> EmbeddingStore | None:
    """Extract embeddings, or continue an extraction that was interrupted.

    Returns the finished store on the first process, None on the others.

    Raises:
        FileNotFoundError, ValueError, OSError: one line naming what was expected and what was found; also
            for a folder that holds an extraction with other settings.
    """
    processes = join_processes(config.device)
    refs = list_images(config.images, config.listing)
    check_shard_count(Path(config.output), len(refs), config.shard_size)
    towers = load_towers(config, processes.device)
    settings = _settings(config, refs, towers)
    output = Path(config.output)
    if processes.is_main:
        claim_folder(output, settings)
    processes.barrier()
    if not (output / MANIFEST).is_file():
        extractor = Extractor(config, refs, towers)
        extractor.run(processes.rank, processes.count, progress=progress and processes.is_main)
        processes.barrier()
        if processes.is_main:
            finish_store(
                output,
                extractor.num_units,
                sizes=(config.tokens, towers["eva"].width, towers["clip"].width),
                dtype=config.store_dtype,
                pooling=_pooling(config.tokens, towers),
                settings=settings,
                images=config.images,
            )
    if not processes.is_main:
        return None
    remove_working_files(output)
    return EmbeddingStore(output)


def load_towers(config: ExtractionConfig, device: torch.device) -> Towers:
    """Both towers on the device. Raises ValueError for tokens that their grids do not pool into."""
    dtype = DTYPES[config.dtype]
    if config.towers_from_scratch:
        logger.warning("towers from scratch: tiny and random, their tokens mean nothing")
        towers = {side: tiny_encoder(side, seed=config.seed) for side in ("eva", "clip")}
    else:
        towers = {
            "eva": load_encoder(config.eva, dtype=dtype, revision=config.eva_revision),
            "clip": load_encoder(config.clip, dtype=dtype, revision=config.clip_revision),
        }
    for tower in towers.values():
        pool_tokens(torch.empty(1, tower.grid**2, 1), config.tokens)  # refuses before any work is done
        tower.to(device, dtype).eval().requires_grad_(False)
    return towers


class Extractor:
    """Extracts the units of one process."""

    def __init__(self, config: ExtractionConfig, refs: Sequence[ImageRef], towers: Towers) -> None:
        self.config = config
        self.refs = refs
        self.towers = towers
        self.output = Path(config.output)
        self.num_units = math.ceil(len(refs) / config.shard_size)

    def run(self, rank: int, world_size: int, *, progress: bool) -> None:
        """Write every unfinished unit whose number is `rank` modulo `world_size`."""
        units = range(rank, self.num_units, world_size)
        unfinished = [unit for unit in units if read_entry(self.output, unit) is None]
        indices = [index for unit in unfinished for index in self._indices(unit)]
        total = sum(len(self._indices(unit)) for unit in units)
        bar = tqdm(total=total, initial=total - len(indices), unit="picture", disable=not progress)
        written = 0
        with bar:
            for number, decoded in itertools.groupby(self._decoded(indices), key=self._unit_of):
                written += self._write_unit(number, self._encode(decoded, bar))
                bar.set_postfix_str(f"{written / 2**20:.1f} MiB written")

    def _indices(self, unit: int) -> range:
        start = unit * self.config.shard_size
        return range(start, min(start + self.config.shard_size, len(self.refs)))

    def _unit_of(self, decoded: Decoded) -> int:
        return decoded.index // self.config.shard_size

    def _decoded(self, indices: Sequence[int]) -> Iterator[Decoded]:
        """The images in order, decoded ahead of the towers by worker processes."""
        preprocessing = {side: tower.preprocessing for side, tower in self.towers.items()}
        loader: Iterable[list[Decoded]] = DataLoader(
            DecodingDataset(self.refs, indices, preprocessing, self.config.max_pixels),
            batch_size=DECODE_BATCH,
            num_workers=self.config.workers,
            collate_fn=list,
        )
        for batch in loader:
            yield from batch

    def _encode(self, decoded: Iterable[Decoded], bar: tqdm) -> Unit:
        unit = Unit()
        batch: list[Decoded] = []
        for image in decoded:
            bar.update()
            if image.reason is not None:
                unit.skipped.append(self._skip(image.index, image.reason))
                continue
            batch.append(image)
            if len(batch) == self.config.batch_size:
                self._run_towers(batch, unit)
                batch = []
        if batch:
            self._run_towers(batch, unit)
        return unit

    def _skip(self, index: int, reason: str) -> dict[str, str]:
        ref = self.refs[index]
        if self.config.strict:
            raise ValueError(f"{ref.location}: {reason} (--strict)")
        return {"key": ref.key, "location": ref.location, "reason": reason}

    @torch.inference_mode()
    def _run_towers(self, batch: Sequence[Decoded], unit: Unit) -> None:
        """Tokens of a batch of images, pooled, checked and in the dtype of the store."""
        records = [_record(self.refs[image.index]) for image in batch]
        tokens: dict[str, Tensor] = {}
        for side, tower in self.towers.items():
            weight = next(tower.parameters())
            pixels = torch.stack([getattr(image, side) for image in batch])  # [B, 3, size, size]
            grid = tower(pixels.to(weight.device, weight.dtype))  # [B, grid * grid, C]
            tokens[side] = pool_tokens(grid.float(), self.config.tokens).cpu()  # [B, tokens, C]
        check_pair(self.output, tokens["eva"], tokens["clip"], records, offset=batch[0].index)
        for side, pieces in (("eva", unit.eva), ("clip", unit.clip)):
            pieces.append(to_disk(self.output, tokens[side], side, self.config.store_dtype))
        unit.lines += [json_line(self.output, p.index, r) for p, r in zip(batch, records, strict=True)]

    def _write_unit(self, number: int, unit: Unit) -> int:
        """The shard, then the entry that makes it count; returns the bytes written."""
        shard = None
        if unit.lines:
            shard = write_shard(self.output, number, torch.cat(unit.eva), torch.cat(unit.clip), unit.lines)
        write_entry(self.output, number, shard, unit.skipped)
        return shard["bytes"] if shard else 0


@dataclass(eq=False)
class DecodingDataset(Dataset):
    """Reads, decodes and preprocesses images; runs in the data loader's processes."""

    refs: Sequence[ImageRef]
    indices: Sequence[int]
    preprocessing: dict[str, Preprocessing]
    max_pixels: int

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Decoded:
        index = self.indices[position]
        try:
            image = decode_image(self.refs[index].read(), max_pixels=self.max_pixels)
        except UnreadableImageError as error:
            return Decoded(index, reason=str(error))
        except (OSError, ValueError) as error:
            return Decoded(index, reason=f"cannot be read: {error}")
        pixels = {side: prepare(image) for side, prepare in self.preprocessing.items()}
        return Decoded(index, eva=pixels["eva"], clip=pixels["clip"])


def _settings(config: ExtractionConfig, refs: Sequence[ImageRef], towers: Towers) -> dict[str, Any]:
    """Everything that decides the content of the store, as JSON values."""
    digest = hashlib.sha256()
    for ref in refs:
        digest.update(json.dumps([ref.key, ref.caption, ref.label]).encode() + b"\n")
    return {
        "settings": {name: value for name, value in asdict(config).items() if name not in RESUMABLE_CHANGES},
        "pictures": {"count": len(refs), "sha256": digest.hexdigest()},
        "towers": {side: tower.describe() for side, tower in towers.items()},
    }


def _pooling(tokens: int, towers: Towers) -> str:
    side = math.isqrt(tokens)
    return ", ".join(f"{name} {t.grid}x{t.grid} -> {side}x{side} mean" for name, t in towers.items())


def _record(ref: ImageRef) -> dict[str, Any]:
    known = {"caption": ref.caption, "label": ref.label}
    return {"key": ref.key} | {name: value for name, value in known.items() if value is not None}
