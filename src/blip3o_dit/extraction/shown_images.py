"""Images beside the samples that a command shows, where the store says which images it was made from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from PIL import Image

from blip3o_dit.extraction.image_decoding import SHOWN_AT, decode_image, thumbnail
from blip3o_dit.extraction.sources.image_list import ListingOptions
from blip3o_dit.extraction.sources.image_ref import ImageRef
from blip3o_dit.extraction.sources.listing import list_images, named
from blip3o_dit.utils.json_files import one_line, printable

# Without being asked, a command lists no more images than this to show a few.
MAX_LISTED = 200_000

logger = logging.getLogger(__name__)


def images_of_store(manifest: Mapping[str, Any]) -> Callable[[list[str]], list[Image.Image | None]]:
    """A function from keys to the images that a store was made from, None for those that cannot be read.

    There are none unless all of them are where they were. Nobody asked for them: they are looked for when a
    few are shown, and whatever is wrong is one line of the log.
    """

    def of_keys(keys: list[str]) -> list[Image.Image | None]:
        where: Any = manifest.get("pictures")
        if not keys or not (isinstance(where, str) or _are_names(where)):
            return [None] * len(keys)
        try:
            return _of_keys(_unchanged(manifest, where), keys)
        except (OSError, ValueError) as error:
            logger.info("the pictures are not shown (--pictures shows others): %s", one_line(error))
            return [None] * len(keys)

    return of_keys


def _are_names(where: Any) -> bool:
    return isinstance(where, list) and bool(where) and all(isinstance(place, str) for place in where)


def _unchanged(manifest: Mapping[str, Any], where: str | list[str]) -> Sequence[ImageRef]:
    """The images at `where`. Raises OSError or ValueError unless they are those of the store."""
    extraction = manifest.get("extraction")
    recorded = extraction.get("pictures") if isinstance(extraction, dict) else None
    count = recorded.get("count") if isinstance(recorded, dict) else None
    shown = printable(named(where))
    absolute = all(Path(place).is_absolute() for place in ([where] if isinstance(where, str) else where))
    if not absolute or recorded is None or not isinstance(count, int):
        raise ValueError(f"{shown}: the store does not say which they were")
    if count > MAX_LISTED:
        raise ValueError(f"{shown}: there are {count}, and listing them takes long")
    settings = extraction.get("settings") if isinstance(extraction, dict) else None
    options = {
        option.name: settings[option.name]
        for option in fields(ListingOptions)
        if isinstance(settings, dict) and isinstance(settings.get(option.name), str | int)
    }
    images = list_images(where, ListingOptions(**options))
    same_starts = "samples" not in recorded or images.samples() == recorded["samples"]
    if not same_starts or images.digest() != recorded.get("content_sha256"):
        raise ValueError(f"{shown}: not the pictures that the store was made from")
    return images


def _of_keys(images: Sequence[ImageRef], keys: list[str]) -> list[Image.Image | None]:
    wanted = set(keys)
    found = {image.key: image for image in images if image.key in wanted}
    return [_read(found[key]) if key in found else None for key in keys]


def _read(image: ImageRef) -> Image.Image | None:
    try:
        picture = decode_image(image.read(), shown_at=SHOWN_AT)
    except (OSError, ValueError):
        return None
    return thumbnail(picture)
