"""Generation for conditions that come batch by batch and have no true tokens beside them: those of images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from blip3o_dit.data.checks import Record
from blip3o_dit.inference.generated_store import GeneratedStore
from blip3o_dit.inference.output import POOLED, TOKENS, check_output, is_file_output, write_arrays
from blip3o_dit.inference.pipeline import BLIP3oInference

Batch = tuple[Tensor, list[Record]]


class Conditions(Protocol):
    """Conditions [n, L, C_eva] and their records, in batches; `most` bounds how many come in all."""

    @property
    def most(self) -> int: ...

    @property
    def encoder(self) -> dict[str, Any]:
        """What is known of the tower that makes them."""

    def batches(self, batch_size: int) -> Iterable[Batch]: ...


def generate_for_conditions(
    inference: BLIP3oInference,
    conditions: Conditions,
    output_path: str | Path,
    *,
    batch_size: int = 8,
    pooled: bool = False,
    overwrite: bool = False,
    num_inference_steps: int | None = None,
    solver: str | None = None,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Generate for all conditions, in one process, and write what `generate_from_dataset` writes but for the
    true tokens and metrics, which there are none of. A condition's sample index is its number.

    Args:
        batch_size, pooled, overwrite: as there.
        num_inference_steps, solver, guidance_scale, guidance_interval, seed: see `BLIP3oDiTModel.generate`.
        about: more of how the tokens were made, for the record beside them.

    Returns: `config`, whose `num_samples` says how many there were, and for a file its arrays.

    Raises:
        ValueError: one line naming what was expected and found.
    """
    path = Path(output_path)
    sampling: dict[str, Any] = {
        "solver": solver,
        "guidance_scale": guidance_scale,
        "guidance_interval": guidance_interval,
        "seed": seed,
    }
    check_output(path, overwrite=overwrite, pooled=pooled)
    sizes = inference.model.config.data_sizes
    kept: _KeptShards | _KeptArrays
    claimed: AbstractContextManager[None]
    if is_file_output(path):
        claimed, kept = nullcontext(), _KeptArrays(sizes, conditions.most, pooled=pooled)
    else:
        store = GeneratedStore(path, sizes, encoder=conditions.encoder)
        size = store.shard_size(conditions.most, batch_size=batch_size, processes=1)
        claimed, kept = store.claimed(overwrite=overwrite), _KeptShards(store, size)
    with claimed, inference.bar(conditions.most, progress) as bar:
        for eva, records in conditions.batches(batch_size):
            numbers = range(kept.count, kept.count + len(eva))
            generated = inference.generate(eva, num_inference_steps, sample_index=numbers, **sampling)
            kept.add(eva, generated, records)
            bar.update(len(eva))
        config = inference.describe_sampling(num_inference_steps, **sampling) | {"num_samples": kept.count}
        return kept.finish(path, config | dict(about or {}))


class _KeptShards:
    """Fills the shards of a store."""

    def __init__(self, store: GeneratedStore, size: int) -> None:
        self.store = store
        self.size = size
        self.count = 0
        self.entries: list[dict[str, Any]] = []
        self.pending: list[tuple[Tensor, Tensor]] = []
        self.records: list[Record] = []

    def add(self, eva: Tensor, generated: Tensor, records: list[Record]) -> None:
        self.pending.append((eva, generated))
        self.records += records
        self.count += len(records)
        if len(self.records) >= self.size:
            self._write()

    def finish(self, path: Path, config: dict[str, Any]) -> dict[str, Any]:
        if self.records:
            self._write()
        self.store.finish(self.entries, config)
        return {"config": config, "generation_metrics": None}

    def _write(self) -> None:
        eva, generated = (torch.cat(side) for side in zip(*self.pending, strict=True))
        first = self.count - len(self.records)
        self.entries.append(self.store.write(len(self.entries), first, eva, generated, self.records))
        self.pending, self.records = [], []


class _KeptArrays:
    """Fills arrays for at most so many samples."""

    def __init__(self, sizes: tuple[int, int, int], most: int, *, pooled: bool) -> None:
        tokens, condition, target = sizes
        self.pooled = pooled
        self.count = 0
        self.records: list[Record] = []
        shapes = (
            {POOLED: (target,)}
            if pooled
            else {TOKENS: (tokens, target), "eva_embeddings": (tokens, condition)}
        )
        self.arrays = {name: np.empty((most, *shape), dtype=np.float32) for name, shape in shapes.items()}

    def add(self, eva: Tensor, generated: Tensor, records: list[Record]) -> None:
        rows = slice(self.count, self.count + len(records))
        values = (
            {POOLED: generated.mean(dim=1)} if self.pooled else {TOKENS: generated, "eva_embeddings": eva}
        )
        for name, value in values.items():
            self.arrays[name][rows] = value.numpy()
        self.records += records
        self.count = rows.stop

    def finish(self, path: Path, config: dict[str, Any]) -> dict[str, Any]:
        results = {
            **{name: values[: self.count] for name, values in self.arrays.items()},
            "keys": [record["key"] for record in self.records],
            "captions": [record.get("caption") for record in self.records],
            "config": config,
            "generation_metrics": None,
        }
        write_arrays(path, results)
        return results
