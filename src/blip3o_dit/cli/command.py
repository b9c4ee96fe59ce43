"""What every command shares: logging to the console, and one line for a user's mistake."""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from blip3o_dit.utils.errors import ReadError, StoppedEarly, WriteError
from blip3o_dit.utils.json_files import escaped
from blip3o_dit.utils.logging import quiet_torchao

TRACEBACK_VARIABLE = "BLIP3O_DIT_TRACEBACK"

# Exit statuses; the last two are those of sysexits.h for "input/output error" and "try again later".
USER_ERROR, INPUT_OUTPUT, STOPPED = 2, 74, 75
INTERRUPTED, READER_GONE = 128 + signal.SIGINT, 128 + signal.SIGPIPE

logger = logging.getLogger(__name__)


def command_module(name: str) -> Any:
    """The module of a command: `add_arguments(parser)` and `run(arguments)`."""
    return importlib.import_module(f"blip3o_dit.cli.{name.replace('-', '_')}")


def run_named(name: str, argv: Sequence[str] | None, *, prog: str, description: str) -> int:
    """Import the command of this name, parse its arguments and run it; returns the exit status."""

    def run() -> None:
        command = command_module(name)
        parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
        command.add_arguments(parser)
        arguments = parser.parse_args(argv)
        if "torch" not in sys.modules:  # importing it takes seconds
            logger.info("%s: starting", prog)
        command.run(arguments)

    set_up_logging()
    return run_command(run)


def run_command(command: Callable[[], None]) -> int:
    """Run a command; returns the exit status.

    0: done. 2: a user's mistake, for which the library raises ValueError or OSError. 74: the disk is full or
    cannot be written, or what is read from fails. 75: a training was stopped as asked, with a checkpoint to
    continue from. 130: interrupted (control-C) where there is nothing to save. Each but the first comes with
    one line on standard error; set BLIP3O_DIT_TRACEBACK=1 to see where it came from. 141, without a line:
    whoever read our output (`| head`) has seen enough.
    """
    try:
        try:
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


def exit_status(error: BaseException) -> int:
    if isinstance(error, StoppedEarly):
        return STOPPED
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return INPUT_OUTPUT if full or isinstance(error, WriteError | ReadError) else USER_ERROR


def user_message(error: BaseException) -> str:
    """One line: what a user is told of an error."""
    if isinstance(error, OSError) and error.filename is not None:
        return escaped(f"{error.filename}: {error.strerror}")
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return escaped(" ".join(str(error).split())) or type(error).__name__


def set_up_logging() -> None:
    """Our messages at INFO on the first process, warnings only on the others; any text can be written."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    quiet_torchao()
    main_process = os.environ.get("RANK", "0") == "0"
    logger = logging.getLogger("blip3o_dit")
    logger.setLevel(logging.INFO if main_process else logging.WARNING)
    if not logger.handlers:
        handler = _Console()
        handler.setFormatter(_EscapingFormatter("%(message)s"))
        logger.addHandler(handler)


class _Console(logging.StreamHandler):
    """Writes to whatever standard error is now."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr


class _EscapingFormatter(logging.Formatter):
    """File names in a message may hold what a terminal would obey."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(escaped(line) for line in super().format(record).split("\n"))
