"""What a command is doing, said while it does it.

In a terminal by a bar that appears after half a second and changes every second; elsewhere by one line, for
what takes longer than a second. Both are on standard error, and of several processes the first one alone.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

from blip3o_dit.utils.durations import in_words
from blip3o_dit.utils.json_files import escaped

# Seconds: a bar is there after the first, and changes after the second; what ends sooner has no line.
APPEARS, EVERY = 0.5, 1.0

logger = logging.getLogger(__name__)

Piece = TypeVar("Piece")


class Bar:
    """A bar in the terminal. Without a total it says how long it has been there.

    It changes whether or not anything was counted, so that a slow step does not look like one that hangs.
    """

    def __init__(self, what: str, total: int | None = None, unit: str = "", *, done: int = 0) -> None:
        self._bar: Any = None
        self._begin(what, total, unit, done)
        self._over = threading.Event()
        self._lock = threading.Lock()
        threading.Thread(target=self._tick, daemon=True).start()

    def update(self, count: int = 1) -> None:
        """So many more are done."""
        with self._lock:
            self._counted += count
            if self._bar is not None:
                self._bar.update(count)

    def found(self, count: int) -> None:
        """So many were done before: they took no time now."""
        with self._lock:
            if self._bar is None:
                self._settings["initial"] += count
            else:
                self._bar.initial += count
                self._bar.update(count)

    def turn_to(self, what: str, total: int | None, unit: str) -> None:
        """Count something else from now on."""
        with self._lock:
            self._clear()
            self._begin(what, total, unit)

    def close(self) -> None:
        """Leave nothing of it on the screen."""
        self._over.set()
        with self._lock:
            self._clear()

    def _begin(self, what: str, total: int | None, unit: str, done: int = 0) -> None:
        self._settings: dict[str, Any] = dict(desc=what, total=total, unit=unit, initial=done)
        if total is None:
            self._settings["bar_format"] = "{desc}: {elapsed}"
        self._counted, self._started = 0, time.time()

    def _clear(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _tick(self) -> None:
        from tqdm import tqdm

        while not self._over.wait(APPEARS if self._bar is None else EVERY):
            with self._lock:
                if self._over.is_set():
                    return
                if self._bar is None:
                    shown = dict(file=sys.stderr, leave=False, dynamic_ncols=True)
                    self._bar = tqdm(**self._settings, **shown)
                    self._bar.start_t = self._bar.last_print_t = self._started
                    self._bar.update(self._counted)
                self._bar.refresh()


def has_terminal() -> bool:
    """Whether somebody may be looking at the bars of this process."""
    return _speaks() and sys.stderr.isatty()


@contextmanager
def working(
    what: str, total: int | None = None, unit: str = "", *, lasting: bool = True, shown: bool = True
) -> Iterator[Callable[[int], None]]:
    """Around work; gives the function that counts what is done of `total`.

    In a terminal it ends with a line that says how long it took, elsewhere it begins with one; neither for
    what takes less than a second, or where nothing `lasting` is wanted. Unless `shown` nothing is said.
    """
    if not shown or (not has_terminal() and not (_speaks() and lasting)):
        yield lambda count: None
        return
    if not has_terminal():
        timer = threading.Timer(EVERY, logger.info, (what,))
        timer.daemon = True
        timer.start()
        try:
            yield lambda count: None
        finally:
            timer.cancel()
        return
    bar, started = Bar(what, total, unit), time.monotonic()
    try:
        yield bar.update
    finally:
        bar.close()
    seconds = time.monotonic() - started
    if seconds > EVERY and lasting:
        logger.info("%s: %s", what, in_words(seconds))


def progress(
    pieces: Iterable[Piece], what: str, unit: str, total: int | None = None, *, lasting: bool = True
) -> Iterator[Piece]:
    """The pieces, counted as by `working`; `total` for what has no length."""
    total = len(pieces) if isinstance(pieces, Sized) else total
    with working(what, total, unit, lasting=lasting) as count:
        for piece in pieces:
            yield piece
            count(1)


@contextmanager
def one_bar(what: str, *, shown: bool = True) -> Iterator[Callable[[Iterable[Any], str], Iterable[Any]]]:
    """In a terminal, one bar for many short computations; gives the function that wraps each one's iterable.

    The bar has the name of the one under way, and `what` in between.
    """
    if not (shown and has_terminal()):
        yield lambda items, name: items
        return
    bar = Bar(what)

    def counted(items: Iterable[Any], name: str) -> Iterator[Any]:
        bar.turn_to(escaped(name), len(items) if isinstance(items, Sized) else None, "step")
        for item in items:
            yield item
            bar.update()
        bar.turn_to(what, None, "")  # a full one would look as if nothing was done any more

    try:
        yield counted
    finally:
        bar.close()


@contextmanager
def above_bars() -> Iterator[None]:
    """Around the writing of a line to standard error: bars make room for it, and go on below it."""
    if "tqdm" not in sys.modules:
        yield
        return
    from tqdm import tqdm

    with tqdm.external_write_mode(file=sys.stderr):
        yield


def _speaks() -> bool:
    return os.environ.get("RANK", "0") == "0"
