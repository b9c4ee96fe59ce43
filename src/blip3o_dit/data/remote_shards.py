"""The shards of a store that lies at an address: samples are read by their bytes and kept in a cache.

Of a shard its header and its samples' CRC-32 are read first, then what is asked for, so that a first batch
waits for itself alone, and an epoch reads the store once however the samples are shuffled. A store that
fits the cache is never read again; of a larger one as much stays as fits.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blip3o_dit.data.manifest import MANIFEST, checked_manifest
from blip3o_dit.data.sample_checksums import NAME as CHECKSUMS
from blip3o_dit.data.sample_checksums import sample_checksum
from blip3o_dit.data.shard_cache import CachedShard, ShardCache
from blip3o_dit.utils.addresses import Address, RemoteFolder, located
from blip3o_dit.utils.json_files import parse_json, short_repr

# Bytes that are read of a shard to begin with, more than its header has; and the longest header.
_BEGINNING, _LONGEST = 1024, 2**20
# Bytes that are asked for at a time.
_AT_A_TIME = 2**26
_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I64": torch.int64,
    "I8": torch.int8,
}

logger = logging.getLogger(__name__)


def is_store_address(path: str | Path) -> bool:
    """Whether a path is an address at which a store is."""
    where = located(path)
    return isinstance(where, Address) and MANIFEST in RemoteFolder(where).sizes()


class Array(NamedTuple):
    """Where one of a shard's arrays lies in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    def per_sample(self) -> int:
        """Bytes of one sample."""
        return self.dtype.itemsize * math.prod(self.shape[1:])

    def of(self, buffer: Any, offset: int, samples: int) -> Tensor:
        """So many samples of it out of a buffer."""
        shape = (samples, *self.shape[1:])
        values = torch.frombuffer(buffer, dtype=self.dtype, count=math.prod(shape), offset=offset)
        return values.view(shape)


