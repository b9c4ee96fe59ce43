"""`list_images`: what is at a place, by its layout. docs/inputs.md has the table."""

from __future__ import annotations

import os
import stat
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from blip3o_dit.extraction.sources import patterns
from blip3o_dit.extraction.sources.collector import SILENT_SECONDS, Collector
from blip3o_dit.extraction.sources.folders import list_folder
from blip3o_dit.extraction.sources.formats import image_suffixes, kind_of, suffix_of
from blip3o_dit.extraction.sources.image_list import ImageList
from blip3o_dit.extraction.sources.lists import LIST_SUFFIXES, is_url, list_file
from blip3o_dit.extraction.sources.options import ListingOptions
from blip3o_dit.extraction.sources.tables import is_table, list_table
from blip3o_dit.extraction.sources.text import valid_text
from blip3o_dit.extraction.sources.webdataset import UNREAD_TARS, is_tar, list_tar
from blip3o_dit.utils.recognise import PICTURES, recognise, refusal


def list_images(
    where: str | Path | Sequence[str | Path],
    options: ListingOptions | None = None,
    *,
    progress: bool = False,
) -> ImageList:
    """Every image at `where`: a folder, a list file, a tar, a table, a picture, or a pattern of such files.

    Several places of one kind are listed in the order given; keys begin below the folder that holds them all.

    Args:
        progress: show a bar when listing takes more than two seconds.

    Raises:
        FileNotFoundError, ValueError: one line naming what was expected and what was found.
        OSError: when the disk cannot be read.
    """
    options = options or ListingOptions()
    places = [where] if isinstance(where, str | Path) else where
    started = time.monotonic()
    with tqdm(desc="listing", unit=" files", delay=SILENT_SECONDS, disable=not progress) as bar:
        if len(places) == 1:
            found = _collect(os.fspath(places[0]), options, bar)
        else:
            found = _collect_several([os.fspath(place) for place in places], options, bar)
    return found.finish(named(places), time.monotonic() - started)


def named(places: str | Path | Sequence[str | Path]) -> str:
    """Where pictures are, for a message."""
    if isinstance(places, str | Path):
        return os.fspath(places)
    more = f" and {len(places) - 1} more" if len(places) > 1 else ""
    return os.fspath(places[0]) + more if places else "nothing"


def _collect_several(places: Sequence[str], options: ListingOptions, bar: tqdm) -> Collector:
    kinds = Counter(map(_kind, places))
    if len(kinds) != 1:
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none"
        raise ValueError(
            f"{named(places)}: expected places of one kind, found {counts}: name those of one kind, or the "
            "folder that holds them"
        )
    parts = []
    for place in places:
        parts.append(_collect(place, options, bar))
        if options.limit is not None and sum(len(part.refs) for part in parts) >= options.limit:
            break
    root = os.path.commonpath([os.path.abspath(part.root) for part in parts])
    together = Collector(Path(root), options, bar)
    for part in parts:
        together.add_all(part)
    return together


def _kind(place: str) -> str:
    if os.path.isdir(place):
        return "folders"
    if Path(place).suffix.lower() in LIST_SUFFIXES:
        return "lists"
    if is_tar(place) or place.lower().endswith(UNREAD_TARS):
        return "tars"
    if is_table(place):
        return "tables"
    return "pictures" if suffix_of(os.path.basename(place)) in image_suffixes() else "other files"


def _collect(where: str, options: ListingOptions, bar: tqdm) -> Collector:
    """What is at one place."""
    if is_url(where):
        raise ValueError(f"{where}: expected a path, found an address: download first, as with img2dataset")
    path = Path(where)
    if path.is_dir():
        found = Collector(path, options, bar)
        list_folder(found)
    elif path.exists():
        found = Collector(path.parent, options, bar)
        _list_file(found, path)
    else:
        expanded = patterns.expand(where)
        if expanded is None:
            raise refusal(where, PICTURES)
        root, names = expanded
        found = Collector(Path(root), options, bar)
        for name in names:
            if not found.is_full:
                _list_one_of_many(found, name)
    return found


def names_pictures(path: Path) -> bool:
    """Whether `list_images` would look for pictures in this file, or in the files of this pattern."""
    name = path.name
    known = is_tar(name) or name.lower().endswith(UNREAD_TARS) or is_table(name)
    known = known or path.suffix.lower() in LIST_SUFFIXES or suffix_of(name) in image_suffixes()
    return known if path.exists() else known or patterns.expand(os.fspath(path)) is not None


def _list_file(found: Collector, path: Path) -> None:
    if not path.is_file():
        raise refusal(path, PICTURES)
    name = path.name
    if path.suffix.lower() in LIST_SUFFIXES:
        list_file(found, name)
    elif name.lower().endswith(UNREAD_TARS):
        raise ValueError(f"{path}: expected a .tar, .tar.gz, .tar.bz2 or .tar.xz, found another compression")
    elif not _list_source(found, name):
        raise ValueError(
            f"{path}: expected a folder, a list ({', '.join(LIST_SUFFIXES)}), .tar, .parquet, .arrow or a "
            f"picture, found {recognise(path).what} named {path.suffix or 'without a suffix'}"
        )


def _list_source(found: Collector, name: str) -> bool:
    """Add a tar, table or picture; False for another file."""
    if is_tar(name):
        list_tar(found, name)
    elif is_table(name):
        list_table(found, name)
    elif suffix_of(name) in image_suffixes():
        status = os.stat(found.path(name))
        found.add_file(name, status, key=valid_text(name), caption=None, label=None)
    else:
        return False
    return True


def _list_one_of_many(found: Collector, name: str) -> None:
    try:
        status = os.stat(found.path(name))
    except OSError as error:
        found.unreadable(name, error)
        return
    if not stat.S_ISREG(status.st_mode):
        found.skip(name, "expected a file, found a folder or something else")
    elif not _list_source(found, name):
        found.ignored[kind_of(name)] += 1
