"""The command `blip3o-dit`: finds the command that was named, and imports only that one.

Nothing is imported before `main` is called, which can then say in one line that it was interrupted.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # without `typing`
if TYPE_CHECKING:
    from blip3o_dit.cli.parser import CommandParser

# In the order of their use: modules of this package with `add_arguments(parser)` and `run(arguments)`
COMMANDS = {
    "extract": "pictures become an embedding store: EVA-CLIP and CLIP tokens",
    "inspect": "say what is in a store or pickle, and draw a few samples, or what a model or run is",
    "train": "train the diffusion transformer on an embedding store or pickle",
    "generate": "generate CLIP tokens for the samples of an embedding store or pickle, or for pictures",
    "translate": "turn one embedding model's vectors, one a sample, into another's, and say how sure each is",
    "calibrate": "fit how much noise a trained model should sample from, and write it into its folder",
    "demo": "serve a page on this machine to try a model on pictures or samples of a store",
    "evaluate": "measure trained models beside baselines on held-out samples, and write a report",
    "train-decoder": "train a small network that turns the target tokens of a store into pictures",
    "decode": "write generated or true tokens as pictures, with a decoder",
    "plot": "draw the training curves of one run, or of several in one figure",
    "distill": "teach a copy of a trained model to generate in a few network calls",
    "export": "write a trained model as one file that torch or onnxruntime runs without this package",
    "convert": "write files of embeddings as one embedding store",
    "export-embeddings": "write an embedding store as .npz, .safetensors, .parquet or the documented .pkl",
    "merge": "write the samples of several embedding stores as one",
    "append": "add the samples of other embedding stores whose keys are new to a store",
    "push": "send a model or an embedding store to the Hugging Face hub, or to s3:// and others",
    "verify": "read all of an embedding store, check every checksum, and name every damaged file",
}


EXAMPLES = (
    "blip3o-dit extract images --output embeddings/store",
    "blip3o-dit inspect embeddings/store",
    "blip3o-dit train --embeddings_path embeddings/store --output_dir checkpoints/run --size small",
    "blip3o-dit generate checkpoints/run embeddings/store generated --split eval",
    "blip3o-dit evaluate checkpoints/run embeddings/store",
)


def main(argv: list[str] | None = None) -> int:
    """Run the command that the words name; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "_ARGCOMPLETE" in os.environ:
        complete()
    if words and words[0] in COMMANDS:
        return run_script(words[0], f"blip3o-dit {words[0]}", words[1:])
    parser = _bare_parser()
    parser.add_argument("command", nargs="?", choices=list(COMMANDS), metavar="COMMAND", help="see above")
    parser.parse_args(words)
    parser.print_help()
    return 0


def run_script(command: str, prog: str, argv: list[str] | None = None) -> int:
    """Run one command, under the name of a script; returns the exit status."""
    try:
        from blip3o_dit.cli.command import run_named

        return run_named(command, argv, prog=prog, description=COMMANDS[command])
    except KeyboardInterrupt:  # before `run_command` was there to say so
        sys.stderr.write("stopped: interrupted\n")
        return 130


def complete() -> None:
    """Answer the shell, which asks by environment variables what a line may go on with, and exit."""
    import argcomplete

    from blip3o_dit.cli.command import command_module

    parser, words = _bare_parser(), os.environ["COMP_LINE"].split()
    commands = parser.add_subparsers()
    for name, what in COMMANDS.items():
        command = commands.add_parser(name, help=what)
        if name in words:
            command_module(name).add_arguments(command)
    argcomplete.autocomplete(parser)


def _bare_parser() -> CommandParser:
    from blip3o_dit import __version__
    from blip3o_dit.cli.parser import CommandParser

    listed = "\n".join(f"  {name:<18} {what}" for name, what in COMMANDS.items())
    parser = CommandParser(
        prog="blip3o-dit",
        description="Generate CLIP tokens from EVA-CLIP tokens by flow matching.\n\n"
        f"commands, in the order of their use (blip3o-dit COMMAND --help):\n{listed}",
        examples=EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"blip3o-dit {__version__}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
