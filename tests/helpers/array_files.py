"""The same few samples in every format that embeddings come in."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

COUNT = 7
KEYS = [f"k{row}" for row in range(COUNT)]
CAPTIONS = [None if row == 2 else f"caption {row} ü" for row in range(COUNT)]


def arrays(tokens: int = 4, clip_tokens: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Values that float16 holds exactly."""
    generator = np.random.default_rng(3)
    eva = generator.integers(-99, 99, (COUNT, tokens, 6)).astype(np.float32) / 8
    clip = generator.integers(-99, 99, (COUNT, clip_tokens or tokens, 3)).astype(np.float32) / 8
    return eva, clip


def as_npz(path: Path, eva: Any, clip: Any) -> Path:
    captions = np.array([caption or "" for caption in CAPTIONS])
    known = [caption is not None for caption in CAPTIONS]
    np.savez(path, eva=eva, clip=clip, keys=np.array(KEYS), captions=captions, has_caption=known)
    return path


def as_compressed_npz(path: Path, eva: Any, clip: Any) -> Path:
    np.savez_compressed(
        path, eva_blip3o_embeddings=np.asfortranarray(eva), clip_embeddings=clip.astype(">f4")
    )
    return path


def as_npy_folder(path: Path, eva: Any, clip: Any) -> Path:
    path = path.with_suffix("")
    path.mkdir()
    np.save(path / "eva.npy", eva.astype(np.float64))
    np.save(path / "clip.npy", clip.astype(">f2"))
    np.save(path / "keys.npy", np.array(KEYS))
    (path / "captions.json").write_text(json.dumps(CAPTIONS))
    return path


def as_safetensors(path: Path, eva: Any, clip: Any) -> Path:
    tensors = {"eva_tokens": torch.from_numpy(eva).half(), "clip_tokens": torch.from_numpy(clip).bfloat16()}
    save_file(tensors, path, metadata={"keys": json.dumps(KEYS), "captions": json.dumps(CAPTIONS)})
    return path


def as_pt(path: Path, eva: Any, clip: Any) -> Path:
    content = {"eva": torch.from_numpy(eva), "clip": torch.from_numpy(clip)}
    torch.save(content | {"keys": KEYS, "captions": CAPTIONS}, path)
    return path


def as_lists_in_a_pickle(path: Path, eva: Any, clip: Any) -> Path:
    content = {"eva": list(eva), "clip": [torch.from_numpy(row) for row in clip], "keys": KEYS}
    path.write_bytes(pickle.dumps(content | {"captions": CAPTIONS}))
    return path


def as_memmap_in_a_pickle(path: Path, eva: Any, clip: Any) -> Path:
    np.save(path.with_suffix(".npy"), eva)
    mapped = np.load(path.with_suffix(".npy"), mmap_mode="r")
    assert type(mapped) is np.memmap
    path.write_bytes(pickle.dumps({"eva": mapped, "clip": clip, "keys": KEYS, "captions": CAPTIONS}))
    path.with_suffix(".npy").unlink()
    return path


def table_of(eva: Any, clip: Any, kind: str) -> pa.Table:
    def column(tokens: np.ndarray) -> Any:
        if kind == "nested":
            inner_type = pa.list_(pa.float32())
            return pa.array(tokens.tolist(), pa.list_(inner_type) if tokens.ndim == 3 else inner_type)
        flat = pa.array(tokens.ravel())
        inner = pa.FixedSizeListArray.from_arrays(flat, tokens.shape[-1])
        if kind == "fixed":
            return inner if tokens.ndim == 2 else pa.FixedSizeListArray.from_arrays(inner, tokens.shape[1])
        whole = pa.FixedSizeListArray.from_arrays(flat, tokens[0].size)
        if kind == "flat":
            return whole
        type_ = pa.fixed_shape_tensor(pa.float32(), tokens.shape[1:])
        return pa.ExtensionArray.from_storage(type_, whole)

    return pa.table({"key": KEYS, "caption": CAPTIONS, "eva": column(eva), "clip": column(clip)})


def as_parquet(kind: str) -> Callable[[Path, Any, Any], Path]:
    def write(path: Path, eva: Any, clip: Any) -> Path:
        pq.write_table(table_of(eva, clip, kind), path, row_group_size=3)
        return path

    return write


def as_saved_dataset(path: Path, eva: Any, clip: Any) -> Path:
    """As `Dataset.save_to_disk` writes it, beside a file of a cache that it does not name."""
    path = path.with_suffix("")
    path.mkdir()
    table = table_of(eva, clip, "nested")
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, rows in zip(names, (table.slice(0, 4), table.slice(4)), strict=True):
        with pa.OSFile(str(path / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(rows, max_chunksize=2)
    (path / "cache-1234.arrow").write_bytes((path / names[0]).read_bytes())
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (path / "dataset_info.json").write_text("{}")
    return path


def as_parquet_folder(path: Path, eva: Any, clip: Any) -> Path:
    path = path.with_suffix("")
    path.mkdir()
    table = table_of(eva, clip, "fixed")
    for number, rows in enumerate((table.slice(0, 4), table.slice(4))):
        pq.write_table(rows, path / f"train-{number:05d}-of-00002.parquet")
    return path


WRITERS: dict[str, tuple[str, Callable[[Path, Any, Any], Path]]] = {
    "npz": (".npz", as_npz),
    "compressed npz": (".npz", as_compressed_npz),
    "npy folder": (".d", as_npy_folder),
    "safetensors": (".safetensors", as_safetensors),
    "pt": (".pt", as_pt),
    "lists in a pickle": (".pkl", as_lists_in_a_pickle),
    "a memory map in a pickle": (".pkl", as_memmap_in_a_pickle),
    "parquet, nested lists": (".parquet", as_parquet("nested")),
    "parquet, lists of fixed size": (".parquet", as_parquet("fixed")),
    "parquet, tensors": (".parquet", as_parquet("tensor")),
    "parquet folder": (".d", as_parquet_folder),
    "a saved dataset": (".d", as_saved_dataset),
}


FLAT = {"parquet, flat lists": (".parquet", as_parquet("flat"))}  # which do not say how many tokens they are


def write_as(form: str, folder: Path, eva: Any, clip: Any) -> Path:
    suffix, writer = (WRITERS | FLAT)[form]
    return writer(folder / f"embeddings{suffix}", eva, clip)
