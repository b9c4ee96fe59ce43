"""The embedding store: what is written comes back, and what is damaged or unusable is refused."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from blip3o_dit.data import store as store_module
from blip3o_dit.data.dataset import EmbeddingDataset, split_samples
from blip3o_dit.data.embeddings import batches
from blip3o_dit.data.manifest import DTYPES, MANIFEST
from blip3o_dit.data.store import EmbeddingStore, StoreWriter
from blip3o_dit.data.worker_batches import whole_batch
from blip3o_dit.utils.atomic import dump_atomically, write_atomically
from tests.helpers.stores import without_sample_checksums

SIZES = dict(num_tokens=4, condition_dim=6, target_dim=3)


def samples(count: int, seed: int = 0) -> tuple[Tensor, Tensor, list[dict[str, Any]]]:
    """Values that every dtype on disk holds exactly: small integers over 8."""
    generator = torch.Generator().manual_seed(seed)
    eva = torch.randint(-99, 99, (count, 4, 6), generator=generator) / 8
    clip = torch.randint(-99, 99, (count, 4, 3), generator=generator) / 8
    return eva, clip, [{"key": f"k{row}", "caption": f"picture {row}"} for row in range(count)]


def write(path: Path, count: int = 7, *, seed: int = 0, **options: Any) -> EmbeddingStore:
    writer = StoreWriter(path, **(SIZES | dict(dtype="float32", shard_size=3) | options))
    writer.append(*samples(count, seed))
    return writer.close()


def refused(call: Callable[[], object]) -> str:
    """The message of the ValueError that `call` raises."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_manifest(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    edit(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


