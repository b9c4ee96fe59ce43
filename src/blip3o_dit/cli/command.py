"""What every command shares: logging to the console, and one line for a user's mistake."""

from __future__ import annotations

import errno
import importlib
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from blip3o_dit.cli.parser import CommandParser
from blip3o_dit.utils.errors import ReadError, StoppedEarly, WriteError
from blip3o_dit.utils.json_files import escaped
from blip3o_dit.utils.logging import quiet_libraries
from blip3o_dit.utils.progress import above_bars

TRACEBACK_VARIABLE = "BLIP3O_DIT_TRACEBACK"

# Exit statuses; the last two are those of sysexits.h for "input/output error" and "try again later".
USER_ERROR, INPUT_OUTPUT, STOPPED = 2, 74, 75
INTERRUPTED, READER_GONE = 128 + signal.SIGINT, 128 + signal.SIGPIPE

logger = logging.getLogger(__name__)


def command_module(name: str) -> Any:
    """The module of a command: `EXAMPLES`, `add_arguments(parser)` and `run(arguments)`."""
    return importlib.import_module(f"blip3o_dit.cli.{name.replace('-', '_')}")


def command_parser(name: str, prog: str | None = None, description: str | None = None) -> CommandParser:
    """The parser of the command of this name."""
    command = command_module(name)
    prog = prog or f"blip3o-dit {name}"
    parser = CommandParser(prog=prog, description=description, examples=command.EXAMPLES)
    parser.add_config()
    command.add_arguments(parser)
    return parser


def run_named(name: str, argv: Sequence[str] | None, *, prog: str, description: str) -> int:
    """Import the command of this name, parse its arguments and run it; returns the exit status."""

    def run() -> None:
        arguments = command_parser(name, prog, description).parse_args(argv)
        if "torch" not in sys.modules:  # importing it takes seconds
            logger.info("%s: starting", prog)
        command_module(name).run(arguments)

    set_up_logging()
    return run_command(run)


def run_command(command: Callable[[], None]) -> int:
    """Run a command; returns the exit status.

    0: done. 2: a user's mistake, for which the library raises ValueError or OSError. 74: the disk is full or
    cannot be written, or what is read from fails. 75: stopped as asked, with something to
    continue from. 130: interrupted (control-C) where there is nothing to save. Each but the first comes with
    one line on standard error; set BLIP3O_DIT_TRACEBACK=1 to see where it came from. 141, without a line:
    whoever read our output (`| head`) has seen enough.
    """
    try:
        try:
            with _leaving_imports_at_once():
                command()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # What is still buffered would be written at exit, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    except (ValueError, OSError, StoppedEarly, KeyboardInterrupt) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        kind = "stopped" if isinstance(error, StoppedEarly | KeyboardInterrupt) else "error"
        sys.stderr.write(f"{kind}: {user_message(error)}\n")
        return exit_status(error)
    return 0


@contextmanager
def _leaving_imports_at_once() -> Iterator[None]:
    """Inside, control-C during an import ends the process, with the line.

    Libraries meet the exception where they look for something else and go on, or say that they are broken;
    there is nothing yet to save.
    """
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not ours or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, _on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    outer = frame
    while outer is not None and outer.f_code.co_filename != "<frozen importlib._bootstrap>":
        outer = outer.f_back
    if outer is None or os.environ.get(TRACEBACK_VARIABLE):
        signal.default_int_handler(number, frame)
    os.write(2, b"stopped: interrupted\n")
    os._exit(INTERRUPTED)


def exit_status(error: BaseException) -> int:
    if isinstance(error, StoppedEarly):
        return STOPPED
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return INPUT_OUTPUT if full or isinstance(error, WriteError | ReadError) else USER_ERROR


def user_message(error: BaseException) -> str:
    """One line: what a user of the command line is told of an error.

    The library names the argument of its functions that replaces what is there; here it is a flag.
    """
    if isinstance(error, OSError) and error.filename is not None:
        return escaped(f"{error.filename}: {error.strerror}")
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "interrupted"
    text = " ".join(str(error).split()).replace("overwrite=True", "--overwrite")
    return escaped(text) or type(error).__name__


def set_up_logging() -> None:
    """Our messages at INFO on the first process, warnings only on the others; any text can be written."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    quiet_libraries()
    main_process = os.environ.get("RANK", "0") == "0"
    logger = logging.getLogger("blip3o_dit")
    logger.setLevel(logging.INFO if main_process else logging.WARNING)
    if not logger.handlers:
        handler, errors = _Console(), _Console()
        handler.setFormatter(_EscapingFormatter("%(message)s"))
        logger.addHandler(handler)
        # Of what libraries log Python would show the warnings, too.
        errors.setLevel(logging.ERROR)
        errors.setFormatter(_EscapingFormatter("%(name)s: %(message)s"))
        errors.addFilter(lambda record: not record.name.startswith("blip3o_dit"))
        logging.getLogger().addHandler(errors)


class _Console(logging.StreamHandler):
    """Writes to whatever standard error is now."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr

    def emit(self, record: logging.LogRecord) -> None:
        with above_bars():
            super().emit(record)


class _EscapingFormatter(logging.Formatter):
    """File names in a message may hold what a terminal would obey."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(escaped(line) for line in super().format(record).split("\n"))
