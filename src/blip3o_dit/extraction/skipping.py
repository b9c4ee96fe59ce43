"""Skipped images: what is noted of them, and how many there may be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from blip3o_dit.extraction.config import ExtractionConfig
from blip3o_dit.extraction.reading_errors import NOT_READ
from blip3o_dit.utils.json_files import printable

# key, location, reason
Skipped = dict[str, str]

# Begins the reason of an image whose tokens the store cannot hold.
NO_FIT = "tokens do not fit"
TOO_LARGE = "too large"


@dataclass
class SkipLimit:
    """Counts skipped images, of `total` listed ones, and ends the run at the first that is too much."""

    config: ExtractionConfig
    total: int
    count: int = 0
    kinds: Counter[str] = field(default_factory=Counter)

    def add(self, skipped: Iterable[Skipped]) -> None:
        """Raises ValueError with --strict, or above --max_skipped."""
        for image in skipped:
            found = f"{printable(image['location'])}: {image['reason']}"
            if self.config.strict:
                raise ValueError(f"{found} (--strict)")
            self.count += 1
            self.kinds[kind_of(image)] += 1
            if self.count > self.config.max_skipped_of(self.total):
                raise ValueError(self._too_many(found))

    def _too_many(self, last: str) -> str:
        again = ", try those again that could not be read (--retry_skipped)" if NOT_READ in self.kinds else ""
        return (
            f"{self.config.output}: expected at most {self.config.max_skipped:.3g} of {self.total} pictures "
            f"to be skipped, found {self.count} ({summary(self.kinds)}), the last {last}: what was done is "
            f"kept, continue with the same command{again}, or accept them (--max_skipped 1)"
        )


def kind_of(image: Skipped) -> str:
    return image["reason"].split(":")[0]


def summary(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