def flip_last_byte(file: Path) -> None:
    """Of the file, which in a shard is one of its last sample's clip or eva."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


# Round trip


@pytest.mark.parametrize("shard_size", [1, 3, 7, 50, None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_comes_back(tmp_path: Path, dtype: str, shard_size: int | None) -> None:
    eva, clip, records = samples(7)
    store = write(tmp_path / "s", dtype=dtype, shard_size=shard_size)
    got = store.fetch(range(7))
    assert [tokens.dtype for tokens in got] == [torch.float32, torch.float32]
    assert torch.equal(got[0], eva)
    assert torch.equal(got[1], clip)
    assert store.records() == records
    assert len(store) == store.num_samples == 7
    assert (store.num_tokens, store.condition_dim, store.target_dim) == (4, 6, 3)
    assert len(store.manifest["shards"]) == -(-7 // (shard_size or 7))


@pytest.mark.parametrize(("dtype", "kind"), DTYPES.items())
def test_shards_hold_the_values_rounded_to_the_dtype(tmp_path: Path, dtype: str, kind: torch.dtype) -> None:
    eva, clip = torch.randn(2, 4, 6), torch.randn(2, 4, 3)
    with StoreWriter(tmp_path / "s", **SIZES, dtype=dtype) as writer:
        writer.append(eva, clip, [{"key": "a"}, {"key": "b"}])
    on_disk = load_file(tmp_path / "s" / "shard-00000.safetensors")
    assert torch.equal(on_disk["eva"], eva.to(kind))
    assert torch.equal(EmbeddingStore(tmp_path / "s").fetch([0, 1])[1], clip.to(kind).float())


def test_of_very_many_shards_sizes_are_looked_at_when_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blip3o_dit.data.manifest.MAX_SIZES_ASKED", 2)
    write(tmp_path / "s", 9, shard_size=3)
    shards = EmbeddingStore(tmp_path / "s").manifest["shards"]
    with open(tmp_path / "s" / shards[1]["file"], "ab") as file:
        file.write(b"more")
    store = EmbeddingStore(tmp_path / "s")
    store.fetch([0, 2, 6])
    assert re.search(r"expected \d+ bytes, found \d+: truncated", refused(lambda: store.fetch([3])))
    (tmp_path / "s" / shards[2]["file"]).unlink()
    assert "expected a shard, found no file" in refused(lambda: EmbeddingStore(tmp_path / "s"))


@pytest.mark.parametrize("indices", [[6, 0, 3, 3, 1, 6], [2, 3], [5], range(6, -1, -1), np.array([4, 0, 4])])
def test_order_and_duplicates_are_kept_across_shards(tmp_path: Path, indices: Any) -> None:
    eva, clip, records = samples(7)
    store = write(tmp_path / "s")
    got = store.fetch(indices)
    assert torch.equal(got[0], eva[list(indices)])
    assert torch.equal(got[1], clip[list(indices)])
    assert store.records(indices) == [records[index] for index in indices]


@pytest.mark.parametrize("dtype", DTYPES)
def test_scattered_samples_are_the_stored_ones_in_float32(tmp_path: Path, dtype: str) -> None:
    eva, clip = torch.randn(50, 4, 6), torch.randn(50, 4, 3)
    with StoreWriter(tmp_path / "s", **SIZES, dtype=dtype, shard_size=9) as writer:
        writer.append(eva, clip, [{"key": str(row)} for row in range(50)])
    wanted = torch.randint(50, (80,), generator=torch.Generator().manual_seed(1))
    store = EmbeddingStore(tmp_path / "s")
    assert store.shard_starts.tolist() == [0, 9, 18, 27, 36, 45, 50]
    for found, tokens in zip(store.fetch(wanted.numpy()), (eva, clip), strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, tokens.to(DTYPES[dtype]).float()[wanted])


def test_no_indices_give_an_empty_batch(tmp_path: Path) -> None:
    eva, clip = write(tmp_path / "s").fetch([])
    assert (eva.shape, clip.shape) == ((0, 4, 6), (0, 4, 3))
    assert EmbeddingStore(tmp_path / "s").records([]) == []


@pytest.mark.parametrize("index", [-1, 7])
def test_an_index_out_of_range_is_refused_by_tokens_and_records(tmp_path: Path, index: int) -> None:
    store = write(tmp_path / "s")
    with pytest.raises(IndexError, match=rf"expected indices in 0\.\.6, found 0\.\.{index}|found {index}"):
        store.fetch([0, index])
    with pytest.raises(IndexError):
        store.records([0, index])


@pytest.mark.parametrize("pieces", [[7], [1] * 7, [2, 0, 5], [4, 3]])
def test_shards_do_not_depend_on_how_samples_were_appended(tmp_path: Path, pieces: list[int]) -> None:
    whole = write(tmp_path / "whole")
    eva, clip, records = samples(7)
    with StoreWriter(tmp_path / "s", **SIZES, dtype="float32", shard_size=3) as writer:
        start = 0
        for count in pieces:
            rows = slice(start, start + count)
            writer.append(eva[rows], clip[rows], records[rows])
            start += count
    assert EmbeddingStore(tmp_path / "s").manifest["shards"] == whole.manifest["shards"]


def test_a_buffer_may_be_reused_after_append(tmp_path: Path) -> None:
    eva, clip, records = samples(2)
    with StoreWriter(tmp_path / "s", **SIZES, dtype="float32", shard_size=8) as writer:
        buffer = eva[:1].clone()
        writer.append(buffer, clip[:1], records[:1])
        buffer.copy_(eva[1:])
        writer.append(buffer, clip[1:], records[1:])
    assert torch.equal(EmbeddingStore(tmp_path / "s").fetch([0, 1])[0], eva)


def test_records_keep_what_json_can_hold(tmp_path: Path) -> None:
    eva, clip, _ = samples(5)
    records = [
        {"key": "plain"},
        {"key": "日本/ключ 🦊", "caption": "naïve façade", "label": 3},
        {"key": "c", "caption": 'two\nlines\r\nand a "quote", a \\ and a \t\x0b\x0c\x1c\x00'},
        {"key": "d", "caption": "", "label": None, "score": 0.5},
        {"key": "", "tags": ["a", {"b": [1, 2]}]},
    ]
    with StoreWriter(tmp_path / "s", **SIZES, shard_size=2) as writer:
        writer.append(eva, clip, records)
    store = EmbeddingStore(tmp_path / "s")
    assert store.records() == records
    assert store.records([4, 1]) == [records[4], records[1]]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85"])
def test_records_keep_unicode_line_separators(tmp_path: Path, mark: str) -> None:
    eva, clip, _ = samples(1)
    records = [{"key": "a", "caption": f"two{mark}lines"}]
    with StoreWriter(tmp_path / "s", **SIZES) as writer:
        writer.append(eva, clip, records)
    assert EmbeddingStore(tmp_path / "s").records() == records


def test_a_lone_surrogate_in_a_caption_comes_back(tmp_path: Path) -> None:
    eva, clip, _ = samples(1)
    records = [{"key": "a", "caption": "file\udcff"}]  # how Python spells an undecodable byte of a file name
    with StoreWriter(tmp_path / "s", **SIZES) as writer:
        writer.append(eva, clip, records)
    assert EmbeddingStore(tmp_path / "s").records() == records


def test_shards_aim_at_256_mib(tmp_path: Path) -> None:
    sizes = dict(num_tokens=64, condition_dim=1280, target_dim=768)
    half = StoreWriter(tmp_path / "a", **sizes, dtype="float16").shard_size
    full = StoreWriter(tmp_path / "b", **sizes, dtype="float32").shard_size
    assert (half, full) == (2**28 // (64 * 2048 * 2), 2**28 // (64 * 2048 * 4))


# The manifest comes last


def interrupted(writer: StoreWriter) -> None:
    def extract() -> None:
        with writer:
            writer.append(*samples(7))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract()


def test_an_exception_inside_the_context_leaves_no_store(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "s", **SIZES, shard_size=3)
    interrupted(writer)
    assert not (tmp_path / "s").exists()


def test_no_manifest_exists_while_shards_are_written(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "s", **SIZES, shard_size=3) as writer:
        writer.append(*samples(7))
        assert not list((tmp_path / "s").glob("manifest*"))
    assert [file.name for file in (tmp_path / "s").glob("manifest*")] == [MANIFEST]


def test_an_interrupted_overwrite_leaves_the_old_store_as_it_was(tmp_path: Path) -> None:
    write(tmp_path / "s")
    before = {file.name: file.read_bytes() for file in (tmp_path / "s").iterdir()}
    interrupted(StoreWriter(tmp_path / "s", **SIZES, overwrite=True))
    assert {file.name: file.read_bytes() for file in (tmp_path / "s").iterdir()} == before


def test_an_unfinished_store_can_be_written_again(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "s", **SIZES, shard_size=1)
    writer.append(*samples(7, seed=1))  # never closed
    write(tmp_path / "s", 4, shard_size=4)
    assert sorted(file.name for file in (tmp_path / "s").iterdir()) == [
        MANIFEST,
        "shard-00000.jsonl",
        "shard-00000.safetensors",
    ]


def test_an_existing_store_is_refused_and_untouched(tmp_path: Path) -> None:
    store = write(tmp_path / "s")
    message = refused(lambda: write(tmp_path / "s", seed=1))
    assert message.startswith(f"{tmp_path / 's'}: expected no store there, found one")
    assert torch.equal(store.fetch(range(7))[0], samples(7)[0])


def test_overwriting_leaves_nothing_of_the_previous_store(tmp_path: Path) -> None:
    write(tmp_path / "s", 7, shard_size=1)
    (tmp_path / "s" / "notes.txt").write_text("mine")
    store = write(tmp_path / "s", 2, seed=1, overwrite=True)
    assert sorted(file.name for file in (tmp_path / "s").iterdir()) == [
        MANIFEST,
        "notes.txt",
        "shard-00000.jsonl",
        "shard-00000.safetensors",
    ]
    assert torch.equal(store.fetch([0, 1])[0], samples(2, seed=1)[0])


def test_an_atomic_write_that_fails_keeps_the_previous_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "no space left on device")

    write_atomically(tmp_path / "a", b"first")
    with monkeypatch.context() as full_disk:
        full_disk.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="no space"):
            write_atomically(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"
    write_atomically(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"second"


# Data that cannot be trained on


def spoiled(count: int, where: str, at: tuple[int, ...], value: float) -> tuple[Tensor, Tensor, list]:
    eva, clip, records = samples(count)
    (eva if where == "eva" else clip)[at] = value
    return eva, clip, records


E, C, R = samples(4)

REFUSED = {
    "fewer clip": ((E, C[:3], R), "expected equal counts, found 4 eva, 3 clip, 4 records"),
    "fewer records": ((E, C, R[:2]), "expected equal counts, found 4 eva, 4 clip, 2 records"),
    "rank of eva": (
        (E.flatten(1), C, R),
        "eva: expected rank 3 [samples, tokens, width], found shape [4, 24] "
        "(one vector a sample? as [:, None] it is one token)",
    ),
    "rank of clip": (
        (E, C[None], R),
        "clip: expected rank 3 [samples, tokens, width], found shape [1, 4, 4, 3] "
        "(a grid, channels last? it takes .reshape(n, -1, C))",
    ),
    "tokens": (
        (E, C[:, :1], R),
        "expected as many eva as clip tokens, found 4 and 1 "
        "(`blip3o-dit convert --pool 1` makes it 1 on both sides)",
    ),
    "not square": (
        (E[:, :3], C[:, :3], R),
        "expected a square number of tokens (an n x n grid), found 3",
    ),
    "other grid": (
        (E[:, :1], C[:, :1], R),
        "expected (tokens, eva width, clip width) (4, 6, 3), found (1, 6, 3)",
    ),
    "widths": ((C, E, R), "expected (tokens, eva width, clip width) (4, 6, 3), found (4, 3, 6)"),
    "no key": ((E, C, [*R[:3], {"caption": "x"}]), "sample 10: expected a string key, found None"),
    "number as key": ((E, C, [R[0], {"key": 5}, *R[2:]]), "sample 8: expected a string key, found 5"),
    "NaN": (
        spoiled(4, "eva", (2, 3, 5), float("nan")),
        "eva: NaN or infinity in 1 samples, first in sample 9 (key 'k2')",
    ),
    "infinities": (
        spoiled(4, "clip", (slice(1, 4), 0, 0), -float("inf")),
        "clip: NaN or infinity in 3 samples, first in sample 8 (key 'k1')",
    ),
    "fp16 overflow": (
        spoiled(4, "clip", (1, 1, 1), -70000.0),
        "clip: largest value 7e+04 does not fit float16; choose another dtype",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_samples_are_refused_by_name_and_leave_the_writer_usable(tmp_path: Path, name: str) -> None:
    batch, message = REFUSED[name]
    with StoreWriter(tmp_path / "s", **SIZES, shard_size=4) as writer:
        writer.append(*samples(7))
        assert refused(lambda: writer.append(*batch)) == f"{tmp_path / 's'}: {message}"
        writer.append(*samples(2, seed=1))
    store = EmbeddingStore(tmp_path / "s")
    assert torch.equal(store.fetch(range(9))[0], torch.cat([samples(7)[0], samples(2, seed=1)[0]]))


def test_what_overflows_fp16_fits_bfloat16(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "s", **SIZES, dtype="bfloat16") as writer:
        writer.append(*spoiled(4, "clip", (1, 1, 1), -65536.0 * 2))
    assert EmbeddingStore(tmp_path / "s").fetch([1])[1][0, 1, 1] == -131072


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e-6])
def test_what_underflows_fp16_is_refused_like_what_overflows(tmp_path: Path, scale: float) -> None:
    eva, clip, records = samples(4)
    eva[2, 1] = torch.tensor([0.3, 0.1, -1.0, 0.7, 0.0, 0.2]) * scale
    with StoreWriter(tmp_path / "s", **SIZES) as writer:
        writer.append(*samples(1))
        message = refused(lambda: writer.append(eva, clip, records))
    assert "eva: 1 tokens are too small for float16, which would change them by more than 1%" in message
    assert message.endswith("choose bfloat16 or float32, or scale them")
    for dtype in ("bfloat16", "float32"):
        with StoreWriter(tmp_path / dtype, **SIZES, dtype=dtype) as writer:
            writer.append(eva, clip, records)


def test_small_values_beside_larger_ones_and_zeros_are_stored(tmp_path: Path) -> None:
    eva, clip, records = samples(2)
    eva[0, 0] = torch.tensor([1e-12, 0.0, 1.0, -1e-8, 0.5, 0.0])
    eva[1, 0] = 0.0
    eva[1, 1] = 1e-4
    with StoreWriter(tmp_path / "s", **SIZES) as writer:
        writer.append(eva, clip, records)


def test_a_record_that_json_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    eva, clip, records = samples(2)
    records[1]["label"] = np.int64(3)
    writer = StoreWriter(tmp_path / "s", **SIZES, shard_size=1)
    assert "sample 1" in refused(lambda: writer.append(eva, clip, records))


def test_a_store_without_samples_is_refused(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "s", **SIZES)
    assert "expected at least one sample, found none" in refused(writer.close)
    writer.append(*samples(0))
    assert "expected at least one sample, found none" in refused(writer.close)
    assert not (tmp_path / "s" / MANIFEST).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float64"}, r"expected one of \('float16', .*'int8'\), found 'float64'"),
        ({"num_tokens": 8}, "square number of tokens .*, found 8"),
        ({"num_tokens": 0}, "square number of tokens .*, found 0"),
        ({"num_tokens": -4}, "square number of tokens .*, found -4"),
        ({"shard_size": 0}, "shard_size"),
        ({"shard_size": -1}, "shard_size"),
        ({"condition_dim": 0}, "condition_dim"),
        ({"target_dim": 0}, "target_dim"),
    ],
)
def test_sizes_that_make_no_store_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StoreWriter(tmp_path / "s", **(SIZES | change))
    assert not (tmp_path / "s").exists()


# Damage


def test_a_truncated_shard_is_refused_at_opening(tmp_path: Path) -> None:
    write(tmp_path / "s")
    file = tmp_path / "s" / "shard-00001.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    assert refused(lambda: EmbeddingStore(tmp_path / "s")) == (
        f"{file}: expected {size} bytes, found {size - 1}: truncated or altered"
    )


def test_a_missing_shard_is_refused_at_opening(tmp_path: Path) -> None:
    write(tmp_path / "s")
    file = tmp_path / "s" / "shard-00002.safetensors"
    file.unlink()
    assert refused(lambda: EmbeddingStore(tmp_path / "s")) == f"{file}: expected a shard, found no file"


def test_a_missing_table_is_refused_when_read(tmp_path: Path) -> None:
    store = write(tmp_path / "s")
    (tmp_path / "s" / "shard-00002.jsonl").unlink()
    assert store.records([0])[0]["key"] == "k0"
    assert "shard-00002.jsonl: expected a file" in refused(store.records)


@pytest.mark.parametrize("kind", ["safetensors", "jsonl"])
def test_one_altered_byte_is_refused_when_that_file_is_read(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "s")
    flip_last_byte(tmp_path / "s" / f"shard-00001.{kind}")
    store = EmbeddingStore(tmp_path / "s")
    read: Callable[[Any], object] = store.fetch if kind == "safetensors" else store.records
    read([0, 1, 2, 6])
    digest = f"{tmp_path / 's'}/shard-00001.{kind}: its SHA-256 is not the manifest's: the file was altered"
    sample = digest.replace("its SHA-256 is not the manifest's", "sample 5: its CRC-32 is not the stored one")
    for _ in range(2):
        assert refused(lambda: read([0, 5])) == (sample if kind == "safetensors" else digest)
    assert refused(store.verify) == digest


def test_a_flipped_bit_anywhere_in_a_shard_is_found_by_who_reads_it_all(tmp_path: Path) -> None:
    write(tmp_path / "s", 3)
    file = tmp_path / "s" / "shard-00000.safetensors"
    whole, before = file.read_bytes(), EmbeddingStore(tmp_path / "s").fetch(range(3))
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        store = EmbeddingStore(tmp_path / "s")
        try:
            found = store.fetch(range(3))
        except ValueError:
            continue
        # a bit of the header that nobody reads
        assert all(torch.equal(a, b) for a, b in zip(found, before, strict=True)), place


def test_reading_reads_no_more_than_what_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write(tmp_path / "s")
    checked: list[int] = []
    plain = store_module.sample_checksum
    count = lambda eva, clip: checked.append(1) or plain(eva, clip)  # noqa: E731
    monkeypatch.setattr(store_module, "sample_checksum", count)
    monkeypatch.setattr(store_module, "check_once", None)  # a call would raise something else
    for _ in range(3):
        store.fetch([0, 4, 4])
    assert len(checked) == 2
    EmbeddingStore(tmp_path / "s", verify="never").fetch(range(7))
    store.unverified().fetch(range(7))
    assert len(checked) == 2


def test_a_shard_that_changed_after_it_was_read_is_checked_again(tmp_path: Path) -> None:
    store = write(tmp_path / "s")
    store.fetch(range(7))
    flip_last_byte(tmp_path / "s" / "shard-00001.safetensors")
    store._maps.clear()
    assert "sample 5: its CRC-32" in refused(lambda: store.fetch(range(7)))


@pytest.mark.parametrize("kind", ["float", "short"])
def test_checksums_of_another_kind_are_refused(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "s", 3)
    file = tmp_path / "s" / "shard-00000.safetensors"
    tensors = load_file(file)
    sums = tensors["crc32"].double() if kind == "float" else tensors["crc32"][:2].clone()
    save_file(tensors | {"crc32": sums}, file)
    sign(tmp_path / "s")
    assert "crc32: expected torch.int64 of shape [3]" in refused(
        lambda: EmbeddingStore(tmp_path / "s").fetch([0])
    )


def test_stores_without_sample_checksums_are_read_as_before(tmp_path: Path) -> None:
    write(tmp_path / "s")
    store = EmbeddingStore(without_sample_checksums(tmp_path / "s"))
    assert torch.equal(store.fetch(range(7))[0], samples(7)[0])
    store.verify()
    flip_last_byte(tmp_path / "s" / "shard-00001.safetensors")
    assert "shard-00001.safetensors: its SHA-256" in refused(lambda: EmbeddingStore(store.path).fetch([3]))


def test_all_damaged_files_are_named(tmp_path: Path) -> None:
    write(tmp_path / "s")
    (tmp_path / "s" / "shard-00000.safetensors").unlink()
    flip_last_byte(tmp_path / "s" / "shard-00001.safetensors")
    flip_last_byte(tmp_path / "s" / "shard-00002.jsonl")
    found = list(EmbeddingStore(tmp_path / "s", check_files=False).find_damage())
    names = ["shard-00000.safetensors", "shard-00001.safetensors", "shard-00002.jsonl"]
    assert [line.split(": ")[0] for line in found] == [str(tmp_path / "s" / name) for name in names]


def test_a_glance_reads_what_is_there_and_leaves_the_checking_to_the_store(tmp_path: Path) -> None:
    store = write(tmp_path / "s")
    unverified_copy = store.unverified()
    assert torch.equal(unverified_copy.fetch(range(7))[0], store.fetch(range(7))[0])
    flip_last_byte(tmp_path / "s" / "shard-00001.safetensors")
    store = EmbeddingStore(tmp_path / "s")
    store.unverified().fetch(range(7))
    assert "shard-00001.safetensors: sample 5: its CRC-32" in refused(lambda: store.fetch([5]))


def test_verify_passes_a_sound_store_and_reads_again_what_was_read_before(tmp_path: Path) -> None:
    store = write(tmp_path / "s")
    store.fetch(range(7))
    store.verify()
    flip_last_byte(tmp_path / "s" / "shard-00001.safetensors")
    assert "shard-00001.safetensors" in refused(store.verify)


def test_opening_reads_no_shard(tmp_path: Path) -> None:
    write(tmp_path / "s")
    for file in (tmp_path / "s").glob("shard-*"):
        file.write_bytes(b"\xff" * file.stat().st_size)
    store = EmbeddingStore(tmp_path / "s")
    assert store.num_samples == 7
    assert "not a readable shard" in refused(lambda: store.fetch([0]))
    assert "altered" in refused(lambda: store.records([0]))


def test_a_shard_with_a_matching_checksum_but_other_content_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "s")
    write(tmp_path / "other", shard_size=4)

    def take_other_files(manifest: dict[str, Any]) -> None:
        other = json.loads((tmp_path / "other" / MANIFEST).read_text())["shards"][0]
        for name in (other["file"], other["table"]):
            (tmp_path / "s" / name).write_bytes((tmp_path / "other" / name).read_bytes())
        manifest["shards"][0] = other | {"num_samples": 3}

    edit_manifest(tmp_path / "s", take_other_files)
    store = EmbeddingStore(tmp_path / "s")
    assert "eva: expected shape [3, 4, 6], found [4, 4, 6]" in refused(lambda: store.fetch([0]))
    assert "expected 3 records, found 4" in refused(store.records)


# Other processes, memory


def test_a_store_pickles_without_its_maps_and_reads_again(tmp_path: Path) -> None:
    store = write(tmp_path / "s", 200, shard_size=100)
    before = len(pickle.dumps(store))
    eva, _ = store.fetch(range(200))
    packed = pickle.dumps(store)
    assert len(packed) < before + 200
    assert torch.equal(pickle.loads(packed).fetch(range(200))[0], eva)


def test_a_fresh_process_reads_the_store(tmp_path: Path) -> None:
    eva, clip, _ = samples(7)
    store = write(tmp_path / "s")
    store.fetch([0])
    loader: DataLoader = DataLoader(
        EmbeddingDataset(store, np.arange(7)),
        batch_size=7,
        num_workers=1,
        collate_fn=whole_batch,
        multiprocessing_context="spawn",
    )
    (batch,) = loader
    assert torch.equal(batch["eva"], eva)
    assert torch.equal(batch["clip"], clip)


def private_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_does_not_grow_with_the_shards_read(tmp_path: Path) -> None:
    count, shards = 256, 12
    sizes = dict(num_tokens=4, condition_dim=512, target_dim=512)
    eva = torch.randn(count, 4, 512)
    with StoreWriter(tmp_path / "s", **sizes, shard_size=count) as writer:
        for shard in range(shards):
            writer.append(eva, eva, [{"key": f"{shard}/{row}"} for row in range(count)])
    store = EmbeddingStore(tmp_path / "s")
    total = sum(entry["bytes"] for entry in store.manifest["shards"])
    store.fetch(range(32))
    before = private_bytes()
    for rows in batches(range(store.num_samples), 32):
        store.fetch(rows)
    assert private_bytes() - before < total / 4


# Content that somebody signed: checksums say nothing about it


def sign(path: Path) -> None:
    """The manifest's sizes and checksums of the first shard as its files are now."""

    def edit(manifest: dict[str, Any]) -> None:
        entry = manifest["shards"][0]
        for name, digest in (("file", "sha256"), ("table", "table_sha256")):
            entry[digest] = hashlib.sha256((path / entry[name]).read_bytes()).hexdigest()
        entry["bytes"] = (path / entry["file"]).stat().st_size

    edit_manifest(path, edit)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"5", "sample 1: expected an object, found 5"),
        (b"{}", "sample 1: expected a string key, found None"),
        (b'{"key": ["k"]}', "sample 1: expected a string key, found ['k']"),
        (b'{"key": "k", "caption": 5}', "sample 1: expected text as caption, found 5"),
        (b"{", "sample 1: not readable JSON"),
        (b"\xff", "sample 1: not readable JSON"),
        (b"[" * 100_000, "sample 1: not readable JSON"),
        (b"9" * 5000, "sample 1: not readable JSON"),
    ],
    ids=range(8),
)
def test_a_record_that_is_none_is_refused_by_file_and_sample(
    tmp_path: Path, line: bytes, message: str
) -> None:
    write(tmp_path / "s")
    table = tmp_path / "s" / "shard-00000.jsonl"
    lines = table.read_bytes().splitlines()
    table.write_bytes(b"\n".join([lines[0], line, lines[2]]) + b"\n")
    sign(tmp_path / "s")
    store = EmbeddingStore(tmp_path / "s")
    assert refused(store.records).startswith(f"{table}: {message}")
    assert refused(lambda: store.records([0])).startswith(f"{table}: {message}")


