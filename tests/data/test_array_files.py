"""Embeddings from files: every format gives the same samples, and what is not read is named."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from blip3o_dit.cli.main import main
from blip3o_dit.data import array_files, table_files
from blip3o_dit.data.array_embeddings import Arrangement
from blip3o_dit.data.convert import convert_files
from blip3o_dit.data.embeddings import open_embeddings
from blip3o_dit.data.pooling import pool_tokens
from blip3o_dit.data.store import EmbeddingStore
from tests.data.test_store import refused
from tests.helpers.array_files import CAPTIONS, COUNT, KEYS, WRITERS, arrays, write_as


@pytest.mark.parametrize("form", WRITERS)
def test_every_format_gives_the_same_samples(tmp_path: Path, form: str) -> None:
    eva, clip = arrays()
    path = write_as(form, tmp_path, eva, clip)
    source = open_embeddings(path)
    sizes = (source.num_samples, source.num_tokens, source.condition_dim, source.target_dim)
    assert sizes == (COUNT, 4, 6, 3)
    for rows in (range(COUNT), [6, 0, 3, 3, 1], np.array([5]), []):
        found = source.fetch(rows)
        assert [tokens.dtype for tokens in found] == [torch.float32, torch.float32]
        assert np.array_equal(found[0].numpy(), eva[list(rows)])
        assert np.array_equal(found[1].numpy(), clip[list(rows)])
    records: list[Any] = [
        {"key": key} | ({"caption": caption} if caption is not None else {})
        for key, caption in zip(KEYS, CAPTIONS, strict=True)
    ]
    if form == "compressed npz":
        records = [{"key": f"{row:08d}"} for row in range(COUNT)]
    assert source.records() == records and source.records([4, 1]) == [records[4], records[1]]
    copy = pickle.loads(pickle.dumps(source))  # as loader workers get it
    assert torch.equal(copy.fetch([2])[0], source.fetch([2])[0])
    store = convert_files([path], tmp_path / "store", dtype="float32")
    assert np.array_equal(store.fetch(range(COUNT))[0].numpy(), eva) and store.records() == records
    assert open_embeddings(path).fingerprint() == source.fingerprint()  # type: ignore[attr-defined]


@pytest.mark.parametrize("form", ["npz", "npy folder", "parquet, nested lists", "a saved dataset"])
def test_an_index_out_of_range_is_an_index_error_everywhere(tmp_path: Path, form: str) -> None:
    path = write_as(form, tmp_path, *arrays())
    for source in (open_embeddings(path), convert_files([path], tmp_path / "store")):
        for index in (-1, COUNT):
            for call in (source.fetch, source.records):
                with pytest.raises(IndexError, match=rf"expected indices in 0\.\.6, found .*{index}"):
                    call([0, index])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("form", ["npz", "npy folder", "safetensors", "parquet, nested lists"])
def test_what_cannot_be_trained_on_is_found_by_reading(tmp_path: Path, form: str, value: float) -> None:
    eva, clip = arrays()
    clip[5, 1, 1] = value
    path = write_as(form, tmp_path, eva, clip)
    message = refused(lambda: open_embeddings(path).fetch(range(COUNT)))
    assert "clip: NaN or infinity in 1 samples, first in sample 5 (key 'k5')" in message
    assert "NaN or infinity" in refused(lambda: convert_files([path], tmp_path / "store"))
    assert not (tmp_path / "store").exists()


# Layouts


def with_class_token(eva: np.ndarray, clip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.concatenate([np.full_like(x[:, :1], 9), x], axis=1) for x in (eva, clip))  # type: ignore[return-value]


@pytest.mark.parametrize("form", ["npz", "npy folder", "lists in a pickle", "parquet, tensors"])
def test_257_tokens_are_256_and_a_class_token(tmp_path: Path, form: str) -> None:
    eva, clip = arrays(256)
    path = write_as(form, tmp_path, *with_class_token(eva, clip))
    message = refused(lambda: open_embeddings(path))
    assert "found 257 (256 and a class token? `blip3o-dit convert --drop_class_token` drops it)" in message
    store = convert_files([path], tmp_path / "s", arrangement=Arrangement(drop_class_token=True))
    assert np.array_equal(store.fetch(range(COUNT))[0].numpy(), eva)
    assert main(["convert", str(path), str(tmp_path / "cli"), "--drop_class_token", "--pool", "64"]) == 0
    pooled = EmbeddingStore(tmp_path / "cli")
    assert torch.equal(pooled.fetch([1])[1], pool_tokens(torch.from_numpy(clip[1:2]), 64).half().float())
    assert pooled.manifest["pooling"] == "mean to 64 tokens"


def test_a_side_that_is_pooled_already_stays(tmp_path: Path) -> None:
    eva, clip = arrays(16, 4)
    path = write_as("npz", tmp_path, eva, clip)
    assert "as many eva as clip tokens, found 16 and 4 (`blip3o-dit convert --pool 4`" in refused(
        lambda: open_embeddings(path)
    )
    store = convert_files([path], tmp_path / "s", dtype="float32", arrangement=Arrangement(pool=4))
    assert torch.equal(store.fetch(range(COUNT))[0], pool_tokens(torch.from_numpy(eva), 4))
    assert np.array_equal(store.fetch(range(COUNT))[1].numpy(), clip)
    again = convert_files([store.path], tmp_path / "t", dtype="float32", arrangement=Arrangement(pool=1))
    assert torch.equal(again.fetch([0])[1], pool_tokens(torch.from_numpy(clip[:1]), 1))
    assert "does not pool evenly" in refused(
        lambda: convert_files([path], tmp_path / "u", arrangement=Arrangement(pool=9))
    )
    assert "--pool: expected a square number of tokens, found 3" in refused(
        lambda: convert_files([path], tmp_path / "u", arrangement=Arrangement(pool=3))
    )


LAYOUTS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
    "transposed": (lambda x: x.swapaxes(1, 2), "(of width 4: transposed? it takes .swapaxes(1, 2))"),
    "channels first": (
        lambda x: x.swapaxes(1, 2).reshape(COUNT, -1, 2, 2),
        ".reshape(n, C, -1).swapaxes(1, 2)",
    ),
    "channels last": (lambda x: x.reshape(COUNT, 2, 2, -1), "it takes .reshape(n, -1, C))"),
    "long rows": (lambda x: np.zeros((len(x), 16_385)), "flat rows of 16385: `blip3o-dit convert --tokens"),
    "no numbers": (lambda x: x[:, 0, :0], "eva: expected at least one number a sample, found 0"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_another_layout_is_named_with_what_makes_it_right(tmp_path: Path, name: str) -> None:
    change, hint = LAYOUTS[name]
    path = write_as("npz", tmp_path, *map(change, arrays()))
    assert hint in refused(lambda: open_embeddings(path))


@pytest.mark.parametrize("form", [*WRITERS, "parquet, flat lists"])
def test_one_vector_a_sample_is_a_grid_of_one_token(tmp_path: Path, form: str) -> None:
    """Rows of [n, C], with keys and captions: mapped arrays, tensors, lists of arrays and columns."""
    eva, clip = (side[:, 0] for side in arrays())
    path = write_as(form, tmp_path, eva, clip)
    source = open_embeddings(path)
    assert (source.num_tokens, source.condition_dim, source.target_dim) == (1, 6, 3)
    found = source.fetch([6, 0])
    assert np.array_equal(found[0].numpy(), eva[[6, 0], None])
    assert np.array_equal(found[1].numpy(), clip[[6, 0], None])
    store = convert_files([path], tmp_path / "store", dtype="float32")
    assert store.num_tokens == 1 and np.array_equal(store.fetch(range(COUNT))[0][:, 0].numpy(), eva)
    assert store.records() == source.records()


def test_vectors_beside_tokens_are_refused(tmp_path: Path) -> None:
    eva, clip = arrays()
    path = write_as("npz", tmp_path, eva[:, 0], clip)
    assert "as many eva as clip tokens, found 1 and 4 (`blip3o-dit convert --pool 1`" in refused(
        lambda: open_embeddings(path)
    )


@pytest.mark.parametrize("form", ["parquet, flat lists", "npz"])
def test_flat_rows_are_as_many_tokens_as_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    eva, clip = arrays()
    flat = (eva, clip) if "parquet" in form else (eva.reshape(COUNT, -1), clip.reshape(COUNT, -1))
    path = write_as(form, tmp_path, *flat)
    assert main(["convert", str(path), str(tmp_path / "s"), "--tokens", "4", "--dtype", "float32"]) == 0
    assert np.array_equal(EmbeddingStore(tmp_path / "s").fetch(range(COUNT))[0].numpy(), eva)
    assert main(["convert", str(path), str(tmp_path / "t"), "--tokens", "9"]) == 2
    assert "expected a multiple of 9 numbers (--tokens), found 24" in capsys.readouterr().err


# Several at once


def test_several_sources_become_one_store(tmp_path: Path) -> None:
    eva, clip = arrays()
    made_up = write_as("compressed npz", tmp_path, eva, clip)
    (tmp_path / "more").mkdir()
    again = write_as("compressed npz", tmp_path / "more", eva, clip)
    named = convert_files([write_as("safetensors", tmp_path, eva, clip)], tmp_path / "named").path
    assert main(["convert", *map(str, (made_up, again, named)), str(tmp_path / "out")]) == 0
    store = EmbeddingStore(tmp_path / "out")
    keys = [record["key"] for record in store.records()]
    assert keys == [f"{row:08d}" for row in range(2 * COUNT)] + KEYS
    assert np.array_equal(store.fetch(range(3 * COUNT))[1].numpy(), np.concatenate([clip] * 3))
    assert store.manifest["encoders"]["converted_from"] == [made_up.name, again.name, "named"]


def test_a_key_of_two_sources_is_refused(tmp_path: Path) -> None:
    paths = [write_as(form, tmp_path, *arrays()) for form in ("safetensors", "pt")]
    assert "expected the key 'k0' in one source, found it in" in refused(
        lambda: convert_files(paths, tmp_path / "out")
    )
    paths[1] = write_as("npz", tmp_path, *arrays(9))
    assert f"clip width) (4, 6, 3) as in {paths[0]}, found (9, 6, 3)" in refused(
        lambda: convert_files(paths, tmp_path / "out")
    )


@pytest.mark.parametrize("names", [("x_eva.npy", "x_clip.npy"), ("b.npy", "a.npy"), ("clip.npy", "eva.npy")])
def test_two_npy_files_are_the_two_sides(tmp_path: Path, names: tuple[str, str]) -> None:
    eva, clip = arrays()
    sides = (clip, eva) if names[0] == "clip.npy" else (eva, clip)
    for name, tokens in zip(names, sides, strict=True):
        np.save(tmp_path / name, tokens)
    paths = [str(tmp_path / name) for name in names]
    assert main(["convert", *paths, str(tmp_path / "out"), "--dtype", "float32"]) == 0
    assert np.array_equal(EmbeddingStore(tmp_path / "out").fetch(range(COUNT))[0].numpy(), eva)
    found = refused(lambda: open_embeddings(paths[0]))
    assert "found one NumPy array: give the folder that has eva.npy and clip.npy" in found


# What is not read


def tar_file() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    return buffer.getvalue()


OTHERS: dict[str, tuple[bytes, str]] = {
    "x.h5": (b"\x89HDF\r\n\x1a\n" + bytes(64), "found an HDF5 file"),
    "x.csv": (b"key,eva_0,eva_1\na,1,2\n", "found a text table such as CSV"),
    "x.tsv": (b"key\teva\r\na\t1\r\n", "found a text table such as CSV"),
    "x.jsonl": (b'{"key": "a", "eva": [1, 2]}\n', "found JSON"),
    "x.tfrecord": (struct.pack("<QI", 20, 5) + bytes(24), "found a TFRecord file"),
    "x.tar": (tar_file(), "found a tar archive"),
    "x.mdb": (bytes(16) + b"\xde\xc0\xef\xbe" + bytes(64), "found an LMDB database"),
    "x.npz": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "found a Git LFS pointer"),
    "x.safetensors": (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "found a web page"),
    "x.pkl.gz": (b"\x1f\x8b" + bytes(20), "found a gzip file: unpack it first"),
    "x.feather": (b"ARROW1\0\0" + bytes(40), "found an Arrow or Feather file"),
    "x.png": (b"\x89PNG\r\n\x1a\n", "found a PNG picture: `blip3o-dit extract"),
    "x.parquet": (b"", "found an empty file"),
}


@pytest.mark.parametrize("renamed", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_are_named_by_their_content(tmp_path: Path, name: str, renamed: bool) -> None:
    content, message = OTHERS[name]
    if renamed and name == "x.tfrecord":
        return  # nothing in it tells it from other numbers
    path = tmp_path / ("embeddings.pkl" if renamed else name)
    path.write_bytes(content)
    found = refused(lambda: open_embeddings(path))
    assert found.startswith(f"{path}: ") and message in found


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({".zarray": "{}"}, "found a zarr array"),
        ({"zarr.json": "{}"}, "found a zarr group"),
        ({"data.mdb": ""}, "found an LMDB database"),
        ({"dataset_dict.json": '{"splits": ["train", "test"]}'}, "name one of ['test', 'train']"),
        ({"state.json": '{"_data_files": [{"filename": "../x"}]}'}, "expected the names of data files"),
        ({"state.json": '{"_data_files": [{"filename": "x"}], "_indices_files": [1]}'}, "flatten_indices"),
        ({"state.json": '{"_data_files": [{"filename": "x"}]}'}, "x: not a readable table"),
        ({"readme.txt": ""}, "found a folder with other files, ['readme.txt']"),
    ],
)
def test_other_folders_are_named(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert message in refused(lambda: open_embeddings(tmp_path))


def npz_of(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_objects_are_refused_and_not_unpickled(tmp_path: Path) -> None:
    eva, clip = arrays()
    objects = np.empty(COUNT, dtype=object)
    for row in range(COUNT):
        objects[row] = eva[row]
    path = tmp_path / "e.npz"
    np.savez(path, eva=objects, clip=clip)
    assert "found numbers" not in refused(lambda: open_embeddings(path))
    assert "Python objects" in refused(lambda: open_embeddings(path))
    np.save(tmp_path / "eva.npy", objects, allow_pickle=True)
    np.save(tmp_path / "clip.npy", clip)
    assert "Python objects" in refused(lambda: open_embeddings(tmp_path))
    (tmp_path / "e.pkl").write_bytes(pickle.dumps({"eva": objects, "clip": clip}))
    assert "expected an object array of str" in refused(lambda: open_embeddings(tmp_path / "e.pkl"))


def test_lists_of_arrays_of_several_shapes_are_refused(tmp_path: Path) -> None:
    eva, clip = arrays()
    content = {"eva": [*eva[:-1], eva[-1, :1]], "clip": clip}
    (tmp_path / "e.pkl").write_bytes(pickle.dumps(content))
    message = refused(lambda: open_embeddings(tmp_path / "e.pkl"))
    assert "eva: expected arrays of one kind and shape, found shapes ['[1, 6]', '[4, 6]']" in message


def test_an_npz_that_says_more_than_it_holds_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything of the size that it tells is made."""
    header = io.BytesIO()
    about = {"descr": "<f4", "fortran_order": False, "shape": (10**7, 256, 1280)}
    np.lib.format.write_array_header_1_0(header, about)
    with zipfile.ZipFile(tmp_path / "e.npz", "w") as archive:
        archive.writestr("eva.npy", header.getvalue())
        archive.writestr("clip.npy", header.getvalue())
    assert "expected 13107200000000 bytes for" in refused(lambda: open_embeddings(tmp_path / "e.npz"))
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("eva.npy", header.getvalue() + bytes(2**18))
    monkeypatch.setattr(array_files, "INFLATED_FREE", 2**17)
    assert "expected at most 8 times the compressed size" in refused(
        lambda: open_embeddings(tmp_path / "bomb.npz")
    )


