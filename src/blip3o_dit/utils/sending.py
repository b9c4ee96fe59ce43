"""Files sent to an address: those that are there are not sent again, and what makes them whole comes last.

While files are sent, `sending.json` there says which ones came, with their SHA-256, so that the same command
goes on where it was stopped.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blip3o_dit.utils.addresses import RemoteFolder
from blip3o_dit.utils.json_files import parse_json

SENDING = "sending.json"

logger = logging.getLogger(__name__)


class Sending:
    """Files on their way to an address.

    Args:
        last: the file that says that the others are whole: while they are sent it is not there.
        overwrite: what is there may be another store, or model.

    Raises:
        ValueError: something else is there; or what `RemoteFolder` raises.
    """

    def __init__(
        self, address: Path, last: str, *, new: bytes | None = None, overwrite: bool = False
    ) -> None:
        self.there, self.last = RemoteFolder(address), last
        self.sizes = self.there.sizes(or_none=True)
        self.sent: dict[str, str] = {}
        self.is_finished = False
        if last in self.sizes:
            found = self.there.read(last)
            self.is_finished = found == new
            if not self.is_finished and not overwrite:
                raise ValueError(
                    f"{address}: expected nothing there, or the same, found another {last} (overwrite=True "
                    "replaces what it lists)"
                )
            self.sent = _listed(address / last, found)
        if SENDING in self.sizes:
            self.sent |= _listed(address / SENDING, self.there.read(SENDING))

    def send(self, file: Path, sha256: str) -> bool:
        """Send a file; whether it was not there yet."""
        same = self.sent.get(file.name) == sha256 and self.sizes.get(file.name) == file.stat().st_size
        if same:
            return False
        if self.last in self.sizes:
            self.there.remove(self.last)
            del self.sizes[self.last]
            self._note()
        self.there.send(file)
        self.sent[file.name], self.sizes[file.name] = sha256, file.stat().st_size
        self._note()
        return True

    def finish(self, content: bytes, keep: set[str] | None = None) -> None:
        """Send the last file; of those that the one before listed, what is not in `keep` goes."""
        for name in sorted(set(self.sent) & set(self.sizes) - keep) if keep is not None else ():
            self.there.remove(name)
        if not self.is_finished or self.last not in self.sizes:
            self.there.write(self.last, content)
        if SENDING in self.there.sizes():
            self.there.remove(SENDING)

    def _note(self) -> None:
        self.there.write(SENDING, json.dumps({"files": self.sent}).encode())


def check_sending(address: Path, last: str, *, overwrite: bool = False) -> None:
    """Refuse (ValueError) before anything is made what `Sending` would refuse, or nobody could write."""
    sending = Sending(address, last, overwrite=overwrite)
    if SENDING not in sending.sizes:
        sending.there.write(SENDING, b"{}")
        sending.there.remove(SENDING)


def send_folder(
    folder: Path, digests: Mapping[str, str], last: str, address: Path, *, overwrite: bool = False
) -> int:
    """Send the files of a folder whose SHA-256 are given, by name, and then `last`; returns how many went."""
    content = (folder / last).read_bytes()
    sending = Sending(address, last, new=content, overwrite=overwrite)
    count = sum(sending.send(folder / name, sha256) for name, sha256 in sorted(digests.items()))
    sending.finish(content, keep=set(digests))
    return count


def _listed(file: Path, content: bytes) -> dict[str, str]:
    """The SHA-256 of files, by name: out of a store's manifest, the checksums of a folder, or ours."""
    values: Any = parse_json(file, content)
    if not isinstance(values, dict):
        return {}
    found: dict[str, Any] = {}
    for entry in values.get("shards", ()):
        found |= {entry.get("file"): entry.get("sha256"), entry.get("table"): entry.get("table_sha256")}
    for name, about in values.get("files", {}).items():
        found[name] = about.get("sha256") if isinstance(about, dict) else about
    return found
