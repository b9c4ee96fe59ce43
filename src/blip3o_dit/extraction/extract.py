"""From images to an embedding store, resumable and divided among processes.

The list of images is cut into units of `shard_size`; a unit becomes one shard, whichever process works on
it and however often it is interrupted (`extractor.py`, `resume.py`).
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blip3o_dit.data.combine import SIDES
from blip3o_dit.data.manifest import STORE_ASIDE, check_shard_count
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.data.store_folder import writing_alone
from blip3o_dit.extraction.beside import add_to_store, check_replaceable, replace_store, unknown_images
from blip3o_dit.extraction.config import ExtractionConfig
from blip3o_dit.extraction.extractor import Extractor
from blip3o_dit.extraction.identity import (
    count_images,
    describe_extraction,
    describe_images,
    describe_towers,
    differences,
    is_of_earlier_version,
    noted_changes,
)
from blip3o_dit.extraction.reading_errors import NOT_READ, listing
from blip3o_dit.extraction.resume import (
    begin,
    find_extraction,
    finish_store,
    forget_units_with,
    is_finished,
    other_files,
    read_skipped,
    remove_working_files,
)
from blip3o_dit.extraction.skipping import TOO_LARGE, SkipLimit, Skipped
from blip3o_dit.extraction.sources.image_list import ImageList
from blip3o_dit.extraction.sources.image_ref import ImageRef
from blip3o_dit.extraction.sources.listing import list_images, named
from blip3o_dit.extraction.tokens import Towers, load_towers
from blip3o_dit.extraction.vision_towers import digest_of_weights
from blip3o_dit.utils.atomic import ASIDE, remove_files_and_folders
from blip3o_dit.utils.distributed import Processes, join_processes
from blip3o_dit.utils.json_files import printable

# Where the images to add to a store are extracted.
MORE_ASIDE = f"more{ASIDE}"

logger = logging.getLogger(__name__)


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
    images = processes.broadcast(list_for(config, bars) if processes.is_main else None)
    pictures = describe_images(images, progress=bars) if processes.is_main else {}
    job = Job(config, Path(config.output), processes, bars, images, pictures, images.skipped)
    if (config.append or config.retry_skipped) and processes.broadcast(is_finished(job.output)):
        job.append()
    elif config.overwrite and processes.broadcast(bool(other_files(job.output))):
        job.overwrite()
    else:
        job.run()
    return EmbeddingStore(job.output) if processes.is_main else None


def list_for(config: ExtractionConfig, bars: bool) -> ImageList:
    """The pictures that are asked for. Raises what `extract` does of them."""
    with listing(named(config.images)):
        images = list_images(config.images, config.listing, progress=bars)
    if images.skipped:  # an archive counts as one
        files = len({ref.file for ref in images}) + len(images.skipped)
        SkipLimit(config, files).add(images.skipped)
    cut = config.limit is not None and len(images) == config.limit
    first, why = ("the first ", " (--limit)") if cut else ("", "")
    logger.info("%s: %s%d pictures%s", named(config.images), first, len(images), why)
    return images


@dataclass(frozen=True)
class Job:
    """An extraction into a folder, where it may have begun or ended before.

    Args:
        refs: the images. pictures: what tells them from others (on the first process).
        skipped: what was skipped when they were listed.
        store: the one that the result is for, whose towers these must be.
        disposable: whether another extraction that is found in the folder gives way to this one.
    """

    config: ExtractionConfig
    output: Path
    processes: Processes
    bars: bool
    refs: Sequence[ImageRef]
    pictures: dict[str, Any]
    skipped: list[Skipped]
    store: EmbeddingStore | None = None
    disposable: bool = False

    def run(self) -> None:
        check_shard_count(self.output, len(self.refs), self.config.shard_size)
        identity = describe_extraction(self.config, self.pictures)
        main = self.processes.is_main
        if main:  # refuses what it can before the towers are loaded, which may take minutes
            self._find(identity)
        if not self.processes.broadcast(is_finished(self.output)):
            with self._held():
                self._work(identity)
        elif main:
            self._check_finished(identity)

    def overwrite(self) -> None:
        """Extract aside; what is there stays until that is whole. Interrupted, it continues too."""
        with self._held():
            if self.processes.is_main:
                check_replaceable(self.output)
            aside = replace(self, output=self.output / STORE_ASIDE, disposable=True)
            aside.run()
            if self.processes.is_main:
                replace_store(aside.output, self.output)

    def append(self) -> None:
        """Extract aside the images whose keys the store lacks, and add them to it.

        With --retry_skipped alone those are images that it skipped; others are refused.
        """
        with self._held():
            store = EmbeddingStore(self.output)
            _check_same_numbers(store, self.config)
            unknown = None
            if self.processes.is_main:
                unknown = unknown_images(store, self.refs, self.bars)
                if not self.config.append:
                    self._check_skipped(unknown)
            refs = self.processes.broadcast(unknown)
            if not refs:
                return
            pictures = self.pictures | count_images(refs) if self.processes.is_main else {}
            aside = replace(
                self,
                output=self.output / MORE_ASIDE,
                refs=refs,
                pictures=pictures,
                store=store,
                disposable=True,
            )
            aside.run()
            if self.processes.is_main:
                add_to_store(aside.output, self.output, _absolute(self.config.images))

    def _check_skipped(self, unknown: Sequence[ImageRef]) -> None:
        """Refuse (ValueError) images that the store neither holds nor skipped."""
        skipped = {image["key"] for image in read_skipped(self.output)}
        others = [ref for ref in unknown if ref.key not in skipped]
        if others:
            raise ValueError(
                f"{self.output}: --retry_skipped: expected the pictures of this store, found {len(others)} "
                f"others, the first {printable(others[0].key)}: --append adds them"
            )

    @contextmanager
    def _held(self) -> Iterator[None]:
        """The first process holds the folder for all of them."""
        if not self.processes.is_main:
            yield
            return
        with writing_alone(self.output, "extraction"):
            yield

    def _find(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        try:
            return find_extraction(self.output, identity)
        except ValueError as error:
            if not self.disposable:
                raise
            logger.info("%s: begun anew, not continued: %s", self.output, error)
            remove_files_and_folders(self.output / name for name in other_files(self.output))
            return None

    def _work(self, identity: dict[str, Any]) -> None:
        towers = load_towers(self.config, self.processes.device)
        identity |= describe_towers(towers)
        if self.processes.is_main:
            self._begin(identity)
        self.processes.barrier()
        extractor = Extractor(self.config, self.output, self.refs, towers, self.processes.device)
        extractor.run(self.processes.rank, self.processes.count, progress=self.bars)
        if self.processes.count > 1:
            logger.info("waiting for the other processes")
        self.processes.barrier()
        if self.processes.is_main:
            self._finish(identity, extractor)

    def _begin(self, identity: dict[str, Any]) -> None:
        if self.store is not None:
            _check_same_towers(self.store, identity)
        found = self._find(identity)
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
                "encoders": self.store.manifest.get("encoders", {}) if self.store else identity["towers"],
                "pooling": _pooling(self.config.tokens, extractor.towers),
                "normalization": "none",
                "extraction": identity,
                "pictures": _absolute(self.config.images),
            },
            more_skipped=self.skipped,
            limit=SkipLimit(self.config, len(self.refs) + len(self.skipped)),
            may_be_empty=self.store is not None,
        )

    def _check_finished(self, identity: dict[str, Any]) -> None:
        """Raises ValueError when other towers made the store, or with --strict when it lacks pictures."""
        found = find_extraction(self.output, identity)
        if not _same_weights(found, self.config):
            towers = load_towers(self.config, self.processes.device)
            found = find_extraction(self.output, identity | describe_towers(towers))
        unknown = " (by an earlier version, which noted neither sizes of pictures nor weights)"
        logger.info(
            "%s: this extraction is complete already%s", self.output, unknown * is_of_earlier_version(found)
        )
        skipped = read_skipped(self.output)
        SkipLimit(replace(self.config, max_skipped=1.0), len(self.refs)).add(skipped)
        remove_working_files(self.output)


def _same_weights(found: Any, config: ExtractionConfig) -> bool:
    """Whether both towers' files are those of a finished extraction, as far as files tell."""
    towers = found.get("towers") if isinstance(found, dict) else None
    if config.towers_from_scratch or not isinstance(towers, dict):
        return False
    recorded = [towers.get(side, {}).get("weights") for side in ("eva", "clip")]
    files = [(config.eva, config.eva_revision), (config.clip, config.clip_revision)]
    return None not in recorded and [digest_of_weights(*each) for each in files] == recorded


