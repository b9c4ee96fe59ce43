"""The manifest: what it says, and that a damaged, edited or oversized one is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blip3o_dit.data import manifest as manifest_module
from blip3o_dit.data.convert import convert_pickle
from blip3o_dit.data.manifest import MANIFEST, STORE_ASIDE
from blip3o_dit.data.pickle_format import write_pickle
from blip3o_dit.data.store import EmbeddingStore
from tests.data.test_store import edit_manifest, refused, write


def set_field(*names: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(manifest: dict[str, Any]) -> None:
        holder: Any = manifest
        for name in names[:-1]:
            holder = holder[name]
        holder[names[-1]] = value

    return edit


def test_the_manifest_says_how_the_tokens_were_made(tmp_path: Path) -> None:
    about = dict(
        encoders={"eva": {"name": "EVA", "revision": "1"}}, pooling="mean 2x2", normalization="l2 per token"
    )
    manifest = write(tmp_path / "s", dtype="bfloat16", **about).manifest
    assert about.items() <= manifest.items()
    assert manifest["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "s" / MANIFEST).read_text()) == manifest


def test_a_byte_changed_anywhere_in_the_manifest_never_changes_the_samples(tmp_path: Path) -> None:
    store = write(tmp_path / "s", 4)
    eva, clip = store.fetch(range(4))
    records = store.records()
    file = tmp_path / "s" / MANIFEST
    whole = file.read_bytes()
    accepted = bytearray()
    for at, byte in enumerate(whole):
        file.write_bytes(whole[:at] + bytes([byte ^ 1]) + whole[at + 1 :])
        try:
            altered = EmbeddingStore(tmp_path / "s")
            got = altered.fetch(range(4))
            found = altered.records()
        except ValueError as error:
            assert str(error).startswith(str(tmp_path / "s"))  # noqa: PT017
            continue
        accepted.append(byte)
        assert altered.num_samples == 4
        assert torch.equal(got[0], eva) and torch.equal(got[1], clip)
        assert found == records
    assert len(accepted) < 0.2 * len(whole)  # the descriptive fields only


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_field("format", value="something"), "expected format 'blip3o-dit embedding store'"),
        (set_field("format_version", value=2), "expected format version 1, found 2"),
        (lambda m: m.pop("format_version"), "expected format version 1, found None"),
        (set_field("num_samples", value=8), "num_samples is 8, its shards hold 7"),
        (set_field("num_samples", value="7"), "num_samples: expected a positive int, found '7'"),
        (set_field("num_samples", value=True), "num_samples: expected a positive int, found True"),
        (set_field("target_dim", value=-3), "target_dim: expected a positive int, found -3"),
        (lambda m: m.pop("condition_dim"), "condition_dim: expected a positive int, found None"),
        (set_field("num_tokens", value=5), "expected a square number of tokens (an n x n grid), found 5"),
        (set_field("shards", value={}), "shards: expected a list, found {}"),
        (set_field("shards", value=[]), "num_samples is 7, its shards hold 0"),
        (set_field("shards", 1, value=None), "file: expected a str, found None"),
        (set_field("shards", 1, "bytes", value=0), "bytes: expected a positive int, found 0"),
        (lambda m: m["shards"][2].pop("table_sha256"), "table_sha256: expected a str, found None"),
    ],
)
def test_an_edited_manifest_is_refused(tmp_path: Path, edit: Callable[..., Any], message: str) -> None:
    write(tmp_path / "s")
    edit_manifest(tmp_path / "s", edit)
    found = refused(lambda: EmbeddingStore(tmp_path / "s"))
    assert found.startswith(f"{tmp_path / 's' / MANIFEST}: ")
    assert message in found


def test_a_size_beyond_every_store_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "s", 2)
    edit_manifest(tmp_path / "s", set_field("num_samples", value=10**30))
    edit_manifest(tmp_path / "s", set_field("shards", 0, "num_samples", value=10**30))
    assert str(tmp_path / "s") in refused(lambda: EmbeddingStore(tmp_path / "s"))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff{}", b"[1]", b"null", b"[" * 100_000, b"9" * 5000], ids=range(7)
)
def test_a_file_that_is_no_manifest_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    write(tmp_path / "s")
    (tmp_path / "s" / MANIFEST).write_bytes(content)
    assert refused(lambda: EmbeddingStore(tmp_path / "s")).startswith(f"{tmp_path / 's' / MANIFEST}: ")


@pytest.mark.parametrize("field", ["file", "table"])
@pytest.mark.parametrize("absolute", [False, True])
def test_a_file_outside_the_store_is_never_read(tmp_path: Path, field: str, absolute: bool) -> None:
    write(tmp_path / "s")
    write(tmp_path / "outside")  # the same bytes, so that only the name can be refused

    def edit(manifest: dict[str, Any]) -> None:
        folder = str(tmp_path / "outside") if absolute else "../outside"
        manifest["shards"][0][field] = f"{folder}/{manifest['shards'][0][field]}"

    edit_manifest(tmp_path / "s", edit)
    assert "expected a plain file name, found" in refused(lambda: EmbeddingStore(tmp_path / "s"))


@pytest.mark.parametrize("name", ["..", ".", "", "no\0where"])
def test_a_name_that_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / "s")
    edit_manifest(tmp_path / "s", set_field("shards", 0, "file", value=name))
    assert str(tmp_path / "s") in refused(lambda: EmbeddingStore(tmp_path / "s"))


def test_a_missing_folder_and_a_folder_that_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none: expected an embedding store, found nothing there"):
        EmbeddingStore(tmp_path / "none")
    assert "expected an embedding store, found an empty folder" in refused(lambda: EmbeddingStore(tmp_path))


def test_a_store_of_more_shards_than_a_manifest_lists_is_refused_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_module, "MAX_SHARDS", 3)
    write(tmp_path / "enough", 9)
    expected = "shard_size: expected at least 4 for 10 samples (a store has at most 3 shards), found 3"
    assert expected in refused(lambda: write(tmp_path / "s", 10))
    assert not (tmp_path / "s" / MANIFEST).exists()
    assert len(list((tmp_path / "s" / STORE_ASIDE).glob("shard-*.safetensors"))) == 3
    write_pickle(write(tmp_path / "whole", 10, shard_size=None), tmp_path / "e.pkl")
    write(tmp_path / "kept", 2)
    convert = lambda: convert_pickle(tmp_path / "e.pkl", tmp_path / "kept", shard_size=3, overwrite=True)  # noqa: E731
    assert expected in refused(convert)
    assert len(EmbeddingStore(tmp_path / "kept")) == 2  # refused before anything was removed


def test_a_manifest_of_the_most_shards_is_read(tmp_path: Path) -> None:
    digest = "0" * 64
    entry = {"file": "shard-349999.safetensors", "num_samples": 1024, "bytes": 268435456, "sha256": digest}
    entry |= {"table": "shard-349999.jsonl", "table_sha256": digest}
    one, two = (len(json.dumps({"shards": [entry] * count}, indent=2)) for count in (1, 2))
    assert (two - one) * manifest_module.MAX_SHARDS < 0.9 * manifest_module.MAX_MANIFEST_BYTES
    about = {"encoders": {"eva": {"name": "x" * manifest_module.MAX_MANIFEST_BYTES}}}
    assert "bytes to write" in refused(
        lambda: manifest_module.write_manifest(tmp_path, (4, 6, 3), "float16", [], about)
    )


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_field("num_tokens", value=2**46), "expected at least"),
        (set_field("condition_dim", value=2**40), "expected at least"),
        (set_field("dtype", value="float64"), "dtype: expected one of"),
        (set_field("dtype", value=["float32"]), "dtype: expected a str"),
        (set_field("encoders", value=[]), "encoders: expected an object for each side, found []"),
        (set_field("encoders", value={"eva": 5}), "encoders: expected an object for each side"),
        (set_field("shards", 0, "file", value="a\nb"), r"expected a plain file name, found 'a\nb'"),
        (set_field("shards", 0, "table", value="x" * 101), "expected a plain file name, found 'xxx"),
        (set_field("format_version", value="x" * 10_000), "expected format version 1, found 'xxx"),
    ],
)
def test_a_manifest_that_asks_for_too_much_is_refused(
    tmp_path: Path, edit: Callable[..., Any], message: str
) -> None:
    write(tmp_path / "s")
    edit_manifest(tmp_path / "s", edit)
    found = refused(lambda: EmbeddingStore(tmp_path / "s"))
    assert found.startswith(f"{tmp_path / 's' / MANIFEST}: ") and message in found and len(found) < 600


def test_a_name_given_twice_in_the_manifest_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "s")
    file = tmp_path / "s" / MANIFEST
    file.write_text(file.read_text().replace('"num_samples": 7,', '"num_samples": 7, "num_samples": 8,'))
    assert "expected each name once, found 'num_samples'" in refused(lambda: EmbeddingStore(tmp_path / "s"))
