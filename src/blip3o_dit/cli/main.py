"""The command `blip3o-dit`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from blip3o_dit.cli import (
    append,
    convert,
    distill,
    evaluate,
    export_embeddings,
    extract,
    generate,
    inspect,
    merge,
    train,
    verify,
)
from blip3o_dit.cli.command import run_command, set_up_logging

COMMANDS = {
    "extract": extract,
    "inspect": inspect,
    "train": train,
    "distill": distill,
    "generate": generate,
    "evaluate": evaluate,
    "convert": convert,
    "export-embeddings": export_embeddings,
    "merge": merge,
    "append": append,
    "verify": verify,
}


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    set_up_logging()
    parser = argparse.ArgumentParser(prog="blip3o-dit", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        sub = commands.add_parser(
            name, help=module.DESCRIPTION, description=module.DESCRIPTION, allow_abbrev=False
        )
        module.add_arguments(sub)
    arguments = parser.parse_args(words)
    return run_command(lambda: COMMANDS[arguments.command].run(arguments))


if __name__ == "__main__":
    sys.exit(main())
