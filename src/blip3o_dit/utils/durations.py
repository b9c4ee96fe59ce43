"""How long something takes, in words."""

from __future__ import annotations


def in_words(seconds: float) -> str:
    """ "40 s", "7 min", "2.5 h", "3 days"."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    if seconds < 100 * 60:
        return f"{round(seconds / 60)} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{round(seconds / 86400)} days"
