"""Whether the library bears an input: run in a forked process that can be watched, limited and lost.

An input is borne when the call succeeds, raises what `run_command` turns into one line (ValueError, OSError),
or stops as argparse does. Everything else is a finding: another exception, a message of several lines, a
program run, a file written or removed where none should be, a connection, memory out of proportion to the
input, more than `SECONDS`, the death of the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import io
import json
import logging
import os
import resource
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blip3o_dit.data.verified import directory_of_records

SECONDS = 5.0
MEMORY_FACTOR = 10
MEMORY_SLACK = 64 << 20
"""Address space that a call may add beside `MEMORY_FACTOR` times the input: allocator arenas, caches."""

Act = Callable[[], object]


@dataclass(frozen=True)
class Trial:
    """One input, written to disk already: what to call, and what the call may write to.

    `names_file` asks that a refusal's message names something below the scratch folder.
    """

    act: Act
    size: int
    scratch: Path
    outputs: tuple[Path, ...] = ()
    names_file: bool = True
    canary: Path | None = None
    slack: int = MEMORY_SLACK


@dataclass(frozen=True)
class Finding:
    """What went wrong with which input; `python -m tests.fuzz --seed --format --only` repeats it."""

    format: str
    seed: int
    number: int
    kind: str
    detail: str

    def __str__(self) -> str:
        again = f"python -m tests.fuzz --seed {self.seed} --format {self.format} --only {self.number}"
        return f"{self.format} {self.number}: {self.kind}: {self.detail}\n    again: {again}"


@dataclass
class Tally:
    """What became of the inputs of one format."""

    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0
    most_memory: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.accepted + self.refused + len(self.findings)


class _Watch:
    """An audit hook: what a call does to the world beside reading. It cannot be removed, only muted."""

    FORBIDDEN = (
        *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen"),
        *("socket.connect", "socket.getaddrinfo", "socket.bind", "socket.sendto", "ctypes.dlopen"),
    )
    WRITING = (
        "os.mkdir",
        "os.remove",
        "os.rmdir",
        "os.rename",
        "os.link",
        "os.symlink",
        "os.truncate",
        "os.chmod",
    )

    def __init__(self) -> None:
        self.outputs: tuple[str, ...] | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.outputs is None:
            return
        if event in self.FORBIDDEN:
            self.seen.append(f"{event}{arguments!r:.200}")
        elif event == "open":
            path, mode, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if writes and isinstance(path, str | bytes | os.PathLike):
                self._check(f"open for writing ({mode!r})", path)
        elif event in self.WRITING:
            for path in arguments[:2] if event in ("os.rename", "os.link") else arguments[:1]:
                self._check(event, _from_root(path, arguments[-1]))

    def _check(self, what: str, path: Any) -> None:
        real = os.path.realpath(os.fsdecode(path))
        allowed = (*(self.outputs or ()), "/dev/null", "/dev/shm", os.path.realpath(directory_of_records()))
        there = what == "os.mkdir" and os.path.isdir(real)  # `exist_ok` asks for what is there
        if not there and not any(real == place or real.startswith(place + os.sep) for place in allowed):
            self.seen.append(f"{what}: {real}")


def _from_root(path: Any, folder: Any) -> Any:
    """A path that is relative to an open folder, as `shutil.rmtree` gives it, from the root."""
    if isinstance(folder, int) and folder > 2 and not os.path.isabs(os.fsdecode(path)):
        return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(path))
    return path


def judge(trial: Trial, watch: _Watch | None = None) -> tuple[bool, str, str]:
    """(accepted, kind of finding or "", detail) of one input, in this process."""
    watch = watch or _Watch()
    output = io.StringIO()
    watch.seen, watch.outputs = [], tuple(os.path.realpath(path) for path in trial.outputs)
    error: BaseException | None = None
    try:
        with _limited(trial), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            trial.act()
    except (Exception, SystemExit) as raised:  # noqa: BLE001 - which ones are right is judged below
        error = raised
    watch.outputs = None
    if watch.seen:
        return False, "act", watch.seen[0]
    if trial.canary is not None and trial.canary.exists():
        return False, "executed", str(trial.canary)
    if "Traceback (most recent call last)" in output.getvalue():
        return False, "traceback", output.getvalue()[-500:]
    return (True, "", "") if error is None else (False, *_refusal(trial, error))


def _refusal(trial: Trial, error: BaseException) -> tuple[str, str]:
    """("", "") for a refusal as it should be."""
    message = str(error)
    if isinstance(error, SystemExit):
        return ("", "") if error.code in (0, 2) else ("exit", f"status {error.code!r}")
    if not isinstance(error, ValueError | OSError):
        return "exception", _where(error)
    told = ("MemoryError", "can't allocate memory", "Cannot allocate memory", "Unable to allocate")
    if any(text in message for text in told):
        return "memory", _where(error)
    if "\n" in message or len(message) > 2000:
        return "message", f"{len(message)} characters, {message.count(chr(10)) + 1} lines: {message[:300]!r}"
    if trial.names_file and str(trial.scratch) not in message:
        return "message", f"names no file: {message[:300]!r}"
    return "", ""


def _where(error: BaseException) -> str:
    """The exception and the last places in our own code that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [
        f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames if "blip3o_dit" in frame.filename
    ]
    return f"{type(error).__name__}: {str(error)[:200]!r} at {' '.join(ours[-3:]) or 'no frame of ours'}"