def test_missing_and_double_names_are_refused(tmp_path: Path) -> None:
    eva, clip = arrays()
    path = npz_of(tmp_path / "e.npz", eva=eva, target=clip)
    assert "expected the key 'clip_blip3o_embeddings', found ['eva', 'target']" in refused(
        lambda: open_embeddings(path)
    )
    npz_of(path, eva=eva, eva_embeddings=eva, clip=clip)
    assert "found ['eva', 'eva_embeddings']" in refused(lambda: open_embeddings(path))
    npz_of(path, eva=eva, clip=clip.astype(np.int32))
    assert "clip: expected an array of floats, found int32" in refused(lambda: open_embeddings(path))
    save_file({"eva": torch.ones(2, 4, 3)}, tmp_path / "e.safetensors")
    assert "found ['eva']" in refused(lambda: open_embeddings(tmp_path / "e.safetensors"))


@pytest.mark.parametrize("form", ["npz", "safetensors", "parquet, tensors", "pt"])
def test_a_file_that_was_cut_short_is_refused(tmp_path: Path, form: str) -> None:
    path = write_as(form, tmp_path, *arrays())
    content = path.read_bytes()
    for share in (0.3, 0.6, 0.95):
        path.write_bytes(content[: int(share * len(content))])
        assert str(path) in refused(lambda: open_embeddings(path).fetch(range(COUNT)))


