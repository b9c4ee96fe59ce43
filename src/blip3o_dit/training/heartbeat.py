"""Several processes watch each other: one that hangs is named, and all end, for a launcher to restart them.

A process that waits for another one's gradients waits in a call that nothing interrupts. So each has a thread
beside it that tells the others, by way of the launcher's store, that it lives and how far the training is.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from blip3o_dit.utils.distributed import Processes
from blip3o_dit.utils.json_files import one_line

HUNG = 76  # exit status
LOST = re.compile("Connection (closed|reset) by peer|Broken pipe")  # as gloo says it
PLACES = 2**20  # of a step's marks: processes that took some again agree when the next step begins
KEY = "blip3o-dit/rank-{}"


@dataclass(frozen=True)
class Sign:
    """What a process tells of itself: `marks` counts what it has passed in its steps, `pulse` goes on while
    it lives. While it is `busy` with what takes its time, as an evaluation, nobody waits in vain."""

    pulse: int = 0
    marks: int = 0
    step: int = 0
    busy: bool = True


class Judge:
    """Decides, from what all processes tell, whether one hangs: for `timeout` seconds it gives no sign of
    life, or none of them gets any further and it is the one that is behind."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._signs: list[Sign] = []
        self._heard: list[float] = []
        self._moved = 0.0

    def verdict(self, signs: list[Sign], now: float) -> str | None:
        """One line, or None; `now` in seconds of a monotonic clock."""
        before = self._signs or [Sign(pulse=-1)] * len(signs)
        heard = self._heard or [now] * len(signs)
        self._heard = [
            now if sign.pulse != last.pulse else since
            for sign, last, since in zip(signs, before, heard, strict=True)
        ]
        moves = any(sign.busy or sign.marks != last.marks for sign, last in zip(signs, before, strict=True))
        self._moved = now if moves else self._moved
        self._signs = signs
        silent = [rank for rank, since in enumerate(self._heard) if now - since > self._timeout]
        if silent:
            return f"{_ranks(silent)} gave no sign of life for {self._timeout:g} s"
        if now - self._moved <= self._timeout:
            return None
        least = min(sign.marks for sign in signs)
        behind = [rank for rank, sign in enumerate(signs) if sign.marks == least]
        step = min(sign.step for sign in signs)
        if len(behind) == len(signs):
            return f"none of {len(signs)} ranks has finished step {step} within {self._timeout:g} s"
        have = "has" if len(behind) == 1 else "have"
        return f"{_ranks(behind)} {have} not finished step {step} within {self._timeout:g} s"


class Heartbeat:
    """What this process tells the others, and a thread that listens to them and ends this one if need be.

    Without `begin` nothing is told.
    """

    def __init__(self) -> None:
        self._done = (0, 0, True)  # marks, step, busy: written by the run's thread, read by the other
        self._first_step = 0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def mark(self, step: int) -> None:
        """Something of optimizer step `step` is done; the first one may take long, as kernels are loaded."""
        marks = max(self._done[0] + 1, step * PLACES)
        self._done = (marks, step, step <= self._first_step)

    def busy(self) -> None:
        """Until the next mark this process does what may take long, as an evaluation."""
        marks, step, _ = self._done
        self._done = (marks + 1, step, True)

    def begin(self, processes: Processes, timeout: float, first_step: int) -> None:
        """Watch from here on, but not how long the first step takes; all processes must call it."""
        self._first_step = first_step
        store = _get_default_store()
        self._tell(store, processes.rank, 0)
        processes.barrier()
        watch = (store, processes.rank, processes.count, timeout)
        self._thread = threading.Thread(target=self._watch, args=watch, daemon=True, name="heartbeat")
        self._thread.start()

    def end(self) -> None:
        """Watch no longer."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, store: Any, rank: int, count: int, timeout: float) -> None:
        judge = Judge(timeout)
        try:
            for pulse in itertools.count(1):
                self._tell(store, rank, pulse)
                signs = [Sign(*json.loads(store.get(KEY.format(other)))) for other in range(count)]
                verdict = judge.verdict(signs, time.monotonic())
                if verdict is not None:
                    first = store.compare_set(KEY.format("hung"), "", str(rank)) == str(rank).encode()
                    end_process(f"error: {verdict}\n" if first else "")
                    return
                if self._over.wait(min(1.0, timeout / 5)):
                    return
        except dist.DistError:
            pass  # the store went with its process, as when a launcher ends them all

    def _tell(self, store: Any, rank: int, pulse: int) -> None:
        store.set(KEY.format(rank), json.dumps((pulse, *self._done)))


@contextmanager
def losses_in_one_line(processes: int) -> Iterator[None]:
    """Around a training: what waited for a process that died says so.

    Raises:
        ConnectionError: in place of whatever the exchange between the processes raised.
    """
    try:
        yield
    except RuntimeError as error:
        if processes == 1 or not (isinstance(error, dist.DistError) or LOST.search(str(error))):
            raise
        raise ConnectionError(f"another process was lost: {one_line(error)[:200]}") from error


def end_process(line: str) -> None:
    """End this process, whatever its threads wait for."""
    os.write(2, line.encode())
    os._exit(HUNG)


def _ranks(numbers: list[int]) -> str:
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
