"""Conditions straight from images: the tower that a model's training data was made with, run on demand."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip3o_dit.data.checks import Record, non_finite_samples
from blip3o_dit.data.manifest import DTYPES
from blip3o_dit.data.pooling import pool_tokens
from blip3o_dit.data.towers import TOWERS_FILE
from blip3o_dit.extraction.identity import flat
from blip3o_dit.extraction.image_decoding import UnreadableImageError, decode_image
from blip3o_dit.extraction.reading_errors import Source
from blip3o_dit.extraction.sources.image_ref import ImageRef
from blip3o_dit.extraction.vision_towers import VisionEncoder, load_encoder, tiny_encoder
from blip3o_dit.utils.json_files import printable, short_repr

# Of a tower's description, what does not say what tokens it makes, or may be spelled in several ways.
_NOT_COMPARED = {"name", "revision", "commit", "meaningful"}
# The name of a tower that is made, not loaded.
FROM_SCRATCH = re.compile(r"random (eva|clip) tower, seed (\d{1,9})")

logger = logging.getLogger(__name__)


@dataclass
class ImageConditions:
    """The conditions of images, [n, L, C_eva] float32 on the CPU; what cannot be read goes to `skipped`.

    Args:
        num_tokens: L, into which the tower's grid is pooled.
        read: images that are done with.
    """

    images: Sequence[ImageRef]
    tower: VisionEncoder
    num_tokens: int
    skipped: list[dict[str, str]] = field(default_factory=list)
    read: int = 0

    @property
    def most(self) -> int:
        return len(self.images)

    @property
    def encoder(self) -> dict[str, Any]:
        return self.tower.describe()

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, list[Record]]]:
        """Conditions and records of the images that can be read, in batches that all but the last are full.

        After each batch `read` and `skipped` say where it ended; set to these, others go on from there.

        Raises:
            ValueError: when none of the images can be read.
            ReadError: when the disk that the images are on cannot be read.
        """
        source = Source.of(self.images)
        done, pixels, images = self.read, [], []
        for number in range(self.read + 1, len(self.images) + 1):
            image = self.images[number - 1]
            prepared = self._prepared(source, image)
            if prepared is not None:
                pixels.append(prepared)
                images.append(image)
            if images and (len(images) == batch_size or number == len(self.images)):
                tokens, records = self._encode(pixels, images)
                done, pixels, images, self.read = done + len(records), [], [], number
                if records:
                    yield tokens, records
        if not done:
            first = self.skipped[0]
            raise ValueError(
                f"expected at least one readable picture, found none of {len(self.skipped)}, "
                f"the first {first['location']}: {first['reason']}"
            )

    def _prepared(self, source: Source, image: ImageRef) -> Tensor | None:
        """An image as the tower takes it, [3, size, size]; None, and noted, where it cannot be read."""
        try:
            return self.tower.preprocessing(decode_image(source.read(image)))
        except UnreadableImageError as error:
            self._skip(image, str(error))
            return None

    def _encode(self, pixels: list[Tensor], images: list[ImageRef]) -> tuple[Tensor, list[Record]]:
        """Pooled tokens [n, L, C_eva] and records of these images, without those whose tokens overflow."""
        tokens = pooled_tokens(self.tower, torch.stack(pixels), self.num_tokens)
        bad = set(non_finite_samples(tokens).tolist())
        for row in sorted(bad):
            self._skip(images[row], "its tokens are not finite")
        rows = [row for row in range(len(images)) if row not in bad]
        return tokens[rows], [images[row].record for row in rows]

    def _skip(self, image: ImageRef, reason: str) -> None:
        self.skipped.append({"key": image.key, "location": image.location, "reason": reason})


@torch.no_grad()
def pooled_tokens(tower: VisionEncoder, pixels: Tensor, num_tokens: int) -> Tensor:
    """A tower's tokens of prepared images [B, 3, size, size]: [B, num_tokens, C] float32 on the CPU."""
    weight = next(tower.parameters())
    grid = tower(pixels.to(weight.device, weight.dtype))  # [B, grid * grid, C]
    return pool_tokens(grid.float(), num_tokens).cpu()