class OpenShard(NamedTuple):
    """A shard's file in the cache, its arrays by name, and its entry in the manifest."""

    cached: CachedShard
    arrays: Mapping[str, Array]
    entry: Mapping[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """Views of all samples; those that are not there are zeros."""
        return {
            name: array.of(self.cached.bytes, array.start, array.shape[0])
            for name, array in self.arrays.items()
        }


class RemoteShards:
    """What an `EmbeddingStore` asks for where its folder is an address."""

    def __init__(self, address: Path) -> None:
        self.address, self.files = address, RemoteFolder(address)
        self.cache = ShardCache()

    def manifest(self, *, check_files: bool) -> dict[str, Any]:
        """As `read_manifest`."""
        file = self.address / MANIFEST
        try:
            content = self.files.read(MANIFEST)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{self.address}: expected an embedding store there, found no {MANIFEST}"
            ) from error
        manifest = checked_manifest(file, parse_json(file, content))
        sizes = self.files.sizes() if check_files else {}
        for shard in manifest["shards"] if check_files else ():
            found = sizes.get(shard["file"])
            if found != shard["bytes"]:
                raise ValueError(
                    f"{self.address / shard['file']}: expected {shard['bytes']} bytes, found "
                    f"{'no file' if found is None else found}"
                )
        return manifest

    def prepare(self, entries: Iterable[Mapping[str, Any]], *, verify: bool) -> None:
        """Make files in the cache for shards that have none there: headers and checksums, asked for together.

        A shard without checksums of its samples comes whole, its SHA-256 checked, where `verify` says so.
        """
        new = [entry for entry in entries if not self._file(entry).exists()]
        wanted = [
            (entry["file"], 0, min(entry["bytes"], _BEGINNING + 8 * entry["num_samples"])) for entry in new
        ]
        for entry, beginning in zip(new, self.files.ranges(wanted), strict=True):
            content, sums_end = self._beginning(entry, beginning)
            if verify and sums_end is None:
                self._bring(entry)
                continue
            if sums_end is not None:
                more = [(entry["file"], len(content), sums_end)] if sums_end > len(content) else []
                content = b"".join([content[:sums_end], *self.files.ranges(more)])
            self.cache.take(len(content) + entry["num_samples"])
            self.cache.add(self._file(entry).name, entry["bytes"] + entry["num_samples"], {0: content})

    def open(self, entry: Mapping[str, Any], *, verify: bool) -> OpenShard:
        """A shard's file in the cache, made if it is not there."""
        self.prepare([entry], verify=verify)
        cached = CachedShard(self._file(entry), entry["bytes"])
        length = struct.unpack("<Q", cached.bytes[:8])[0]
        arrays = _arrays(self.address / entry["file"], cached.bytes[8 : 8 + length], entry)
        return OpenShard(cached, arrays, entry)

    def fetch(
        self, shards: Mapping[int, OpenShard], wanted: Sequence[tuple[int, int]]
    ) -> dict[tuple[int, int], dict[str, Tensor]]:
        """The arrays of samples, by shard and row, read from the address and kept where there is room.

        Raises ValueError for a sample whose CRC-32 is not the stored one.
        """
        found: dict[tuple[int, int], dict[str, Tensor]] = {}
        for runs in _in_parts(shards, wanted):
            asked = [piece for run in runs for piece in run.pieces()]
            contents = iter(self.files.ranges(asked))
            parts = [{start: bytearray(next(contents)) for _, start, _ in run.pieces()} for run in runs]
            for run, part in zip(runs, parts, strict=True):
                samples = run.samples(part)
                self._check(run, samples)
                found |= {(run.number, run.first + row): sample for row, sample in enumerate(samples)}
            self._keep(runs, parts)
        return found

    def rows(self, entry: Mapping[str, Any], names: Sequence[str], rows: Sequence[int]) -> dict[str, Tensor]:
        """Rows of some of a shard's arrays, read from the address and not cached."""
        arrays = {name: self.open(entry, verify=False).arrays[name] for name in names}
        places = [
            (array.start + row * array.per_sample(), array.per_sample())
            for array in arrays.values()
            for row in rows
        ]
        contents = iter(self.files.ranges([(entry["file"], start, start + size) for start, size in places]))
        return {
            name: torch.cat([array.of(bytearray(next(contents)), 0, 1) for _ in rows])
            for name, array in arrays.items()
        }

    def table(self, entry: Mapping[str, Any]) -> bytes:
        """A shard's table, its SHA-256 checked."""
        expected = entry["table_sha256"]
        path = self.cache.folder / f"{self._key(expected)}.table"
        if path.exists():
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() == expected:
                return content
            path.unlink(missing_ok=True)
        content = self.files.read(entry["table"])
        if hashlib.sha256(content).hexdigest() != expected:
            raise _altered(self.address / entry["table"])
        if self.cache.take(len(content)):
            self.cache.add(path.name, len(content), {0: content})
        return content

    def verify(self, entry: Mapping[str, Any]) -> None:
        """Read a shard whole. Raises ValueError when its SHA-256 is not the manifest's."""
        if self.files.sha256(entry["file"], entry["bytes"]) != entry["sha256"]:
            raise _altered(self.address / entry["file"])

    def _key(self, sha256: str) -> str:
        return hashlib.sha256(f"{self.address}\0{sha256}".encode()).hexdigest()[:32]

    def _file(self, entry: Mapping[str, Any]) -> Path:
        return self.cache.folder / f"{self._key(entry['sha256'])}.shard"

    def _beginning(self, entry: Mapping[str, Any], content: bytes) -> tuple[bytes, int | None]:
        """A shard's beginning, at least its header, and where the checksums of its samples end."""
        name, size = entry["file"], entry["bytes"]
        length = struct.unpack("<Q", content[:8].ljust(8, b"\0"))[0]
        if not 2 <= length <= min(_LONGEST, size - 8):
            raise ValueError(f"{self.address / name}: not a readable shard: a header of {length} bytes")
        if len(content) < 8 + length:
            content += self.files.ranges([(name, len(content), 8 + length)])[0]
        sums = _arrays(self.address / name, content[8 : 8 + length], entry).get(CHECKSUMS)
        return content, None if sums is None else sums.start + sums.per_sample() * entry["num_samples"]

    def _bring(self, entry: Mapping[str, Any]) -> None:
        """The whole shard; processes that want it too wait for the one that reads it."""
        path = self._file(entry)
        with open(path.with_suffix(".part"), "a+b") as part:
            fcntl.flock(part, fcntl.LOCK_EX)
            if path.exists():
                return
            part.truncate(0)
            if not self.cache.take(entry["bytes"] + entry["num_samples"]):
                raise ValueError(
                    f"{self.address / entry['file']}: expected room for its {entry['bytes']} bytes in the "
                    f"cache, {self.cache.folder}, found none: its samples have no checksums, so it is read "
                    "whole: "
                    "give a larger BLIP3O_DIT_CACHE_GB, or --verify never"
                )
            digest = hashlib.sha256()
            for block in self.files.blocks(entry["file"], entry["bytes"]):
                digest.update(block)
                part.write(block)
            if digest.hexdigest() != entry["sha256"]:
                Path(part.name).unlink()
                raise _altered(self.address / entry["file"])
            part.write(b"\1" * entry["num_samples"])
            part.flush()
            Path(part.name).rename(path)

    def _check(self, run: Run, samples: Sequence[dict[str, Tensor]]) -> None:
        sums = run.shard.tensors().get(CHECKSUMS)
        if sums is None:
            return
        for place, sample in enumerate(samples, run.first):
            if sample_checksum(**sample) != int(sums[place]):
                file = self.address / run.shard.entry["file"]
                raise ValueError(
                    f"{file}: row {place}: its CRC-32 is not the stored one: the file was altered"
                )

    def _keep(self, runs: Sequence[Run], parts: Sequence[Mapping[int, bytearray]]) -> None:
        fitting = self.cache.take(*(sum(map(len, part.values())) for part in parts))
        try:
            for run, part in zip(runs[:fitting], parts, strict=False):
                run.shard.cached.put(run.first, run.rows, part)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            logger.warning("%s: the disk is full: nothing more is kept there", self.cache.folder)
            self.cache.is_full()


