"""The Trainer's other loggers: what TensorBoard has of a run and of its continuation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.training.loggers import TENSORBOARD_VARIABLE, loggers
from blip3o_dit.training.run import train
from tests.helpers.stores import write_linear_store
from tests.helpers.training import tiny_training

SHORT = dict(
    max_steps=4, eval_split=0.4, eval_samples=0, logging_steps=1, save_steps=2, report_to="tensorboard"
)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EmbeddingStore:
    monkeypatch.delenv(TENSORBOARD_VARIABLE, raising=False)
    return write_linear_store(tmp_path / "store", samples=12)


def scalars(file: Path) -> Iterator[tuple[int, str]]:
    """(step, name) of each, out of the records: length, its checksum, an event, its checksum."""
    data = file.read_bytes()
    while data:
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        yield from ((event.step, value.tag) for value in event.summary.value)
        data = data[16 + size :]


def test_tensorboard_has_the_run_and_its_continuation_in_one_folder(
    store: EmbeddingStore, tmp_path: Path
) -> None:
    for name in ("one", "other"):
        config = tiny_training(store.path, tmp_path / name, **SHORT)
        train(config)
        found = [each for file in (tmp_path / name / "runs").glob("events.*") for each in scalars(file)]
        assert [step for step, tag in found if tag == "train/loss"] == [1, 2, 3, 4]
        assert {"train/velocity_cosine", "eval/loss"} & {tag for _, tag in found}
    time.sleep(1.0)  # tensorboardX names its files by the second
    train(config, resume=tmp_path / "other" / "checkpoint-2")
    assert len(list((tmp_path / "other" / "runs").glob("events.*"))) == 2


def test_what_cannot_be_logged_to_is_refused_in_one_line(store: EmbeddingStore, tmp_path: Path) -> None:
    def refusal(name: str) -> str:
        with pytest.raises(ValueError, match="report_to") as caught:
            train(tiny_training(store.path, tmp_path / "x", report_to=name))
        assert not (tmp_path / "x").exists()
        return str(caught.value)

    assert "expected one of" in refusal("frobnicate")
    assert refusal("tensorboard, comet_ml").endswith("found none: pip install comet-ml")
    assert "expected --wandb_project beside it" in refusal("wandb")
    assert loggers(tiny_training(store.path, tmp_path / "x", report_to=" tensorboard,")) == ["tensorboard"]