def _check_same_numbers(store: EmbeddingStore, config: ExtractionConfig) -> None:
    for name, there, here in (
        ("tokens", store.num_tokens, config.tokens),
        ("store_dtype", store.manifest["dtype"], config.store_dtype),
        ("normalization", store.manifest.get("normalization") or "none", "none"),
        ("keep", sorted(store.kept), sorted(f"{side}_{kind}" for side in SIDES for kind in config.keep)),
    ):
        if there != here:
            raise ValueError(f"{store.path}: {name}: expected {there} as in this store, found {here}")


def _check_same_towers(store: EmbeddingStore, identity: dict[str, Any]) -> None:
    """Those of a store that says what they were."""
    different = differences({"towers": store.manifest.get("encoders", {})}, {"towers": identity["towers"]})
    if different:
        raise ValueError(f"{store.path}: expected the towers of this store, found others: {different[0]}")


def _absolute(images: str | tuple[str, ...]) -> str | list[str]:
    return os.path.abspath(images) if isinstance(images, str) else [os.path.abspath(each) for each in images]


def _pooling(tokens: int, towers: Towers) -> str:
    side = math.isqrt(tokens)
    return ", ".join(f"{name} {t.grid}x{t.grid} -> {side}x{side} mean" for name, t in towers.items())
