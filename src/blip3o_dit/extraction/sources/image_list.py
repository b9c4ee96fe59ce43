"""What listing a source gives: the images, what was skipped and why, what was no image."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

from tqdm.auto import tqdm

from blip3o_dit.extraction.sources.image_ref import ImageRef

# Images of a list that are looked into, to tell it from others
SAMPLES = 16


@dataclass(frozen=True)
class ImageList(Sequence[ImageRef]):
    """Images in an order that does not depend on the file system; their keys are unique.

    `skipped`: key, location and reason of what should have been images: damaged shards, missing files.
    `ignored`: how many files were no images, by suffix. `root`: while it is there, a file that cannot be read
    is that file's fault.
    """

    refs: list[ImageRef]
    skipped: list[dict[str, str]] = field(default_factory=list)
    ignored: dict[str, int] = field(default_factory=dict)
    root: Path = Path()

    def __len__(self) -> int:
        return len(self.refs)

    @overload
    def __getitem__(self, index: int) -> ImageRef: ...
    @overload
    def __getitem__(self, index: slice) -> list[ImageRef]: ...
    def __getitem__(self, index: int | slice) -> ImageRef | list[ImageRef]:
        return self.refs[index]

    def digest(self, *, progress: bool = False) -> str:
        """SHA-256 of every key, caption, label and stored size: not of paths, so that a folder may move."""
        digest = hashlib.sha256()
        for ref in tqdm(self.refs, desc="sizes", unit=" pictures", delay=2, disable=not progress):
            values = [ref.key, ref.caption, ref.label, ref.size, ref.row]
            digest.update(json.dumps(values).encode() + b"\n")
        return digest.hexdigest()

    def samples(self) -> dict[str, str]:
        """Digests of what a few of the images begin with, by their place; not of those that cannot be read.

        They tell sets apart whose names and sizes are the same, as uncompressed pictures' may be.
        """
        places = range(0, len(self.refs), max(1, len(self.refs) // SAMPLES))
        starts = {str(place): self.refs[place].start() for place in places}
        return {place: hashlib.sha256(start).hexdigest() for place, start in starts.items() if start}
