"""Channel statistics against NumPy in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from blip3o_dit.data.statistics import FLOOR, ChannelAccumulator, ChannelStatistics, streamed_statistics
from blip3o_dit.data.store import EmbeddingStore, StoreWriter


def write(path: Path, eva: Tensor, clip: Tensor) -> EmbeddingStore:
    sizes = dict(num_tokens=eva.shape[1], condition_dim=eva.shape[2], target_dim=clip.shape[2])
    with StoreWriter(path, **sizes, dtype="float32", shard_size=16) as writer:
        writer.append(eva, clip, [{"key": str(row)} for row in range(len(eva))])
    return EmbeddingStore(path)


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    scale = torch.tensor([0.01, 1.0, 100.0, 1e-4, 3.0])
    return write(tmp_path / "s", 2.0 + torch.randn(50, 4, 5) * scale, 0.036 * torch.randn(50, 4, 3))


def accumulated(*pieces: Tensor) -> ChannelStatistics:
    accumulator = ChannelAccumulator(pieces[0].shape[-1])
    for piece in pieces:
        accumulator.add(piece)
    return accumulator.result()


def check(found: ChannelStatistics, tokens: Tensor, rtol: float = 1e-6) -> None:
    rows = tokens.double().numpy().reshape(-1, tokens.shape[-1])
    assert (found.mean.dtype, found.std.dtype) == (torch.float32, torch.float32)
    np.testing.assert_allclose(found.mean.numpy(), rows.mean(axis=0), rtol=rtol)
    np.testing.assert_allclose(found.std.numpy(), rows.std(axis=0), rtol=rtol)
    np.testing.assert_allclose(found.rms_norm, np.sqrt((rows**2).sum(axis=1).mean()), rtol=rtol)


def test_statistics_are_those_of_numpy(store: EmbeddingStore) -> None:
    condition, target = streamed_statistics(store, np.arange(50), normalize=False)
    eva, clip = store.fetch(range(50))
    check(condition, eva)
    check(target, clip)


def test_a_huge_offset_does_not_drown_the_deviation(tmp_path: Path) -> None:
    tokens = 1e4 + 0.01 * torch.randn(300, 4, 6)
    store = write(tmp_path / "s", tokens, -tokens)
    condition, target = streamed_statistics(store, np.arange(300), normalize=False, batch_size=7)
    check(condition, tokens)
    check(target, -tokens)


def test_a_drift_of_the_mean_counts_as_deviation() -> None:
    tokens = torch.randn(40, 2, 3) + torch.linspace(-50, 50, 40)[:, None, None]
    check(accumulated(*tokens.split(3)), tokens)


@pytest.mark.parametrize("batch_size", [1, 7, 50, 1000])
@pytest.mark.parametrize("normalize", [False, True])
def test_statistics_do_not_depend_on_the_batch_size(
    store: EmbeddingStore, batch_size: int, normalize: bool
) -> None:
    reference = streamed_statistics(store, np.arange(50), normalize=normalize)
    found = streamed_statistics(store, np.arange(50), normalize=normalize, batch_size=batch_size)
    for a, b in zip(found, reference, strict=True):
        torch.testing.assert_close(a.mean, b.mean, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(a.std, b.std, rtol=1e-6, atol=0)
        assert a.rms_norm == pytest.approx(b.rms_norm, rel=1e-9)


def test_only_the_given_samples_count_in_any_order(store: EmbeddingStore) -> None:
    indices = np.array([40, 3, 7, 21, 8])
    condition, target = streamed_statistics(store, indices, normalize=False, batch_size=2)
    eva, clip = store.fetch(indices)
    check(condition, eva)
    check(target, clip)
    assert indices.tolist() == [40, 3, 7, 21, 8]


def test_normalisation_comes_before_the_statistics(store: EmbeddingStore) -> None:
    found = streamed_statistics(store, np.arange(50), normalize=True)
    for one, tokens in zip(found, store.fetch(range(50)), strict=True):
        rows = tokens.double().numpy()
        check(one, torch.from_numpy(rows / np.linalg.norm(rows, axis=-1, keepdims=True)), rtol=2e-5)
        assert one.rms_norm == pytest.approx(1.0, abs=1e-6)


def test_a_constant_channel_comes_back_as_its_constant() -> None:
    tokens = torch.randn(60, 4, 5)
    tokens[..., 1] = 0.1
    tokens[..., 3] = 0.0
    found = accumulated(*tokens.split(7))
    varying = FLOOR * tokens[..., [0, 2, 4]].flatten(0, 1).std(dim=0)
    assert torch.equal(found.mean[[1, 3]], torch.tensor([0.1, 0.0]))
    for floor in found.std[[1, 3]]:
        assert 0.99 * varying.min() < floor < 1.01 * varying.max()
    standardised = (tokens - found.mean) / found.std
    assert torch.equal(standardised[..., [1, 3]], torch.zeros(60, 4, 2))


@pytest.mark.parametrize("constants", [4, 5])
def test_varying_channels_keep_their_deviation_when_most_are_constant(constants: int) -> None:
    tokens = 0.036 * torch.randn(60, 4, 8)
    tokens[..., :constants] = 0.0
    varying = tokens[..., constants:]
    expected = varying.double().numpy().reshape(-1, 8 - constants).std(axis=0)
    np.testing.assert_allclose(accumulated(tokens).std[constants:].numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, 300.0])
def test_data_that_never_varies_standardises_to_zero(value: float) -> None:
    found = accumulated(*torch.full((9, 4, 3), value).split(2))
    standardised = (torch.full((3,), value) - found.mean) / found.std
    assert torch.equal(standardised, torch.zeros(3))
    assert torch.equal(found.std, torch.ones(3))


def test_half_precision_tokens_are_summed_in_float64() -> None:
    tokens = (200.0 + 10 * torch.randn(100, 4, 3)).half()
    check(accumulated(*tokens.split(9)), tokens)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("side", "name"), [(0, "eva"), (1, "clip")])
def test_a_value_that_is_no_number_is_named(
    store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch, side: int, name: str, value: float
) -> None:
    fetch = store.fetch

    def spoil(indices: np.ndarray) -> tuple[Tensor, Tensor]:
        batch = fetch(indices)
        for bad in (31, 44):
            batch[side][np.flatnonzero(np.asarray(indices) == bad), 2, 1] = value
        return batch

    monkeypatch.setattr(store, "fetch", spoil)
    with pytest.raises(ValueError, match=f"s: {name}: NaN or infinity in sample 31$"):
        streamed_statistics(store, np.arange(1, 50, 1)[::-1], normalize=False, batch_size=10)


def test_the_progress_bar_sees_every_sample_once(store: EmbeddingStore) -> None:
    seen: list[Any] = []

    def track(pieces: Any) -> Any:
        assert len(pieces) == 5
        for piece in pieces:
            seen.extend(piece.tolist())
            yield piece

    found = streamed_statistics(store, np.arange(50), normalize=False, batch_size=10, progress=track)
    assert seen == list(range(50))
    check(found[0], store.fetch(range(50))[0])
