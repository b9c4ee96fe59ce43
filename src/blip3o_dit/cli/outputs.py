"""Stores that a command writes at an address: made on this disk first, then sent."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def store_output(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Where a command writes its store: the path, or for an address a folder of the cache, sent from there.

    What is stopped is continued by the same command on this machine. That the address can be written to is
    found out first: it would be a pity after days of extraction.

    Raises:
        ValueError: another store is there, without `overwrite`.
    """
    from blip3o_dit.utils.addresses import Address, cache_folder, located

    address = located(path)
    if not isinstance(address, Address):
        yield path
        return
    from blip3o_dit.data.manifest import MANIFEST
    from blip3o_dit.publish import push_to_address
    from blip3o_dit.utils.sending import check_sending

    key = hashlib.sha256(str(address).encode()).hexdigest()[:16]
    folder = cache_folder() / "outputs" / f"{address.name}-{key}"
    sends = os.environ.get("RANK", "0") == "0"
    if sends:
        check_sending(address, MANIFEST, overwrite=overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    yield folder
    if sends:
        push_to_address(folder, address, overwrite=overwrite)
        sys.stdout.write(f"{address}\n")
        shutil.rmtree(folder)
