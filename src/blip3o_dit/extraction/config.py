"""What an extraction does: the flags of `blip3o-dit extract`, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from blip3o_dit.data.choices import DTYPE_NAMES, KEPT, STORE_DTYPES
from blip3o_dit.extraction.sources.options import ListingOptions
from blip3o_dit.utils.settings import setting
from blip3o_dit.utils.validation import check_name, check_range, is_number

DEFAULT_EVA = "BAAI/EVA-CLIP-8B"
DEFAULT_CLIP = "openai/clip-vit-large-patch14"
# So many pictures may be skipped in any case: one of three is no sign of a source that fails.
FEW_SKIPPED = 5
MAX_PIXELS = 178_956_970  # Pillow refuses more than this by itself


@dataclass(frozen=True, kw_only=True)
class ExtractionConfig:
    """What to extract, from what, into what: the flags of `blip3o-dit extract`, explained by their help.

    `images`: any source of docs/inputs.md, or several. `output`: the store's folder. The towers are named as
    `load_encoder` takes them.

    A field that `decides` what is written cannot change between a run and its continuation (and the towers'
    weights and the pictures' sizes cannot); one that is `noted` can.

    Raises:
        ValueError: names the field, what it expects and what it found.
    """

    images: str | tuple[str, ...]
    output: str
    eva: str = setting(
        DEFAULT_EVA, "tower of the conditions: a folder, a name on the hub, timm:NAME, ...", group="towers"
    )
    clip: str = setting(DEFAULT_CLIP, "tower of the targets")
    eva_revision: str | None = setting(None, "revision on the hub (default: the newest)")
    clip_revision: str | None = setting(None, "revision on the hub (default: the newest)")
    eva_preprocessing: str | None = setting(
        None, "a preprocessor_config.json to use (default: the tower's own)"
    )
    clip_preprocessing: str | None = setting(
        None, "a preprocessor_config.json to use (default: the tower's own)"
    )
    eva_size: int | None = setting(None, "pixels a side for the tower (default: its own)")
    clip_size: int | None = setting(None, "pixels a side for the tower (default: its own)")
    towers_from_scratch: bool = setting(
        False,
        "tiny random towers, to try the pipeline: their tokens mean nothing",
        decides=True,
    )
    tokens: int = setting(
        64, "tokens per picture after pooling, a square; 256 keeps a 16x16 grid", decides=True
    )
    dtype: str = setting("float32", "precision of the towers", choices=DTYPE_NAMES, decides=True)
    store_dtype: str = setting(
        "float16", "precision on disk", group="store", choices=STORE_DTYPES, decides=True
    )
    keep: tuple[str, ...] = setting(
        (),
        "vectors of each tower to keep beside the tokens: class (its class token), pooled (the one projected "
        "vector of a picture)",
        decides=True,
    )
    shard_size: int = setting(1024, "pictures per shard", decides=True)
    batch_size: int = setting(32, "pictures per call of a tower", group="speed", noted=True)
    workers: int = setting(2, "decoding processes, per process")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...")
    strict: bool = setting(
        False, "an unreadable picture is an error, not a line in skipped.jsonl", group="pictures"
    )
    max_skipped: float = setting(
        0.05, f"stop when more than this share of the pictures (and more than {FEW_SKIPPED}) cannot be used"
    )
    retry_skipped: bool = setting(
        False, "try pictures again that could not be read; a finished store: all that were skipped"
    )
    max_pixels: int = setting(MAX_PIXELS, "refuse larger pictures, before they are decoded", noted=True)
    append: bool = setting(
        False, "add the pictures whose keys are not in the finished store yet", group="store"
    )
    overwrite: bool = setting(
        False, "replace the store or unfinished extraction that is there, when it is done"
    )
    image_column: str | None = setting(
        None,
        "column of a list or table with the pictures (default: by its usual names)",
        group="pictures",
        decides=True,
    )
    caption_column: str | None = setting(None, "column with the captions (default: by its usual names)")
    image_field: str | None = setting(
        None,
        "which member of a webdataset sample is its picture, as 'seg.png;depth.png' (default: jpg, png, ...)",
        decides=True,
    )
    csv_separator: str | None = setting(
        None,
        "of list files with a header: tab, comma, semicolon or a character (default: the header's)",
    )
    skip_links: bool = setting(False, "do not enter linked folders")
    limit: int | None = setting(
        None,
        "extract the first so many pictures of the list only; --append adds others later (default: all)",
        decides=True,
    )
    seed: int = setting(0, "seed of towers from scratch", group="towers")

    def __post_init__(self) -> None:
        check_name("dtype", self.dtype, DTYPE_NAMES)
        check_name("store_dtype", self.store_dtype, STORE_DTYPES)
        for kind in self.keep:
            check_name("keep", kind, KEPT)
        if len(set(self.keep)) < len(self.keep):
            raise ValueError(f"keep: expected each once, found {list(self.keep)}")
        for name, low in _MINIMUM.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"{name}: expected an integer >= {low}, found {value!r}")
        for name in ("eva_size", "clip_size"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 1, 4097)
        _ = self.listing  # which checks its own
        if self.max_pixels > MAX_PIXELS:
            raise ValueError(f"max_pixels: expected at most {MAX_PIXELS}, found {self.max_pixels}")
        if not is_number(self.max_skipped) or not 0 <= self.max_skipped <= 1:
            raise ValueError(f"max_skipped: expected a share from 0 to 1, found {self.max_skipped!r}")
        if self.append and self.overwrite:
            raise ValueError("expected --append or --overwrite, found both")

    def max_skipped_of(self, count: int) -> float:
        """How many of so many pictures may be skipped."""
        if self.max_skipped in (0, 1):  # none, or any number
            return math.inf if self.max_skipped else 0
        return max(self.max_skipped * count, FEW_SKIPPED)

    @property
    def listing(self) -> ListingOptions:
        """Those of the settings that say how pictures are listed."""
        return ListingOptions(
            **{option.name: getattr(self, option.name) for option in fields(ListingOptions)}
        )


_MINIMUM = {"tokens": 1, "batch_size": 1, "shard_size": 1, "max_pixels": 1, "workers": 0, "seed": 0}
