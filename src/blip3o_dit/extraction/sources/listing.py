"""`list_images`: what is at a place, by its layout. (Being filled in: the interface stands.)"""

from __future__ import annotations

from pathlib import Path

from blip3o_dit.extraction.sources.image_list import ImageList, ListingOptions
from blip3o_dit.extraction.sources.image_ref import ImageRef


def list_images(
    where: str | Path, options: ListingOptions | None = None, *, progress: bool = False
) -> ImageList:
    """Every image at `where`."""
    from blip3o_dit.extraction import image_files

    options = options or ListingOptions()
    old = image_files.list_images(
        where, image_column=options.image_column, caption_column=options.caption_column
    )
    refs = [
        ImageRef(ref.key, ref.caption, ref.label, "", ref.file, ref.size, ref.member, ref.offset, ref.row, ref.column)
        for ref in old
    ]
    return ImageList(refs, root=Path(where))
