"""Folder trees: pictures with captions beside them, and the tars, tables and datasets below a folder."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain

from blip3o_dit.extraction.sources import huggingface, img2dataset
from blip3o_dit.extraction.sources.collector import Collector
from blip3o_dit.extraction.sources.formats import image_suffixes, kind_of, suffix_of
from blip3o_dit.extraction.sources.image_ref import is_fault_of_file
from blip3o_dit.extraction.sources.tables import is_table, list_table
from blip3o_dit.extraction.sources.text import (
    CAPTION_NAMES,
    LABEL_NAMES,
    MAX_TEXT_BYTES,
    NO_OBJECT,
    decode_text,
    first_value,
    parse_object,
    text_or_none,
    valid_text,
)
from blip3o_dit.extraction.sources.webdataset import UNREAD_TARS, is_tar, list_tar

# Files beside a picture that may hold its caption; the first that does is taken.
CAPTION_SUFFIXES = (".txt", ".caption", ".text", ".json")


def list_folder(found: Collector) -> None:
    """Add what is below the root. Raises ValueError for several kinds of source, or several splits."""
    tree = _Tree(found)
    tree.walk()
    kinds = {
        "tars": tree.tars,
        "tables": tree.tables,
        "saved datasets": tree.saved,
        "pictures": found.refs,
        "tfrecord files": tree.tfrecords,
    }
    present = {kind: len(members) for kind, members in kinds.items() if members}
    if len(present) > 1:
        counts = ", ".join(f"{count} {kind}" for kind, count in present.items())
        raise ValueError(f"{found.root}: expected one kind of source, found {counts}: name one of them")
    if tree.tfrecords:
        img2dataset.refuse_tfrecords(str(found.root), len(tree.tfrecords))
    saved = chain.from_iterable(tree.saved.values())
    huggingface.refuse_splits(found, [*tree.tars, *tree.tables, *saved])
    for name in tree.tars:
        if not found.is_full:
            list_tar(found, name)
    for name in tree.tables:
        if not found.is_full:
            list_table(found, name)
    for folder in sorted(tree.saved):
        if not found.is_full:
            huggingface.list_saved(found, folder, tree.saved[folder])


@dataclass(slots=True)
class _Contents:
    """One folder, sorted out: pictures, other files, folders and links to folders."""

    images: list[str] = field(default_factory=list)
    others: set[str] = field(default_factory=set)
    folders: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)


class _Tree:
    """A walk over a tree, in the order of whole paths: real folders before linked ones, each only once."""

    def __init__(self, found: Collector) -> None:
        self.found = found
        self.tars: list[str] = []
        self.tables: list[str] = []
        self.tfrecords: list[str] = []
        self.saved: dict[str, list[str]] = {}
        self._metadata = huggingface.Metadata()
        self._links: list[str] = []
        self._entered = {_identity(os.stat(folder)) for folder in found.root.resolve().parents}
        self._label_depth: int | None = None
        self._labels: set[str | None] = set()

    def walk(self) -> None:
        self._walk_below("")
        followed = False
        while self._links:
            links, self._links = sorted(self._links, key=os.fsencode), []
            for link in links:
                followed |= self._walk_below(link)
        self._metadata.skip_missing(self.found)
        if followed:
            self.found.refs.sort(key=lambda ref: os.fsencode(ref.name))
            self.tars.sort(key=os.fsencode)
            self.tables.sort(key=os.fsencode)
        if self._labels and len(self._labels) < 2:  # one folder is no class
            self.found.refs = [replace(ref, label=None) for ref in self.found.refs]

    def _walk_below(self, top: str) -> bool:
        """Whether the folder was not walked yet. No recursion: a tree may be deeper than Python's stack."""
        if not self._enter(top):
            self.found.notes["linked folders lead to what is listed already, or above it: not entered"] += 1
            return False
        if top:
            self.found.notes["linked folders followed"] += 1
        stack = [self._list(top)]
        while stack:
            folder = next(stack[-1], None)
            if folder is None:
                stack.pop()
            elif self._enter(folder):
                stack.append(self._list(folder))
        return True

    def _enter(self, folder: str) -> bool:
        try:
            identity = _identity(os.stat(self.found.path(folder)))
        except OSError as error:
            self.found.unreadable(folder, error)
            return False
        new = identity not in self._entered
        self._entered.add(identity)
        return new

    def _list(self, folder: str) -> Iterator[str]:
        """Add the pictures of a folder; its sub-folders come out at their place in the order."""
        contents = self._sort_out(folder)
        if huggingface.SPLITS in contents.others:
            huggingface.refuse_dict(self.found, folder, contents.folders)
        self._metadata.read(self.found, folder, contents.others)
        captions = self._note_others(folder, contents)
        if not folder:
            self._label_depth = _label_depth(contents)
        if self.found.options.skip_links:
            self.found.ignored["linked folders"] += len(contents.links)
        else:
            self._links += [posixpath.join(folder, link) for link in contents.links]
        label, used = self._label(folder), set()
        for item in sorted([*contents.images, *(name + "/" for name in contents.folders)], key=os.fsencode):
            name = posixpath.join(folder, item)
            if item.endswith("/"):
                yield name[:-1]
                continue
            stem = item[: len(item) - len(suffix_of(item))]
            beside = [captions[stem + suffix] for suffix in CAPTION_SUFFIXES if stem + suffix in captions]
            used.update(beside)
            self._add(name, [posixpath.join(folder, file) for file in beside], label)
        self.found.ignored.update(suffix_of(file) for file in captions.values() if file not in used)

    def _sort_out(self, folder: str) -> _Contents:
        contents = _Contents()
        try:
            with os.scandir(self.found.path(folder)) as entries:
                for entry in entries:
                    self.found.bar.update()
                    self._note_entry(contents, folder, entry)
        except OSError as error:
            self.found.unreadable(folder, error)
        return contents

    def _note_entry(self, contents: _Contents, folder: str, entry: os.DirEntry[str]) -> None:
        name, found = entry.name, self.found
        suffix = suffix_of(name)
        image = suffix in image_suffixes()
        if name.startswith("."):
            found.ignored[f"hidden {kind_of(name)}" if suffix else kind_of(name)] += 1
        elif entry.is_dir(follow_symlinks=False):
            contents.folders.append(name)
        elif entry.is_symlink() and not os.path.exists(entry.path):
            if image or not suffix or is_tar(name) or is_table(name):
                found.skip(posixpath.join(folder, name), "a link to what is not there")
            else:
                found.ignored[kind_of(name)] += 1
        elif entry.is_dir():
            contents.links.append(name)
        elif image:
            contents.images.append(name)
        elif not entry.is_file():
            found.skip(posixpath.join(folder, name), "not a regular file")
        else:
            contents.others.add(name)

    def _note_others(self, folder: str, contents: _Contents) -> dict[str, str]:
        """Sort out what is no picture; returns what may be captions: by stem and suffix in lower case."""
        others = contents.others
        arrows = sorted(name for name in others if name.endswith(".arrow"))
        saved = bool(arrows) and bool({huggingface.STATE, huggingface.INFO} & others)
        if saved:
            self.saved[folder] = [posixpath.join(folder, name) for name in arrows]
        captions: dict[str, str] = {}
        for name in sorted(others, key=os.fsencode):
            path, suffix = posixpath.join(folder, name), suffix_of(name)
            if path in self._metadata.files or (saved and suffix == ".arrow"):
                continue
            if is_tar(name):
                self.tars.append(path)
            elif name.lower().endswith(UNREAD_TARS):
                self.found.skip(path, "an archive compressed in a way that is not read: decompress it")
            elif suffix == img2dataset.TFRECORD:
                self.tfrecords.append(path)
            elif is_table(name) and not self._is_about_others(name, contents):
                self.tables.append(path)
            elif suffix in CAPTION_SUFFIXES:
                if captions.setdefault(name[: -len(suffix)] + suffix, name) != name:
                    self.found.ignored[suffix] += 1  # a.TXT and a.txt
            else:
                self.found.ignored[kind_of(name)] += 1
        return captions

    def _is_about_others(self, table: str, contents: _Contents) -> bool:
        if table.startswith("cache-") and table.endswith(".arrow"):
            return True
        return img2dataset.is_about_shard(table, contents.others, contents.folders)

    def _add(self, name: str, beside: list[str], label: str | None) -> None:
        """A picture with what is known of it: a metadata row, then the files beside it, then its folder."""
        if name in self._metadata.aside and name not in self._metadata.rows:
            self.found.ignored["named by another column of a metadata file"] += 1
            return
        caption, own_label = self._metadata.of(name)
        for file in beside if caption is None or own_label is None else ():
            about = self._read_about(file)
            caption, own_label = caption or about[0], own_label or about[1]
        if own_label is None and label is not None:
            self._labels.add(label)
        try:
            status = os.stat(self.found.path(name))
        except OSError as error:
            self.found.unreadable(name, error)
            return
        self.found.add_file(name, status, key=valid_text(name), caption=caption, label=own_label or label)

    def _read_about(self, file: str) -> tuple[str | None, str | None]:
        """Caption and label of a file beside a picture. All lines of a text are one caption."""
        try:
            with open(self.found.path(file), "rb") as opened:
                text, fallback = decode_text(opened.read(MAX_TEXT_BYTES))
        except OSError as error:
            if not is_fault_of_file(error, self.found.root):
                raise
            self.found.ignored[f"{suffix_of(file)} that cannot be read"] += 1
            return None, None
        if fallback:
            self.found.notes["captions that are no UTF-8, read as Windows-1252"] += 1
        if suffix_of(file) != ".json":
            return text_or_none(text.strip()), None
        values = parse_object(text)
        if values is None:
            self.found.notes[NO_OBJECT] += 1
            return None, None
        return text_or_none(first_value(values, CAPTION_NAMES)), text_or_none(
            first_value(values, LABEL_NAMES)
        )

    def _label(self, folder: str) -> str | None:
        """The class of a folder's pictures: the name of the first folder below the root."""
        if self._label_depth is None or self._metadata.files:
            return None
        parts = folder.split("/")
        return valid_text(parts[self._label_depth]) if len(parts) > self._label_depth else None


def _label_depth(root: _Contents) -> int | None:
    """Where in a path the class stands: first, or below folders that are splits. None: there are no classes.

    A tree of classes holds folders only. img2dataset's shards are none.
    """
    folders = [*root.folders, *root.links]
    if root.images or img2dataset.holds_shards(root.others, folders):
        return None
    if folders and all(huggingface.split_named(name) for name in folders):
        return 1
    return 0 if len(folders) > 1 else None


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
