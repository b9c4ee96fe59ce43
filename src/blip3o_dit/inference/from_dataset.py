"""Generation for the samples of a data set, by several processes, to a store, a file or into memory.

A run that was stopped goes on from its whole shards, and from the samples that are in no shard yet: they are
read instead of generated, and everything that follows from them is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from blip3o_dit.data.embeddings import Embeddings, batches
from blip3o_dit.data.towers import towers_of
from blip3o_dit.inference.generated_store import GeneratedStore
from blip3o_dit.inference.output import POOLED, TOKENS, check_output, is_file_output, write_arrays
from blip3o_dit.inference.progress import SampleBar
from blip3o_dit.inference.unfinished import Unfinished, file_claimed
from blip3o_dit.metrics.fidelity import FidelitySums
from blip3o_dit.utils.kept_state import NOTHING_KEPT, KeptState

if TYPE_CHECKING:
    from blip3o_dit.inference.pipeline import BLIP3oInference


def check_apart(output: Path | None, source: Embeddings) -> None:
    """Refuse (ValueError) to write where the data is read from."""
    if output is not None and output.resolve() == source.path.resolve():
        raise ValueError(f"{output}: expected another place than that of the data, found the same")


@dataclass(frozen=True, kw_only=True)
class DatasetGeneration:
    """One generation for the samples at `indices` of a data set.

    Args:
        output: a store's folder, a file, or None. request: what tells this generation from others.
        generate: conditions and their indices -> tokens [n, N, C].
        sums: of the metrics, or None. pooled: one vector a sample instead of tokens.
        keep: whether tokens are returned.
    """

    inference: BLIP3oInference
    source: Embeddings
    indices: Sequence[int]
    output: Path | None
    request: dict[str, Any]
    generate: Callable[[Tensor, Sequence[int]], Tensor]
    sums: FidelitySums | None
    batch_size: int
    pooled: bool
    overwrite: bool
    keep: bool

    def run(self, config: dict[str, Any], make_bar: Callable[[], SampleBar]) -> dict[str, Any]:
        """Generate and write; `config` is the record of how. Returns what `generate_from_dataset` does."""
        store = self._store()
        with self._claimed(store) as size, make_bar() as bar:
            work = PieceWork(self, store, size, bar)
            tokens, entries = self._collect(work)
            if not self.inference.processes.is_main:
                return {}
            results = self._arrays(tokens) if self.keeps_tokens else {}
            metrics = None if self.sums is None else self.sums.result()
            results |= {"config": config, "generation_metrics": metrics}
            if store is not None:
                store.finish(entries, config, self.request, metrics)
            elif self.output is not None:
                results["config"] = config | {"request": self.request}
                write_arrays(self.output, results)
        return results

    @property
    def _to_file(self) -> bool:
        return self.output is not None and is_file_output(self.output)

    @property
    def keeps_tokens(self) -> bool:
        return self.keep or self._to_file

    def _store(self) -> GeneratedStore | None:
        if self.output is None or self._to_file:
            return None
        towers = towers_of(self.source)
        encoder = None if towers is None else towers["encoders"]["eva"]
        return GeneratedStore(self.output, self.inference.model.config.data_sizes, encoder=encoder)

    @contextmanager
    def _claimed(self, store: GeneratedStore | None) -> Iterator[int]:
        """The output claimed by the first process before any process writes to it; the samples of a piece."""
        processes, size = self.inference.processes, self.batch_size
        if store is not None:
            size = store.shard_size(len(self.indices), batch_size=size, processes=processes.count)
        with ExitStack() as claims:
            if self.output is not None and processes.is_main:
                check_output(self.output, overwrite=self.overwrite, pooled=self.pooled)
                if store is not None:
                    claimed = store.claimed(self.request, size, overwrite=self.overwrite)
                    size = claims.enter_context(claimed)
                else:
                    how: dict[str, Any] = {"overwrite": self.overwrite, "size": size}
                    claims.enter_context(file_claimed(self.output, self.request, **how))
            yield processes.broadcast(size)

    def _collect(self, work: PieceWork) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """What is kept, [n, N, C] or pooled [n, C], and the entries of the shards; on the first process."""
        processes, count = self.inference.processes, len(self.indices)
        kept = self.keeps_tokens and processes.is_main
        shape = (self.source.target_dim,) if self.pooled else (self.source.num_tokens, self.source.target_dim)
        tokens = np.empty((count if kept else 0, *shape), dtype=np.float32)
        state, done = self._load(tokens) if kept and self._to_file else (NOTHING_KEPT, 0)
        done = processes.broadcast(done)
        work.bar.found(done)
        entries = []
        pieces = (range(a, min(a + work.size, count)) for a in range(done, count, work.size))
        for number, (piece, found) in enumerate(processes.map_in_order(pieces, work)):
            if found.entry is not None:
                entries.append(found.entry)
            for added in found.added:
                assert self.sums is not None
                self.sums.state += added
            if found.tokens is not None:
                tokens[piece.start : piece.stop] = found.tokens.numpy()
            if number % processes.count:  # another process's, which does not show on this one's bar
                work.bar.found(found.known)
                work.bar.sampled(len(piece) - found.known)
            state.keep(lambda done=piece.stop: self._state(tokens[:done]))  # type: ignore[misc]
        return tokens, entries

    def _load(self, tokens: np.ndarray) -> tuple[KeptState, int]:
        """Where tokens for a file are kept, and how many of them a stopped run has put there."""
        assert self.output is not None
        state = KeptState(Unfinished(self.output).folder / "state.safetensors")
        found = state.load()
        if found is None:
            return state, 0
        there, done = found[0], len(found[0]["tokens"])
        tokens[:done] = there["tokens"].numpy()
        if self.sums is not None:
            self.sums.state = there["sums"]
        return state, done

    def _state(self, done: np.ndarray) -> tuple[dict[str, Tensor], dict[str, Any]]:
        sums = torch.empty(0) if self.sums is None else self.sums.state
        return {"tokens": torch.from_numpy(done), "sums": sums}, {}

    def _arrays(self, generated: np.ndarray) -> dict[str, Any]:
        """What was generated, with keys and captions, and unless pooled the samples' own tokens."""
        source, indices = self.source, self.indices
        records = source.records(indices)
        about = {
            "keys": [record["key"] for record in records],
            "captions": [record.get("caption") for record in records],
        }
        if self.pooled:
            return {POOLED: generated, **about}
        eva = np.empty((len(indices), source.num_tokens, source.condition_dim), dtype=np.float32)
        clip = np.empty(generated.shape, dtype=np.float32)
        for rows in batches(range(len(indices)), 256):
            fetched = source.fetch(indices[rows.start : rows.stop])
            eva[rows.start : rows.stop], clip[rows.start : rows.stop] = (side.numpy() for side in fetched)
        return {TOKENS: generated, "eva_embeddings": eva, "target_clip_embeddings": clip, **about}


