"""Stores put together: several merged into a new one, or more samples appended to one that is there.

A sample is known by its key. One that comes again with the same tokens and record is passed over and counted;
one that comes again with others is refused, or passed over as well when the first is to be kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blip3o_dit.data.checks import Record
from blip3o_dit.data.embeddings import batches, check_not_mixed
from blip3o_dit.data.kept_vectors import fetch_kept
from blip3o_dit.data.manifest import write_manifest
from blip3o_dit.data.shard_writer import ShardWriter
from blip3o_dit.data.store import EmbeddingStore, StoreWriter
from blip3o_dit.data.store_folder import claim_more, publish_more, remove_unpublished
from blip3o_dit.utils.json_files import short_repr

SIDES = ("eva", "clip")

# What `write_manifest` says by itself.
_SIZES = ("num_tokens", "condition_dim", "target_dim", "dtype")
_COUNTED = {"format", "format_version", "num_samples", "shards", *_SIZES}

Append = Callable[[Tensor, Tensor, Sequence[Record], Mapping[str, Tensor]], None]


class Combined(NamedTuple):
    """The store, how many samples were added to it, and how many were passed over."""

    store: EmbeddingStore
    added: int
    passed_over: int


def merge_stores(
    paths: Sequence[str | Path], output: str | Path, *, overwrite: bool = False, keep_first: bool = False
) -> Combined:
    """Write the samples of several stores as one, in their order.

    Raises:
        ValueError: for stores that do not belong together, or two different samples of one key unless
            `keep_first`; `output` is as it was before.
    """
    stores = [EmbeddingStore(path) for path in paths]
    for store in stores[1:]:
        check_alike(stores[0], store)
    writer = StoreWriter(
        output,
        num_tokens=stores[0].num_tokens,
        condition_dim=stores[0].condition_dim,
        target_dim=stores[0].target_dim,
        dtype=stores[0].manifest["dtype"],
        encoders=common_encoders(stores) | {"merged_from": [str(path) for path in paths]},
        pooling=next((s.manifest["pooling"] for s in stores if s.manifest.get("pooling")), None),
        normalization=stores[0].manifest.get("normalization", "none"),
        kept=stores[0].kept,
        overwrite=overwrite,
    )
    known = KnownSamples(keep_first=keep_first)
    with writer:
        counts = [known.add_new(store, writer.append) for store in stores]
    return Combined(EmbeddingStore(output), sum(counts), sum(len(store) for store in stores) - sum(counts))


def append_store(
    path: str | Path,
    more: str | Path,
    *,
    keep_first: bool = False,
    about: Mapping[str, Any] | None = None,
) -> Combined:
    """Add the samples of the store `more` whose keys are new to the store at `path`, as shards after its own.

    The manifest that lists them comes last: a process that is killed leaves the store as it was. Whoever
    calls this holds the lock of the folder, if others might write there.

    Args:
        about: what the new manifest says otherwise than the old one.

    Raises:
        ValueError: for stores that do not belong together, or two different samples of one key unless
            `keep_first`; the store is as it was before.
    """
    base, added = EmbeddingStore(path), EmbeddingStore(more)
    check_alike(base, added)
    known = KnownSamples(keep_first=keep_first)
    known.add(base)
    writer = ShardWriter(
        base.path,
        claim_more(base.path),
        (base.num_tokens, base.condition_dim, base.target_dim),
        dtype=base.manifest["dtype"],
        first_shard=_next_number(base),
        first_sample=len(base),
    )
    try:
        count = known.add_new(added, writer.append)
        writer.flush()
        if count:
            kept = {name: value for name, value in base.manifest.items() if name not in _COUNTED}
            kept["encoders"] = kept.get("encoders", {}) | common_encoders([base, added])
            entries = [*base.manifest["shards"], *writer.entries]
            write_manifest(writer.folder, writer.sizes, writer.dtype, entries, kept | dict(about or {}))
            publish_more(base.path)
    finally:
        remove_unpublished(base.path)
    return Combined(EmbeddingStore(path), count, len(added) - count)


class KnownSamples:
    """The samples of several stores by their keys: a dict of all keys is held."""

    def __init__(self, *, keep_first: bool = False) -> None:
        self._keep_first = keep_first
        self._where: dict[str, tuple[EmbeddingStore, int]] = {}

    def add(self, store: EmbeddingStore) -> None:
        """Know all samples of a store; the first one of each key."""
        for start, stop in pairwise(store.shard_starts.tolist()):
            for index, record in enumerate(store.records(range(start, stop)), start):
                self._where.setdefault(record["key"], (store, index))

    def add_new(self, store: EmbeddingStore, append: Append) -> int:
        """Know those of a store that are new, and give them to `append`; returns how many."""
        count = 0
        for start, stop in pairwise(store.shard_starts.tolist()):
            records = store.records(range(start, stop))
            new = [i for i in range(start, stop) if self._is_new(store, i, records[i - start])]
            for rows in batches(new, 256):
                kept = fetch_kept(store, rows)
                append(*store.fetch_stored(rows), [records[i - start] for i in rows], kept)
            count += len(new)
        return count

    def _is_new(self, store: EmbeddingStore, index: int, record: Record) -> bool:
        first, place = self._where.setdefault(record["key"], (store, index))
        if first is store and place == index:
            return True
        if not self._keep_first:
            same = record == first.records([place])[0]
            tokens = zip(_all_of(first, place), _all_of(store, index), strict=True)
            if not same or not all(torch.equal(a, b) for a, b in tokens):
                raise ValueError(
                    f"{store.path}: sample {index}: expected the key {short_repr(record['key'])} once, or "
                    f"with the tokens and record of sample {place} of {first.path}, found others "
                    "(--keep_first keeps the first)"
                )
        return False


def _all_of(store: EmbeddingStore, index: int) -> list[Tensor]:
    """Tokens and kept vectors of a sample."""
    kept = fetch_kept(store, [index])
    return [*store.fetch_stored([index]), *(kept[name] for name in sorted(kept))]


def check_alike(first: EmbeddingStore, other: EmbeddingStore, *, dtypes: bool = True) -> None:
    """Refuse (ValueError) stores of other sizes, or tokens made otherwise, as far as both say how."""
    check_not_mixed([first, other])
    for name in _SIZES if dtypes else _SIZES[:-1]:
        _check_same(first, other, name, first.manifest[name], other.manifest[name])
    _check_same(first, other, "kept vectors", first.kept, other.kept)
    for name in ("pooling", "normalization"):
        _check_same(first, other, name, first.manifest.get(name), other.manifest.get(name))
    for side in SIDES:
        ours, theirs = (store.manifest.get("encoders", {}).get(side, {}) for store in (first, other))
        for name in sorted(ours.keys() & theirs.keys()):
            _check_same(first, other, f"{side} tower: {name}", ours[name], theirs[name])


def common_encoders(stores: Sequence[EmbeddingStore]) -> dict[str, Any]:
    """What the stores, which agree, say of their towers together."""
    found: dict[str, Any] = {}
    for side in SIDES:
        told = [store.manifest.get("encoders", {}).get(side, {}) for store in stores]
        both = {name: value for about in reversed(told) for name, value in about.items()}
        if both:
            found[side] = both
    return found


def _check_same(first: EmbeddingStore, other: EmbeddingStore, name: str, ours: Any, theirs: Any) -> None:
    if ours is not None and theirs is not None and ours != theirs:
        raise ValueError(
            f"{other.path}: {name}: expected {short_repr(ours)} as in {first.path}, "
            f"found {short_repr(theirs)}"
        )


def _next_number(store: EmbeddingStore) -> int:
    """After the last shard's; an extraction whose pictures of a unit were all skipped leaves gaps."""
    numbers = [re.fullmatch(r"shard-(\d+)\..*", entry["file"]) for entry in store.manifest["shards"]]
    return max([len(numbers), *(int(found[1]) + 1 for found in numbers if found)])
