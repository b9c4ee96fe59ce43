"""A store in other formats and back: nothing is lost."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from blip3o_dit.cli.main import main
from blip3o_dit.data import export
from blip3o_dit.data.convert import convert_files
from blip3o_dit.data.embeddings import open_embeddings
from blip3o_dit.data.export import export_embeddings
from blip3o_dit.data.store import EmbeddingStore, StoreWriter
from tests.data.test_store import SIZES, refused, samples

RECORDS: list[dict[str, Any]] = [
    {"key": "a", "caption": "with caption\nü", "label": 3},
    {"key": "b", "label": 4},
    {"key": "c", "caption": ""},
    {"key": "d/日本", "caption": "x", "label": 0},
]
FORMATS = (".npz", ".safetensors", ".parquet", ".pkl")


def write(path: Path, records: list[dict[str, Any]] = RECORDS, dtype: str = "float16") -> EmbeddingStore:
    with StoreWriter(path, **SIZES, dtype=dtype, shard_size=3) as writer:
        writer.append(*samples(len(records))[:2], records)
    return EmbeddingStore(path)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_what_is_exported_comes_back(
    tmp_path: Path, suffix: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "BATCH", 3)
    store, file = write(tmp_path / "s", dtype=dtype), tmp_path / "new" / f"e{suffix}"
    export_embeddings(store, file)
    assert [left.name for left in file.parent.iterdir()] == [file.name]
    for found in (open_embeddings(file), convert_files([file], tmp_path / "back", dtype=dtype)):
        assert found.records() == RECORDS
        for ours, theirs in zip(store.fetch(range(4)), found.fetch(range(4)), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("suffix", FORMATS[:3])
def test_records_come_back_whole(tmp_path: Path, suffix: str) -> None:
    records = [
        {"key": "file\udcff", "caption": "\ud800 $ \x00", "tags": [1, {"a": None}]},
        {"key": "b", "label": "x"},
    ]
    export_embeddings(write(tmp_path / "s", records), tmp_path / f"e{suffix}")
    assert open_embeddings(tmp_path / f"e{suffix}").records() == records


def test_others_read_the_files(tmp_path: Path) -> None:
    store = write(tmp_path / "s")
    for suffix in FORMATS:
        export_embeddings(store, tmp_path / f"e{suffix}")
    eva = store.fetch(range(4))[0].numpy()
    with np.load(tmp_path / "e.npz", allow_pickle=False) as npz:
        assert npz["eva_blip3o_embeddings"].dtype == np.float16
        assert np.array_equal(npz["eva_blip3o_embeddings"], eva)
        lines = npz["records"].tobytes().splitlines()
    assert [json.loads(line) for line in lines] == RECORDS
    assert np.array_equal(load_file(tmp_path / "e.safetensors")["eva_blip3o_embeddings"].float().numpy(), eva)
    table = pq.read_table(tmp_path / "e.parquet")
    assert table.column("caption").to_pylist() == [record.get("caption") for record in RECORDS]
    assert table.column("label").to_pylist() == [3, 4, None, 0]
    tokens = table.column("eva_blip3o_embeddings")
    assert np.array_equal(np.array(tokens.to_pylist(), dtype=np.float16), eva)
    # `load_dataset("parquet")` knows no extension types.
    types = [tokens.type, tokens.type.value_type, tokens.type.value_type.value_type]
    assert [str(kind).partition("<")[0] for kind in types] == ["fixed_size_list"] * 2 + ["halffloat"]
    pickled = pickle.loads((tmp_path / "e.pkl").read_bytes())
    assert pickled["captions"] == ["with caption\nü", "", "", "x"]
    assert pickled["has_caption"] == [True, False, True, True] and pickled["labels"] == [3, 4, None, 0]


def test_a_pickle_of_known_captions_is_as_it_was(tmp_path: Path) -> None:
    export_embeddings(write(tmp_path / "s", [{"key": "a", "caption": "x"}]), tmp_path / "e.pkl")
    names = pickle.loads((tmp_path / "e.pkl").read_bytes()).keys()
    assert list(names) == [
        "eva_blip3o_embeddings", "clip_blip3o_embeddings", "captions", "keys", "config", "total_samples"
    ]  # fmt: skip


def test_the_command_replaces_nothing_unless_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, file = str(write(tmp_path / "s").path), tmp_path / "e.npz"
    file.write_text("mine")
    assert main(["export-embeddings", store, str(file)]) == 2
    assert file.read_text() == "mine" and "found one (--overwrite replaces it)" in capsys.readouterr().err
    assert main(["export-embeddings", store, str(file), "--overwrite"]) == 0
    assert open_embeddings(file).num_samples == 4
    assert main(["export-embeddings", store, str(tmp_path / "e.h5")]) == 2
    assert "expected a suffix of ['.npz', '.safetensors', '.parquet', '.pkl']" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", FORMATS[:3])
def test_an_export_that_fails_leaves_the_old_file(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, file = write(tmp_path / "s"), tmp_path / f"e{suffix}"
    file.write_text("old")
    monkeypatch.setattr(export, "BATCH", 2)
    (store.path / "shard-00001.safetensors").write_bytes(
        b"\0" * (store.path / "shard-00001.safetensors").stat().st_size
    )
    assert "not a readable shard" in refused(lambda: export_embeddings(store, file, overwrite=True))
    assert file.read_text() == "old" and not file.with_name(f"e{suffix}.partial").exists()
