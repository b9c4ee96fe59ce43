"""The command `blip3o-dit`: finds the command that was named, and imports only that one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from blip3o_dit.cli.command import run_named

# In the order of their use: modules of this package with `add_arguments(parser)` and `run(arguments)`
COMMANDS = {
    "extract": "pictures become an embedding store: EVA-CLIP and CLIP tokens",
    "inspect": "say what is in a store or pickle, and draw a few samples, or what a model or run is",
    "train": "train the diffusion transformer on an embedding store or pickle",
    "generate": "generate CLIP tokens for the samples of an embedding store or pickle, or for pictures",
    "evaluate": "measure trained models beside baselines on held-out samples, and write a report",
    "plot": "draw the training curves of one run, or of several in one figure",
    "distill": "teach a copy of a trained model to generate in a few network calls",
    "convert": "write files of embeddings as one embedding store",
    "export-embeddings": "write an embedding store as .npz, .safetensors, .parquet or the documented .pkl",
    "merge": "write the samples of several embedding stores as one",
    "append": "add the samples of other embedding stores whose keys are new to a store",
    "verify": "read all of an embedding store, check every checksum, and name every damaged file",
}


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        return run_named(words[0], words[1:], prog=f"blip3o-dit {words[0]}", description=COMMANDS[words[0]])
    parser = argparse.ArgumentParser(
        prog="blip3o-dit",
        description="Generate CLIP tokens from EVA-CLIP tokens by flow matching.",
        epilog="\n".join(
            [
                "commands, in the order of their use:",
                *(f"  {name:<18} {what}" for name, what in COMMANDS.items()),
                "",
                "for example:",
                "  blip3o-dit extract images --output embeddings/pictures",
                "  blip3o-dit train --embeddings_path embeddings/pictures --output_dir checkpoints/run",
                "  blip3o-dit evaluate checkpoints/run embeddings/pictures",
            ]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="blip3o-dit COMMAND ..., blip3o-dit COMMAND --help",
    )
    parser.add_argument("--version", action="version", version=f"blip3o-dit {_version()}")
    parser.add_argument("command", nargs="?", choices=list(COMMANDS), metavar="COMMAND", help="see below")
    parser.parse_args(words)
    parser.print_help()
    return 0


def _version() -> str:
    try:
        return version("blip3o-dit")
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
