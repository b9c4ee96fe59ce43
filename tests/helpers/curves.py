"""Curves are drawn only where a test looks at them: a picture takes most of a second, at every checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from blip3o_dit.training import callbacks

_draw_curves = callbacks.draw_curves


def _draw_nothing(*_: object) -> None:
    """In place of `draw_curves`, as soon as this module is imported."""


callbacks.draw_curves = _draw_nothing


@contextmanager
def curves_drawn() -> Iterator[None]:
    """The last picture that a run inside draws is drawn at the end: it replaces those of the checkpoints."""
    asked: list[tuple[object, ...]] = []
    callbacks.draw_curves = lambda *arguments: asked.append(arguments)
    try:
        yield
    finally:
        callbacks.draw_curves = _draw_nothing
    if asked:
        _draw_curves(*asked[-1])  # type: ignore[arg-type]
