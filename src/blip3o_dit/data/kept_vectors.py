"""The class token and the pooled vector of each tower, beside the grid, as arrays of their own in the shards.

    eva_class, eva_pooled, clip_class, clip_pooled   those that were kept, [n, C] each, in the store's dtype
    crc32_kept                                       of their bytes in the order of their names, [n]

The manifest names them with their widths, "kept": {"clip_pooled": 768}. Who does not ask for them reads the
store as if they were not there.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from blip3o_dit.data.checks import Indices, Record, check_indices
from blip3o_dit.data.choices import KEPT
from blip3o_dit.utils.json_files import one_line, short_repr
from blip3o_dit.utils.validation import check_name

if TYPE_CHECKING:
    from blip3o_dit.data.store import EmbeddingStore

NAMES = tuple(f"{side}_{kind}" for side in ("eva", "clip") for kind in KEPT)
CHECKSUMS = "crc32_kept"


def kept_checksums(kept: Mapping[str, Tensor]) -> Tensor:
    """A CRC-32 for each sample of vectors [n, C] by name, [n]."""
    sums = [0] * len(next(iter(kept.values())))
    for name in sorted(kept):
        rows = kept[name].contiguous().view(torch.uint8).numpy()
        sums = [zlib.crc32(row.data, known) for row, known in zip(rows, sums, strict=True)]
    return torch.tensor(sums, dtype=torch.int64)


def check_kept_widths(where: Path, kept: Any) -> dict[str, int]:
    """What a manifest says is kept. Raises ValueError for what is no width by one of `NAMES`."""
    if not isinstance(kept, dict) or any(
        name not in NAMES or type(width) is not int or not 1 <= width < 2**24 for name, width in kept.items()
    ):
        raise ValueError(f"{where}: kept: expected widths of {list(NAMES)}, found {short_repr(kept)}")
    return kept


def dtype_of(store_dtype: str) -> str:
    """What these vectors are stored in: one a picture is no more than a token of the grid."""
    return "float32" if store_dtype == "int8" else store_dtype


def kept_widths(file: Path) -> dict[str, int]:
    """The widths of the vectors that a shard, which was just written, holds beside its tokens."""
    with safe_open(file, framework="pt") as tensors:
        there = [name for name in NAMES if name in tensors.keys()]  # noqa: SIM118
        return {name: tensors.get_slice(name).get_shape()[1] for name in there}


def fetch_kept(store: EmbeddingStore, indices: Indices) -> dict[str, Tensor]:
    """The vectors [n, C] of these samples by name, in the store's dtype.

    Raises:
        ValueError: for a damaged shard; unless the store was opened to verify nothing, also for vectors whose
            CRC-32 is another.
    """
    check_indices(store.path, indices, store.num_samples)
    wanted = np.asarray(indices, dtype=np.int64)
    shards, inside = store.locate(wanted)
    dtype = getattr(torch, dtype_of(store.manifest["dtype"]))
    found = {name: torch.empty(len(wanted), width, dtype=dtype) for name, width in store.kept.items()}
    for shard in np.unique(shards) if found else ():
        entry, rows = store.manifest["shards"][int(shard)], np.flatnonzero(shards == shard)
        if store.elsewhere is None:
            there = _rows_of(store.path / entry["file"], found, inside[rows], entry["num_samples"])
        else:
            there = store.elsewhere.rows(entry, [*found, CHECKSUMS], inside[rows].tolist())
        sums = there.pop(CHECKSUMS)
        if store.verified_first and not torch.equal(kept_checksums(there), sums):
            raise ValueError(
                f"{store.path / entry['file']}: its {CHECKSUMS} are not the stored ones: the file was altered"
            )
        for name, vectors in there.items():
            found[name][rows] = vectors
    return found


def _rows_of(file: Path, wanted: Mapping[str, Tensor], rows: np.ndarray, count: int) -> dict[str, Tensor]:
    """These rows of a shard's kept vectors and of their checksums."""
    try:
        with safe_open(file, framework="pt") as tensors:
            found = {name: tensors.get_tensor(name) for name in (*wanted, CHECKSUMS)}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a shard with kept vectors: {one_line(error)}") from error
    for name, tensor in wanted.items():
        expected = [count, tensor.shape[1]]
        if list(found[name].shape) != expected or found[name].dtype != tensor.dtype:
            raise ValueError(
                f"{file}: {name}: expected {tensor.dtype} of shape {expected}, found {found[name].dtype} of "
                f"shape {list(found[name].shape)}"
            )
    if list(found[CHECKSUMS].shape) != [count] or found[CHECKSUMS].dtype != torch.int64:
        raise ValueError(f"{file}: {CHECKSUMS}: expected int64 of shape [{count}]")
    return {name: tensor[torch.from_numpy(rows)] for name, tensor in found.items()}


class KeptVectors:
    """One vector of each tower as embeddings of one token: those that a store keeps beside its grid.

    Args:
        kind: "class" or "pooled".

    Raises:
        ValueError: for a store that does not keep them of both towers.
    """

    def __init__(self, store: EmbeddingStore, kind: str) -> None:
        check_name("vectors", kind, KEPT)
        self.store, self.names = store, (f"eva_{kind}", f"clip_{kind}")
        missing = [name for name in self.names if name not in store.kept]
        if missing:
            raise ValueError(
                f"{store.path}: expected the vectors {list(self.names)}, found "
                f"{list(store.kept) or 'none'} (`blip3o-dit extract --keep {kind}` keeps them)"
            )
        self.path, self.num_samples, self.num_tokens = store.path, store.num_samples, 1
        self.condition_dim, self.target_dim = (store.kept[name] for name in self.names)
        self.shard_starts, self.manifest = store.shard_starts, store.manifest

    def fetch_stored(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """As `Embeddings.fetch`, in the store's dtype."""
        found = fetch_kept(self.store, indices)
        eva, clip = (found[name][:, None] for name in self.names)
        return eva, clip

    def fetch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """See `Embeddings.fetch`."""
        eva, clip = self.fetch_stored(indices)
        return eva.float(), clip.float()

    def records(self, indices: Indices | None = None) -> list[Record]:
        """See `Embeddings.records`."""
        return self.store.records(indices)
