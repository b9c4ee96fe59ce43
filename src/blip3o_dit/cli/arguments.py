"""Command-line flags made from a dataclass of settings, where help text and default are stated once.

Not transformers' `HfArgumentParser`: it always has a value, while a resumed run must know what was not given.
"""

from __future__ import annotations

import argparse
import typing
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from types import UnionType
from typing import Any


def add_flags(
    parser: argparse.ArgumentParser,
    settings: type,
    *,
    negatable: bool = False,
    leave_out: Sequence[str] = (),
    **changes: dict[str, Any],
) -> None:
    """A flag for each field of a dataclass that has a help text in its metadata (see `utils/settings.py`).

    A flag that was not given is left out of the parsed arguments, so that its default is the dataclass's.

    Args:
        negatable: switches can also be turned off, `--no-NAME`.
        leave_out: fields without a flag.
        changes: by field, arguments of `add_argument` instead of those derived from the field.
    """
    types = typing.get_type_hints(settings)
    for option in fields(settings):
        if "help" in option.metadata and option.name not in leave_out:
            keywords = _keywords(option, types[option.name], negatable) | changes.get(option.name, {})
            parser.add_argument(option.metadata.get("spelling", f"--{option.name}"), **keywords)


def given_settings(arguments: argparse.Namespace, settings: type) -> dict[str, Any]:
    """The flags of this dataclass that were given, by field; lists as tuples."""
    names = [option.name for option in fields(settings) if option.name in arguments]
    given = {name: getattr(arguments, name) for name in names}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def _keywords(option: Field[Any], kind: Any, negatable: bool) -> dict[str, Any]:
    """What `add_argument` is told of a field of this type."""
    keywords: dict[str, Any] = {"default": argparse.SUPPRESS, "help": option.metadata["help"]}
    if option.default is MISSING:
        keywords["required"] = True
    elif option.default not in ("", None) and (kind is not bool or negatable):
        keywords["help"] += f" (default: {_shown(option.default)})"
    if kind is bool:
        return keywords | {"action": argparse.BooleanOptionalAction if negatable else "store_true"}
    if typing.get_origin(kind) is tuple:
        kind, *others = typing.get_args(kind)
        keywords["nargs"] = "*" if others == [...] else 1 + len(others)
    elif isinstance(kind, UnionType):  # `int | None`: a flag that is given has a value
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    return keywords | {"type": kind, "choices": option.metadata.get("choices")}


def _shown(default: Any) -> str:
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
