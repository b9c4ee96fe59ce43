"""Short names of paths, for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def shortest_ends(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as few as tell all of them apart; they differ."""
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]
