"""Reading an image's bytes: what is tried again, what makes it a skipped image, and what stops a run.

Bad bytes are a skipped image. A reading error is the source's (a disk that is away, a network that is down):
it is tried again, then stops the run. A file that is missing or locked is a skipped image only while the
source is there: as long as files that could be opened before still can be.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from blip3o_dit.extraction.image_decoding import UnreadableImageError
from blip3o_dit.extraction.sources.image_ref import OF_ONE_FILE, ImageRef
from blip3o_dit.utils.errors import RETRY_AFTER, ReadError
from blip3o_dit.utils.json_files import one_line, printable

# Begins the reason of an image whose bytes could not be had: a later try may have them.
NOT_READ = "cannot be read"

_WITNESSES = 16
# Of one file, or of a folder in the place of one.
_OF_ONE_FILE = {*OF_ONE_FILE, errno.EISDIR}


@dataclass
class Source:
    """What images are read from; small and picklable.

    Args:
        witnesses: files that could be opened when the run began.
        last: the file that was read last, probably a neighbour of the next one.
    """

    witnesses: tuple[str, ...]
    last: str | None = None

    @classmethod
    def of(cls, refs: Sequence[ImageRef]) -> Source:
        """Raises FileNotFoundError when none of some images, from all over the list, can be opened."""
        some = refs[:: max(1, len(refs) // _WITNESSES)]
        files = list(dict.fromkeys(ref.file for ref in some))
        witnesses = tuple(file for file in files if _opens(file))
        if not witnesses:
            raise FileNotFoundError(
                f"{printable(files[0])}: expected a file that can be opened, found none, "
                f"nor at {len(files) - 1} others of the list"
            )
        return cls(witnesses)

    def read(self, ref: ImageRef) -> bytes:
        """The image's bytes.

        Raises:
            UnreadableImageError: the reason why this image has none.
            ReadError: the source fails.
        """
        waits, missing = list(RETRY_AFTER), False
        while True:
            try:
                data = ref.read()
            except OSError as error:
                found = error
            except (ValueError, MemoryError) as error:
                raise UnreadableImageError(f"{NOT_READ}: {one_line(error)}") from error
            else:
                self.last = ref.file
                return data
            if found.errno is None:  # a library's word for damage: no call of the system failed
                raise UnreadableImageError(f"{NOT_READ}: {one_line(found)}") from found
            if found.errno in _OF_ONE_FILE and self._is_there(ref):
                if missing:  # the source was there before this try and after it
                    raise UnreadableImageError(_reason(found)) from found
                missing = True
            elif waits:
                missing = False
                time.sleep(waits.pop(0))
            else:
                raise ReadError(f"{printable(ref.location)}: {_reason(found)}") from found

    def _is_there(self, ref: ImageRef) -> bool:
        needed = [self.last] if self.last else []
        if ref.member or ref.row >= 0:
            needed.append(ref.file)  # an archive is no image that is missing by itself
        return all(map(_opens, needed)) and any(map(_opens, self.witnesses))


@contextmanager
def listing(where: str) -> Iterator[None]:
    """A disk that fails while images are listed stops the run as well; a place that is not there does not."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.errno in _OF_ONE_FILE:
            raise
        raise ReadError(f"{where}: {_reason(error)}: continue with the same command") from error


def _opens(file: str) -> bool:
    try:
        os.close(os.open(file, os.O_RDONLY | os.O_NONBLOCK))  # a pipe would be waited for
    except (OSError, ValueError):
        return False
    return True


def _reason(error: OSError) -> str:
    name = errno.errorcode.get(error.errno or 0, str(error.errno))
    return f"{NOT_READ}: {name}, {error.strerror or one_line(error)}"
