"""Exceptions with an exit status of their own.

A user's mistake is a ValueError or OSError, everywhere: one line with what was expected and what was found.
"""

from __future__ import annotations

# Seconds before each further try of a read that failed.
RETRY_AFTER = (1.0, 4.0, 25.0)


class WriteError(OSError):
    """Something could not be written whole; what was there before is untouched."""


class ReadError(OSError):
    """What is read from fails, now; what was done is kept, and the same command continues."""


class StoppedEarly(Exception):
    """A run was stopped as asked and can be continued; the message says why and from where."""
