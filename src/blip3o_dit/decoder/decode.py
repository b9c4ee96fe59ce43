"""Tokens of a store or file become PNG files, one a sample."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image
from torch import Tensor

from blip3o_dit.data.embeddings import Embeddings, batches
from blip3o_dit.data.store_folder import IGNORED
from blip3o_dit.decoder.network import TokenDecoder
from blip3o_dit.utils.atomic import written_aside
from blip3o_dit.utils.progress import working
from blip3o_dit.utils.recognise import recognise
from blip3o_dit.utils.stateless_random import stateless_choice

# Root mean square of standardised tokens: 1 for those that a decoder learned from
USUAL_SCALE = (0.5, 2.0)
# Of a file's name, without what is added to it; file systems take 255 bytes.
MAX_NAME = 200

logger = logging.getLogger(__name__)


def decode_embeddings(
    decoder: TokenDecoder,
    source: Embeddings,
    output: str | Path,
    *,
    num_samples: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    overwrite: bool = False,
) -> int:
    """Write one PNG for each sample's target tokens into a new folder, named by the key; returns how many.

    Characters of a key that are not those of a plain file name are written as %XX.

    Args:
        output: made when all pictures are there; may be an empty folder.
        num_samples: only so many, chosen by the seed.
        overwrite: replace the pictures that are there.

    Raises:
        ValueError: tokens of another shape than the decoder's; something is in the folder.
        WriteError: when the disk is full or the folder cannot be written.
    """
    check_fits(decoder, source.num_tokens, source.target_dim, source.path)
    output = Path(output)
    check_output(output, overwrite=overwrite)
    count = source.num_samples if num_samples is None else num_samples
    indices = stateless_choice(source.num_samples, count, seed=seed, stream="decoded samples")
    names = _file_names(source, indices)
    counting = working(f"decoding {len(indices)} samples", len(indices), "picture")
    with written_aside(output, sealed=False) as aside, counting as bar:
        for piece in batches(indices, batch_size):
            tokens = source.fetch(piece)[1]
            if piece[0] == indices[0]:
                check_scale(decoder, tokens, source.path)
            pixels = decoder.decode(tokens).numpy()
            for picture, name in zip(pixels, islice(names, len(piece)), strict=True):
                Image.fromarray(picture).save(aside / name)
            bar(len(piece))
    return len(indices)


def check_fits(decoder: TokenDecoder, num_tokens: int, channels: int, where: str | Path) -> None:
    """Refuse (ValueError) tokens of another shape than the decoder's."""
    expected = [decoder.config.num_tokens, decoder.config.channels]
    if [num_tokens, channels] != expected:
        raise ValueError(
            f"{where}: expected {expected[0]} tokens of {expected[1]} numbers, as the decoder takes them, "
            f"found {num_tokens} of {channels}"
        )


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse (ValueError) a place where something is, or with `overwrite` something else than PNG files."""
    if not output.exists():
        return
    there = {file for file in output.iterdir() if file.name not in IGNORED} if output.is_dir() else {output}
    pictures = output.is_dir() and all(file.suffix == ".png" and file.is_file() for file in there)
    if there and not (overwrite and pictures):
        way = " (overwrite=True replaces it)" if pictures else ""
        raise ValueError(f"{output}: expected a new folder, found {recognise(output).what}{way}")


def check_scale(decoder: TokenDecoder, tokens: Tensor, where: str | Path) -> None:
    """Say so when tokens [B, N, C] are far from those that the decoder learned from."""
    scale = float(decoder.standardize(tokens.to(decoder.token_mean.device)).square().mean().sqrt())
    low, high = USUAL_SCALE
    if not low <= scale <= high:
        logger.warning(
            "%s: its tokens deviate %.3g times as much as those that the decoder learned from: they may be "
            "another tower's, or normalised (train-decoder --normalize_embeddings)",
            *(where, scale),
        )


def _file_names(source: Embeddings, indices: np.ndarray) -> Iterator[str]:
    taken: set[str] = set()
    for piece in batches(indices, 256):
        for index, record in zip(piece, source.records(piece), strict=True):
            name = quote(record["key"], safe=" ()[],;=+@!'&$", errors="backslashreplace")
            name = name.removesuffix(".png")
            if len(name) > MAX_NAME or name in taken:
                name = f"{name[:MAX_NAME]}-{index}"
            taken.add(name)
            yield f"{name}.png"
