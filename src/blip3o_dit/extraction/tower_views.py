"""The part of a picture that each tower of a store saw, to stand beside the maps of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image

from blip3o_dit.extraction.preprocessing import MAX_SIDE, Preprocessing

# Pixels a side of what is shown of a picture; of a whole one, the longest side
VIEW_PIXELS, WHOLE_PIXELS = 224, 448
WHOLE = "whole picture"
SIDES = {"eva": "EVA", "clip": "CLIP"}

Views = Callable[[Image.Image], dict[str, Image.Image]]


def tower_views(manifest: Mapping[str, Any], pixels: int = VIEW_PIXELS) -> Views:
    """A function from an RGB picture to what the store's towers saw of it, by a name for people.

    One view where both saw the same, as they do by default; else one of each. Where a store does not say how
    a tower's pictures were prepared, all of the picture stands for it, and the name says so.

    Args:
        pixels: of a view, a side, where views are made by scaling.
    """
    seen = {side: _preprocessing(manifest, side) for side in SIDES}
    if len({_part(found) for found in seen.values()}) == 1:
        (found, _) = seen.values()
        named = {"picture" if found else WHOLE: found}
    else:
        named = {
            f"picture, as {SIDES[side]} saw it" if found else WHOLE: found for side, found in seen.items()
        }
    return lambda picture: {name: _view(picture, found, pixels) for name, found in named.items()}


def are_scaled(manifest: Mapping[str, Any]) -> bool:
    """Whether all views are made by scaling, so that a smaller picture of the same scene gives the same."""
    seen = [_preprocessing(manifest, side) for side in SIDES]
    return all(found is None or found.resize in ("shortest", "squash") for found in seen)


def size_seen(manifest: Mapping[str, Any], side: str) -> int | None:
    """Pixels a side of what the tower of "eva" or "clip" saw; None where that is not known."""
    found = _preprocessing(manifest, side)
    return None if found is None else found.size


def _preprocessing(manifest: Mapping[str, Any], side: str) -> Preprocessing | None:
    """What decides which pixels a tower saw; None where that is not known."""
    encoders = manifest.get("encoders")
    tower = encoders.get(side) if isinstance(encoders, dict) else None
    said = tower.get("preprocessing") if isinstance(tower, dict) else None
    if not isinstance(said, dict) or said.get("resize") not in ("shortest", "squash", "crop", "none"):
        return None
    size: Any = said.get("size")
    to = said.get("resize_to") or size
    if not all(type(number) is int and 1 <= number <= MAX_SIDE for number in (size, to)):
        return None
    return Preprocessing(size, said["resize"], resize_to=to)


def _part(found: Preprocessing | None) -> Any:
    """Equal for towers that see the same part of every picture."""
    if found is None or found.resize in ("crop", "none"):
        return found and (found.resize, found.size)
    return found.resize, (found.resize_to or found.size) / found.size


def _view(picture: Image.Image, found: Preprocessing | None, pixels: int) -> Image.Image:
    if found is None:
        whole = picture.copy()
        whole.thumbnail((WHOLE_PIXELS, WHOLE_PIXELS))
        return whole
    scaled = found.at(pixels) if found.resize in ("shortest", "squash") else found
    return Image.fromarray(scaled.pixels(picture).permute(1, 2, 0).numpy())
