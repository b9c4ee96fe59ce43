"""Pictures beside the samples of a store: those that it was made from, as its towers saw them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from blip3o_dit.extraction.image_decoding import decode_image
from blip3o_dit.extraction.sources.image_list import ImageList
from blip3o_dit.extraction.sources.image_ref import ImageRef
from blip3o_dit.extraction.sources.listing import list_images, named
from blip3o_dit.extraction.sources.options import ListingOptions
from blip3o_dit.extraction.tower_views import VIEW_PIXELS, are_scaled, tower_views
from blip3o_dit.utils.json_files import one_line, printable

# Without being asked, a command lists no more images than this to show a few.
MAX_LISTED = 200_000
# Pixels that are decoded for one that is shown, a side, at least
DECODED_PER_PIXEL = 4

logger = logging.getLogger(__name__)

# A picture's bytes -> views of it by name (`tower_views`)
Views = Callable[[bytes], dict[str, Image.Image]]
# From keys to views of their pictures, None for what cannot be shown.
Shown = Callable[[list[str]], list[dict[str, Image.Image] | None]]


def pictures_of_store(
    manifest: Mapping[str, Any], where: str | None = None, *, pixels: int = VIEW_PIXELS
) -> Shown:
    """The pictures at `where`, or by default those that the store was made from.

    Those of another set with the same names are never shown: `where` has to hold the pictures that the store
    records, by their keys, captions, labels and sizes. Embeddings without such a record can only be matched
    by name, and the views' names say so.

    Nobody asked for the default: it is looked for when a few are shown, and whatever is wrong is one line of
    the log.

    Args:
        pixels: of a view, a side, see `tower_views`.

    Raises:
        FileNotFoundError, ValueError: for `where`: nothing can be listed there, or it holds other pictures.
    """
    views = _views(manifest, pixels)
    if where is not None:
        return _asked_for(manifest, where, views)

    @cache
    def listed() -> ImageList | None:
        recorded: Any = manifest.get("pictures")
        if not (isinstance(recorded, str) or _are_names(recorded)):
            return None
        try:
            return _unchanged(manifest, recorded)
        except (OSError, ValueError) as error:
            logger.info("the pictures are not shown (--pictures shows others): %s", one_line(error))
            return None

    def of_keys(keys: list[str]) -> list[dict[str, Image.Image] | None]:
        images = listed() if keys else None
        return [None] * len(keys) if images is None else _of_keys(images, keys, views)

    return of_keys


def _views(manifest: Mapping[str, Any], pixels: int) -> Views:
    """As `tower_views`, of a picture's bytes, which are decoded no larger than the views need."""
    views = tower_views(manifest, pixels)
    shown_at = DECODED_PER_PIXEL * pixels if are_scaled(manifest) else None
    return lambda data: views(decode_image(data, shown_at=shown_at))


def _asked_for(manifest: Mapping[str, Any], where: str, views: Views) -> Shown:
    images = list_images(where, _listing_options(manifest))
    recorded = _recorded(manifest)
    if _are_the_same(images, recorded):
        return lambda keys: _of_keys(images, keys, views)
    if "content_sha256" in recorded and not manifest.get("appended"):
        raise ValueError(
            f"{printable(where)}: expected the {recorded.get('count')} pictures of these embeddings, "
            f"found {len(images)} whose names, captions, labels, sizes or contents differ"
        )
    logger.warning(
        "%s: the embeddings do not say which pictures they were made from: found by name", printable(where)
    )

    def by_name(data: bytes) -> dict[str, Image.Image]:
        return {f"{name}, found by its name": view for name, view in views(data).items()}

    return lambda keys: _of_keys(images, keys, by_name)


def _are_names(where: Any) -> bool:
    return isinstance(where, list) and bool(where) and all(isinstance(place, str) for place in where)


def _unchanged(manifest: Mapping[str, Any], where: str | list[str]) -> ImageList:
    """The images at `where`. Raises OSError or ValueError unless they are those of the store."""
    recorded, shown = _recorded(manifest), printable(named(where))
    count = recorded.get("count")
    absolute = all(Path(place).is_absolute() for place in ([where] if isinstance(where, str) else where))
    if not absolute or not isinstance(count, int):
        raise ValueError(f"{shown}: the store does not say which they were")
    if count > MAX_LISTED:
        raise ValueError(f"{shown}: there are {count}, and listing them takes long")
    images = list_images(where, _listing_options(manifest))
    if not _are_the_same(images, recorded):
        raise ValueError(f"{shown}: not the pictures that the store was made from")
    return images


def _are_the_same(images: ImageList, recorded: Mapping[str, Any]) -> bool:
    """By names, captions, labels and sizes, and the starts of a few where a store noted them."""
    starts = "samples" not in recorded or images.samples() == recorded["samples"]
    return starts and images.digest() == recorded.get("content_sha256")


def _recorded(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the store says of the pictures that it was made from."""
    extraction = manifest.get("extraction")
    recorded = extraction.get("pictures") if isinstance(extraction, dict) else None
    return recorded if isinstance(recorded, dict) else {}


def _listing_options(manifest: Mapping[str, Any]) -> ListingOptions:
    """Those that the store's extraction listed with."""
    extraction = manifest.get("extraction")
    settings = extraction.get("settings") if isinstance(extraction, dict) else None
    options = {
        option.name: settings[option.name]
        for option in fields(ListingOptions)
        if isinstance(settings, dict) and isinstance(settings.get(option.name), str | int)
    }
    return ListingOptions(**options)


def _of_keys(
    images: Sequence[ImageRef], keys: list[str], views: Views
) -> list[dict[str, Image.Image] | None]:
    wanted = set(keys)
    found = {image.key: image for image in images if image.key in wanted}
    return [_read(found[key], views) if key in found else None for key in keys]


def _read(image: ImageRef, views: Views) -> dict[str, Image.Image] | None:
    """Each is made small before the next is read."""
    try:
        return views(image.read())
    except (OSError, ValueError):
        return None
