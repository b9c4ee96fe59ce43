"""Start-up: seconds until a program is ready, in fresh processes that take turns."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.evaluation import write_store
from benchmarks.measure import Row, alternate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, nargs="+", default=[64, 512], help="sizes of the stores")


def run(arguments: argparse.Namespace) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        stores = {count: Path(folder) / str(count) for count in arguments.samples}
        for count, path in stores.items():
            write_store(path, count)
        programs = {
            "import blip3o_dit": _python("import blip3o_dit"),
            "import torch": _python("import torch"),
            "import BLIP3oDiTModel": _python("from blip3o_dit import BLIP3oDiTModel"),
            "import diffusers' LuminaNextDiT2DModel": _python("from diffusers import LuminaNextDiT2DModel"),
            "blip3o-dit train --help": _python(_MAIN + "main(['train', '--help'])"),
        }
        for count, path in stores.items():
            words = ["train", "--embeddings_path", str(path), "--output_dir", f"{folder}/out", "--debug"]
            words += ["--dry_run", "--source", "noise"]
            programs[f"first gradients, {count} samples"] = _python(_MAIN + f"main({words})")
        seconds = alternate(programs, arguments.rounds)
    return [{"until": name, "seconds": value} for name, value in seconds.items()]


_MAIN = "from blip3o_dit.cli.main import main; "


def _python(code: str) -> Callable[[], None]:
    def run_it() -> None:
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

    return run_it
