"""Images read, decoded and cropped by worker processes, ahead of the towers.

Workers read files and members of tars themselves. What can only be read in order, the rows of a table and the
members of a compressed tar, the main process reads, once: every worker would read it all.

What a worker hands over is one array of bytes per batch and per distinct resize and crop, through a pipe.
Tensors would go through shared memory, of which containers have 64 MB, with a file descriptor each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from blip3o_dit.extraction.image_decoding import SCALED, UnreadableImageError, decode_image
from blip3o_dit.extraction.preprocessing import Preprocessing
from blip3o_dit.extraction.reading_errors import Source
from blip3o_dit.extraction.sources.image_ref import ImageRef
from blip3o_dit.utils.errors import ReadError
from blip3o_dit.utils.json_files import one_line

# An image's index, and its bytes (or the reason why there are none) where the main process reads them
Request = tuple[int, bytes | Exception | None]

DECODE_BATCH = 16
# Seconds for a batch, far above what decoding and reading again take: a worker that is lost is an error.
TIMEOUT = 600


@dataclass(frozen=True)
class Decoded:
    """An image ready for the towers, or the reason why it is not.

    `pixels`: by side, uint8 [3, size, size]; sides with the same resize and crop share them. `scaled`: how
    grey values of more than 8 bits were scaled.
    """

    index: int
    pixels: Mapping[str, np.ndarray] = field(default_factory=dict)
    reason: str | None = None
    scaled: str | None = None


@dataclass(frozen=True)
class DecodedBatch:
    """What a worker hands over.

    `outcomes`: by image, in order, its index, the reason why it is not among the `arrays`, and how its values
    were scaled. Of the arrays there is one per distinct resize and crop, uint8 [B, 3, size, size].
    `failure`: why the source ended there.
    """

    outcomes: list[tuple[int, str | None, str | None]]
    arrays: list[np.ndarray]
    failure: str | None = None


@dataclass(eq=False)
class DecodingDataset(Dataset):
    """Reads, decodes and crops images; runs in the data loader's processes."""

    refs: Sequence[ImageRef]
    indices: Sequence[int]
    preprocessing: Sequence[Preprocessing]
    source: Source
    max_pixels: int

    def __len__(self) -> int:
        return len(self.indices)

    def requests(self) -> Iterator[list[Request]]:
        """What workers are asked for, batch by batch; the last holds the error that reading ended with."""
        for start in range(0, len(self.indices), DECODE_BATCH):
            batch: list[Request] = []
            for index in self.indices[start : start + DECODE_BATCH]:
                batch.append((index, self._read_in_order(self.refs[index])))
                if isinstance(batch[-1][1], ReadError):
                    yield batch
                    return
            yield batch

    def _read_in_order(self, ref: ImageRef) -> bytes | Exception | None:
        """The bytes, or why there are none; None for what a worker reads."""
        try:
            return self.source.read(ref) if ref.is_read_in_order else None
        except (UnreadableImageError, ReadError) as error:
            return error

    def __getitems__(self, requests: Sequence[Request]) -> DecodedBatch:
        outcomes: list[tuple[int, str | None, str | None]] = []
        rows: list[list[np.ndarray]] = []
        failure = None
        for index, given in requests:
            try:
                if isinstance(given, Exception):
                    raise given
                data = self.source.read(self.refs[index]) if given is None else given
                image = decode_image(data, max_pixels=self.max_pixels)
                rows.append([each.pixels(image).numpy() for each in self.preprocessing])
                outcomes.append((index, None, image.info.get(SCALED)))
            except UnreadableImageError as error:
                outcomes.append((index, str(error), None))
            except ReadError as error:
                failure = str(error)
                break
        return DecodedBatch(outcomes, [np.stack(column) for column in zip(*rows, strict=True)], failure)


def decoded_images(
    refs: Sequence[ImageRef],
    indices: Sequence[int],
    preprocessing: Mapping[str, Preprocessing],
    *,
    source: Source,
    max_pixels: int,
    workers: int,
) -> Iterator[Decoded]:
    """The images `indices` of the list, in this order; `preprocessing` by side.

    Raises:
        ReadError: the source fails, or a worker is lost.
    """
    distinct = {each.geometry: each for each in preprocessing.values()}
    place = {side: list(distinct).index(each.geometry) for side, each in preprocessing.items()}
    dataset = DecodingDataset(refs, indices, list(distinct.values()), source, max_pixels)
    loader: DataLoader = DataLoader(
        dataset,
        batch_sampler=dataset.requests(),
        num_workers=workers,
        collate_fn=_as_it_is,
        timeout=TIMEOUT if workers else 0,
    )
    for batch in _with_one_line(loader, workers):
        rows = zip(*batch.arrays, strict=True)
        for index, reason, scaled in batch.outcomes:
            row = next(rows) if reason is None else ()
            pixels = {side: row[number] for side, number in place.items()} if row else {}
            yield Decoded(index, pixels, reason, scaled)
        if batch.failure is not None:
            raise ReadError(f"{batch.failure}: what was done is kept, continue with the same command")


def stack(images: Sequence[Decoded], side: str) -> Tensor:
    """uint8 [B, 3, size, size]."""
    return torch.from_numpy(np.stack([image.pixels[side] for image in images]))


def _as_it_is(batch: Any) -> Any:
    return batch


def _with_one_line(loader: DataLoader, workers: int) -> Iterator[DecodedBatch]:
    """The loader's batches; what it and the system say of workers that fail, in one line."""
    try:
        yield from loader
    except (RuntimeError, OSError) as error:
        if not workers:
            raise
        raise ReadError(
            f"--workers {workers}: a decoding process was lost ({one_line(error)}): memory, file descriptors "
            "or /dev/shm may be short; what was done is kept, continue with the same command, perhaps with "
            "fewer --workers (0: none)"
        ) from error
