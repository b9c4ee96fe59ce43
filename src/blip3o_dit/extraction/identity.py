"""What an extraction is: the settings, images and towers that its folder belongs to.

Kept as `extraction.json` while the extraction is unfinished, then in the manifest:

    version     of this package: noted, not compared
    settings    the flags that decide what is written
    pictures    their number, a digest of keys, captions and labels, one that includes sizes, and `samples`:
                by their place digests of what a few of them begin with
    towers      what each says of itself, with a digest of its weights

So another folder with the same names is told from the same folder at another place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from tqdm.auto import tqdm

from blip3o_dit import __version__
from blip3o_dit.extraction.config import ExtractionConfig
from blip3o_dit.extraction.encoders import VisionEncoder
from blip3o_dit.extraction.sources.image_list import ImageList
from blip3o_dit.extraction.sources.image_ref import ImageRef
from blip3o_dit.utils.json_files import short_repr

# Where the weights are known, the tower is: wherever it was loaded from.
_WHERE_FROM = ("name", "revision", "commit")
_NAMES, _CONTENT = "pictures.sha256", "pictures.content_sha256"
_SAMPLES = "pictures.samples."


def describe_images(images: ImageList, *, progress: bool = False) -> dict[str, Any]:
    """Of listed images: their number, two digests, and digests of what a few of them begin with."""
    found = {"content_sha256": images.digest(progress=progress), "samples": images.samples()}
    return count_images(images, progress=progress) | found


def count_images(refs: Iterable[ImageRef], *, progress: bool = False) -> dict[str, Any]:
    digest, count = hashlib.sha256(), 0
    for ref in tqdm(refs, desc="names", unit=" pictures", delay=2, disable=not progress):
        digest.update(json.dumps([ref.key, ref.caption, ref.label]).encode() + b"\n")
        count += 1
    return {"count": count, "sha256": digest.hexdigest()}


def describe_extraction(config: ExtractionConfig, pictures: dict[str, Any]) -> dict[str, Any]:
    """What is known before the towers are loaded."""
    known = [
        each.name for each in fields(config) if each.metadata.get("decides") or each.metadata.get("noted")
    ]
    settings = {name: getattr(config, name) for name in known}
    settings["keep"] = list(config.keep)
    if not config.keep:  # as earlier versions, which kept none
        del settings["keep"]
    if config.towers_from_scratch:
        settings["seed"] = config.seed
    return {"version": __version__, "settings": settings, "pictures": pictures}


def describe_towers(towers: Mapping[str, VisionEncoder]) -> dict[str, Any]:
    return {"towers": {side: tower.describe() for side, tower in towers.items()}}


def is_of_earlier_version(identity: Any) -> bool:
    """Whether sizes of images and weights of towers were not noted."""
    return _CONTENT not in flat(identity)


def differences(found: Any, wanted: dict[str, Any]) -> list[str]:
    """What decides the store's content and is another there, in words. Compared is what both of them know."""
    if not isinstance(found, dict):
        return ["it was not written by this command"]
    there, here = flat(found), flat(json.loads(json.dumps(wanted)))
    for side in (there, here) if "settings" in wanted else ():
        side.setdefault("settings.keep", [])
    names = [
        name for name in here if name in there and here[name] != there[name] and _decides(name, there, here)
    ]
    if _NAMES in names and "pictures.count" not in names:
        return ["other pictures: their names, captions or labels differ", *_shown(names, there, here)]
    if _CONTENT in names and "pictures.count" not in names:
        return [
            "another set of pictures with the same names: their sizes differ",
            *_shown(names, there, here),
        ]
    if "pictures.count" not in names and any(name.startswith(_SAMPLES) for name in names):
        return ["another set of pictures with the same names and sizes", *_shown(names, there, here)]
    return _shown(names, there, here)


def noted_changes(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Settings that may be others and change last bits, or which images are too large."""
    there, here = found.get("settings", {}), wanted["settings"]
    names = [each.name for each in fields(ExtractionConfig) if each.metadata.get("noted")]
    return [name for name in names if name in there and there[name] != here[name]]


def _decides(name: str, there: dict[str, Any], here: dict[str, Any]) -> bool:
    kind, _, rest = name.partition(".")
    if kind == "settings":
        if rest == "seed":
            return here["settings.towers_from_scratch"]
        if rest == "limit":  # of fewer pictures than it allows it is none
            return there.get(_CONTENT) != here.get(_CONTENT)
        return any(each.name == rest and each.metadata.get("decides") for each in fields(ExtractionConfig))
    if kind == "towers":
        side, _, what = rest.partition(".")
        weights = f"towers.{side}.weights"
        return what not in _WHERE_FROM or not (weights in there and weights in here)
    return kind == "pictures"


def _shown(names: list[str], there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    return [
        f"{name} is {short_repr(there[name])} there, {short_repr(here[name])} here"
        for name in names
        if name not in (_NAMES, _CONTENT) and not name.startswith(_SAMPLES)
    ]


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, its names joined by dots."""
    if not isinstance(values, dict):
        return {prefix.rstrip("."): values}
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.")
    return found
