"""A flipped byte anywhere in what a run writes is found, or changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.training.checkpoint import verify_checkpoint
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.training.run import train
from blip3o_dit.utils.checksums import CHECKSUMS_FILE
from tests.fuzz.mutators import flip_bytes
from tests.helpers.stores import write_linear_store
from tests.helpers.training import config_for

# What a model folder also holds and nothing reads back, or reads as what it is: a log, a picture.
NOT_COVERED = {"training_log.jsonl", "training_curves.png"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage")
    store: EmbeddingStore = write_linear_store(folder / "store")
    return train(config_for(store, folder / "run", num_epochs=1, num_layers=1))


def test_in_a_checkpoint(run: Path) -> None:
    (checkpoint,) = run.glob("checkpoint-*")
    files, missed = set(), []
    for file, position in flip_bytes(checkpoint, 300, seed=1):
        files.add(file.name)
        if refusal(checkpoint) is None:
            missed.append((file.name, position))
    assert files == {file.name for file in checkpoint.iterdir()}
    # The checksums may say the same in other words: white space, the name of their format.
    assert {name for name, _ in missed} <= {CHECKSUMS_FILE}
    assert refusal(checkpoint) is None


def refusal(checkpoint: Path) -> str | None:
    try:
        verify_checkpoint(checkpoint)
    except ValueError as error:
        return str(error)
    return None


def test_in_a_trained_model(run: Path) -> None:
    eva = torch.randn(1, 9, 12)

    def use() -> torch.Tensor:
        TrainingConfig.from_folder(run)
        return torch.cat([BLIP3oInference(run, weights=name).generate(eva, 1) for name in ("ema", "raw")])

    expected, found = use(), 0
    for file, position in flip_bytes(run, 250, seed=2):
        if file.parent != run or file.name in NOT_COVERED:
            continue
        try:
            result = use()
        except ValueError as error:
            found += 1
            assert str(run) in str(error)  # noqa: PT017
            continue
        harmless = file.name in (CHECKSUMS_FILE, "trainer_state.json")
        assert harmless and torch.equal(result, expected), (file.name, position)
    assert found > 50
