"""The store that generated tokens go to, shard by shard, and which of its shards are whole."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from blip3o_dit.data.checks import Record, check_pair, check_square
from blip3o_dit.data.manifest import DTYPES, STORE_ASIDE, check_shard_entry, write_manifest
from blip3o_dit.data.shard_writer import json_line, to_disk, write_shard
from blip3o_dit.data.store_folder import GENERATION_PARTS, StoreFolder, writing_alone
from blip3o_dit.inference.unfinished import Unfinished
from blip3o_dit.utils.atomic import write_atomically
from blip3o_dit.utils.checksums import sha256
from blip3o_dit.utils.json_files import finite_or_none, read_json

DTYPE = "float32"
# Size of a shard at most, give or take a batch; a process holds one shard at a time.
MAX_SHARD_BYTES = 2**28

logger = logging.getLogger(__name__)


class GeneratedStore:
    """Writes conditions and generated tokens shard by shard, aside, until the store is whole.

    Args:
        path: the folder that becomes the store; all processes see it.
        sizes: tokens, condition width, target width.
        encoder: what is known of the tower that made the conditions, for the manifest.
    """

    def __init__(
        self, path: Path, sizes: tuple[int, int, int], *, encoder: Mapping[str, Any] | None = None
    ) -> None:
        self.path = path
        self.aside = path / STORE_ASIDE
        self.sizes = sizes
        self.encoder = encoder
        self.unfinished = Unfinished(path)

    @contextmanager
    def claimed(self, request: dict[str, Any], size: int, *, overwrite: bool = False) -> Iterator[int]:
        """Hold the folder while the block writes; on one process, before others write.

        When the block ends well the store takes its place, else what was there before stays, and what was
        generated is kept for the same request. Yields the samples per shard: `size`, or as it was begun.

        Raises:
            ValueError: see `StoreFolder` and `Unfinished.find`; also when another process writes to the same
                folder.
        """
        check_square(self.path, self.sizes[0])
        with writing_alone(self.path, "generation"):
            found = self.unfinished.find(request, overwrite=overwrite)
            folder = StoreFolder(
                self.path, overwrite=overwrite, parts=GENERATION_PARTS, goes_on=found is not None
            )
            try:
                with self.unfinished.going_on(found, request, size=size) as begun_size:
                    yield begun_size
                    folder.publish()
            except BaseException:
                if not self.unfinished.has_samples():
                    folder.abandon()
                raise

    def shard_size(self, count: int, *, batch_size: int, processes: int) -> int:
        """Samples per shard: a multiple of `batch_size` that gives each process equally many shards.

        The batches are then the same as on one process, and so are the samples, bit for bit.
        """
        num_tokens, condition_dim, target_dim = self.sizes
        bytes_per_sample = num_tokens * (condition_dim + target_dim) * DTYPES[DTYPE].itemsize
        max_samples = max(1, MAX_SHARD_BYTES // bytes_per_sample)
        shards_per_process = math.ceil(count / (max_samples * processes))
        return batch_size * math.ceil(count / (shards_per_process * processes * batch_size))

    def write(
        self, number: int, first: int, eva: Tensor, generated: Tensor, records: Sequence[Record]
    ) -> dict[str, Any]:
        """Write a shard, [n, L, C_eva] and [n, N, C]; returns its manifest entry.

        Args:
            first: number of samples in the shards before it.

        Raises:
            ValueError: for NaN or infinity and bad records, naming the sample.
        """
        check_pair(self.path, eva, generated, records, expected=self.sizes, offset=first)
        lines = [json_line(self.path, first + row, record) for row, record in enumerate(records)]
        stored_eva, stored_clip = (
            to_disk(self.path, tokens, name, DTYPE) for tokens, name in ((eva, "eva"), (generated, "clip"))
        )
        self._entry_file(number).unlink(missing_ok=True)
        entry = write_shard(self.aside, number, stored_eva, stored_clip, lines)
        write_atomically(self._entry_file(number), json.dumps(entry).encode())
        return entry

    def written(self, number: int) -> dict[str, Any] | None:
        """The entry of a shard that was written and is whole; None for one that must be generated (again)."""
        file = self._entry_file(number)
        if not file.is_file():
            return None
        try:
            entry: dict[str, Any] = read_json(file)
            check_shard_entry(file, entry)
            for name, digest in ((entry["file"], entry["sha256"]), (entry["table"], entry["table_sha256"])):
                if sha256(self.aside / name) != digest:
                    raise ValueError(f"{self.aside / name}: not what was written there")
        except (OSError, ValueError) as error:
            logger.warning("%s: shard %d is generated again", error, number)
            return None
        return entry

    def tokens_of(self, entry: Mapping[str, Any]) -> Tensor:
        """The generated tokens in a whole shard, [n, N, C]."""
        with safe_open(self.aside / entry["file"], framework="pt") as tensors:
            tokens: Tensor = tensors.get_tensor("clip").clone()
        return tokens

    def state_file(self, name: str) -> Path:
        """Where samples are kept that are in no shard yet."""
        return self.unfinished.folder / f"{name}.safetensors"

    def finish(
        self,
        entries: Sequence[Mapping[str, Any]],
        made_by: Mapping[str, Any],
        request: Mapping[str, Any],
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the manifest, from the entries of all shards in order, how the tokens were made, for which
        request, and how good they are."""
        encoders: dict[str, Any] = {"clip": {"generated_by": made_by}}
        if self.encoder is not None:
            encoders["eva"] = dict(self.encoder)
        about: dict[str, Any] = {"encoders": encoders, "pooling": None, "normalization": "none"}
        about["generation"] = {"request": request, "metrics": finite_or_none(metrics)}
        write_manifest(self.aside, self.sizes, DTYPE, entries, about)

    def _entry_file(self, number: int) -> Path:
        return self.unfinished.folder / f"shard-{number:05d}.entry.json"
