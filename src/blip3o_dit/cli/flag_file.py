"""--config FILE: flags of a command from a YAML or JSON file; those on the command line win.

    batch_size: 64
    bf16: true
    compile: blocks

Names are those of the flags, in any spelling that the command line takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from blip3o_dit.utils.json_files import one_line, short_repr


def read_flags(file: Path) -> dict[str, Any]:
    """{flag without hyphens: value} of a file.

    Raises:
        ValueError: it is no YAML, or no mapping from names to plain values or lists of them.
    """
    import yaml

    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file}: expected YAML, found {one_line(error)}") from error
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(
            f"{file}: expected flags and their values (batch_size: 64), found {short_repr(found)}"
        )
    return found


def take_flags(
    file: Path,
    values: Mapping[str, Any],
    action_of: Callable[[str], argparse.Action | None],
    value_of: Callable[[argparse.Action, str], Any],
) -> dict[str, Any]:
    """{destination: value} for a parser, with each value checked as on the command line.

    Args:
        action_of: the action of a flag's name, None where there is none.
        value_of: a word as this action's value; raises argparse.ArgumentError.

    Raises:
        ValueError: naming the file and the flag.
    """
    taken: dict[str, Any] = {}
    for name, value in values.items():
        action = action_of(name)
        if action is None or action.dest in ("help", "config"):
            raise ValueError(f"{file}: expected flags of this command, found {short_repr(name)}")
        try:
            taken[action.dest] = _taken(action, value, value_of)
        except argparse.ArgumentError as error:
            raise ValueError(f"{file}: {name}: {error.message}") from error
        action.required = False
    return taken


def _taken(action: argparse.Action, value: Any, value_of: Callable[[argparse.Action, str], Any]) -> Any:
    if action.nargs == 0 or isinstance(value, bool) or value is None:
        if action.nargs == 0 and isinstance(value, bool):
            return value
        expected = "true or false" if action.nargs == 0 else "a value"
        raise argparse.ArgumentError(None, f"expected {expected}, found {short_repr(value)}")
    several = action.nargs not in (None, "?")
    if several != isinstance(value, list) or isinstance(value, dict):
        expected = "a list" if several else "one value"
        raise argparse.ArgumentError(None, f"expected {expected}, found {short_repr(value)}")
    if isinstance(action.nargs, int) and len(value) != action.nargs:
        raise argparse.ArgumentError(None, f"expected {action.nargs} values, found {short_repr(value)}")
    return [value_of(action, str(each)) for each in value] if several else value_of(action, str(value))
