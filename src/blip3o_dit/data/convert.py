"""Files of embeddings, and stores, become one embedding store."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blip3o_dit.data.array_embeddings import AS_IT_IS, Arrangement
from blip3o_dit.data.array_files import open_pair
from blip3o_dit.data.checks import Record
from blip3o_dit.data.combine import check_alike, common_encoders
from blip3o_dit.data.embeddings import (
    Embeddings,
    batches,
    check_not_mixed,
    fetch_stored,
    generated_by,
    open_embeddings,
)
from blip3o_dit.data.kept_vectors import KeptVectors, fetch_kept
from blip3o_dit.data.manifest import check_shard_count
from blip3o_dit.data.pickle_format import PickledEmbeddings, config_for_json
from blip3o_dit.data.store import EmbeddingStore, StoreWriter
from blip3o_dit.utils.json_files import short_repr

logger = logging.getLogger(__name__)


def convert_pickle(
    source: str | Path,
    target: str | Path,
    *,
    dtype: str = "float16",
    shard_size: int | None = None,
    overwrite: bool = False,
) -> EmbeddingStore:
    """Write the documented pickle `source` as an embedding store at `target`."""
    return convert_files([source], target, dtype=dtype, shard_size=shard_size, overwrite=overwrite)


def convert_files(
    paths: Sequence[str | Path],
    target: str | Path,
    *,
    dtype: str = "float16",
    shard_size: int | None = None,
    overwrite: bool = False,
    arrangement: Arrangement = AS_IT_IS,
    vectors: str | None = None,
) -> EmbeddingStore:
    """Write files of embeddings and stores, in their order, as one store at `target`.

    Two .npy files are the two sides of one source. Keys that were made up go on from source to source.
    Vectors that stores keep beside their grid (`kept_vectors.py`) go along when every source is a store; with
    `vectors` ("class" or "pooled") these are the samples, of one token.

    Raises:
        ValueError: for what cannot be read or stored, other sizes than the first source's, and a key of
            one source that another has too.
    """
    sources: list[Embeddings] = _open_all([Path(path) for path in paths], arrangement)
    if vectors is not None:
        sources = [_vectors_of(source, vectors) for source in sources]
    num_tokens, condition_dim, target_dim = _sizes(sources[0], arrangement)
    samples = sum(source.num_samples for source in sources)
    if shard_size is not None and shard_size >= 1:
        check_shard_count(Path(target), samples, shard_size)
    kept_widths = _kept(sources)
    writer = StoreWriter(
        target,
        num_tokens=num_tokens,
        condition_dim=condition_dim,
        target_dim=target_dim,
        dtype=dtype,
        shard_size=shard_size,
        kept=kept_widths,
        overwrite=overwrite,
        **_about(sources, arrangement),
    )
    with writer:
        keys = _Keys(several=len(sources) > 1)
        for source in sources:
            for rows in batches(range(source.num_samples), 256):
                records = keys.checked(source, source.records(rows))
                eva, clip = fetch_stored(source, rows)
                kept = fetch_kept(source, rows) if isinstance(source, EmbeddingStore) and kept_widths else {}
                writer.append(arrangement(eva), arrangement(clip), records, kept)
    return EmbeddingStore(target)


def _open_all(paths: Sequence[Path], arrangement: Arrangement) -> list[Embeddings]:
    if len(paths) == 2 and all(path.suffix == ".npy" for path in paths):
        return [open_pair(paths[0], paths[1], arrangement)]
    sources = [open_embeddings(path, arrangement=arrangement) for path in paths]
    sizes = [_sizes(source, arrangement) for source in sources]
    for source, found in zip(sources, sizes, strict=True):
        if found != sizes[0]:
            raise ValueError(
                f"{source.path}: expected (tokens, eva width, clip width) {sizes[0]} as in "
                f"{sources[0].path}, found {found}"
            )
    check_not_mixed(sources)
    stores = [source for source in sources if isinstance(source, EmbeddingStore)]
    for store in stores[1:]:
        check_alike(stores[0], store, dtypes=False)
    return sources


def _kept(sources: Sequence[Embeddings]) -> dict[str, int]:
    """The vectors beside the tokens that go along, and their widths: those that every source has."""
    for source in sources:
        if not isinstance(source, EmbeddingStore):
            left_out = [store for store in sources if isinstance(store, EmbeddingStore) and store.kept]
            if left_out:
                logger.warning(
                    "%s: its vectors %s are left out: %s has none",
                    left_out[0].path,
                    sorted(left_out[0].kept),
                    source.path,
                )
            return {}
    return next(source.kept for source in sources if isinstance(source, EmbeddingStore))


def _vectors_of(source: Embeddings, kind: str) -> Embeddings:
    if not isinstance(source, EmbeddingStore):
        raise ValueError(f"{source.path}: --vectors {kind}: expected a store, found another format")
    return KeptVectors(source, kind)


def _sizes(source: Embeddings, arrangement: Arrangement) -> tuple[int, int, int]:
    """Tokens and widths as they will be stored; a store's tokens are arranged as they are written."""
    shape = (source.num_samples, source.num_tokens, source.condition_dim)
    _, tokens, width = arrangement.shape(source.path, "tokens", shape)
    return tokens, width, source.target_dim


def _about(sources: Sequence[Embeddings], arrangement: Arrangement) -> dict[str, Any]:
    """How the tokens were made, as far as the sources say."""
    names = [source.path.name for source in sources]
    encoders: dict[str, Any] = {"converted_from": names[0] if len(names) == 1 else names}
    if isinstance(sources[0], PickledEmbeddings) and len(sources) == 1:
        encoders["config"] = config_for_json(sources[0].path, sources[0].config)
    origins = [source.store if isinstance(source, KeptVectors) else source for source in sources]
    stores = [source for source in origins if isinstance(source, EmbeddingStore)]
    made_by = generated_by(sources[0])
    if made_by is not None:
        encoders["clip"] = {"generated_by": config_for_json(sources[0].path, made_by)}
    about: dict[str, Any] = {"encoders": common_encoders(stores) | encoders}
    pooling = next((s.manifest["pooling"] for s in stores if s.manifest.get("pooling")), None)
    pooled = None if arrangement.pool is None else f"mean to {arrangement.pool} tokens"
    if isinstance(sources[0], KeptVectors):
        pooling = f"none, the vectors {sources[0].names}"
    about["pooling"] = ", then ".join(part for part in (pooling, pooled) if part) or None
    if stores and len(stores) == len(sources):
        about["normalization"] = stores[0].manifest.get("normalization", "none")
    return about


class _Keys:
    """Keys of several sources: those of one are not those of another."""

    def __init__(self, *, several: bool) -> None:
        self._several = several
        self._of: dict[str, Embeddings] = {}
        self._count = 0

    def checked(self, source: Embeddings, records: list[Record]) -> list[Record]:
        """These records, numbered on if their keys were made up. Raises ValueError for another's key."""
        if self._several and not getattr(source, "has_keys", True):
            records = [record | {"key": f"{self._count + row:08d}"} for row, record in enumerate(records)]
        self._count += len(records)
        for record in records if self._several else []:
            other = self._of.setdefault(record["key"], source)
            if other is not source:
                raise ValueError(
                    f"{source.path}: expected the key {short_repr(record['key'])} in one source, "
                    f"found it in {other.path} too (`blip3o-dit merge` passes over samples that come again)"
                )
        return records
