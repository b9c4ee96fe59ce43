"""What readers fill while they list: images, what is skipped, what is ignored, what is worth a line."""

from __future__ import annotations

import logging
import os
import stat
from collections import Counter
from dataclasses import replace
from pathlib import Path

from tqdm.auto import tqdm

from blip3o_dit.extraction.sources.formats import suffix_of, what_is_missing
from blip3o_dit.extraction.sources.image_list import ImageList
from blip3o_dit.extraction.sources.image_ref import ImageRef, is_fault_of_file
from blip3o_dit.extraction.sources.options import ListingOptions
from blip3o_dit.extraction.sources.reading import check_size
from blip3o_dit.extraction.sources.text import valid_text
from blip3o_dit.utils.json_files import one_line, printable, short_repr
from blip3o_dit.utils.recognise import MADE_HERE, PICTURES, recognise, refusal

# A listing that takes longer is shown: a bar, or a line when it is done.
SILENT_SECONDS = 2.0
SHOWN = 8

logger = logging.getLogger(__name__)


class Collector:
    """One listing. `root` is the folder that names and keys are relative to."""

    def __init__(self, root: Path, options: ListingOptions, bar: tqdm) -> None:
        self.root = root
        self.folder = str(root)
        self.options = options
        self.refs: list[ImageRef] = []
        self.skipped: list[dict[str, str]] = []
        self._listed_before: list[int] = []  # how many images were, when each of those was skipped
        self.ignored: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.bar = bar

    @property
    def is_full(self) -> bool:
        """Whether as many images are listed as were asked for."""
        return self.options.limit is not None and len(self.refs) >= self.options.limit

    def add_all(self, part: Collector) -> None:
        """What was listed at a place below the root; its keys begin there."""
        below = os.path.relpath(os.path.abspath(part.root), os.path.abspath(self.root))
        prefix = "" if below == os.curdir else valid_text(below) + "/"
        self._listed_before += [len(self.refs) + count for count in part._listed_before]
        self.refs += [replace(ref, key=prefix + ref.key) for ref in part.refs] if prefix else part.refs
        self.skipped += [entry | {"key": prefix + entry["key"]} for entry in part.skipped]
        self.ignored.update(part.ignored)
        self.notes.update(part.notes)

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name) if name else self.folder

    def skip(self, name: str, reason: str, *, key: str | None = None, location: str | None = None) -> None:
        """Something that should have been an image, or held some. `name` is below the root.

        `key` and `location` are valid text already; without them they are made from the name.
        """
        location = location or valid_text(self.path(name))
        if self.options.strict:
            raise ValueError(f"{printable(location)}: {printable(reason)} (--strict)")
        self.skipped.append({"key": key or valid_text(name), "location": location, "reason": reason})
        self._listed_before.append(len(self.refs))

    def unreadable(self, name: str, error: Exception) -> None:
        """Skip a file for the error of reading it. Raises what is no fault of this file."""
        if isinstance(error, OSError) and not is_fault_of_file(error, self.root):
            raise error
        number = error.errno if isinstance(error, OSError) else None
        self.skip(name, f"cannot be read: {os.strerror(number)}" if number else one_line(error))

    def add_file(
        self, name: str, status: os.stat_result, *, key: str, caption: str | None, label: str | None
    ) -> None:
        """A picture file, unless its status or suffix says that it cannot be read as one."""
        reason = what_is_missing(suffix_of(name))
        if not stat.S_ISREG(status.st_mode):
            reason = "not a regular file"
        try:
            check_size(status.st_size)
        except ValueError as error:
            reason = str(error)
        if reason is not None:
            self.skip(name, reason, key=key)
            return
        self.refs.append(ImageRef(key, caption, label, self.folder, name, status.st_size))

    def finish(self, where: str, seconds: float) -> ImageList:
        """Say what was ignored; refuse a place without images, and keys that two images have.

        `seconds`: how long listing took.
        """
        if self.bar.disable and seconds > SILENT_SECONDS:
            logger.info("%s: %d pictures listed in %.0f s", where, len(self.refs), seconds)
        for note, count in self.notes.items():
            logger.info("%s: %d %s", where, count, note)
        if self.ignored:
            logger.info("%s: ignored: %s", where, _counted(self.ignored))
        if not self.refs and os.path.isdir(where) and recognise(Path(where)).kind in MADE_HERE:
            raise refusal(where, PICTURES)
        if not self.refs:
            raise ValueError(f"{where}: expected at least one picture, found none{self._why()}")
        self._cut()
        self._check_unique(where)
        root = Path(where) if os.path.exists(where) else self.root
        self.skipped.sort(key=lambda entry: entry["key"])
        return ImageList(self.refs, self.skipped, dict(self.ignored), root)

    def _cut(self) -> None:
        """With a limit, what comes after the last image that it allows was not listed."""
        limit = self.options.limit
        if limit is None or not self.is_full:
            return
        self.refs = self.refs[:limit]
        self.skipped = [
            entry for entry, before in zip(self.skipped, self._listed_before, strict=True) if before < limit
        ]

    def _why(self) -> str:
        parts = [f"{printable(entry['key'])}: {printable(entry['reason'])}" for entry in self.skipped[:3]]
        if len(self.skipped) > 3:
            parts.append(f"... {len(self.skipped) - 3} more")
        if self.ignored:
            parts.append(f"ignored: {_counted(self.ignored)}")
        return "".join(f"; {part}" for part in parts)

    def _check_unique(self, where: str) -> None:
        if len({ref.key for ref in self.refs}) == len(self.refs):
            return
        seen: dict[str, ImageRef] = {}
        for ref in self.refs:
            other = seen.setdefault(ref.key, ref)
            if other is not ref:
                both = f"{printable(other.location)} and {printable(ref.location)}"
                raise ValueError(f"{where}: key {short_repr(ref.key)} belongs to both {both}")


def _counted(kinds: Counter[str]) -> str:
    ordered = sorted((-count, kind) for kind, count in kinds.items() if count)
    common = [f"{-count} {printable(kind)}" for count, kind in ordered[:SHOWN]]
    rest = -sum(count for count, _ in ordered[SHOWN:])
    return ", ".join(common) + (f", {rest} others" if rest else "")
