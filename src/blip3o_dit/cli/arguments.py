"""Flags of several commands: those made from a dataclass, which states help text and default, and a few more.

Not transformers' `HfArgumentParser`: it always has a value, while a resumed run must know what was not given.
"""

from __future__ import annotations

import argparse
import logging
import os
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import UnionType
from typing import Any

from blip3o_dit.cli.parser import CommandParser, OnOff

# Compute capability of the first GPUs with TF32 (Ampere).
MIN_TF32_CAPABILITY = (8, 0)

logger = logging.getLogger(__name__)


def add_flags(
    parser: CommandParser,
    settings: type,
    *,
    negatable: bool = False,
    leave_out: Sequence[str] = (),
    **changes: dict[str, Any],
) -> None:
    """A flag for each field of a dataclass that has a help text in its metadata (see `utils/settings.py`).

    A flag that was not given is left out of the parsed arguments, so that its default is the dataclass's.
    A field that names no group is in that of the field before it.

    Args:
        negatable: switches can also be turned off, `--no_NAME`.
        leave_out: fields without a flag.
        changes: by field, arguments of `add_argument` instead of those derived from the field.
    """
    types, place = typing.get_type_hints(settings), parser.add_argument
    for option in fields(settings):
        if option.metadata.get("group"):
            place = parser.group(option.metadata["group"]).add_argument
        if "help" in option.metadata and option.name not in leave_out:
            keywords = _keywords(option, types[option.name], negatable) | changes.get(option.name, {})
            place(f"--{option.name}", **keywords)


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
    elif "(default" not in keywords["help"] and (kind is not bool or negatable):
        keywords["help"] += f" (default: {_shown(option.default)})"
    if kind in (bool, bool | None):
        return keywords | {"action": OnOff if negatable else "store_true"}
    if typing.get_origin(kind) is tuple:
        kind, *others = typing.get_args(kind)
        keywords["nargs"] = "*" if others == [...] else 1 + len(others)
    elif isinstance(kind, UnionType):  # `int | None`: a flag that is given has a value
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if not option.metadata["choices"]:
        keywords["metavar"] = {int: "N", float: "X"}.get(kind, option.name.rpartition("_")[2].upper())
    return keywords | {"type": kind, "choices": option.metadata["choices"]}


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    if default in ("", None):
        return "none"
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def add_push(group: argparse._ActionsContainer) -> None:
    """--push_to_hub, for commands that make a model."""
    group.add_argument(
        "--push_to_hub",
        metavar="OWNER/NAME",
        help="send the finished model to the Hugging Face hub (default: do not)",
    )
    group.add_argument("--private", action="store_true", help="make that repository a private one")


@contextmanager
def pushed(arguments: argparse.Namespace, folder: Path) -> Iterator[None]:
    """Around what makes the model in a folder, which is then sent where --push_to_hub says.

    Whether the hub takes it is found out first: it would be a pity after days of training.
    """
    if arguments.private and not arguments.push_to_hub:
        raise ValueError("--private: expected --push_to_hub beside it, found none")
    sends = arguments.push_to_hub is not None and os.environ.get("RANK", "0") == "0"
    if sends:
        from blip3o_dit.utils.hub import Repository

        Repository(arguments.push_to_hub, private=arguments.private)
    yield
    if sends:
        from blip3o_dit.publish import push_to_hub

        page = push_to_hub(folder, arguments.push_to_hub, private=arguments.private)
        logger.info("the model is at %s", page)


def add_tf32(parser: argparse._ActionsContainer) -> None:
    """--tf32, off unless asked for: float32 figures are what those of other machines are compared with.

    TF32 keeps 10 bits of a factor's mantissa, where float32 keeps 23. bfloat16 keeps 7 and is faster still.
    """
    parser.add_argument(
        "--tf32", action="store_true", help="round the factors of float32 products to TF32, faster on a GPU"
    )


def add_weights(parser: argparse._ActionsContainer) -> None:
    """--weights: which of a model's."""
    parser.add_argument(
        "--weights",
        choices=("auto", "ema", "raw"),
        default="auto",
        help="averaged (ema) or last (raw) weights (default: auto, averaged where there are any)",
    )


def add_no_calibrate(parser: argparse._ActionsContainer) -> None:
    """--no_calibrate: a `noise_scale` of 1."""
    parser.add_argument(
        "--no_calibrate",
        dest="noise_scale",
        action="store_const",
        const=1.0,
        default=argparse.SUPPRESS,
        help="leave out the scale of the noise that was fitted after training",
    )


def use_tf32(device: str) -> None:
    """Let this process round so. Raises ValueError where no GPU with TF32 would be used."""
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        raise ValueError("--tf32: expected a GPU, found the CPU")
    found = torch.cuda.get_device_capability()
    if found < MIN_TF32_CAPABILITY:
        raise ValueError(
            "--tf32: expected compute capability {}.{} or newer, found {}.{}".format(
                *MIN_TF32_CAPABILITY, *found
            )
        )
    torch.set_float32_matmul_precision("high")
