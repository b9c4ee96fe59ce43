"""Generation for conditions that come batch by batch and have no true tokens beside them: those of images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from blip3o_dit.data.checks import Record
from blip3o_dit.inference.generated_store import GeneratedStore
from blip3o_dit.inference.output import POOLED, TOKENS, check_output, is_file_output, write_arrays
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.inference.request import Sampling
from blip3o_dit.inference.unfinished import Unfinished, file_claimed
from blip3o_dit.utils.kept_state import KeptState

Batch = tuple[Tensor, list[Record]]


class Conditions(Protocol):
    """Conditions [n, L, C_eva] and their records, in batches; `most` bounds how many come in all.

    `read` and `skipped` say what is done with: set, the batches go on from there.
    """

    read: int
    skipped: list[dict[str, str]]

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
    data: Mapping[str, Any],
    batch_size: int = 8,
    pooled: bool = False,
    overwrite: bool = False,
    about: Mapping[str, Any] | None = None,
    progress: bool = True,
    **sampling: Any,
) -> dict[str, Any]:
    """Generate for all conditions, in one process, and write what `generate_from_dataset` writes but for the
    true tokens and metrics, which there are none of. A condition's sample index is its number.

    Args:
        data: what tells these conditions from others.
        batch_size, pooled, overwrite: as there. sampling: as for `Sampling`.
        about: more of how the tokens were made, for the record beside them.

    Returns: `config`, whose `num_samples` says how many there were, and for a file its arrays.

    Raises:
        ValueError: one line naming what was expected and found.
    """
    path, how = Path(output_path), Sampling(**sampling)
    check_output(path, overwrite=overwrite, pooled=pooled)
    # A picture has no true tokens to be measured by.
    request = inference.request(dict(data), how, batch_size=batch_size, pooled=pooled, metrics=False)
    kept: _KeptShards | _KeptArrays
    if is_file_output(path):
        kept = _KeptArrays(path, conditions, inference.model.config.data_sizes, pooled=pooled)
    else:
        kept = _KeptShards(path, conditions, inference.model.config.data_sizes, batch_size)
    with kept.claimed(request, overwrite), inference.sample_bar(conditions.most, how, progress) as bar:
        kept.go_on()
        bar.found(conditions.read)
        for eva, records in conditions.batches(batch_size):
            numbers = range(kept.count, kept.count + len(eva))
            kept.add(eva, inference.generate(eva, sample_index=numbers, **asdict(how)), records)
            bar.sampled(len(eva))
        config = inference.describe_sampling(how) | {"num_samples": kept.count} | dict(about or {})
        return kept.finish(config, request)


class _Kept:
    """What was generated so far, kept for a run that goes on, with how far the conditions were read."""

    def __init__(self, conditions: Conditions, state: KeptState) -> None:
        self.conditions, self.state = conditions, state
        self.records: list[Record] = []

    def _about(self) -> dict[str, Any]:
        return {
            "records": self.records,
            "read": self.conditions.read,
            "skipped": self.conditions.skipped,
        }

    def _read(self, about: Mapping[str, Any]) -> None:
        self.records = about["records"]
        self.conditions.read, self.conditions.skipped[:] = about["read"], about["skipped"]


class _KeptShards(_Kept):
    """Fills the shards of a store."""

    def __init__(
        self, path: Path, conditions: Conditions, sizes: tuple[int, int, int], batch_size: int
    ) -> None:
        self.store = GeneratedStore(path, sizes, encoder=conditions.encoder)
        super().__init__(conditions, KeptState(self.store.state_file("state")))
        self.size = self.store.shard_size(conditions.most, batch_size=batch_size, processes=1)
        self.count = 0
        self.entries: list[dict[str, Any]] = []
        self.pending: list[tuple[Tensor, Tensor]] = []

    def claimed(self, request: dict[str, Any], overwrite: bool) -> AbstractContextManager[int]:
        return self.store.claimed(request, self.size, overwrite=overwrite)

    def go_on(self) -> None:
        """From the shards that are whole and what was in none yet, unless one of these has been damaged."""
        found = self.state.load()
        if found is None:
            return
        tensors, about = found
        entries = [self.store.written(number) for number in range(about["shards"])]
        if any(entry is None for entry in entries):
            return
        self._read(about)
        self.entries = [entry for entry in entries if entry is not None]
        self.pending = [(tensors["eva"], tensors["tokens"])]
        self.count = sum(entry["num_samples"] for entry in self.entries) + len(self.records)

    def add(self, eva: Tensor, generated: Tensor, records: list[Record]) -> None:
        self.pending.append((eva, generated))
        self.records += records
        self.count += len(records)
        if len(self.records) >= self.size:
            self._write()
        self.state.keep(self._state)

    def finish(self, config: dict[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
        if self.records:
            self._write()
        self.store.finish(self.entries, config, request)
        return {"config": config, "generation_metrics": None}

    def _write(self) -> None:
        eva, generated = (torch.cat(side) for side in zip(*self.pending, strict=True))
        first = self.count - len(self.records)
        self.entries.append(self.store.write(len(self.entries), first, eva, generated, self.records))
        self.pending, self.records = [], []

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tokens, condition, target = self.store.sizes
        nothing = (torch.empty(0, tokens, condition), torch.empty(0, tokens, target))
        eva, generated = (torch.cat(side) for side in zip(*(self.pending or [nothing]), strict=True))
        return {"eva": eva, "tokens": generated}, self._about() | {"shards": len(self.entries)}


class _KeptArrays(_Kept):
    """Fills arrays of a file for at most so many samples."""

    def __init__(
        self, path: Path, conditions: Conditions, sizes: tuple[int, int, int], *, pooled: bool
    ) -> None:
        super().__init__(conditions, KeptState(Unfinished(path).folder / "state.safetensors"))
        tokens, condition, target = sizes
        self.path, self.pooled = path, pooled
        shapes = (
            {POOLED: (target,)}
            if pooled
            else {TOKENS: (tokens, target), "eva_embeddings": (tokens, condition)}
        )
        most = conditions.most
        self.arrays = {name: np.empty((most, *shape), dtype=np.float32) for name, shape in shapes.items()}

    @property
    def count(self) -> int:
        return len(self.records)

    def claimed(self, request: dict[str, Any], overwrite: bool) -> AbstractContextManager[None]:
        return file_claimed(self.path, request, overwrite=overwrite, size=1)

    def go_on(self) -> None:
        found = self.state.load()
        if found is not None:
            self._read(found[1])
            for name, values in found[0].items():
                self.arrays[name][: self.count] = values.numpy()

    def add(self, eva: Tensor, generated: Tensor, records: list[Record]) -> None:
        rows = slice(self.count, self.count + len(records))
        values = (
            {POOLED: generated.mean(dim=1)} if self.pooled else {TOKENS: generated, "eva_embeddings": eva}
        )
        for name, value in values.items():
            self.arrays[name][rows] = value.numpy()
        self.records += records
        self.state.keep(self._state)

    def finish(self, config: dict[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
        results = {
            **self._filled(),
            "keys": [record["key"] for record in self.records],
            "captions": [record.get("caption") for record in self.records],
            "config": config | {"request": request},
            "generation_metrics": None,
        }
        write_arrays(self.path, results)
        return results

    def _filled(self) -> dict[str, np.ndarray]:
        return {name: values[: self.count] for name, values in self.arrays.items()}

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {name: torch.from_numpy(values) for name, values in self._filled().items()}, self._about()
