"""Recorded training passes, with the recording imitated: when there is one, and what is replayed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.training import fsdp, memory, recorded_passes
from blip3o_dit.training.arguments import training_arguments
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.training.recorded_passes import record_passes
from tests.conftest import tiny_config
from tests.helpers.stores import write_linear_store
from tests.helpers.training import config_for, make_trainer


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return write_linear_store(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[list[torch.Size]]:
    """The shapes that were recorded, then those that were replayed."""
    shapes: list[list[torch.Size]] = []

    def make_graphed_callables(module: Any, example: tuple[torch.Tensor, ...], **_: Any) -> Any:
        plain = module.forward
        assert module.training

        def replayed(*inputs: torch.Tensor) -> torch.Tensor:
            shapes.append([held.shape for held in inputs])
            return plain(*inputs)

        replayed(*example)
        module.forward = replayed
        return module

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_graphed_callables)
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return shapes


@pytest.mark.parametrize("source", ["noise", "ridge"])
def test_full_batches_are_replayed_in_training_only(recorded: list[list[torch.Size]], source: str) -> None:
    model = BLIP3oDiTModel(tiny_config(flow_matching={"source": source}))
    record_passes(model, 3, None)
    assert len(recorded) == 1 and len(recorded[0]) == (3 if source == "noise" else 4)
    inputs = {n: (torch.randn(n, 9, 8), torch.rand(n), torch.randn(n, 9, 12)) for n in (2, 3)}
    model(*inputs[3])
    assert recorded[1] == recorded[0]
    model(*inputs[2])  # a last batch that is not full
    with torch.no_grad():
        model(*inputs[3])
    model.eval()
    model(*inputs[3])
    assert len(recorded) == 2


def test_a_run_records_before_its_first_batch_and_ends_with_the_same_weights(
    store: EmbeddingStore,
    tmp_path: Path,
    recorded: list[list[torch.Size]],
) -> None:
    plain = make_trainer(store, tmp_path / "plain", max_steps=3)
    plain.train()
    assert not recorded
    trainer = make_trainer(store, tmp_path / "recorded", max_steps=3)
    trainer.config = replace(trainer.config, cuda_graphs=True)
    trainer.train()
    assert len(recorded) == 4
    pairs = zip(plain.unwrapped_model.parameters(), trainer.unwrapped_model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    "setting", ["gradient_checkpointing", "selective_checkpointing", "gradient_accumulation_steps", "memory"]
)
def test_what_recorded_passes_do_not_go_with_is_refused(
    store: EmbeddingStore, tmp_path: Path, setting: str
) -> None:
    settings: dict[str, Any] = {"gradient_accumulation_steps": 2, "memory": "low"}
    with pytest.raises(ValueError, match=f"cuda_graphs: expected none with {setting}"):
        config_for(store, tmp_path, cuda_graphs=True, **{setting: settings.get(setting, True)})


def test_passes_are_recorded_unasked_on_one_gpu_with_room(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, model, rooms = torch.device("cuda"), tiny_config(), [0]
    monkeypatch.setattr(recorded_passes, "memory_of", lambda _: rooms[0])

    def recorded(device: torch.device = gpu, processes: int = 1, **settings: Any) -> bool:
        return recorded_passes.may_record(TrainingConfig(**settings), model, device, processes)

    needed = memory.forecast(TrainingConfig(), model, gpu)
    rooms[0] = needed.total + needed.activations + needed.gradients
    assert recorded() and recorded(cuda_graphs=True)
    assert not recorded(cuda_graphs=False)
    assert not recorded(torch.device("cpu")) and not recorded(processes=2)
    assert not recorded(gradient_checkpointing=True) and not recorded(gradient_accumulation_steps=2)
    monkeypatch.setattr(fsdp, "asked_for", lambda: True)
    assert not recorded()
    monkeypatch.setattr(fsdp, "asked_for", lambda: False)
    rooms[0] -= 1  # a last batch that is not full would not fit
    assert not recorded() and recorded(cuda_graphs=True)


def test_recorded_passes_without_a_gpu_are_refused(store: EmbeddingStore, tmp_path: Path) -> None:
    config = config_for(store, tmp_path, cuda_graphs=True)
    with pytest.raises(ValueError, match="--cuda_graphs: expected one process on a GPU, found a CPU"):
        training_arguments(config, evaluate=False)
