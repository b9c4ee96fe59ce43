"""Signs of life in a terminal: bars whose time goes on, and work of one long step."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

from blip3o_dit.utils.json_files import escaped

TICK = 1.0  # seconds

logger = logging.getLogger(__name__)


@contextmanager
def ticking(bar: tqdm) -> Iterator[tqdm]:
    """Close the bar after the block; while that runs, its time goes on also in a step that takes long."""
    ended = threading.Event()

    def tick() -> None:
        while not ended.wait(TICK):
            bar.refresh()

    shown = not bar.disable and sys.stderr.isatty()
    thread = threading.Thread(target=tick, daemon=True) if shown else None
    try:
        if thread is not None:
            thread.start()
        yield bar
    finally:
        ended.set()
        if thread is not None:
            thread.join()
        bar.close()


@contextmanager
def progress_bars(shown: bool) -> Iterator[Callable[[Iterable[Any], str], Iterable[Any]]]:
    """Wraps iterables for bars of a name, which go when they are done, or the block is left."""
    running: list[Generator[Any, None, None]] = []

    def steps(items: Iterable[Any], name: str) -> Generator[Any, None, None]:
        bar = tqdm(items, desc=escaped(name), unit="step", leave=False, disable=not shown)
        with ticking(bar):
            yield from bar

    def bar(items: Iterable[Any], name: str) -> Iterable[Any]:
        running.append(steps(items, name))
        return running[-1]

    try:
        yield bar
    finally:
        for each in running:  # an error would hold them open until after its message
            each.close()


@contextmanager
def working(what: str, *, shown: bool = True) -> Iterator[None]:
    """Say what the block does: in a terminal on a line that goes when it is done, else as a message."""
    if not shown or not sys.stderr.isatty():
        if shown:
            logger.info("%s", what)
        yield
        return
    with ticking(tqdm(desc=what, bar_format="{desc}: {elapsed}", leave=False)):
        yield
