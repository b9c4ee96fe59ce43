"""Images beside the samples that a command shows, where the store says which images it was made from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from PIL import Image

from blip3o_dit.extraction.image_decoding import decode_image
from blip3o_dit.extraction.sources.image_ref import ImageRef
from blip3o_dit.extraction.sources.listing import list_images
from blip3o_dit.extraction.sources.options import ListingOptions
from blip3o_dit.utils.json_files import one_line, printable

# Without being asked, a command lists no more images than this to show a few.
MAX_LISTED = 200_000
THUMBNAIL_PIXELS = 448  # a side

logger = logging.getLogger(__name__)


def images_of_store(manifest: Mapping[str, Any]) -> Callable[[list[str]], list[Image.Image | None]]:
    """A function from keys to the images that a store was made from, None for those that cannot be read.

    There are none unless all of them are where they were. Nobody asked for them: they are looked for when a
    few are shown, and whatever is wrong is one line of the log.
    """

    def of_keys(keys: list[str]) -> list[Image.Image | None]:
        where = manifest.get("pictures")
        if not keys or not isinstance(where, str):
            return [None] * len(keys)
        try:
            return _of_keys(_unchanged(manifest, where), keys)
        except (OSError, ValueError) as error:
            logger.info("the pictures are not shown (--pictures shows others): %s", one_line(error))
            return [None] * len(keys)

    return of_keys


def _unchanged(manifest: Mapping[str, Any], where: str) -> Sequence[ImageRef]:
    """The images at `where`. Raises OSError or ValueError unless they are those of the store."""
    extraction = manifest.get("extraction")
    recorded = extraction.get("pictures") if isinstance(extraction, dict) else None
    count = recorded.get("count") if isinstance(recorded, dict) else None
    if not Path(where).is_absolute() or recorded is None or not isinstance(count, int):
        raise ValueError(f"{printable(where)}: the store does not say which they were")
    if count > MAX_LISTED:
        raise ValueError(f"{printable(where)}: there are {count}, and listing them takes long")
    settings = extraction.get("settings") if isinstance(extraction, dict) else None
    options = {
        option.name: settings[option.name]
        for option in fields(ListingOptions)
        if isinstance(settings, dict) and isinstance(settings.get(option.name), str | bool)
    }
    images = list_images(where, ListingOptions(**options))
    if images.digest() != recorded.get("content_sha256"):
        raise ValueError(f"{printable(where)}: not the pictures that the store was made from")
    return images


def _of_keys(images: Sequence[ImageRef], keys: list[str]) -> list[Image.Image | None]:
    wanted = set(keys)
    found = {image.key: image for image in images if image.key in wanted}
    return [_read(found[key]) if key in found else None for key in keys]


def _read(image: ImageRef) -> Image.Image | None:
    try:
        picture = decode_image(image.read())
    except (OSError, ValueError):
        return None
    picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    return picture
