"""What every command shares: log lines on the console, and one line for a user's mistake."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

TRACEBACK_VARIABLE = "BLIP3O_DIT_TRACEBACK"
USER_ERROR = 2


def run_command(command: Callable[[], None]) -> int:
    """Run a command; returns the exit status.

    ValueError and OSError are what the library raises for a user's mistake: they become one line on
    standard error and status 2. Set BLIP3O_DIT_TRACEBACK=1 to see where they came from.
    """
    set_up_logging()
    try:
        command()
    except (ValueError, OSError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        sys.stderr.write(f"error: {one_line(error)}\n")
        return USER_ERROR
    return 0


def one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def set_up_logging() -> None:
    """Our messages at INFO on the first process, warnings only on the others."""
    main_process = os.environ.get("RANK", "0") == "0"
    logger = logging.getLogger("blip3o_dit")
    logger.setLevel(logging.INFO if main_process else logging.WARNING)
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
