"""Generation to a store: in bounded memory, by several processes, never half a store."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.inference import generated_store
from blip3o_dit.inference.generated_store import GeneratedStore
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from tests.helpers.stores import write_linear_store

SAMPLE = 9 * (12 + 8) * 4  # bytes


@pytest.fixture
def model(tiny_model: BLIP3oDiTModel, tmp_path: Path) -> Path:
    tiny_model.set_statistics(
        condition=(torch.full((12,), 3.0), torch.full((12,), 1.1)), target=(torch.zeros(8), torch.ones(8) / 4)
    )
    tiny_model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def inference(model: Path, monkeypatch: pytest.MonkeyPatch) -> BLIP3oInference:
    monkeypatch.setattr(generated_store, "MAX_SHARD_BYTES", 12 * SAMPLE)
    return BLIP3oInference(model, device="cpu", dtype=torch.float32)


def test_memory_does_not_grow_with_the_samples(
    inference: BLIP3oInference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The generated batches that are still held whenever another one is made."""
    made: list[weakref.ref[torch.Tensor]] = []
    held: list[int] = []

    def generate(eva: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        held.append(sum(reference() is not None for reference in made))
        tokens = torch.randn(len(eva), 9, 8)
        made.append(weakref.ref(tokens))
        return tokens

    monkeypatch.setattr(inference, "generate", generate)
    most = {}
    for samples in (24, 120):
        made.clear()
        held.clear()
        data = write_linear_store(tmp_path / f"data-{samples}", samples=samples)
        output = tmp_path / f"output-{samples}"
        found = inference.generate_from_dataset(data.path, batch_size=4, output_path=output, progress=False)
        assert set(found) == {"config", "generation_metrics"}  # nothing that has a row for each sample
        assert EmbeddingStore(output).num_samples == samples == found["config"]["num_samples"]
        most[samples] = max(held)
    assert most[120] == most[24] <= 3  # a shard's, of 3 batches


def test_the_store_holds_what_is_returned_in_memory(inference: BLIP3oInference, tmp_path: Path) -> None:
    data = write_linear_store(tmp_path / "data", samples=30)
    options: dict[str, Any] = dict(batch_size=4, num_inference_steps=2, progress=False)
    expected = inference.generate_from_dataset(data.path, **options)
    found = inference.generate_from_dataset(data.path, output_path=tmp_path / "output", **options)
    written = EmbeddingStore(tmp_path / "output")
    assert [shard["num_samples"] for shard in written.manifest["shards"]] == [12, 12, 6]
    eva, clip = written.fetch(range(30))
    assert (clip.numpy() == expected["generated_clip_embeddings"]).all()
    assert (eva.numpy() == expected["eva_embeddings"]).all()
    assert [record["key"] for record in written.records()] == expected["keys"]
    assert found["generation_metrics"] == expected["generation_metrics"]
    assert written.manifest["encoders"]["clip"]["generated_by"]["num_samples"] == 30


def test_a_store_that_is_there_is_refused_before_anything_is_generated(
    inference: BLIP3oInference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_linear_store(tmp_path / "data", samples=4)
    other = write_linear_store(tmp_path / "other", samples=4)
    monkeypatch.setattr(inference, "generate", None)  # a call would raise something else
    with pytest.raises(ValueError, match="expected no store there, found one"):
        inference.generate_from_dataset(data.path, output_path=other.path, progress=False)
    assert EmbeddingStore(other.path).num_samples == 4


@pytest.mark.parametrize("processes", [1, 2, 8])
@pytest.mark.parametrize("count", [1, 5, 60, 1000])
def test_shards_are_whole_batches_and_as_many_for_each_process(
    processes: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generated_store, "MAX_SHARD_BYTES", 40 * SAMPLE)
    size = GeneratedStore(Path("x"), (9, 12, 8)).shard_size(count, batch_size=4, processes=processes)
    assert size % 4 == 0 and 0 < size <= 40 + 4
    shards, batches = -(-count // size), -(-count // 4)
    if batches >= processes * 5:
        assert shards > 0.7 * processes * -(-shards // processes)  # few processes idle in the last round
