"""Settings as dataclass fields: default, help text and accepted values stated in one place.

`cli/arguments.py` makes a command-line flag of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field, fields
from typing import Any

from blip3o_dit.utils.validation import check_bool, check_name, check_text


def setting(
    default: Any,
    help_text: str,
    *,
    group: str | None = None,
    choices: tuple[str, ...] | None = None,
    check: Callable[[str, Any], None] | None = None,
    **flag: Any,
) -> Any:
    """A dataclass field; `default` may be `dataclasses.MISSING`, `choices` are the names it takes.

    `group` is the heading of the help that it stands under, with the fields after it. `check` raises
    ValueError, given the field's name and a bad value. `flag` is what a class checks by itself.
    """
    known = {"help": help_text, "group": group, "choices": choices, "check": check}
    return field(default=default, metadata=known | flag)


def check_settings(config: Any) -> None:
    """Refuse (ValueError) values of another type, unknown names, and what a field's own check refuses."""
    for option in fields(config):
        name, kind, value = option.name, str(option.type), getattr(config, option.name)
        if value is None and kind.endswith("| None"):
            continue
        if kind.startswith("bool"):
            check_bool(name, value)
        if kind.startswith("str"):
            check_text(name, value)
        if option.metadata["choices"]:
            check_name(name, value, option.metadata["choices"])
        if option.metadata["check"]:
            option.metadata["check"](name, value)
