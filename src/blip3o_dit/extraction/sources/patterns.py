"""Patterns of file names: webdataset's `{00000..00012}.tar`, alternatives in braces, and `*`."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator

MAX_NAMES = 1_000_000

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand(pattern: str) -> tuple[str, list[str]] | None:
    """The folder above the first pattern, and the names below it; None when there is no pattern.

    Names in braces are there whether or not the files are; those by `*`, `?` and `[...]` are sorted.
    """
    special = re.search(r"[{*?\[]", pattern)
    if special is None:
        return None
    root = os.path.dirname(pattern[: special.start()])
    names: dict[str, None] = {}
    for one in _alternatives(pattern):
        found = sorted(glob.glob(one, recursive=True), key=os.fsencode) if glob.has_magic(one) else [one]
        names.update(dict.fromkeys(os.path.relpath(name, root or ".") for name in found))
        if len(names) > MAX_NAMES:
            raise ValueError(f"{pattern}: expected at most {MAX_NAMES} names, found more")
    return root or ".", list(names)


def _alternatives(pattern: str) -> Iterator[str]:
    for braces in _BRACES.finditer(pattern):
        choices = _choices(braces[1])
        if choices is not None:
            for choice in choices:
                for rest in _alternatives(pattern[braces.end() :]):
                    yield pattern[: braces.start()] + choice + rest
            return
    yield pattern


def _choices(text: str) -> Iterator[str] | None:
    """Of `00..12` the numbers with as many digits, of `a,b` the parts; None for other text in braces."""
    if bounds := _RANGE.fullmatch(text):
        first, last = int(bounds[1]), int(bounds[2])
        width = max(len(bounds[1]), len(bounds[2])) if "0" in (bounds[1][0], bounds[2][0]) else 0
        step = 1 if first <= last else -1
        return (f"{number:0{width}d}" for number in range(first, last + step, step))
    return iter(text.split(",")) if "," in text else None
