"""Weights & Biases: set up before the Trainer's own callback starts the run."""

from __future__ import annotations

import importlib.util
import logging
import netrc
import os
import re
import socket
import uuid
from pathlib import Path
from urllib.parse import urlparse

from blip3o_dit.utils.validation import package_missing

DEFAULT_URL = "https://api.wandb.ai"

# Which run at Weights & Biases an output folder belongs to.
RUN_ID_FILE = "wandb_run_id.txt"

logger = logging.getLogger(__name__)


def require_wandb() -> None:
    """Raises ValueError when wandb is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise package_missing("--wandb_project", "wandb")


def prepare_wandb(project: str, output_dir: str, *, continued: bool = False) -> None:
    """Point wandb at the project, and at the run there that this one continues; without a key or a network,
    record offline and say so in one line."""
    os.environ["WANDB_PROJECT"] = project
    _name_run(Path(output_dir) / RUN_ID_FILE, continued)
    os.environ.setdefault("WANDB_DIR", output_dir)
    if "WANDB_MODE" in os.environ:
        return
    host = urlparse(os.environ.get("WANDB_BASE_URL", DEFAULT_URL)).hostname or ""
    reason = None if _has_key(host) else "no API key (wandb login)"
    if reason is None and not _reachable(host):
        reason = f"{host} cannot be reached"
    if reason is not None:
        os.environ["WANDB_MODE"] = "offline"
        logger.warning(
            "Weights & Biases: %s; recording offline under %s/wandb (wandb sync uploads it later)",
            *(reason, output_dir),
        )


def _name_run(file: Path, continued: bool) -> None:
    """Take the run's id from the output folder, or make one and leave it there; an id that was given wins."""
    found = file.read_text().strip() if continued and file.is_file() else ""
    if os.environ.get("WANDB_RUN_ID") and os.environ["WANDB_RUN_ID"] not in _made_here:
        found = os.environ["WANDB_RUN_ID"]
    if not re.fullmatch(r"[\w-]{1,64}", found):
        found = uuid.uuid4().hex[:16]
    _made_here.add(found)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(found + "\n")
    os.environ["WANDB_RUN_ID"] = found
    os.environ.setdefault("WANDB_RESUME", "allow")


# So that a second run of this process does not take the first one's for given.
_made_here: set[str] = set()


def _has_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    candidates = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    for file in (Path(name).expanduser() for name in candidates if name):
        if file.is_file():
            try:
                return netrc.netrc(file).authenticators(host) is not None
            except netrc.NetrcParseError:
                return False
    return False


def _reachable(host: str, timeout: float = 3.0) -> bool:
    try:
        with socket.create_connection((host, 443), timeout=timeout):
            return True
    except OSError:
        return False
