"""Stores of other dtypes: models trained on them, measured on the same held-out samples of the float32 store.

Every model has the same seed, noise and order of samples, and all draw the same noise, so that differences
are paired. Conditions and targets that models are measured with are the float32 ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from benchmarks.measure import Row
from benchmarks.quality_data import MemorySource
from benchmarks.quantization import ENDS
from blip3o_dit.data.choices import STORE_DTYPES
from blip3o_dit.data.dataset import split_permutation
from blip3o_dit.data.int8_tokens import restored
from blip3o_dit.data.manifest import sample_bytes
from blip3o_dit.data.shard_writer import to_disk
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.evaluation.predictions import Predictions, collect_predictions
from blip3o_dit.evaluation.samplers import ModelSampler
from blip3o_dit.evaluation.scores import no_bar, paired_differences

# The reference first.
DTYPES = ("float32", "float16", "bfloat16", "int8")
assert set(DTYPES) == set(STORE_DTYPES)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=400, help="of each training")
    parser.add_argument("--store", help="a store of digits, as `make demo` leaves it (default: made here)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES[1:], default=DTYPES[1:])


def run(arguments: argparse.Namespace) -> list[Row]:
    return list(_rows(arguments))


def _rows(arguments: argparse.Namespace) -> Iterator[Row]:
    from benchmarks import quality  # needs matplotlib and scikit-learn

    data = _of_store(arguments.store) if arguments.store else quality.SETS["digits"]()
    truth = quality.truth_of(data)
    sizes = data.num_tokens, data.condition_dim, data.target_dim
    for seed in arguments.seeds:
        first: Predictions | None = None
        for dtype in ("float32", *arguments.dtypes):
            there = replace(data, eva=stored(data.eva, dtype), clip=stored(data.clip, dtype))
            model = quality.train_recipe(there, truth, {}, steps=arguments.steps, points=[], seed=seed)[1]
            found = collect_predictions(ModelSampler(model).with_calls("midpoint", 16), truth, no_bar)
            first = first or found
            plain = float(first.values["conditional.energy_score"].mean())
            above = paired_differences(found, first, truth)["conditional.energy_score"]
            yield {
                "measured": f"digits, {arguments.steps} steps, seed {seed}",
                "store": dtype,
                "bytes a sample": sample_bytes(sizes, dtype),
                "energy score": float(found.values["conditional.energy_score"].mean()),
                **{f"above float32 %{end}": 100 * above[name] / plain for name, end in ENDS.items()},
            }


def _of_store(path: str) -> MemorySource:
    """The demo's store in memory, with the samples held out that its towers did not learn from."""
    store = EmbeddingStore(path)
    everything = np.arange(len(store))
    labels = np.array([int(record["label"]) for record in store.records()])
    eva, clip = store.fetch(everything)
    held_out = np.isin(everything, split_permutation(len(store), eval_split=0.2, seed=0).eval)
    return MemorySource("digits", eva, clip, held_out, labels)


def stored(tokens: Tensor, dtype: str) -> Tensor:
    """What a store of this dtype gives back, float32."""
    on_disk = to_disk(Path("digits"), tokens, "tokens", dtype)
    return restored(on_disk) if dtype == "int8" else on_disk.float()
