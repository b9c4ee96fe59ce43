"""The documented pickle: accepted in every form it is found in, refused by name, converted without loss."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blip3o_dit.data.convert import convert_pickle
from blip3o_dit.data.embeddings import open_embeddings
from blip3o_dit.data.manifest import DTYPES
from blip3o_dit.data.pickle_format import CLIP_KEY, EVA_KEY, PickledEmbeddings
from blip3o_dit.data.safe_unpickler import UnsafePickleError
from blip3o_dit.data.store import StoreWriter

KEYS = [f"k{row}" for row in range(5)]
CAPTIONS = ["a", "two\nlines", "naïve 🦊", "", "e"]


def arrays(count: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Values that float16 and bfloat16 hold exactly."""
    rng = np.random.default_rng(0)
    eva = rng.integers(-99, 99, (count, 4, 6)).astype(np.float32) / 8
    clip = rng.integers(-99, 99, (count, 4, 3)).astype(np.float32) / 8
    return eva, clip


def documented(**changes: Any) -> dict[str, Any]:
    eva, clip = arrays()
    content = {EVA_KEY: eva, CLIP_KEY: clip, "captions": CAPTIONS, "keys": KEYS, "config": {"a": 1}}
    content |= changes
    return {name: value for name, value in content.items() if value is not ...}


def dump(path: Path, content: object) -> Path:
    path.write_bytes(pickle.dumps(content))
    return path


