"""What a user may say of a source; importing this imports no library."""

from __future__ import annotations

from dataclasses import dataclass

# Separators that are easier to name than to type.
SEPARATOR_NAMES = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "space": " "}


@dataclass(frozen=True, kw_only=True)
class ListingOptions:
    """What a source's own conventions leave open. None: by its usual names.

    Args:
        image_column, caption_column: of list files, metadata and tables.
        image_field: of webdataset samples, "jpg" or "seg.png"; several in order, separated by ";".
        csv_separator: of list files with a header; None takes the one that its header is written with.
        skip_links: do not enter linked folders.
        limit: only the first so many images of the list.
        strict: whatever would be skipped is an error.
    """

    image_column: str | None = None
    caption_column: str | None = None
    image_field: str | None = None
    csv_separator: str | None = None
    skip_links: bool = False
    limit: int | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        separator = SEPARATOR_NAMES.get(self.csv_separator or "", self.csv_separator)
        if separator is not None and (len(separator) != 1 or separator in '\r\n"'):
            expected = f"one character or {', '.join(SEPARATOR_NAMES)}"
            raise ValueError(f"csv_separator: expected {expected}, found {self.csv_separator!r}")
        object.__setattr__(self, "csv_separator", separator)
        if self.limit is not None and (not isinstance(self.limit, int) or self.limit < 1):
            raise ValueError(f"limit: expected a number of pictures from 1 on, found {self.limit!r}")
