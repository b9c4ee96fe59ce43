"""python -m benchmarks PART: speed, memory and known answers, as tables.

`python -m benchmarks short` runs every part on small sizes; without it each part runs on its full ones, on
a GPU where there is one. `--json FILE` keeps the rows with the machine and the command;
`python -m benchmarks tables FILE` prints them all.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from types import ModuleType

from benchmarks import (
    generation,
    known_answers,
    loading,
    low_memory,
    memory,
    products,
    scaling,
    soak,
    startup,
    training_step,
)
from benchmarks.measure import described, machine, markdown, record, tables

PARTS: dict[str, ModuleType] = {
    "generation": generation,
    "training": training_step,
    "loading": loading,
    "startup": startup,
    "memory": memory,
    "low-memory": low_memory,
    "scaling": scaling,
    "products": products,
    "known-answers": known_answers,
    "soak": soak,
}

SHORT = {
    "generation": "--layers 2 --calls 2 --rounds 3",
    "training": "--sizes 'default width' --layers 1 --batch 8 --rounds 3",
    "loading": "--gigabytes 0.3",
    "startup": "--rounds 1 --samples 32",
    "memory": "--layers 1 --steps 2",
    "known-answers": "--steps 300",
}


def main(words: list[str]) -> None:
    if words[:1] == ["short"]:
        for part, given in SHORT.items():
            print(f"\n## {part}\n", flush=True)
            main([part, *shlex.split(given), *words[1:]])
        return
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    for name, module in PARTS.items():
        sub = parts.add_parser(name, help=module.__doc__, description=module.__doc__)
        module.add_arguments(sub)
        sub.add_argument("--json", type=Path, help="file to keep the rows in, beside other parts'")
        sub.add_argument("--rows", action="store_true", help=argparse.SUPPRESS)  # for their own processes
    parts.add_parser("tables", help="print the tables of a JSON file").add_argument("file", type=Path)
    arguments = parser.parse_args(words)
    if arguments.part == "tables":
        print(tables(arguments.file), end="")
        return
    rows = PARTS[arguments.part].run(arguments)
    if arguments.rows:
        print(json.dumps(rows))
        return
    print(markdown(rows))
    print("\n" + described(machine()), flush=True)
    if arguments.json:
        record(arguments.json, _command(words), rows)


def _command(words: list[str]) -> str:
    """What was asked for, without where to put it."""
    to_files = [i for i, word in enumerate(words) if word in ("--json", "--figure")]
    kept = [word for i, word in enumerate(words) if i not in to_files and i - 1 not in to_files]
    return "python -m benchmarks " + shlex.join(kept)


if __name__ == "__main__":
    main(sys.argv[1:])
