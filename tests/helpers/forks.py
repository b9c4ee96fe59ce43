"""A copy of this process that can be lost, without the seconds that importing torch again takes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from tqdm import tqdm


def forked(work: Callable[[], object]) -> int:
    """Begin `work` in a fork, which leads a session of its own as a shell's command does; the fork's id."""
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        tqdm.set_lock(threading.RLock())  # tqdm's own is shared, and a fork that is killed may hold it
        work()
    finally:
        os._exit(1)
