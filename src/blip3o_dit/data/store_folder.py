"""The folder that a store is written to: whose it may be, and how the new store takes the old one's place.

    NAME/store.partial/    the new store while it is written; its files move into NAME when it is whole

So the old store stays until the new one is whole, and NAME may be a mount point, a link or the current
folder, which no rename could replace. A process killed while files move leaves what the next one finishes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from blip3o_dit.data.manifest import FORMAT, MANIFEST, STORE_ASIDE
from blip3o_dit.utils.addresses import refuse_address
from blip3o_dit.utils.atomic import (
    abandon_files,
    finish_publishing,
    move_files,
    publish_files,
    remove_files_and_folders,
)
from blip3o_dit.utils.folder_lock import LOCK_FILE, held_folder
from blip3o_dit.utils.json_files import read_json, show_names

# What file systems, file managers and git leave in a folder that counts as empty; nothing touches them.
IGNORED = {".DS_Store", ".gitkeep", "Thumbs.db", "desktop.ini", "lost+found", LOCK_FILE}

# In a store's folder while tokens are generated for it: see `inference/unfinished.py`.
GENERATION_PARTS = "generation.parts"

_SHARD_NAME = re.compile(r"shard-\d+\.(safetensors|jsonl)")
_EXTRACTION_NAME = re.compile(r"extraction\.json|shard-\d+\.entry\.json")


class StoreFolder:
    """A folder claimed for a store: a new or empty one, or that of a store with `overwrite`.

    Args:
        parts: a folder in it that belongs to whoever claims it, if it is there.
        goes_on: what was written aside before stays.

    Raises:
        ValueError: for any other, saying what is there.
    """

    def __init__(
        self, path: Path, *, overwrite: bool = False, parts: str | None = None, goes_on: bool = False
    ) -> None:
        self.path = path
        self.aside = path / STORE_ASIDE
        check_is_folder(path)
        self._is_new = not path.exists()
        if not self._is_new:
            finish_publishing(self.aside, path, MANIFEST)
            check_claim(path, overwrite, parts)
            if not goes_on:
                remove_unpublished(path)
        self.aside.mkdir(parents=True, exist_ok=goes_on)

    def publish(self) -> None:
        """The store that was written aside, manifest and all, takes the place of what was there."""
        publish_files(self.aside, self.path, stored_files(self.path), MANIFEST)

    def abandon(self) -> None:
        """Remove what was written; what was there before stays."""
        abandon_files(self.aside, self.path, MANIFEST)
        if self._is_new:
            with suppress(OSError):  # somebody put something there
                self.path.rmdir()


@contextmanager
def writing_alone(path: Path, what: str) -> Iterator[None]:
    """Hold the lock of a folder to write to, which is made for that and goes again if it stays empty."""
    check_is_folder(path)
    with held_folder(path, what):
        yield


def claim_more(store: Path) -> Path:
    """A new folder for shards that will be added to the store at `store`; see `publish_more`.

    Raises:
        ValueError: when files there could be taken for such shards.
    """
    remove_unpublished(store)
    others = _shard_names({file.name for file in store.iterdir()}) - stored_files(store)
    if others:
        raise ValueError(f"{store}: expected no shards beside those of its store, found {show_names(others)}")
    (store / STORE_ASIDE).mkdir()
    return store / STORE_ASIDE


def publish_more(path: Path) -> None:
    """Move more shards and a manifest that lists them as well from aside into the store at `path`.

    The manifest comes last, by one rename: until then the store is the old one.
    """
    move_files(path / STORE_ASIDE, path, MANIFEST)


def remove_unpublished(path: Path) -> None:
    """Remove what a killed writer left aside, and the shards that it had moved without listing them."""
    if (path / MANIFEST).is_file():
        strays = stored_files(path / STORE_ASIDE) - stored_files(path)
        remove_files_and_folders([path / name for name in strays])
    remove_files_and_folders([path / STORE_ASIDE])


def stored_files(path: Path) -> set[str]:
    """The files of the store at `path`, the manifest among them; none when there is no store."""
    manifest = _own_manifest(path)
    if manifest is None:
        return set()
    shards = manifest.get("shards")
    entries = [shard for shard in shards if isinstance(shard, dict)] if isinstance(shards, list) else []
    names = {str(shard.get(name)) for shard in entries for name in ("file", "table")}
    return _shard_names(names) | {MANIFEST} | ({"skipped.jsonl"} if "skipped" in manifest else set())


def check_claim(path: Path, overwrite: bool, parts: str | None = None) -> None:
    """See `StoreFolder`."""
    names = {file.name for file in path.iterdir()} - IGNORED - {STORE_ASIDE, parts}
    stored = stored_files(path)
    if not names:
        return
    if any(_EXTRACTION_NAME.fullmatch(name) for name in names) and MANIFEST not in stored:
        raise ValueError(
            f"{path}: expected an empty folder, found an unfinished extraction: "
            "repeat its command, or choose another folder"
        )
    if GENERATION_PARTS in names:
        raise ValueError(
            f"{path}: expected an empty folder, found an unfinished generation: "
            "repeat its command, or choose another folder"
        )
    if MANIFEST not in stored:
        raise ValueError(
            f"{path}: expected an empty folder, or a store to replace, found {show_names(names)}"
        )
    if not overwrite:
        raise ValueError(f"{path}: expected no store there, found one (overwrite=True replaces it)")
    others = _shard_names(names) - stored - stored_files(path / STORE_ASIDE)
    if others:
        raise ValueError(f"{path}: expected no shards beside those of its store, found {show_names(others)}")


def check_is_folder(path: Path) -> None:
    """Refuse (ValueError) a file or a broken link where a folder is to be written to."""
    refuse_address(path)
    if not path.is_dir() and (path.exists() or path.is_symlink()):
        raise ValueError(f"{path}: expected a folder to write to, found a file or a broken link")


def _shard_names(names: set[str]) -> set[str]:
    return {name for name in names if _SHARD_NAME.fullmatch(name)}


def _own_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest if it is one of ours, whatever else is wrong with it."""
    try:
        manifest = read_json(path / MANIFEST)
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("format") == FORMAT else None
