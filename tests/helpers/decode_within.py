"""Decode and prepare pictures, each in a process with a hard limit on its memory.

    python -m tests.helpers.decode_within SLACK_MB FILE...

The limit is what the process has, 4 times the bytes of the decoded pixels, and the slack. Writes a line for
each picture: its name, and "ok" or the reason.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

from PIL import Image

from blip3o_dit.extraction.image_decoding import UnreadableImageError, decode_image
from blip3o_dit.extraction.preprocessing import Preprocessing

# What Pillow holds of a pixel
BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2}


def decode_within(file: Path, slack: int) -> str:
    """In this process, whose limit is lowered for good."""
    with Image.open(file) as image:
        decoded = image.width * image.height * BYTES.get(image.mode, 4)
    data = file.read_bytes()
    status = Path("/proc/self/status").read_text().splitlines()
    now = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))
    limit = now + 4 * decoded + slack
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        pixels = Preprocessing(224).pixels(decode_image(data))
        return "ok" if pixels.shape == (3, 224, 224) else f"shape {pixels.shape}"
    except UnreadableImageError as error:
        return str(error)


if __name__ == "__main__":
    for name in sys.argv[2:]:
        if os.fork() == 0:
            sys.stdout.write(f"{Path(name).name}: {decode_within(Path(name), int(sys.argv[1]) * 2**20)}\n")
            sys.stdout.flush()
            os._exit(0)
        os.wait()
