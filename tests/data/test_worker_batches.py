"""Batches of data-loader processes arrive where shared memory is short, and where it cannot be reached."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import process
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from blip3o_dit.data import worker_batches
from blip3o_dit.data.worker_batches import whole_batch


class Batches(Dataset):
    def __len__(self) -> int:
        return 6

    def __getitems__(self, items: list[int]) -> dict[str, Any]:
        values = torch.tensor(items, dtype=torch.float32)
        tokens = values[:, None, None].expand(-1, 4, 3).contiguous()
        return {
            "eva": tokens.bfloat16(),
            "noise": tokens / 7,
            "u_time": values / 3,
            "index": items,
            "epoch": 0,
        }


def small_memory(monkeypatch: pytest.MonkeyPatch, _: Path) -> None:
    monkeypatch.setattr(worker_batches.os, "statvfs", lambda _: SimpleNamespace(f_bavail=1, f_frsize=1))


def long_folder(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """As with a long TMPDIR: multiprocessing makes its sockets there."""
    folder = folder / ("x" * 100)
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setitem(process.current_process()._config, "tempdir", str(folder))


def plenty(monkeypatch: pytest.MonkeyPatch, _: Path) -> None: ...


@pytest.mark.parametrize("situation", [plenty, small_memory, long_folder])
def test_batches_arrive_as_they_were(
    situation: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    situation(monkeypatch, tmp_path)
    loader: DataLoader = DataLoader(
        Batches(), batch_size=3, num_workers=1, collate_fn=whole_batch, timeout=20
    )
    found = list(loader)
    assert [batch["eva"].is_shared() for batch in found] == [situation is plenty] * 2
    for batch, items in zip(found, ([0, 1, 2], [3, 4, 5]), strict=True):
        expected = Batches().__getitems__(items)
        assert batch.keys() == expected.keys() and type(batch) is dict
        for name in ("eva", "noise", "u_time"):
            assert torch.equal(batch[name], expected[name]) and batch[name].dtype == expected[name].dtype
        assert (batch["index"], batch["epoch"]) == (items, 0)
