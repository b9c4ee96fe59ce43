"""One byte a number: what is lost, and that nothing more is lost when it is stored again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blip3o_dit.data.combine import merge_stores
from blip3o_dit.data.convert import convert_files
from blip3o_dit.data.int8_tokens import quantized, restored
from blip3o_dit.data.manifest import MANIFEST, sample_bytes
from blip3o_dit.data.store import EmbeddingStore, StoreWriter
from tests.helpers.remote import in_memory
from tests.helpers.stores import write_linear_store


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-30, 30), width=st.integers(1, 40))
def test_the_error_and_what_is_stored_again(seed: int, exponent: int, width: int) -> None:
    tokens = torch.randn(3, 4, width, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    tokens[0, 0] = 0
    stored = quantized(tokens)
    assert stored.dtype == torch.int8 and stored.shape == (3, 4, width + 4)
    found, largest = restored(stored), tokens.abs().amax(dim=-1, keepdim=True)
    assert ((found - tokens).abs() <= largest * (1 / 254 + 1e-5)).all()
    assert torch.equal(quantized(found), stored)


def test_a_store_of_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = write_linear_store(tmp_path / "plain")
    small = convert_files([plain.path], tmp_path / "small", dtype="int8", shard_size=10)
    eva, clip = small.fetch([7, 47, 0])
    for found, true in zip((eva, clip), plain.fetch([7, 47, 0]), strict=True):
        assert found.dtype == torch.float32
        assert (found - true).abs().max() <= 0.0040 * true.abs().max() and not torch.equal(found, true)
    assert torch.equal(small.fetch_stored([7])[0], eva[:1])
    assert small.records() == plain.records()
    assert sample_bytes((64, 1280, 768), "int8") == 64 * (1284 + 772)
    small.verify()
    again = convert_files([small.path], tmp_path / "again", dtype="int8", shard_size=10)
    merged = merge_stores([small.path, again.path], tmp_path / "merged").store
    assert again.fingerprint() == small.fingerprint() and len(merged) == len(small)
    monkeypatch.setenv("BLIP3O_DIT_CACHE", str(tmp_path / "cache"))
    there = EmbeddingStore(in_memory(small.path, f"{tmp_path.name}-int8"))
    assert torch.equal(there.fetch([7, 47, 0])[0], eva) and torch.equal(there.fetch([7, 0])[0], eva[[0, 2]])


def test_bytes_are_not_taken_for_other_numbers(tmp_path: Path) -> None:
    store = convert_files([write_linear_store(tmp_path / "a").path], tmp_path / "b", dtype="int8")
    file = store.path / MANIFEST
    file.write_text(file.read_text().replace('"dtype": "int8"', '"dtype": "float16"'))
    with pytest.raises(ValueError, match=r"expected at least|expected shape"):
        EmbeddingStore(store.path).fetch([0])
    with pytest.raises(ValueError, match=r"expected one of .*'int8'"):
        StoreWriter(tmp_path / "c", num_tokens=9, condition_dim=1, target_dim=1, dtype="int4")
