"""The embedding store: a folder of safetensors shards under one manifest, read through memory maps.

    manifest.json             written last, by rename: a folder without it is not a store
    shard-00000.safetensors   eva [n, L, C_eva], clip [n, N, C_clip] and crc32 [n]
    shard-00000.jsonl         one object per sample: "key", and "caption" or anything else known

Memory does not grow with the data set. A sample's CRC-32 is checked when a process first reads the sample.
Where an older store has none, the whole shard's SHA-256 is checked, once on a machine: see `verified.py`.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from blip3o_dit.data.checks import Indices, Record, check_indices, check_record, check_square
from blip3o_dit.data.choices import VERIFY_CHOICES
from blip3o_dit.data.int8_tokens import NAME as INT8
from blip3o_dit.data.int8_tokens import restored, width_on_disk
from blip3o_dit.data.manifest import (
    DTYPES,
    ON_DISK,
    check_shard_file,
    read_manifest,
    write_manifest,
)
from blip3o_dit.data.remote_shards import OpenShard, RemoteShards
from blip3o_dit.data.sample_checksums import DTYPE as CHECKSUM_DTYPE
from blip3o_dit.data.sample_checksums import NAME as CHECKSUMS
from blip3o_dit.data.sample_checksums import sample_checksum
from blip3o_dit.data.shard_writer import ShardWriter
from blip3o_dit.data.store_folder import StoreFolder
from blip3o_dit.data.verified import Identity, check_once, identity
from blip3o_dit.utils.addresses import Address, located
from blip3o_dit.utils.checksums import sha256
from blip3o_dit.utils.json_files import one_line, show_names
from blip3o_dit.utils.validation import check_name

# Bytes (as float32) a store hands out before it drops its maps; mapping again costs microseconds a shard.
# Scattered reads map about five times what they read, as the kernel maps pages around each.
UNMAP_AFTER = 2**26


class Shard(NamedTuple):
    """A mapped shard; `sums` [n] is None in older stores, `elsewhere` where the shard lies on this disk."""

    eva: Tensor
    clip: Tensor
    sums: Tensor | None
    elsewhere: OpenShard | None = None


class EmbeddingStore:
    """An embedding store opened for reading.

    Opening reads the manifest and the sizes of the files; `fetch` maps shards when it needs them.

    Args:
        path: the store's folder, or its address: `s3://bucket/store`, or whatever else fsspec reads.
        verify: "first" checks a sample's CRC-32 when this process first reads it, and again when the file
            changed; of a shard without these its SHA-256, once on a machine. "never" relies on sizes and
            shapes.
        check_files: refuse a store whose shards are not all there in the right sizes; of more than 20,000 a
            size is looked at when the shard is first read.

    Raises:
        FileNotFoundError, ValueError: one line naming the file, what was expected and what was found.
    """

    def __init__(self, path: str | Path, *, verify: str = "first", check_files: bool = True) -> None:
        check_name("verify", verify, VERIFY_CHOICES)
        self.path = located(path)
        self.verified_first = verify == "first"
        self.elsewhere = RemoteShards(self.path) if isinstance(self.path, Address) else None
        opened = partial(read_manifest, self.path) if self.elsewhere is None else self.elsewhere.manifest
        self.manifest = opened(check_files=check_files)
        self.num_samples: int = self.manifest["num_samples"]
        self.num_tokens: int = self.manifest["num_tokens"]
        self.condition_dim: int = self.manifest["condition_dim"]
        self.target_dim: int = self.manifest["target_dim"]
        # Vectors beside the grid and their widths: see `kept_vectors.py`
        self.kept: dict[str, int] = self.manifest.get("kept", {})
        counts = [shard["num_samples"] for shard in self.manifest["shards"]]
        self.shard_starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._verified: dict[int, Identity] = {}  # by this process, or the one that started it
        self._checked: dict[int, tuple[Identity, np.ndarray]] = {}  # samples whose CRC-32 was right
        self._maps: dict[int, Shard] = {}
        self._bytes_read = 0

    def __len__(self) -> int:
        return self.num_samples

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}, "_checked": {}}  # data-loader processes map for themselves

    def fingerprint(self) -> str:
        """What tells these embeddings from others: a hash of all the checksums in the manifest."""
        sums = [[shard["sha256"], shard["table_sha256"]] for shard in self.manifest["shards"]]
        return hashlib.sha256(json.dumps(sums).encode()).hexdigest()

    def fetch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """See `Embeddings.fetch`. Raises ValueError for a damaged shard, IndexError out of range."""
        return self._fetch(indices, torch.float32)

    def fetch_stored(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """The same in the store's dtype: half the bytes for a batch that goes from process to process.

        Of int8 stores float32, what their tokens mean.
        """
        return self._fetch(indices, DTYPES.get(self.manifest["dtype"], torch.float32))

    def _fetch(self, indices: Indices, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        check_indices(self.path, indices, self.num_samples)
        wanted = np.asarray(indices, dtype=np.int64)
        eva = torch.empty(len(wanted), self.num_tokens, self.condition_dim, dtype=dtype)
        clip = torch.empty(len(wanted), self.num_tokens, self.target_dim, dtype=dtype)
        shards, inside = self.locate(wanted)
        is_int8 = self.manifest["dtype"] == INT8
        fetched = {} if self.elsewhere is None else self._fetch_from(self.elsewhere, shards, inside)
        # In the order of the files, and each sample straight from its map to its place: gathering a batch
        # and converting it would go over the same bytes three times.
        for row in np.argsort(wanted).tolist():
            shard, place = int(shards[row]), int(inside[row])
            if (shard, place) in fetched:
                sample = fetched[shard, place]
            else:
                mapped = self._map(shard)
                sample = mapped.eva[place], mapped.clip[place]
                if self.verified_first and mapped.sums is not None:
                    self._check_sample(shard, place)
            eva[row], clip[row] = map(restored, sample) if is_int8 else sample
        self._release_pages(4 * (eva.numel() + clip.numel()))
        return eva, clip

    def _fetch_from(
        self, elsewhere: RemoteShards, shards: np.ndarray, inside: np.ndarray
    ) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
        """The samples that are not in the cache, or not as they were written, by shard and row."""
        samples = set(zip(shards.tolist(), inside.tolist(), strict=True))
        opened: dict[int, OpenShard] = {}
        needed = sorted({shard for shard, _ in samples})
        new = [self.manifest["shards"][shard] for shard in needed if shard not in self._maps]
        elsewhere.prepare(new, verify=self.verified_first)
        for shard in needed:
            mapped = self._map(shard)
            assert mapped.elsewhere is not None
            opened[shard] = mapped.elsewhere
        missing = [s for s in samples if not opened[s[0]].cached.has(s[1]) or not self._is_whole(*s)]
        found = elsewhere.fetch(opened, missing)
        return {sample: (arrays["eva"], arrays["clip"]) for sample, arrays in found.items()}

    def records(self, indices: Indices | None = None) -> list[Record]:
        """See `Embeddings.records`."""
        if indices is None:
            return [record for shard in range(len(self.shard_starts) - 1) for record in self._table(shard)]
        check_indices(self.path, indices, self.num_samples)
        wanted = np.asarray(indices, dtype=np.int64)
        shards, inside = self.locate(wanted)
        found: dict[int, Record] = {}
        for shard in np.unique(shards):
            table = self._table(int(shard))
            for row in np.flatnonzero(shards == shard):
                found[int(wanted[row])] = table[inside[row]]
        return [found[int(index)] for index in wanted]

    def locate(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shard of each sample, and its row there."""
        shards = np.searchsorted(self.shard_starts, wanted, side="right") - 1
        return shards, wanted - self.shard_starts[shards]

    def _release_pages(self, bytes_read: int) -> None:
        """Unmap everything now and then: pages that were read count as this process's memory until then."""
        self._bytes_read += bytes_read
        if self._bytes_read > UNMAP_AFTER:
            self._maps.clear()
            self._bytes_read = 0

    def unverified(self) -> EmbeddingStore:
        """A view that skips checksums, for sparse reads over many shards: a checksum reads its shard whole.

        For samples that are read again later from the store itself, which finds a damaged shard then.
        """
        other = copy.copy(self)
        other._maps, other._verified, other._checked, other.verified_first = {}, {}, {}, False
        return other

    def verify(self) -> None:
        """Read all of it and check every checksum, those too that were verified before, and every record.

        Raises ValueError naming the first damaged file.
        """
        for damage in self.find_damage():
            raise ValueError(damage)

    def find_damage(self) -> Iterator[str]:
        """The same for all files: a line for each damaged one, in the order of the shards."""
        for shard in range(len(self.manifest["shards"])):
            for check in (self._verify_shard, self._table):
                try:
                    check(shard)
                except ValueError as error:
                    yield str(error)

    def _verify_shard(self, shard: int) -> None:
        entry = self.manifest["shards"][shard]
        if self.elsewhere is not None:
            self.elsewhere.verify(entry)
            return
        file = self.path / entry["file"]
        self._maps.pop(shard, None)
        check_shard_file(self.path, entry)
        before = _identity(file)
        _check_digest(file, entry["sha256"])
        self._verified[shard] = before
        mapped = self._map(shard)
        if mapped.sums is not None:
            self._checked[shard] = (before, np.zeros(entry["num_samples"], dtype=bool))
            for place in range(entry["num_samples"]):
                self._check_sample(shard, place)
        self._maps.clear()  # its pages count as memory until then

    def _check_sample(self, shard: int, place: int) -> None:
        """Refuse (ValueError) a sample that is not what was written; looked at once."""
        if not self._is_whole(shard, place):
            raise ValueError(
                f"{self.path / self.manifest['shards'][shard]['file']}: sample "
                f"{self.shard_starts[shard] + place}: its CRC-32 is not the stored one: the file was altered"
            )

    def _is_whole(self, shard: int, place: int) -> bool:
        """Whether a sample has the CRC-32 that was stored with it; looked at once."""
        mapped = self._maps[shard]
        if not self.verified_first or mapped.sums is None:
            return True
        _, checked = self._checked[shard]
        if not checked[place]:
            found = sample_checksum(mapped.eva[place], mapped.clip[place])
            checked[place] = found == int(mapped.sums[place])
        return bool(checked[place])

    def _map(self, shard: int) -> Shard:
        if shard not in self._maps:
            entry = self.manifest["shards"][shard]
            if self.elsewhere is None:
                self._maps[shard] = self._map_file(shard, entry)
            else:
                opened = self.elsewhere.open(entry, verify=self.verified_first)
                self._maps[shard] = self._checked_shard(
                    self.path / entry["file"], entry["num_samples"], opened.tensors(), opened
                )
                self._checked.setdefault(shard, ((), np.zeros(entry["num_samples"], dtype=bool)))
        return self._maps[shard]

    def _map_file(self, shard: int, entry: Mapping[str, Any]) -> Shard:
        check_shard_file(self.path, entry)
        file = self.path / entry["file"]
        now = _identity(file)
        try:
            with safe_open(file, framework="pt") as tensors:
                arrays = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a readable shard: {one_line(error)}") from error
        mapped = self._checked_shard(file, entry["num_samples"], arrays)
        if self.verified_first and mapped.sums is None and self._verified.get(shard) != now:
            self._verified[shard] = check_once(file, shard, entry["sha256"])
        if mapped.sums is not None and self._checked.get(shard, (None,))[0] != now:
            self._checked[shard] = (now, np.zeros(entry["num_samples"], dtype=bool))
        return mapped

    def _checked_shard(
        self, file: Path, count: int, arrays: Mapping[str, Tensor], elsewhere: OpenShard | None = None
    ) -> Shard:
        """These arrays. Raises ValueError unless they are of the shapes and dtypes of the store."""
        for name, width in (("eva", self.condition_dim), ("clip", self.target_dim)):
            if name not in arrays:
                raise ValueError(f"{file}: not a readable shard: expected {name}, found {show_names(arrays)}")
            expected = [count, self.num_tokens, width_on_disk(width, self.manifest["dtype"])]
            tensor = arrays[name]
            if list(tensor.shape) != expected:
                raise ValueError(f"{file}: {name}: expected shape {expected}, found {list(tensor.shape)}")
            if tensor.dtype != ON_DISK[self.manifest["dtype"]]:
                raise ValueError(f"{file}: {name}: expected {self.manifest['dtype']}, found {tensor.dtype}")
        sums = arrays.get(CHECKSUMS)
        if sums is not None and (list(sums.shape) != [count] or sums.dtype != CHECKSUM_DTYPE):
            raise ValueError(
                f"{file}: {CHECKSUMS}: expected {CHECKSUM_DTYPE} of shape [{count}], "
                f"found {sums.dtype} of shape {list(sums.shape)}"
            )
        return Shard(arrays["eva"], arrays["clip"], sums, elsewhere)

    def _table(self, shard: int) -> list[Record]:
        entry = self.manifest["shards"][shard]
        file = self.path / entry["table"]
        if self.elsewhere is None:
            _check_digest(file, entry["table_sha256"])
            content = file.read_bytes()
        else:
            content = self.elsewhere.table(entry)
        lines = content.removesuffix(b"\n").split(b"\n")
        if len(lines) != entry["num_samples"]:
            raise ValueError(f"{file}: expected {entry['num_samples']} records, found {len(lines)}")
        first = int(self.shard_starts[shard])
        return [_read_record(file, first + row, line) for row, line in enumerate(lines)]


