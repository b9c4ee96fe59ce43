"""Which files are pictures by their suffix, and how files that are not are counted."""

from __future__ import annotations

import importlib
import re
from functools import lru_cache

from PIL import Image

# Pictures whatever the installed Pillow was built with: one that it cannot decode is skipped with a reason.
_ALWAYS = (
    *(".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"),
    *(".avif", ".heic", ".heif", ".hif", ".jxl"),
)
# Formats of Pillow that hold no picture, or that a program outside would be run for.
_NO_PICTURES = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"})

# Decoders that are packages of their own: module, and its function that makes it known to Pillow.
_PLUGINS = (("pillow_heif", "register_heif_opener"), ("pillow_jxl", None))
_NEEDS = {
    ".heic": "pip install pillow-heif",
    ".heif": "pip install pillow-heif",
    ".hif": "pip install pillow-heif",
    ".jxl": "pip install pillow-jxl-plugin",
    ".avif": "a Pillow that reads AVIF (11.3 or newer)",
}


def _register_plugins() -> None:
    """Make the optional decoders that are installed known to Pillow, in this process."""
    for module, function in _PLUGINS:
        try:
            plugin = importlib.import_module(module)
        except ImportError:
            continue
        if function is not None:
            getattr(plugin, function)()


@lru_cache(maxsize=1)
def picture_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are opened here, whatever suffix a file has."""
    _register_plugins()
    Image.init()
    return tuple(name for name in Image.OPEN if name not in _NO_PICTURES)


@lru_cache(maxsize=1)
def _opened() -> frozenset[str]:
    """Suffixes of what Pillow opens here."""
    opens = {*picture_formats(), "MPO"}  # which JPEG's reader opens
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in opens)


@lru_cache(maxsize=1)
def image_suffixes() -> frozenset[str]:
    """Lower-case, with the dot: what Pillow opens, and what it opens with an extra."""
    return _opened() | frozenset(_ALWAYS)


def what_is_missing(suffix: str) -> str | None:
    """The reason why pictures of this suffix cannot be decoded here; None when they can."""
    if suffix not in _NEEDS or suffix in _opened():
        return None
    return f"{suffix} files need {_NEEDS[suffix]}"


def suffix_of(name: str) -> str:
    """Lower-case, with the dot; that of `.png` is empty, as for the file system."""
    stem, dot, suffix = name.rpartition(".")
    return dot + suffix.lower() if stem.strip(".") else ""


def kind_of(name: str) -> str:
    """How a file that is no picture is counted: by suffix; a hidden one without by its name."""
    suffix = suffix_of(name) or (name if name.startswith(".") else "")
    return (
        suffix if re.fullmatch(r"\.(?=\w*[a-zA-Z_])\w{1,16}", suffix, re.ASCII) else "without a usual suffix"
    )
