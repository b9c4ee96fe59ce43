"""The documented data set, and commands that run in this process without leaving traces in it."""

from __future__ import annotations

import logging
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.acceptance.commands import SAMPLES


@pytest.fixture
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def console_restored() -> Any:
    """A command's console handler holds the stream of the test that ran it."""
    yield
    logger = logging.getLogger("blip3o_dit")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)


@pytest.fixture(scope="session")
def content() -> dict[str, Any]:
    """The documented pickle's content: targets that the conditions determine, as far as noise lets them."""
    generator = np.random.default_rng(0)
    eva = generator.standard_normal((SAMPLES, 64, 1280), dtype=np.float32)
    mixing = generator.standard_normal((1280, 768), dtype=np.float32) / math.sqrt(1280)
    return {
        "eva_blip3o_embeddings": eva,
        "clip_blip3o_embeddings": eva @ mixing + 0.5,
        "captions": [f"caption {row}" for row in range(SAMPLES)],
        "keys": [f"sample{row:05d}" for row in range(SAMPLES)],
        "config": {"tokens": 64},
    }


@pytest.fixture(scope="session")
def shared(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pickle, where the specification's paths lead."""
    folder = tmp_path_factory.mktemp("specification")
    with open(folder / "blip3o_grid_embeddings.pkl", "wb") as file:
        pickle.dump(content, file)
    return folder


@pytest.fixture
def folder(shared: Path, tmp_path: Path) -> Path:
    """A folder of a test's own with the same pickle."""
    (tmp_path / "blip3o_grid_embeddings.pkl").symlink_to(shared / "blip3o_grid_embeddings.pkl")
    return tmp_path
