"""What an evaluation that was stopped leaves, and how the same command goes on with it.

    OUTPUT/.evaluation.parts/    while it is unfinished
        request.json               what decides the figures
        method-00.safetensors      sums and values of the samples that were measured
        curve-00.safetensors       points of the cost curve

Another request begins anew. A method's samples are reduced as they come: what is kept does not grow with
their tokens, and the figures are those of an uninterrupted evaluation, but for times and memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blip3o_dit.data.embeddings import Embeddings
from blip3o_dit.evaluation.config import EvaluationConfig
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.inference.request import describe_data, describe_model, differences
from blip3o_dit.utils.atomic import remove_files_and_folders, write_atomically
from blip3o_dit.utils.folder_lock import LOCK_FILE, held_folder
from blip3o_dit.utils.json_files import read_json
from blip3o_dit.utils.kept_state import KeptState

PARTS_FOLDER, REQUEST_FILE = ".evaluation.parts", "request.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """Where an evaluation keeps what it has; without a folder, nowhere."""

    folder: Path | None = None

    def method(self, number: int) -> KeptState:
        return self._state(f"method-{number:02d}")

    def curve(self, number: int) -> KeptState:
        return self._state(f"curve-{number:02d}")

    def _state(self, name: str) -> KeptState:
        return KeptState(None if self.folder is None else self.folder / f"{name}.safetensors")


NOWHERE = Kept()


@contextmanager
def going_on(output: Path, request: dict[str, Any]) -> Iterator[Kept]:
    """Hold the output's folder of parts while the block evaluates; when that ends well, it goes.

    Raises:
        FolderInUseError: another process evaluates into the same folder.
    """
    folder = output / PARTS_FOLDER
    try:
        with held_folder(folder, "evaluation"):
            _begin(folder, request)
            try:
                yield Kept(folder)
            except BaseException:
                if not has_parts(output):
                    _clear(folder)
                raise
            _clear(folder)
    finally:
        with suppress(OSError):  # a stopped one's, which this one went on with
            folder.rmdir()


def has_parts(output: Path) -> bool:
    """Whether anything is kept that the same command would go on with."""
    return any(name.endswith(".safetensors") for name in _names(output / PARTS_FOLDER))


def _begin(folder: Path, request: dict[str, Any]) -> None:
    try:
        found = read_json(folder / REQUEST_FILE)
    except (OSError, ValueError):
        found = None
    different = differences(found, request, leave_out=())
    if not different:
        logger.info("%s: going on with an evaluation that was stopped", folder.parent)
        return
    if found is not None and has_parts(folder.parent):
        logger.info("%s: begun anew, not continued: %s", folder.parent, "; ".join(different[:3]))
    _clear(folder)
    write_atomically(folder / REQUEST_FILE, json.dumps(request, indent=2).encode())


def describe_evaluation(
    models: Sequence[BLIP3oInference],
    measured: tuple[Embeddings, np.ndarray],
    fitted: tuple[Embeddings, np.ndarray],
    config: EvaluationConfig,
) -> dict[str, Any]:
    """All that decides the figures: models, data, settings and this code."""
    settings = asdict(config)
    for name in ("shown", "device"):  # the page's alone, and said below
        settings.pop(name)
    request = {
        "models": {
            str(number): describe_model(model.model_path, model.weights)
            for number, model in enumerate(models)
        },
        "data": _describe_samples(*measured),
        "fitted": _describe_samples(*fitted),
        "settings": settings,
        "code": {
            "sha256": _digest_of_code(),
            "torch": torch.__version__,
            "device": [model.device.type for model in models],
            "float32_products": torch.get_float32_matmul_precision(),
        },
    }
    found: dict[str, Any] = json.loads(json.dumps(request))
    return found


def _describe_samples(source: Embeddings, indices: np.ndarray) -> dict[str, Any]:
    return describe_data(getattr(source, "source", source), indices.tolist())  # what a view is a view of


def _digest_of_code() -> str:
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _clear(folder: Path) -> None:
    remove_files_and_folders(folder / name for name in _names(folder))


def _names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()} - {LOCK_FILE} if folder.is_dir() else set()