def test_a_column_with_holes_or_uneven_lists_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "e.parquet"
    token = [[1.0, 2.0]] * 4
    for eva, message in (
        ([token, None], "eva: expected tokens for every sample, found 1 missing"),
        ([token, token[:2]], "eva: expected lists of one length, found [2, 4]"),
        ([token, [[1.0], [1.0], [1.0], [1.0]]], "eva: expected lists of one length, found [1, 2]"),
        ([token, [[1.0, None]] * 4], "eva: expected tokens for every sample"),
        (["a", "b"], "eva: expected lists of floats, found 'string'"),
    ):
        pq.write_table(pa.table({"eva": eva, "clip": [token, token]}), path)
        assert message in refused(lambda: open_embeddings(path).fetch([0, 1]))


def test_json_beside_npy_files_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    path = write_as("npy folder", tmp_path, *arrays())
    before: Any = open_embeddings(path)
    prints = before.fingerprint()
    (path / "captions.json").write_text(json.dumps(["other"] * COUNT))
    after: Any = open_embeddings(path)
    assert after.fingerprint() != prints


def test_a_table_of_more_than_its_file_holds_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    flat = pa.array(np.zeros(2**18, np.float32))
    eva = pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(flat, 2**8), 4)
    pq.write_table(pa.table({"eva": eva, "clip": eva}), tmp_path / "e.parquet")
    assert open_embeddings(tmp_path / "e.parquet").num_samples == 2**8
    monkeypatch.setattr(table_files, "INFLATED_FREE", 2**18)
    assert "row group 0: expected at most 8 times" in refused(lambda: open_embeddings(tmp_path / "e.parquet"))
