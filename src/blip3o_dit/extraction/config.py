"""What an extraction does: the flags of `blip3o-dit extract`, checked."""

from __future__ import annotations

from dataclasses import dataclass, fields

from blip3o_dit.data.manifest import DTYPES
from blip3o_dit.extraction.image_decoding import MAX_PIXELS
from blip3o_dit.extraction.sources.image_list import ListingOptions
from blip3o_dit.utils.settings import setting
from blip3o_dit.utils.validation import check_name

DEFAULT_EVA = "BAAI/EVA-CLIP-8B"
DEFAULT_CLIP = "openai/clip-vit-large-patch14"


@dataclass(frozen=True, kw_only=True)
class ExtractionConfig:
    """What to extract, from what, into what: the flags of `blip3o-dit extract`, explained by their help.

    `images`: any source of docs/inputs.md. `output`: the store's folder. The towers are named as
    `load_encoder` takes them.

    Raises:
        ValueError: names the field, what it expects and what it found.
    """

    images: str
    output: str
    eva: str = setting(DEFAULT_EVA, "tower of the conditions")
    clip: str = setting(DEFAULT_CLIP, "tower of the targets")
    eva_revision: str | None = setting(None, "revision on the hub")
    clip_revision: str | None = setting(None, "revision on the hub")
    towers_from_scratch: bool = setting(
        False,
        "tiny random towers, to try the pipeline: their tokens mean nothing",
        spelling="--towers-from-scratch",
    )
    tokens: int = setting(64, "tokens per picture after pooling, a square; 256 keeps a 16x16 grid")
    dtype: str = setting("float32", "precision of the towers", choices=("float32", "bfloat16", "float16"))
    store_dtype: str = setting("float16", "precision on disk", choices=("float32", "bfloat16", "float16"))
    batch_size: int = setting(32, "pictures per call of a tower")
    shard_size: int = setting(1024, "pictures per shard")
    workers: int = setting(2, "decoding processes, per process")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...")
    strict: bool = setting(False, "an unreadable picture is an error, not a line in skipped.jsonl")
    image_column: str | None = setting(
        None, "column of a list or table with the pictures, not its usual name"
    )
    caption_column: str | None = setting(None, "column with the captions, not its usual name")
    image_field: str | None = setting(
        None, "which member of a webdataset sample is its picture: jpg, or 'seg.png;depth.png'"
    )
    csv_separator: str | None = setting(
        None, "of list files with a header: tab, comma, semicolon or a character; else by the header"
    )
    skip_links: bool = setting(False, "do not enter linked folders")
    max_pixels: int = setting(MAX_PIXELS, "refuse larger pictures, before they are decoded")
    seed: int = setting(0, "seed of towers from scratch")

    def __post_init__(self) -> None:
        check_name("dtype", self.dtype, tuple(DTYPES))
        check_name("store_dtype", self.store_dtype, tuple(DTYPES))
        for name, low in _MINIMUM.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"{name}: expected an integer >= {low}, found {value!r}")
        _ = self.listing  # which checks its own
        if self.max_pixels > MAX_PIXELS:
            raise ValueError(f"max_pixels: expected at most {MAX_PIXELS}, found {self.max_pixels}")

    @property
    def listing(self) -> ListingOptions:
        """Those of the settings that say how pictures are listed."""
        return ListingOptions(
            **{option.name: getattr(self, option.name) for option in fields(ListingOptions)}
        )


_MINIMUM = {"tokens": 1, "batch_size": 1, "shard_size": 1, "max_pixels": 1, "workers": 0, "seed": 0}

# What may differ between a run and its continuation: it does not change what is written.
RESUMABLE_CHANGES = ("images", "output", "workers", "device")