class StoreWriter:
    """Write a store shard by shard, beside what the folder holds; it takes its place when it is whole.

    Use as a context manager: leaving it normally makes the store, leaving it by an exception leaves what was
    there before.

    Args:
        path: folder to create, or an empty one, or with `overwrite` a store's; see `StoreFolder`.
        num_tokens, condition_dim, target_dim: sizes of a sample.
        dtype: "float16", "bfloat16", "float32" or "int8" on disk.
        shard_size: samples per shard; None aims at 256 MiB.
        encoders: {"eva": {...}, "clip": {...}}, names and revisions, kept in the manifest.
        pooling, normalization: how the tokens were made, kept in the manifest.
        kept: widths of vectors beside the tokens, by name; see `kept_vectors.py`.

    Raises:
        ValueError: for data that cannot be trained on (counts, ranks, a token count that is not a square,
            NaN or infinity, values that the dtype cannot hold), naming the sample.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        num_tokens: int,
        condition_dim: int,
        target_dim: int,
        dtype: str = "float16",
        shard_size: int | None = None,
        encoders: Mapping[str, Any] | None = None,
        pooling: str | None = None,
        normalization: str = "none",
        kept: Mapping[str, int] | None = None,
        overwrite: bool = False,
    ) -> None:
        if dtype not in ON_DISK:
            raise ValueError(f"dtype: expected one of {tuple(ON_DISK)}, found {dtype!r}")
        self.path = Path(path)
        check_square(self.path, num_tokens)
        sizes = {"condition_dim": condition_dim, "target_dim": target_dim, "shard_size": shard_size}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"{name}: expected at least 1, found {size}")
        self._folder = StoreFolder(self.path, overwrite=overwrite)
        sizes_of_sample = (num_tokens, condition_dim, target_dim)
        self._shards = ShardWriter(
            self.path, self._folder.aside, sizes_of_sample, dtype=dtype, shard_size=shard_size
        )
        self._about = {"encoders": dict(encoders or {}), "pooling": pooling, "normalization": normalization}
        if kept:
            self._about["kept"] = dict(kept)

    @property
    def shard_size(self) -> int:
        return self._shards.shard_size

    def append(
        self,
        eva: Tensor,
        clip: Tensor,
        records: Sequence[Record],
        kept: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add n samples: eva [n, L, C_eva], clip [n, N, C_clip], n records with a "key" each.

        `kept` are the vectors [n, C] by the names that the writer was told.
        """
        self._shards.append(eva, clip, records, kept)

    def close(self) -> EmbeddingStore:
        """Write what is pending and the manifest; returns the store, opened."""
        self._shards.flush()
        if not self._shards.entries:
            raise ValueError(f"{self.path}: expected at least one sample, found none")
        sizes, dtype = self._shards.sizes, self._shards.dtype
        write_manifest(self._folder.aside, sizes, dtype, self._shards.entries, self._about)
        self._folder.publish()
        return EmbeddingStore(self.path)

    def abandon(self) -> None:
        """Remove what was written; what the folder held before stays."""
        self._folder.abandon()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.close()
                return
        except BaseException:
            self.abandon()
            raise
        self.abandon()


def _read_record(file: Path, sample: int, line: bytes) -> Record:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: sample {sample}: not readable JSON: {one_line(error)}") from error
    check_record(file, sample, record)
    return record


def _identity(file: Path) -> Identity:
    """What changes with the file's content. Raises ValueError when there is none."""
    if not file.is_file():
        raise ValueError(f"{file}: expected a file of the store, found none")
    return identity(file)


def _check_digest(file: Path, expected: str) -> None:
    _identity(file)
    if sha256(file) != expected:
        raise ValueError(f"{file}: its SHA-256 is not the manifest's: the file was altered")