def open_tower(
    recorded: Mapping[str, Any] | None,
    sizes: tuple[int, int, int],
    model: Path,
    *,
    side: str = "eva",
    name: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    device: torch.device | str = "cpu",
) -> VisionEncoder:
    """The tower that made the conditions, or with side "clip" the targets, which a model was trained on.

    Args:
        recorded: what `read_towers` found beside the model's weights.
        sizes: tokens, condition width and target width of the model. model: its folder.
        name, revision, dtype: of the tower, instead of those recorded.

    Raises:
        ValueError, OSError: one line: no tower is recorded or named, it cannot be loaded, or it is another
            one than the one recorded.
    """
    known = {} if recorded is None else recorded["encoders"].get(side)
    known = known if isinstance(known, dict) else {}
    role = "conditions" if side == "eva" else "targets"
    if name is None and not isinstance(known.get("name"), str):
        raise ValueError(
            f"{model}: expected {TOWERS_FILE}, which names the tower of the {role}, found none: the "
            f"model was trained on a pickle or by an earlier version; name the tower with --{side}"
        )
    if name is None and known["name"].startswith(("timm:", "open_clip:")):
        raise ValueError(
            f"{model}: was trained on tokens of {printable(known['name'])}, which is only loaded when you "
            f"name it: --{side}"
        )
    wanted = known["name"] if name is None else name
    tower = _load(
        wanted, revision or (_revision(known) if name is None else None), dtype, recorded, model, side
    )
    tokens, width = sizes[0], sizes[1 if side == "eva" else 2]
    if tower.width != width:
        raise ValueError(
            f"{model}: expected a tower {width} wide, found {printable(wanted)}, {tower.width} wide"
        )
    pool_tokens(torch.empty(1, tower.grid**2, 1), tokens)  # refuses a grid that does not pool into the tokens
    _check_description(tower.describe(), known, model)
    _check_pooling(recorded or {}, tower, tokens, model, side)
    return tower.to(device).eval().requires_grad_(False)


def _revision(known: Mapping[str, Any]) -> str | None:
    """The recorded one, exactly if that is known: a branch of the hub moves on."""
    return known.get("commit") or known.get("revision")


def _load(
    name: str,
    revision: str | None,
    dtype: str | None,
    recorded: Mapping[str, Any] | None,
    model: Path,
    side: str,
) -> VisionEncoder:
    precision = DTYPES[dtype or (recorded or {}).get("dtype", "float32")]
    from_scratch = FROM_SCRATCH.fullmatch(name)
    if from_scratch:
        logger.warning("%s: tiny and random, its tokens mean nothing", name)
        return tiny_encoder(from_scratch[1], seed=int(from_scratch[2])).to(precision)
    logger.info("loading the tower %s", printable(name))
    try:
        return load_encoder(name, dtype=precision, revision=revision)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; {model} was trained on tokens of it: name where it is now with --{side}"
        ) from error


def _check_description(found: Mapping[str, Any], known: Mapping[str, Any], model: Path) -> None:
    """Refuse another tower than the recorded one, by all that both descriptions tell.

    Of the preprocessing also by what only one tells: settings that few towers have are left out elsewhere.
    """
    there, here = flat(known), flat(found)
    names = there.keys() & here.keys()
    if isinstance(known.get("preprocessing"), dict):
        names |= {name for name in there.keys() | here.keys() if name.startswith("preprocessing.")}
    for name in sorted(names - _NOT_COMPARED):
        if there.get(name) != here.get(name):
            raise ValueError(
                f"{model}: expected the tower that made its training data, with {name} "
                f"{short_repr(there.get(name))}, found {printable(found['name'])} with "
                f"{short_repr(here.get(name))}"
            )


def _check_pooling(
    recorded: Mapping[str, Any], tower: VisionEncoder, tokens: int, model: Path, side: str
) -> None:
    """Refuse what was pooled or normalised in another way than here."""
    grid = round(tokens**0.5)
    ours = f"{side} {tower.grid}x{tower.grid} -> {grid}x{grid} mean"
    pooling, normalization = recorded.get("pooling"), recorded.get("normalization", "none")
    if pooling is not None and not any(part.startswith(ours) for part in str(pooling).split(", ")):
        raise ValueError(f"{model}: expected tokens pooled {ours!r}, found {short_repr(pooling)}")
    if normalization != "none":
        raise ValueError(f"{model}: expected tokens normalised 'none', found {short_repr(normalization)}")