class Piece(NamedTuple):
    """The result for a piece: its shard's manifest entry, each batch's metric sums, the tokens if kept, and
    how many samples of it were there."""

    entry: dict[str, Any] | None
    added: list[Tensor]
    tokens: Tensor | None
    known: int


@dataclass(frozen=True)
class PieceWork:
    """Generates a piece of the samples batch by batch, then writes it as a shard, or keeps it, or both.

    Args:
        size: samples per piece; the store's shard size if there is one.
        bar: on which the batches of this process show.
    """

    job: DatasetGeneration
    store: GeneratedStore | None
    size: int
    bar: SampleBar

    def __call__(self, piece: range) -> Piece:
        """Generate the samples at these positions of `indices`, but for those that are there."""
        job, number = self.job, piece.start // self.size
        indices = job.indices[piece.start : piece.stop]
        entry = None if self.store is None else self.store.written(number)
        kept = KeptState(None if self.store is None else self.store.state_file(f"piece-{number:05d}"))
        known = self._known(entry, kept)
        conditions, parts, added, done = [], [], [], 0
        for batch in batches(indices, job.batch_size):
            eva, clip = job.source.fetch(batch)
            generated = self._generated(known, done, eva, batch)
            done += len(batch)
            if job.sums is not None:
                added.append(job.sums.of(generated, job.inference.model.l2_normalize_if_configured(clip)))
            parts.append(generated.mean(dim=1) if job.pooled else generated)
            if self.store is not None:
                conditions.append(eva)
            if done > len(known):
                kept.keep(lambda: ({"tokens": torch.cat(parts)}, {}))
        tokens = torch.cat(parts)
        if self.store is not None and entry is None:
            records = job.source.records(indices)
            entry = self.store.write(number, piece.start, torch.cat(conditions), tokens, records)
        kept.remove()
        return Piece(entry, added, tokens if job.keeps_tokens else None, min(len(known), len(piece)))

    def _known(self, entry: dict[str, Any] | None, kept: KeptState) -> Tensor:
        """The first tokens of a piece that are there, [m, N, C]."""
        if entry is not None:
            assert self.store is not None
            return self.store.tokens_of(entry)
        found = kept.load()
        return torch.empty(0) if found is None else found[0]["tokens"]

    def _generated(self, known: Tensor, done: int, eva: Tensor, batch: Sequence[int]) -> Tensor:
        """A batch's tokens, read where all of them are there, else generated."""
        if done + len(batch) <= len(known):
            self.bar.found(len(batch))
            return known[done : done + len(batch)].clone()
        generated = self.job.generate(eva, batch)
        self.bar.sampled(len(batch))
        return generated
