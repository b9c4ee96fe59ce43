"""A run's checkpoints at an address: each whole one is sent there, and the newest is fetched to go on from.

ADDRESS/checkpoint-N/      as in the output folder; its checksums go last, and mark it as whole
        training_log.jsonl
"""

from __future__ import annotations

import fcntl
import logging
import re
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments

from blip3o_dit.training.checkpoint import checkpoints, verify_checkpoint
from blip3o_dit.training.curves import LOG_FILE
from blip3o_dit.utils.addresses import Address, RemoteFolder, located
from blip3o_dit.utils.checksums import CHECKSUMS_FILE, digests_of, is_sealed, sealed_names
from blip3o_dit.utils.errors import ReadError
from blip3o_dit.utils.json_files import one_line
from blip3o_dit.utils.progress import working
from blip3o_dit.utils.sending import check_sending, send_folder

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")

logger = logging.getLogger(__name__)


class SendCheckpoints(TrainerCallback):
    """Sends every checkpoint when it is whole, and removes there those that were removed here.

    Training waits meanwhile. A connection that is lost does not end it: the next checkpoint tries again.
    """

    def __init__(self, address: str) -> None:
        self.address = located(address)
        self._sent: set[str] = set()

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        try:
            self.send(Path(args.output_dir or ""))
        except (ReadError, ValueError) as error:
            logger.warning("not sent, which the next checkpoint tries again: %s", one_line(error))

    def send(self, output: Path) -> None:
        there = RemoteFolder(self.address)
        whole = {path.name: path for path in checkpoints(output) if is_sealed(path)}
        for name, path in whole.items():
            if name not in self._sent:
                with working(f"sending {name} to {self.address}", lasting=False):
                    digests = digests_of(path, sealed_names(path))
                    send_folder(path, digests, CHECKSUMS_FILE, self.address / name, overwrite=True)
                self._sent.add(name)
        if (output / LOG_FILE).is_file():
            there.send(output / LOG_FILE)
        for name in sorted(self._sent - set(whole)):
            there.remove(name)
            self._sent.discard(name)


def check_send_to(address: str, *, resumes: bool) -> None:
    """Refuse (ValueError) what is no address, cannot be written to, or holds another run."""
    where = located(address)
    if not isinstance(where, Address):
        raise ValueError(f"--send_to: expected an address such as s3://bucket/run, found {address}")
    check_sending(where, CHECKSUMS_FILE, overwrite=resumes)
    found = [] if resumes else checkpoints_at(where)
    if found:
        raise ValueError(
            f"{where}: expected no run there, found {found[0]}: give --resume_from_checkpoint auto to "
            "continue it, or another --send_to"
        )


def checkpoints_at(address: Path) -> list[str]:
    """The names of checkpoints at an address, whole or not, the newest first."""
    names = [found for name in RemoteFolder(address).folders() if (found := _CHECKPOINT.fullmatch(name))]
    return [found[0] for found in sorted(names, key=lambda found: int(found[1]), reverse=True)]


def fetch_checkpoint(address: str | Path, output: Path) -> Path | None:
    """The newest whole checkpoint of a run at an address, or the one that is named, in the output folder.

    None where there is none. Processes that want the same one wait for the one that fetches it.
    """
    run = located(address)
    named = _CHECKPOINT.fullmatch(run.name)
    if named:
        run = run.parent
    for name in [named[0]] if named else checkpoints_at(run):
        there = RemoteFolder(run / name)
        sizes = there.sizes(or_none=True)
        if CHECKSUMS_FILE not in sizes:
            logger.warning("passed over: %s: it was not sent whole", run / name)
            continue
        with open(output / f"{name}.lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (output / name).exists():
                _fetch(there, sizes, output / name)
        return output / name
    return None


def _fetch(there: RemoteFolder, sizes: dict[str, int], checkpoint: Path) -> None:
    aside = checkpoint.with_name(f"{checkpoint.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    with working(f"fetching {there.address}"):
        for name in sizes:
            there.download(name, aside / name)
    verify_checkpoint(aside)
    run, log = RemoteFolder(there.address.parent), checkpoint.parent / LOG_FILE
    if LOG_FILE in run.sizes() and not log.exists():
        run.download(LOG_FILE, log)
    aside.rename(checkpoint)
