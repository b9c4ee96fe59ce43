"""Images for the samples on a page or a sheet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def pictures_by_key(where: str | None) -> Callable[[list[str]], list[Any]]:
    """A function from keys to RGB images, None for those that are not at `where` or cannot be read.

    Raises:
        FileNotFoundError, ValueError: when nothing can be listed at `where`.
    """
    from blip3o_dit.extraction.image_decoding import UnreadableImageError, decode_image
    from blip3o_dit.extraction.image_files import list_images

    refs = {ref.key: ref for ref in list_images(where)} if where else {}

    def read(keys: list[str]) -> list[Any]:
        found: list[Any] = []
        for key in keys:
            try:
                found.append(decode_image(refs[key].read()) if key in refs else None)
            except (UnreadableImageError, OSError):
                found.append(None)
        return found

    return read