@contextlib.contextmanager
def _limited(trial: Trial) -> Iterator[None]:
    """Address space: what there is, and in proportion to the input."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY_FACTOR * trial.size + trial.slack
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


# The forked process


def run_trials(
    format_name: str,
    seed: int,
    numbers: range,
    make: Callable[[int], Trial],
    *,
    seconds: float = SECONDS,
    stop_after: int = 50,
) -> Tally:
    """Make and judge these inputs; a process that hangs or dies is replaced behind the guilty input.

    `make(number)` writes input `number` and returns its trial; it runs in the child.
    """
    tally = Tally()
    at = numbers.start
    while at < numbers.stop and len(tally.findings) < stop_after:
        at = _run_child(format_name, seed, range(at, numbers.stop), make, tally, seconds)
    return tally


def _run_child(
    name: str, seed: int, numbers: range, make: Callable[[int], Trial], tally: Tally, seconds: float
) -> int:
    """Judge in one child until it is done, dead or killed; returns the number to go on with."""
    readable, writable = os.pipe()
    child = os.fork()
    if not child:
        os.close(readable)
        _child(numbers, make, writable)
    os.close(writable)
    number, buffer = numbers.start, b""
    while True:
        ready = select.select([readable], [], [], seconds)[0]
        data = os.read(readable, 65536) if ready else b""
        if not data:
            break
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            number = _note(name, seed, json.loads(line), tally)
    os.close(readable)
    if not ready:
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if status:
        kind = "died" if ready else "hang"
        detail = f"no end in {seconds} s" if kind == "hang" else f"process ended with status {status}"
        tally.findings.append(Finding(name, seed, number, kind, detail))
        return number + 1
    return number


def _note(name: str, seed: int, line: dict[str, Any], tally: Tally) -> int:
    tally.slowest = max(tally.slowest, line["seconds"])
    tally.most_memory = max(tally.most_memory, line["memory"])
    if line["kind"]:
        tally.findings.append(Finding(name, seed, line["number"], line["kind"], line["detail"]))
    elif line["accepted"]:
        tally.accepted += 1
    else:
        tally.refused += 1
    return line["number"] + 1


def _child(numbers: range, make: Callable[[int], Trial], pipe: int) -> None:
    """Never returns: one JSON line per input."""
    status, number = 1, numbers.start
    try:
        _quieten()
        watch = _Watch()
        for number in numbers:
            started, before = _cpu(), _resident()
            accepted, kind, detail = judge(make(number), watch)
            memory = max(0, _resident() - before)
            line = {"number": number, "accepted": accepted, "kind": kind, "detail": detail, "memory": memory}
            os.write(pipe, json.dumps(line | {"seconds": _cpu() - started}).encode() + b"\n")
        status = 0
    except BaseException:  # noqa: BLE001 - nothing may leave the child but a line and its status
        line = {"number": number, "accepted": False, "kind": "harness", "detail": traceback.format_exc()}
        os.write(pipe, json.dumps(line | {"seconds": 0.0, "memory": 0}).encode() + b"\n")
    finally:
        os._exit(status)


def _quieten() -> None:
    """Nothing on the terminal, one malloc arena (each reserves 64 MiB of address space), no core files."""
    warnings.simplefilter("ignore")
    logging.getLogger("blip3o_dit").handlers.clear()  # earlier tests closed their streams
    faulthandler.disable()
    ctypes.CDLL(None).mallopt(-8, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    gc.freeze()


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
