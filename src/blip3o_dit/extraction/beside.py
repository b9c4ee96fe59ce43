"""Extractions beside a store, in a folder of its folder: one that replaces the store, one that adds to it."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from tqdm.auto import tqdm

from blip3o_dit.data.combine import append_store
from blip3o_dit.data.manifest import MANIFEST
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.data.store_folder import check_claim, stored_files
from blip3o_dit.extraction.resume import (
    is_begun,
    is_finished,
    read_skipped,
    unfinished_files,
    write_skipped,
)
from blip3o_dit.extraction.sources.image_ref import ImageRef
from blip3o_dit.utils.atomic import publish_files, remove_files_and_folders, write_atomically
from blip3o_dit.utils.json_files import read_json

logger = logging.getLogger(__name__)


def check_replaceable(output: Path) -> None:
    """Refuse (ValueError) a folder that holds neither a store nor an extraction that was begun."""
    if not is_begun(output):
        check_claim(output, overwrite=True)


def replace_store(aside: Path, output: Path) -> None:
    """The finished store takes the place of the store or extraction around it; other files there stay."""
    publish_files(aside, output, {*stored_files(output), *unfinished_files(output)}, MANIFEST)


def unknown_images(store: EmbeddingStore, refs: Sequence[ImageRef], bars: bool) -> list[ImageRef]:
    """Those whose keys the store does not have."""
    known: set[str] = set()
    shards = list(pairwise(store.shard_starts.tolist()))
    for start, stop in tqdm(shards, desc="keys", unit=" shards", delay=2, disable=not bars):
        known.update(record["key"] for record in store.records(range(start, stop)))
    unknown = [ref for ref in refs if ref.key not in known]
    logger.info(
        "%s: %d of %d pictures are in the store already, by their keys",
        store.path,
        len(refs) - len(unknown),
        len(refs),
    )
    return unknown


def add_to_store(aside: Path, output: Path, images: str | list[str]) -> None:
    """Add what was extracted aside from `images`, and list what was skipped there."""
    before = {image["key"]: image for image in read_skipped(output)}
    skipped, added = before | {image["key"]: image for image in read_skipped(aside)}, 0
    if is_finished(aside):
        more = EmbeddingStore(aside)
        logger.info("%s: adding %d pictures", output, len(more))
        added = append_store(output, aside, keep_first=True).added
        for record in more.records():
            skipped.pop(record["key"], None)
    if added or skipped != before:
        write_skipped(output, list(skipped.values()))
        manifest = read_json(output / MANIFEST)
        appended = [*manifest.get("appended", []), {"pictures": images, "added": added}]
        manifest |= {"skipped": len(skipped), "appended": appended}
        write_atomically(output / MANIFEST, json.dumps(manifest, indent=2).encode())
    remove_files_and_folders([aside])
    logger.info("%s: %d pictures added", output, added)