class Run(NamedTuple):
    """Samples of one shard that follow each other: `rows` of them from `first` on."""

    number: int
    shard: OpenShard
    first: int
    rows: int

    def pieces(self) -> list[tuple[str, int, int]]:
        """File, start and stop of their bytes in each array."""
        starts = [(array.start, array.per_sample()) for array in self._of_samples().values()]
        return [
            (self.shard.entry["file"], start + self.first * size, start + (self.first + self.rows) * size)
            for start, size in starts
        ]

    def samples(self, parts: Mapping[int, bytearray]) -> list[dict[str, Tensor]]:
        """The arrays of each, out of the contents of the pieces by where they start."""
        arrays = self._of_samples()
        contents = [
            array.of(parts[start], 0, self.rows)
            for array, (_, start, _) in zip(arrays.values(), self.pieces(), strict=True)
        ]
        return [dict(zip(arrays, rows, strict=True)) for rows in zip(*contents, strict=True)]

    def _of_samples(self) -> dict[str, Array]:
        return {name: self.shard.arrays[name] for name in ("eva", "clip")}


def _in_parts(shards: Mapping[int, OpenShard], wanted: Sequence[tuple[int, int]]) -> Iterator[list[Run]]:
    """These samples, by shard and row, as runs: as many at a time as are asked for at once."""
    runs: list[Run] = []
    size = 0
    for number, places in groupby(sorted(set(wanted)), key=lambda sample: sample[0]):
        shard = shards[number]
        longest = max(1, _AT_A_TIME * shard.entry["num_samples"] // shard.entry["bytes"])
        for run in _runs(number, shard, [place for _, place in places], longest):
            if runs and size + run.rows * shard.entry["bytes"] // shard.entry["num_samples"] > _AT_A_TIME:
                yield runs
                runs, size = [], 0
            runs.append(run)
            size += run.rows * shard.entry["bytes"] // shard.entry["num_samples"]
    if runs:
        yield runs


def _runs(number: int, shard: OpenShard, places: Sequence[int], longest: int) -> Iterator[Run]:
    first, count = places[0], 0
    for place in places:
        if place != first + count or count == longest:
            yield Run(number, shard, first, count)
            first, count = place, 0
        count += 1
    yield Run(number, shard, first, count)


def _arrays(file: Path, header: bytes, entry: Mapping[str, Any]) -> dict[str, Array]:
    """A safetensors header's arrays; each has a first dimension of the shard's samples."""
    listed = parse_json(file, header)
    found: dict[str, Array] = {}
    for name, about in listed.items() if isinstance(listed, dict) else ():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = _DTYPES[about["dtype"]], tuple(map(int, about["shape"]))
            start, stop = (8 + len(header) + int(offset) for offset in about["data_offsets"])
        except (KeyError, TypeError, ValueError):
            dtype, shape, start, stop = torch.uint8, (0,), 0, 0
        fits = 8 < start < stop <= entry["bytes"] and stop - start == dtype.itemsize * math.prod(shape)
        if not fits or shape[:1] != (entry["num_samples"],):
            raise ValueError(f"{file}: not a readable shard: {short_repr(name)}: {short_repr(about)}")
        found[name] = Array(dtype, shape, start)
    return found


def _altered(file: Path) -> ValueError:
    return ValueError(f"{file}: its SHA-256 is not the manifest's: the file was altered")
