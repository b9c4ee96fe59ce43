"""What a long computation has so far, in a file, for the process that goes on when this one is stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from blip3o_dit.utils.atomic import remove_files_and_folders, save_tensors
from blip3o_dit.utils.json_files import parse_json

# Seconds of work between two writes at least, and how many times as long as a write takes: so a stop costs
# little work, and keeping a twentieth of the time at most.
KEEP_EVERY, KEEP_SHARE = 10.0, 20

_ABOUT = "about"


class KeptState:
    """Tensors and JSON values in a safetensors file that is replaced now and then; without a file, nothing.

    Args:
        file: where; its folder must exist when something is kept.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self._began = time.monotonic()
        self._due = self._began + KEEP_EVERY

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was kept, in memory of its own; None when nothing was, or it cannot be read."""
        if self.file is None or not self.file.is_file():
            return None
        try:
            with safe_open(self.file, framework="pt") as tensors:
                found = {name: tensors.get_tensor(name).clone() for name in tensors.keys()}  # noqa: SIM118
            return found, parse_json(self.file, bytes(found.pop(_ABOUT).numpy()), non_finite=True)
        except (SafetensorError, OSError, ValueError, KeyError):
            return None

    def keep(
        self, state: Callable[[], tuple[Mapping[str, Tensor], Mapping[str, Any]]], *, last: bool = False
    ) -> None:
        """Write the state if it is time to; the last one unless all of it took little time.

        Raises:
            WriteError: when it cannot be written; what was kept before is there still.
        """
        due = self._began + KEEP_EVERY / 10 if last else self._due
        if self.file is None or time.monotonic() < due:
            return
        started = time.monotonic()
        tensors, about = state()
        # Not as metadata, of which a file holds little.
        text = torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)
        save_tensors({**tensors, _ABOUT: text}, self.file)
        now = time.monotonic()
        self._due = now + max(KEEP_EVERY, KEEP_SHARE * (now - started))

    def remove(self) -> None:
        if self.file is not None:
            remove_files_and_folders([self.file])


NOTHING_KEPT = KeptState(None)
