"""A copy of this process that can be lost, without the seconds that importing torch again takes."""

from __future__ import annotations

import os
from collections.abc import Callable


def forked(work: Callable[[], object]) -> int:
    """Begin `work` in a fork, which leads a session of its own as a shell's command does; the fork's id."""
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        work()
    finally:
        os._exit(1)
