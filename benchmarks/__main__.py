"""python -m benchmarks PART: speed, memory and quality, as tables.

`python -m benchmarks short` runs the speed and memory tables on small sizes; without it each part runs on its
full ones, on a GPU where there is one.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.measure import described, machine, markdown, record, tables

# A part's module is imported only when it is asked for: gpu-check runs without diffusers and matplotlib.
# Modules with `add_arguments(parser)` and `run(arguments) -> rows`:
TABLES = {
    "generation": "sampling beside diffusers' class and scheduler with the same weights",
    "training": "a training step beside diffusers' class in a loop written by hand",
    "split": "what a training step and a generation spend their time on, by a profiler",
    "counts": "weights read, passes over activations and launches of one network call on a GPU, by counting",
    "loading": "reading a store: samples per second, memory, time to the first batch",
    "remote": "a store at an address: what an epoch reads from there, by samples and by whole shards",
    "scale": "a store of 100 million samples, imitated: opening, split, first batches; seconds and memory",
    "memory": "peak memory of training and generation beside what was forecast",
    "evaluation": "time and peak memory of an evaluation at full widths",
    "migration": "an index of translated vectors: recall beside ridge's, and what the spread is good for",
    "quantization": "quantised weights: energy scores beside float32's, time of a call, bytes",
    "store-dtypes": "digits from stores of float32, 16 bits and int8: energy scores beside float32's",
    "fine-tuning": "digits 0 to 4 from scratch, and from a model of 5 to 9: steps to the same energy score",
    "checkpoints": "how long a run stands still for a checkpoint, and its steps while one is written",
    "restarts": "a training under torchrun whose workers are killed or hang, beside an undisturbed one",
    "soak": "killed, stopped and damaged trainings beside one that nobody disturbed",
}
# Modules with `main(words) -> exit status`, which print what they find themselves:
PROGRAMS = {
    "extraction": "extraction of mixed images: skip list, time, kills, processes, memory",
    "quality": "recipes side by side on four data sets, as JSON lines",
    "quality-table": "tables and figure of these JSON lines",
    "calibration": "spread over error and energy score with and without the fitted scale of the noise",
    "real-towers": "recipes on real pretrained towers and photographs, out of packages that it fetches",
    "goldens": "small trainings beside what they computed when they were recorded, to the last bit",
    "gpu-check": "whether a GPU computes what the CPU does, and how near it is to its limits",
}
OF_FILES = (
    "`tables FILE` prints what --json kept; --into PAGE puts it under the page's last heading, ## Tables.",
    "`again FILE` runs its commands (of --parts) on this machine, and keeps their rows beside the others'.",
)
SHORT = {
    "generation": "--layers 2 --calls 2 --rounds 3",
    "training": "--sizes 'default width' --layers 1 --batch 8 --rounds 3",
    "loading": "--gigabytes 0.3",
    "memory": "--layers 1 --steps 2",
}


def main(words: Sequence[str]) -> int:
    listed = [f"  {name:14} {what}" for name, what in (TABLES | PROGRAMS).items()]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog="\n".join(["parts:", *listed, "", *OF_FILES]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", choices=[*TABLES, *PROGRAMS, "short", "tables", "again"], metavar="PART")
    part = parser.parse_args(words[:1]).part
    rest = list(words[1:])
    if part in PROGRAMS:
        return _module(part).main(rest)
    if part == "short":
        _run_short(rest)
    elif part == "tables":
        _print_tables(rest)
    elif part == "again":
        _run_again(rest)
    else:
        _run_table(part, rest)
    return 0


def _run_short(words: list[str]) -> None:
    for part, small in SHORT.items():
        print(f"\n## {part}\n", flush=True)
        _run_table(part, [*shlex.split(small), *words])


def _run_table(part: str, words: list[str]) -> None:
    module = _module(part)
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {part}", description=module.__doc__)
    module.add_arguments(parser)
    parser.add_argument("--json", type=Path, help="file to keep the rows in, with machine and command")
    parser.add_argument("--rows", action="store_true", help=argparse.SUPPRESS)  # for their own processes
    arguments = parser.parse_args(words)
    rows = module.run(arguments)
    if arguments.rows:
        print(json.dumps(rows))
        return
    print(markdown(rows))
    print("\n" + described(machine()), flush=True)
    if arguments.json:
        record(arguments.json, _command(part, words), rows)


def _print_tables(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks tables")
    parser.add_argument("file", type=Path, help="as --json wrote it")
    parser.add_argument("--into", type=Path, help="page whose last heading is ## Tables")
    arguments = parser.parse_args(words)
    printed = tables(arguments.file)
    if arguments.into is None:
        print(printed, end="")
        return
    above, heading, _ = arguments.into.read_text().partition("\n## Tables\n")
    arguments.into.write_text(f"{above}{heading or chr(10) + '## Tables' + chr(10)}\n{printed}")


def _run_again(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks again")
    parser.add_argument("file", type=Path, help="as --json wrote it")
    parser.add_argument("--parts", nargs="+", choices=TABLES, default=list(TABLES))
    arguments = parser.parse_args(words)
    for command in json.loads(arguments.file.read_text()):
        part, *given = shlex.split(command)[3:]
        if part in arguments.parts:
            print(f"\n## {command}\n", flush=True)
            _run_table(part, [*given, "--json", str(arguments.file)])


def _module(part: str) -> Any:
    return import_module("benchmarks." + part.replace("-", "_"))


def _command(part: str, words: list[str]) -> str:
    """What was asked for, without where to put it."""
    kept = [word for i, word in enumerate(words) if word != "--json" and words[i - 1 : i] != ["--json"]]
    return shlex.join(["python", "-m", "benchmarks", part, *kept])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
