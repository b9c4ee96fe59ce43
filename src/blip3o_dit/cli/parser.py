"""The parser of every command: flags in groups, one line for a mistake, one spelling for each flag.

Flags are written with underscores. Hyphens do as well, and so do the names that a flag had before.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from blip3o_dit.utils.json_files import escaped

MAX_MESSAGE = 500


class CommandParser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` for one command; `examples` are whole command lines of it."""

    def __init__(self, *, examples: Sequence[str] = (), **keywords: Any) -> None:
        epilog = "\n".join(["for example:", *(f"  {example}" for example in examples)]) if examples else None
        ours: dict[str, Any] = {"formatter_class": _Formatter, "allow_abbrev": False, "epilog": epilog}
        super().__init__(**(ours | keywords))
        self._former_names: dict[str, str] = {}

    def group(self, title: str) -> argparse._ArgumentGroup:
        """The group of this title, a new one the first time."""
        known = (group for group in self._action_groups if group.title == title)
        return next(known, None) or self.add_argument_group(title)

    def add_config(self) -> None:
        """--config, a file of flags: see `flag_file.py`."""
        self.add_argument(
            "--config",
            metavar="FILE",
            help="YAML with flags and their values; those given beside it win (default: none)",
        )

    def add_former_name(self, former: str, now: str) -> None:
        """Let `--former` stand for `--now`, without a line in the help."""
        self._former_names[f"--{former}"] = f"--{now}"

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, but a word that is not known comes with one that may be meant."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._hint(unknown[0])}")
        return found

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, of words in any spelling."""
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        words = [*map(self._spelled, words[:end]), *words[end:]]
        self._take_file(words[:end])
        return super().parse_known_args(words, namespace)

    def _take_file(self, words: Sequence[str]) -> None:
        """The flags of a --config file become what is taken where a flag is not given."""
        given = argparse.ArgumentParser(
            add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS
        )
        given.add_argument("--config", nargs="?")
        file = getattr(given.parse_known_args(words)[0], "config", None)
        if file is None or "--config" not in self._option_string_actions:
            return
        from blip3o_dit.cli.flag_file import read_flags, take_flags

        try:
            values = read_flags(Path(file))
            self.set_defaults(**take_flags(Path(file), values, self._action_of, self._checked))
        except ValueError as error:
            self.error(str(error))

    def _action_of(self, name: str) -> argparse.Action | None:
        return self._option_string_actions.get(self._spelled(f"--{name}"))

    def _checked(self, action: argparse.Action, word: str) -> Any:
        value = self._get_value(action, word)
        self._check_value(action, value)
        return value

    def error(self, message: str) -> NoReturn:
        """One line and status 2; argparse would show the usage first, of dozens of flags."""
        message = escaped(" ".join(message.split()))
        if len(message) > MAX_MESSAGE:
            message = f"{message[:MAX_MESSAGE]} ..."
        self.exit(2, f"error: {message}; see {self.prog} --help\n")

    def format_usage(self) -> str:
        """What has to be given; the flags are in the groups below."""
        needed = [action for action in self._actions if action.required or not action.option_strings]
        formatter = argparse.HelpFormatter(prog=f"{self.prog} [FLAGS]")
        formatter.add_usage(None, needed, [])
        return formatter.format_help()

    def format_help(self) -> str:
        """The help, with the short usage."""
        self.usage = self.format_usage().removeprefix("usage: ").strip().replace("%", "%%")
        return super().format_help()

    def _spelled(self, word: str) -> str:
        """The word as the flag is spelled here, if it is one of another spelling."""
        if not word.startswith("--"):
            return word
        name, equals, value = word.partition("=")
        known = {_plain(flag): flag for flag in self._option_string_actions}
        known |= {former: known[now] for former, now in self._former_names.items()}
        return known.get(_plain(name), name) + equals + value

    def _hint(self, word: str) -> str:
        if word.startswith("--"):
            near = difflib.get_close_matches(_plain(word.partition("=")[0]), self._option_string_actions, 1)
            return f" (did you mean {near[0]}?)" if near else ""
        several = Path(word).exists() or "*" in word
        return " (quote a pattern of files, as 'shards/*.tar')" if several else ""


def _plain(flag: str) -> str:
    """--no-picture and --no_picture alike."""
    return "--" + flag.removeprefix("--").replace("-", "_")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Examples keep their lines; a default that the help text does not state is added."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        stated = "(default" in (action.help or "") or action.default is argparse.SUPPRESS
        if stated or not action.option_strings or action.default is None or action.nargs == 0:
            return action.help
        return f"{action.help} (default: %(default)s)"


class OnOff(argparse.Action):
    """A switch that can be turned off again: `--NAME` and `--no_NAME`."""

    def __init__(self, option_strings: Sequence[str], dest: str, **keywords: Any) -> None:
        both = [*option_strings, *(f"--no_{flag.removeprefix('--')}" for flag in option_strings)]
        super().__init__(both, dest, nargs=0, **keywords)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Note which of the two was given."""
        setattr(namespace, self.dest, not (option_string or "").startswith("--no_"))
