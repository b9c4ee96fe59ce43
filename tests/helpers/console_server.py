"""The installed package's commands, each on a terminal of its own, seen as a person there sees them.

Run as a script with only the wheel on PYTHONPATH. It imports all modules of the package once, then takes one
JSON request a line and answers with one: the command runs in a fork, whose clocks go by the processor's time,
so that a loaded machine changes nothing, and go faster, as on a slower machine with more data.
"""

from __future__ import annotations

import fcntl
import gc
import importlib.util
import json
import os
import pkgutil
import pty
import re
import struct
import sys
import tempfile
import termios
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

COLUMNS = 80
POLL = 0.002
MOVES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # of the cursor, and colours
# What takes the same time whatever the data: imports, and the drawing of figures.
FIXED = 1.0
# Not there after `pip install` of the package alone. torchao stays: it is the one that has much to say.
EXTRAS = ("wandb", "pyarrow", "torchdiffeq", "sklearn", "scipy", "pandas", "diffusers", "peft", "gradio")
# Whose words a stream carries is asked of whoever called these.
CARRIERS = ("logging", "tqdm", "contextlib", "warnings", __name__)


class FastClock:
    """Seconds of this process's own work, times `pace`, in place of the clocks of `time`."""

    def __init__(self, pace: float) -> None:
        self._pace, self._passed = pace, 0.0
        self._used = time.process_time()
        self._lock = threading.RLock()

    def seconds(self) -> float:
        with self._lock:
            used = time.process_time()
            self._passed += (used - self._used) * self._pace
            self._used = used
            return self._passed

    @contextmanager
    def at_most(self, pace: float) -> Iterator[None]:
        self.seconds()
        before, self._pace = self._pace, min(self._pace, pace)
        try:
            yield
        finally:
            self.seconds()
            self._pace = before

    def slowly(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            with self.at_most(FIXED):
                return function(*arguments, **named)

        return call

    def install(self) -> None:
        import matplotlib.axes
        import matplotlib.figure
        import matplotlib.pyplot
        import tqdm.std

        really_wait, sleep = threading.Event.wait, time.sleep

        def wait(event: threading.Event, timeout: float | None = None) -> bool:
            if timeout is None:
                return really_wait(event)
            until = self.seconds() + timeout
            while not event.is_set() and self.seconds() < until:
                sleep(POLL)
            return event.is_set()

        threading.Event.wait = wait
        begun, monotonic = time.time(), time.monotonic()
        time.time = tqdm.std.time = lambda: begun + self.seconds()
        time.monotonic = time.perf_counter = lambda: monotonic + self.seconds()
        machinery = importlib._bootstrap
        machinery._find_and_load = self.slowly(machinery._find_and_load)
        drawing: list[tuple[Any, str]] = [(matplotlib.pyplot, "subplots"), (matplotlib.axes.Axes, "__init__")]
        drawing += [(matplotlib.axes.Axes, name) for name in ("imshow", "plot", "tick_params", "legend")]
        drawing += [(matplotlib.figure.Figure, name) for name in ("savefig", "subplots", "add_subplot")]
        for owner, name in drawing:
            setattr(owner, name, self.slowly(getattr(owner, name)))


class Watched:
    """A stream that notes what was written to it, when, and by which module."""

    def __init__(self, stream: TextIO, clock: FastClock, written: list[tuple[float, str, str]]) -> None:
        self._stream, self._clock, self._written = stream, clock, written

    def write(self, text: str) -> int:
        self._written.append((self._clock.seconds(), _writer(), text))
        return self._stream.write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _writer() -> str:
    """The module that has something written: ours, also where it logs or counts with a bar."""
    frame, nearest = sys._getframe(2), ""
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        nearest = nearest or name
        if name == "logging" and "record" in frame.f_locals:
            return frame.f_locals["record"].name
        if name.split(".")[0] not in CARRIERS:
            return name
        if name.startswith("warnings"):
            return nearest
        frame = frame.f_back
    return nearest


def silences(written: list[tuple[float, str, str]], end: float) -> list[tuple[float, str]]:
    """The seconds after each thing that was written, and what it was, the longest first."""
    plain = [(when, MOVES.sub("", text).strip()[-COLUMNS:]) for when, _, text in written]
    seen = [(0.0, "the start"), *((when, text) for when, text in plain if text)]
    ends = [when for when, _ in seen[1:]] + [end]
    return sorted(
        ((until - when, text) for (when, text), until in zip(seen, ends, strict=True)), reverse=True
    )


def run_words(words: list[str]) -> int:
    """One line of a shell: the package's command, or python with a program."""
    if words[0] == "python":
        exec(compile(words[2], "program", "exec"), {"__name__": "blip3o_dit-example"})
        return 0
    from importlib.metadata import entry_points

    (entry,) = entry_points(group="console_scripts", name=words[0])
    status: int = entry.load()(words[1:])
    return status


def in_child(request: dict[str, Any], report: str) -> None:
    """What the fork does; it never returns to the server's loop."""
    status, written = 1, []
    clock = FastClock(request["pace"])
    try:
        os.chdir(request["folder"])
        for module, name, value in request["changes"]:
            if importlib.util.find_spec(module):
                setattr(importlib.import_module(module), name, value)
        clock.install()
        sys.stdout = Watched(open(1, "w", closefd=False), clock, written)  # noqa: SIM115
        sys.stderr = Watched(open(2, "w", closefd=False), clock, written)  # noqa: SIM115
        status = run_words(request["words"])
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:  # noqa: BLE001 - the test reads it on the terminal
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        seen = {
            "seconds": clock.seconds(),
            "silences": silences(written, clock.seconds())[:3],
            "written": [(writer, text) for _, writer, text in written],
        }
        Path(report).write_text(json.dumps(seen))
        os._exit(status)


def run_on_terminal(request: dict[str, Any]) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile() as report:
        child, terminal = pty.fork()
        if child == 0:
            fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
            in_child(request, report.name)
        shown = b""
        while True:
            try:
                piece = os.read(terminal, 1 << 16)
            except OSError:  # how Linux says that the other end was closed
                break
            if not piece:
                break
            shown += piece
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.close(terminal)
        text = shown.decode("utf-8", "replace")
        return {"status": status, "text": text} | json.loads(Path(report.name).read_text())


def hide(names: tuple[str, ...]) -> None:
    """As if these packages were not installed."""
    find = importlib.machinery.PathFinder.find_spec

    def find_others(name: str, path: Any = None, target: Any = None) -> Any:
        return None if name.split(".")[0] in names else find(name, path, target)

    importlib.machinery.PathFinder.find_spec = find_others


def import_everything() -> None:
    """All modules, as a command would: after its logging is set up."""
    import blip3o_dit
    from blip3o_dit.cli.command import set_up_logging

    set_up_logging()
    import matplotlib.pyplot  # noqa: F401

    need_extras = ("__main__", "demo.page")
    need_triton = ("gpu_kernels", "triton_kernels", "gpu_training", "triton_training", "triton_adamw")
    on_a_gpu = () if importlib.util.find_spec("triton") else (*need_triton, "philox_kernel")
    for found in pkgutil.walk_packages(blip3o_dit.__path__, "blip3o_dit."):
        if not found.name.endswith((*need_extras, *on_a_gpu)):
            importlib.import_module(found.name)


@contextmanager
def outputs_in(file: Any) -> Iterator[None]:
    """What is written to this process's outputs, also past Python, goes into a file."""
    kept = os.dup(1), os.dup(2)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    hide(EXTRAS)
    with tempfile.TemporaryFile() as file:
        with outputs_in(file):
            import_everything()
        file.seek(0)
        printed = file.read().decode("utf-8", "replace")
    import blip3o_dit

    begun = {"package": blip3o_dit.__file__, "path": sys.path, "printed": printed}
    answers.write(json.dumps(begun) + "\n")
    answers.flush()
    # Looking through the modules' objects for garbage stops all threads for as long, whatever the data.
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        answers.write(json.dumps(run_on_terminal(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    sys.path.pop(0)  # this script's folder, in the repository
    main()