def test_a_surrogate_in_a_key_splits_by_its_hash(tmp_path: Path) -> None:
    eva, clip, _ = samples(2)
    with StoreWriter(tmp_path / "s", **SIZES) as writer:
        writer.append(eva, clip, [{"key": "file\udcff"}, {"key": "b"}])
    split = split_samples(EmbeddingStore(tmp_path / "s"), eval_split=0.0, seed=0, split_by="key_hash")
    assert split.train.tolist() == [0, 1]


def test_a_shard_of_another_dtype_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "s")
    file = tmp_path / "s" / "shard-00000.safetensors"
    save_file({name: tensor.double() for name, tensor in load_file(file).items()}, file)
    sign(tmp_path / "s")
    store = EmbeddingStore(tmp_path / "s")
    assert refused(lambda: store.fetch([0])) == f"{file}: eva: expected float32, found torch.float64"


@pytest.mark.parametrize("writer", [write_atomically, dump_atomically])
def test_a_link_left_aside_does_not_lead_outside(tmp_path: Path, writer: Callable[..., Any]) -> None:
    (tmp_path / "outside").write_text("untouched")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "x.partial").symlink_to(tmp_path / "outside")
    writer(tmp_path / "s" / "x", b"new")
    assert (tmp_path / "outside").read_text() == "untouched"
    assert b"new" in (tmp_path / "s" / "x").read_bytes()


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="needs a device")
def test_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "null").symlink_to("/dev/null")
    (tmp_path / "folder").mkdir()
    for name in ("null", "folder"):
        with pytest.raises(ValueError, match=f"{name}: expected a file to write, found a folder or a device"):
            write_atomically(tmp_path / name, b"x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "null"]