def refused(call: Callable[[], object]) -> str:
    """The message of the ValueError that `call` raises."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


FORMS: dict[str, Callable[[np.ndarray], Any]] = {
    "float32": lambda x: x,
    "float64": lambda x: x.astype(np.float64),
    "float16": lambda x: x.astype(np.float16),
    "big-endian": lambda x: x.astype(">f4"),
    "big-endian float16": lambda x: x.astype(">f2"),
    "Fortran order": np.asfortranarray,
    "torch": torch.from_numpy,
    "torch float16": lambda x: torch.from_numpy(x).half(),
    "torch bfloat16": lambda x: torch.from_numpy(x).bfloat16(),
    "torch transposed": lambda x: torch.from_numpy(x.transpose(2, 0, 1).copy()).permute(1, 2, 0),
    "torch with gradient": lambda x: torch.from_numpy(x).requires_grad_(),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_array_gives_the_same_samples(tmp_path: Path, form: str) -> None:
    eva, clip = arrays()
    source = open_embeddings(
        dump(tmp_path / "e.pkl", documented(**{EVA_KEY: FORMS[form](eva), CLIP_KEY: FORMS[form](clip)}))
    )
    for indices in (range(5), [4, 0, 0, 2], np.array([3])):
        got = source.fetch(indices)
        assert [tokens.dtype for tokens in got] == [torch.float32, torch.float32]
        assert np.array_equal(got[0].numpy(), eva[list(indices)])
        assert np.array_equal(got[1].numpy(), clip[list(indices)])
    sizes = (source.num_samples, source.num_tokens, source.condition_dim, source.target_dim)
    assert sizes == (5, 4, 6, 3)


def test_a_file_from_torch_save_is_read_too(tmp_path: Path) -> None:
    eva, clip = (torch.from_numpy(tokens) for tokens in arrays())
    torch.save(documented(**{EVA_KEY: eva, CLIP_KEY: clip}), tmp_path / "e.pt")
    source = open_embeddings(tmp_path / "e.pt")
    assert torch.equal(source.fetch([2])[1], clip[[2]])
    assert source.records([1]) == [{"key": "k1", "caption": "two\nlines"}]


def test_a_batch_is_a_copy(tmp_path: Path) -> None:
    source = open_embeddings(dump(tmp_path / "e.pkl", documented()))
    source.fetch(range(5))[0].zero_()
    assert np.array_equal(source.fetch(range(5))[0].numpy(), arrays()[0])


@pytest.mark.parametrize("column", [list, tuple, np.array, lambda x: np.array(x, dtype=object)])
def test_keys_and_captions_come_in_any_list(tmp_path: Path, column: Callable[[list], Any]) -> None:
    content = documented(keys=column(KEYS), captions=column(CAPTIONS))
    source = open_embeddings(dump(tmp_path / "e.pkl", content))
    expected = [{"key": key, "caption": text} for key, text in zip(KEYS, CAPTIONS, strict=True)]
    assert source.records() == expected
    assert source.records(np.array([3, 3, 0])) == [expected[3], expected[3], expected[0]]


@pytest.mark.parametrize("absent", [..., None, []])
def test_absent_keys_become_positions_and_absent_captions_stay_absent(tmp_path: Path, absent: Any) -> None:
    source = open_embeddings(dump(tmp_path / "e.pkl", documented(keys=absent, captions=absent)))
    assert source.records() == [{"key": f"{row:08d}"} for row in range(5)]


def test_a_missing_caption_is_left_out_of_its_record(tmp_path: Path) -> None:
    captions = ["a", None, "c", None, "e"]
    records = open_embeddings(dump(tmp_path / "e.pkl", documented(captions=captions))).records()
    assert [record.get("caption") for record in records] == captions
    assert "caption" not in records[1]


def test_integer_keys_become_text(tmp_path: Path) -> None:
    source = open_embeddings(dump(tmp_path / "e.pkl", documented(keys=np.arange(10, 15))))
    assert [record["key"] for record in source.records()] == ["10", "11", "12", "13", "14"]


def with_value(tokens: np.ndarray, at: tuple[int, ...], value: float) -> np.ndarray:
    tokens = tokens.copy()
    tokens[at] = value
    return tokens


EVA, CLIP = arrays()

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no eva": (
        {EVA_KEY: ..., "config": ...},
        f"expected the key '{EVA_KEY}', found ['captions', '{CLIP_KEY}', 'keys']",
    ),
    "no clip": ({CLIP_KEY: ...}, f"expected the key '{CLIP_KEY}', found "),
    "list": ({EVA_KEY: EVA.tolist()}, f"{EVA_KEY}: expected an array of floats, found list"),
    "integers": ({CLIP_KEY: CLIP.astype(np.int64)}, f"{CLIP_KEY}: expected an array of floats, found int64"),
    "torch integers": (
        {EVA_KEY: torch.zeros(5, 4, 6, dtype=torch.int32)},
        f"{EVA_KEY}: expected an array of floats, found torch.int32",
    ),
    "rank 1": (
        {EVA_KEY: EVA[:, 0, 0]},
        f"{EVA_KEY}: expected rank 3 [samples, tokens, width], found shape [5]",
    ),
    "rank 4": (
        {CLIP_KEY: CLIP.reshape(5, 2, 2, 3)},
        f"{CLIP_KEY}: expected rank 3 [samples, tokens, width], found shape [5, 2, 2, 3]",
    ),
    "fewer clip": ({CLIP_KEY: CLIP[:4]}, "expected equal counts, found 5 eva, 4 clip, 5 records"),
    "fewer keys": ({"keys": KEYS[:2]}, "expected as many keys as samples (5), found 2"),
    "more captions": ({"captions": [*CAPTIONS, "f"]}, "expected as many captions as samples (5), found 6"),
    "text as keys": ({"keys": "abcde"}, "keys: expected a list, found a str"),
    "dict as captions": ({"captions": {"a": 1}}, "captions: expected a list, found a dict"),
    "other token counts": ({CLIP_KEY: CLIP[:, :1]}, "expected as many eva as clip tokens, found 4 and 1"),
    "not square": (
        {EVA_KEY: EVA[:, :3], CLIP_KEY: CLIP[:, :3]},
        "expected a square number of tokens (an n x n grid), found 3",
    ),
    "NaN": (
        {EVA_KEY: with_value(EVA, (slice(2, 4), 1, 1), np.nan)},
        "eva: NaN or infinity in 2 samples, first in sample 2 (key 'k2')",
    ),
    "infinity": (
        {CLIP_KEY: with_value(CLIP, (4, 3, 2), -np.inf)},
        "clip: NaN or infinity in 1 samples, first in sample 4 (key 'k4')",
    ),
    "empty": (
        {EVA_KEY: EVA[:0], CLIP_KEY: CLIP[:0], "keys": [], "captions": []},
        "expected at least one sample, found none",
    ),
    "no width": ({EVA_KEY: EVA[:, :, :0]}, "width"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_content_is_refused_by_file_and_name(tmp_path: Path, name: str) -> None:
    changes, message = REFUSED[name]
    path = dump(tmp_path / "e.pkl", documented(**changes))
    found = refused(lambda: open_embeddings(path))
    assert found.startswith(f"{path}: ")
    assert message in found.removeprefix(f"{path}: ")


def test_a_pickle_of_something_else_is_refused(tmp_path: Path) -> None:
    path = dump(tmp_path / "e.pkl", [EVA, CLIP])
    assert refused(lambda: open_embeddings(path)) == f"{path}: expected a dict, found a list"


def test_a_pickle_that_names_a_program_is_refused(tmp_path: Path) -> None:
    path = dump(tmp_path / "e.pkl", documented(config=print))
    with pytest.raises(UnsafePickleError, match="print"):
        open_embeddings(path)


def test_an_index_out_of_range_is_refused_like_the_stores(tmp_path: Path) -> None:
    path = dump(tmp_path / "e.pkl", documented())
    for source in (open_embeddings(path), convert_pickle(path, tmp_path / "store")):
        for index in (5, -1):
            with pytest.raises(IndexError):
                source.fetch([0, index])


# Conversion


@pytest.mark.parametrize("shard_size", [2, 300, None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_conversion_keeps_samples_and_records(tmp_path: Path, dtype: str, shard_size: int | None) -> None:
    count = 261  # more than one batch of the conversion
    eva, clip = arrays(count)
    captions = [None if row % 7 == 0 else f"{row}\nü" for row in range(count)]
    content = documented(**{EVA_KEY: eva, CLIP_KEY: clip, "captions": captions, "keys": list(range(count))})
    path = dump(tmp_path / "e.pkl", content)
    store = convert_pickle(path, tmp_path / "store", dtype=dtype, shard_size=shard_size)
    assert store.manifest["dtype"] == dtype
    got = store.fetch(range(count))
    assert np.array_equal(got[0].numpy(), eva)
    assert np.array_equal(got[1].numpy(), clip)
    assert store.records() == PickledEmbeddings(path).records()


def test_conversion_keeps_the_config_as_far_as_json_can(tmp_path: Path) -> None:
    config = {"name": "EVA", 3: (1, None, True), "dtype": np.float32(0.5), "nested": {"x": [1.5]}}
    path = dump(tmp_path / "e.pkl", documented(config=config))
    manifest = convert_pickle(path, tmp_path / "store").manifest
    assert manifest["encoders"] == {
        "converted_from": "e.pkl",
        "config": {"name": "EVA", "3": [1, None, True], "dtype": "0.5", "nested": {"x": [1.5]}},
    }


def test_conversion_keeps_an_existing_store_unless_told(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "store", num_tokens=1, condition_dim=2, target_dim=2) as writer:
        writer.append(torch.ones(1, 1, 2), torch.ones(1, 1, 2), [{"key": "old"}])
    path = dump(tmp_path / "e.pkl", documented())
    assert "found one" in refused(lambda: convert_pickle(path, tmp_path / "store"))
    assert open_embeddings(tmp_path / "store").records() == [{"key": "old"}]
    assert convert_pickle(path, tmp_path / "store", overwrite=True).records()[0]["key"] == "k0"


def test_a_bad_pickle_does_not_cost_the_store_it_would_replace(tmp_path: Path) -> None:
    good = dump(tmp_path / "good.pkl", documented())
    bad = dump(tmp_path / "bad.pkl", documented(**{CLIP_KEY: with_value(CLIP, (0, 0, 0), np.nan)}))
    convert_pickle(good, tmp_path / "store")
    assert "NaN" in refused(lambda: convert_pickle(bad, tmp_path / "store", overwrite=True))
    assert open_embeddings(tmp_path / "store").num_samples == 5


def test_conversion_refuses_what_does_not_fit_the_dtype(tmp_path: Path) -> None:
    path = dump(tmp_path / "e.pkl", documented(**{EVA_KEY: with_value(EVA, (1, 0, 0), 1e5)}))
    assert "eva: largest value 1e+05 does not fit float16" in refused(
        lambda: convert_pickle(path, tmp_path / "half")
    )
    assert not (tmp_path / "half").exists()
    assert convert_pickle(path, tmp_path / "full", dtype="float32").fetch([1])[0][0, 0, 0] == 1e5


def tuples_without_end() -> tuple:
    value: tuple = ()
    for _ in range(60):
        value = (value, value)
    return value


@pytest.mark.parametrize("name", ["keys", "captions"])
@pytest.mark.parametrize("value", [tuples_without_end(), [], b"x", 10**30, None])
def test_a_name_that_is_no_text_is_refused(tmp_path: Path, name: str, value: object) -> None:
    if name == "captions" and value is None:
        return  # no caption
    content = {"eva_blip3o_embeddings": np.ones((1, 4, 5), np.float32), name: [value]}
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(content | {"clip_blip3o_embeddings": np.ones((1, 4, 3), np.float32)}))
    with pytest.raises(ValueError, match=f"{name}: sample 0: expected text, found") as caught:
        open_embeddings(path)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("config", [tuples_without_end(), {"x": [0] * 20_000}])
def test_a_config_without_end_is_refused_by_the_conversion(tmp_path: Path, config: object) -> None:
    content = {"eva_blip3o_embeddings": np.ones((1, 4, 5), np.float32), "config": config}
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(content | {"clip_blip3o_embeddings": np.ones((1, 4, 3), np.float32)}))
    with pytest.raises(ValueError, match="config: expected at most 10000 values, 50 deep"):
        convert_pickle(path, tmp_path / "store")
    assert not (tmp_path / "store").exists()
