"""Patterns of file names: webdataset's `{00000..00012}.tar`, alternatives in braces, and `*`."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

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


def one_place(names: Sequence[str]) -> str:
    """Several files as one pattern, the one that a shell made them of where that is plain.

    Raises:
        ValueError: for several names of which one is no file, or cannot be part of a pattern.
    """
    if len(names) == 1:
        return names[0]
    for name in names:
        if not os.path.isfile(name) or re.search("[{},]", name):
            raise ValueError(
                f"{name}: expected one place, or several tars, tables or pictures without braces and commas "
                f"in their names, found it among {len(names)}: extract one by one, then blip3o-dit merge"
            )
    folders, suffixes = {os.path.dirname(name) for name in names}, {Path(name).suffix for name in names}
    if len(folders) == len(suffixes) == 1:
        pattern = os.path.join(glob.escape(*folders), f"*{glob.escape(*suffixes)}")
        if sorted(glob.glob(pattern)) == sorted(names):
            return pattern
    if len({os.path.isabs(name) for name in names}) > 1:
        names = [os.path.abspath(name) for name in names]
    root = os.path.commonpath([os.path.dirname(name) for name in names])
    below = ",".join(glob.escape(os.path.relpath(name, root or ".")) for name in names)
    return os.path.join(glob.escape(root), f"{{{below}}}")


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
