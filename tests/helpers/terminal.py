"""A command in a terminal of 80 columns: what a person there sees, and how long nothing changes."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import termios
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

COLUMNS = 80


@dataclass
class Seen:
    """What was written, in pieces with their seconds since the start, and the exit status at last."""

    pieces: list[tuple[float, str]] = field(default_factory=list)
    seconds: float = 0.0
    status: int = -1

    @property
    def text(self) -> str:
        return "".join(piece for _, piece in self.pieces)

    @property
    def lines(self) -> list[str]:
        """What is left on the screen in the end: what bars wrote over is gone."""
        screen, row, column = [""], 0, 0
        for token in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", self.text):
            line = screen[row]
            if token == "\n":
                row += 1
                screen += [""] * (row == len(screen))
            elif token == "\r":
                column = 0
            elif token == "\x1b[A":
                row -= 1
            elif token == "\x1b[K":
                screen[row] = line[:column]
            else:
                screen[row] = line[:column].ljust(column) + token + line[column + len(token) :]
                column += len(token)
        return [line.rstrip() for line in screen]

    @property
    def silences(self) -> list[tuple[float, float]]:
        """(seconds, when it began) of the times in which nothing was written, the longest first."""
        times = [0.0, *(when for when, _ in self.pieces), self.seconds]
        return sorted(((end - begin, begin) for begin, end in pairwise(times)), reverse=True)


def in_terminal(command: Sequence[str], *, interrupt_at: str | None = None) -> Seen:
    """Run a command; control-C is pressed once it has written `interrupt_at`."""
    child, terminal = pty.fork()
    if child == 0:
        os.execvp(command[0], list(command))
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    seen, started = Seen(), time.monotonic()
    while piece := _read(terminal):
        seen.pieces.append((time.monotonic() - started, piece.decode("utf-8", "replace")))
        if interrupt_at is not None and interrupt_at in seen.text:
            interrupt_at = None
            os.killpg(os.getpgid(child), signal.SIGINT)
    seen.status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seen.seconds = time.monotonic() - started
    os.close(terminal)
    return seen


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the last process there has gone
        return b""
