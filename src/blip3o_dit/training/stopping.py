"""Stopping a run from outside: a signal or a time limit ends it after its step, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from blip3o_dit.utils.distributed import launcher_began, restarts

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest(TrainerCallback):
    """Watches for SIGTERM, SIGINT and the time limit; a second signal ends the process at once.

    transformers' own (`enable_jit_checkpoint`) knows SIGTERM only, and processes may stop at other steps.

    All processes stop after the same step: once a step they tell each other, by way of the CPU, whether one
    of them was asked to. They read the answers a step later, so that none waits for another; the run then
    ends a step after the one in which the signal came. `max_hours` count from when this is built, or from
    when the launcher began that has started the run again.
    """

    def __init__(self, max_hours: float | None) -> None:
        self.reason: str | None = None
        gone = time.time() - launcher_began() if restarts() else 0.0
        self._until = None if max_hours is None else time.monotonic() + 3600.0 * max_hours - gone
        self._max_hours = max_hours
        self._complete = False  # the last step is taken
        self._group: Any = None
        self._asked: tuple[Any, torch.Tensor] | None = None  # on its way since the last step

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the signals ask for a stop; outside they do what they did before.

        Only the main thread can watch for signals; a run in another one has the time limit alone.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_train_begin(self, args: TrainingArguments, *_: Any, **kwargs: Any) -> None:
        if args.world_size > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo")

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._until is not None and time.monotonic() >= self._until:
            self.reason = self.reason or f"--max_hours {self._max_hours:g} are over"
        self._complete = state.global_step >= state.max_steps
        if self._asked_anywhere() and not self._complete:
            self.reason = self.reason or "another process was asked to stop"
            control.should_save = control.should_training_stop = True

    def on_train_end(self, *_: Any, **kwargs: Any) -> None:
        if self._asked is not None:
            self._asked[0].wait()

    def cut_short(self, state: TrainerState) -> bool:
        """Whether the run ended before its last step because it was asked to."""
        return self.reason is not None and state.global_step < state.max_steps

    def _asked_anywhere(self) -> bool:
        if self._group is None:
            return self.reason is not None
        asked = torch.tensor([self.reason is not None], dtype=torch.int32)
        work = dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        before, self._asked = self._asked, (work, asked)
        if before is None:
            return False
        before[0].wait()
        return bool(before[1].item())

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None:
            os._exit(128 + number)
        self.reason = f"{signal.Signals(number).name} received"
        what = "saving after this step, then stopping"
        if self._complete:
            what = "all steps are taken: writing the model, then ending"
        # Not by way of logging, which the signal may have interrupted halfway through a line. In a terminal
        # that line may hold a bar.
        start = "\r\x1b[K" if os.isatty(2) else ""
        os.write(2, f"{start}{self.reason}: {what}; once more stops at once\n".encode())


def outlive_stops(worker_id: int) -> None:
    """What a data-loader worker does first: leave SIGTERM and SIGINT to the training process.

    Launchers send them to every process of a job, and a run that loses a worker cannot finish its step. The
    training process's own SIGTERM, with which torch ends workers, still ends this one.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS has none
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_asked_by, args=(os.getppid(),), daemon=True).start()


def _end_when_asked_by(sender: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != sender:
        pass
    os._exit(0)
