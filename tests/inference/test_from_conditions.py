"""blip3o-dit generate on pictures: the tokens of extract and generate, without a store in between."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blip3o_dit.cli import generate as command
from blip3o_dit.cli.main import main
from blip3o_dit.data.safe_unpickler import load_pickle
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.data.towers import TOWERS_FILE, read_towers
from blip3o_dit.extraction import conditions as tower_conditions
from blip3o_dit.extraction.sources.listing import list_images
from blip3o_dit.inference import generated_store
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.training.distillation import distill
from blip3o_dit.training.distillation_config import DistillationConfig
from blip3o_dit.utils import kept_state
from tests.helpers.extracted import extracted_store
from tests.helpers.training import train_model

FAST = ["--num_inference_steps", "2", "--dtype", "float32", "--device", "cpu"]
COUNT, BROKEN = 9, {"02.png": b"", "06.png": b"not a picture"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of which two are broken, their store, and a model trained on it."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "images").mkdir()
    generator = np.random.default_rng(0)
    for index in range(COUNT):
        pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{index:02d}.png")
    for name, data in BROKEN.items():
        (root / "images" / name).write_bytes(data)
    (root / "images" / "00.txt").write_text("the first picture")
    train_model(extracted_store(root), root / "model", save_steps=2)
    return root


def generate(root: Path, data: Path, output: Path, *words: str, model: str = "model") -> int:
    return main(["generate", str(root / model), str(data), str(output), *FAST, *words])


def error_of(capsys: pytest.CaptureFixture[str], status: int) -> str:
    error = capsys.readouterr().err.splitlines()[-1]
    assert status == 2 and error.startswith("error: ")
    return error


def skipped_in(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_tokens_are_those_of_extract_and_generate(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also over several shards, with broken pictures between them, which take no sample's number."""
    sample = 16 * (64 + 48) * 4
    monkeypatch.setattr(generated_store, "MAX_SHARD_BYTES", 4 * sample)
    assert generate(root, root / "store", tmp_path / "a", "--batch_size", "2", "--seed", "5") == 0
    capsys.readouterr()
    assert generate(root, root / "images", tmp_path / "b", "--batch_size", "2", "--seed", "5") == 0
    out, err = capsys.readouterr()
    assert out == "" and f"{tmp_path / 'b'}: 7 pictures, 2 skipped" in err
    assert "no true tokens: no metrics" in err
    there, here = EmbeddingStore(tmp_path / "a"), EmbeddingStore(tmp_path / "b")
    assert here.records() == there.records() and here.records()[0]["caption"] == "the first picture"
    for expected, found in zip(there.fetch(range(7)), here.fetch(range(7)), strict=True):
        assert abs(expected - found).max() < 0.01 * expected.std()  # the store holds float16
    assert len(here.manifest["shards"]) == 2
    assert here.manifest["encoders"]["eva"] == EmbeddingStore(root / "store").manifest["encoders"]["eva"]
    made_by = here.manifest["encoders"]["clip"]["generated_by"]
    assert made_by["num_samples"] == 7 and made_by["pictures"] == str(root / "images")
    skipped = skipped_in(tmp_path / "b" / "skipped.jsonl")
    assert {image["key"] for image in skipped} == set(BROKEN) and all(image["reason"] for image in skipped)


@pytest.mark.parametrize(("output", "words"), [("out", []), ("out.pkl", []), ("out.npz", ["--pooled"])])
def test_a_stopped_generation_goes_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, words: list[str], capsys: Any
) -> None:
    """The 7 readable pictures, by 2, in shards of 4; what was read is not read again."""
    monkeypatch.setattr(generated_store, "MAX_SHARD_BYTES", 4 * 16 * (64 + 48) * 4)
    monkeypatch.setattr(kept_state, "KEEP_EVERY", 0.0)
    monkeypatch.setattr(kept_state, "KEEP_SHARE", 0)
    words = [*words, "--batch_size", "2"]
    assert generate(root, root / "images", tmp_path / "whole" / output, *words) == 0
    capsys.readouterr()
    decode, prepared = tower_conditions.ImageConditions._prepared, []
    monkeypatch.setattr(
        tower_conditions.ImageConditions,
        "_prepared",
        lambda *image: prepared.append(image[2].key) or decode(*image),
    )
    sample, batches = BLIP3oDiTModel.generate, []

    def generated(*arguments: Any, **options: Any) -> Any:
        batches.append(1)
        if len(batches) % 2 == 0:
            raise KeyboardInterrupt
        return sample(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(BLIP3oDiTModel, "generate", generated)
        for _ in range(3):
            assert generate(root, root / "images", tmp_path / output, *words) == 75
            assert "what is generated is kept" in capsys.readouterr().err
            assert generate(root, root / "images", tmp_path / output, *words, "--seed", "1") == 2
            assert "seed is 0 there, 1 here" in capsys.readouterr().err
    prepared.clear()
    assert generate(root, root / "images", tmp_path / output, *words) == 0
    assert prepared == ["08.png"]
    found, expected = (
        {str(file.relative_to(at)): file.read_bytes() for file in at.rglob("*") if file.is_file()}
        for at in (tmp_path, tmp_path / "whole")
    )
    assert {name: data for name, data in found.items() if not name.startswith("whole")} == expected
    with monkeypatch.context() as patch:
        patch.setattr(command, "_load", None)
        assert generate(root, root / "images", tmp_path / output, *words) == 0
        assert "finished already" in capsys.readouterr().err
        shutil.copytree(root / "images", tmp_path / "images")
        (tmp_path / "images" / "09.png").write_bytes(b"one more")
        assert generate(root, tmp_path / "images", tmp_path / output, *words) == 2
        assert "count is 9 there, 10 here" in capsys.readouterr().err


def test_into_files_and_pooled(root: Path, tmp_path: Path) -> None:
    assert generate(root, root / "images", tmp_path / "all.pkl") == 0
    tokens: Any = load_pickle(tmp_path / "all.pkl")
    assert tokens["generated_clip_embeddings"].shape == (7, 16, 48)
    assert tokens["eva_embeddings"].shape == (7, 16, 64)
    assert "target_clip_embeddings" not in tokens and tokens["generation_metrics"] is None
    assert len(skipped_in(tmp_path / "all.skipped.jsonl")) == 2
    for name, data in (("images.npz", "images"), ("store.npz", "store")):
        assert generate(root, root / data, tmp_path / name, "--pooled") == 0
        with np.load(tmp_path / name, allow_pickle=False) as file:
            assert set(file) == {"pooled_clip_embeddings", "keys", "captions", "config", "generation_metrics"}
            pooled, keys = file["pooled_clip_embeddings"], json.loads(bytes(file["keys"]))
        mean = tokens["generated_clip_embeddings"].mean(axis=1)
        np.testing.assert_allclose(pooled, mean, atol=0.01 * mean.std() if data == "images" else 0.02)
        assert keys == tokens["keys"]


def test_a_single_picture_and_a_list(root: Path, tmp_path: Path) -> None:
    assert generate(root, root / "images" / "04.png", tmp_path / "one.npz") == 0
    (tmp_path / "list.txt").write_text(f"{root}/images/04.png\ta caption\n{root}/images/none.png\n")
    assert generate(root, tmp_path / "list.txt", tmp_path / "two.pkl") == 0
    listed: Any = load_pickle(tmp_path / "two.pkl")
    with np.load(tmp_path / "one.npz") as one:
        assert json.loads(bytes(one["keys"])) == ["04.png"]
        assert np.array_equal(one["generated_clip_embeddings"], listed["generated_clip_embeddings"])
    assert listed["captions"] == ["a caption"]
    assert "No such file" in skipped_in(tmp_path / "two.skipped.jsonl")[0]["reason"]
    assert not (tmp_path / "one.skipped.jsonl").exists()


def test_nothing_readable_is_one_line(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"")
    for output in ("out", "out.pkl"):
        error = error_of(capsys, generate(root, tmp_path / "bad", tmp_path / output))
        assert "expected at least one readable picture, found none of 1, the first" in error
        assert "a.png: empty file" in error
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bad"]


def test_the_towers_travel_with_the_model(root: Path) -> None:
    record = read_towers(root / "model")
    assert record is not None and record == read_towers(root / "model" / "checkpoint-4")
    assert record["encoders"] == EmbeddingStore(root / "store").manifest["encoders"]
    assert (record["num_tokens"], record["condition_dim"], record["target_dim"]) == (16, 64, 48)
    assert record["pooling"].startswith("eva 16x16 -> 4x4 mean") and record["dtype"] == "float32"


def test_a_student_takes_its_teachers_towers(root: Path, tmp_path: Path) -> None:
    config = DistillationConfig(steps=1, train_steps=1, teacher_steps=1, batch_size=2, device="cpu")
    distill(root / "model", root / "store", tmp_path / "student", config, progress=False)
    assert read_towers(tmp_path / "student") == read_towers(root / "model")


def altered(root: Path, folder: Path, change: Any) -> Path:
    """The model in a folder of its own, with another record of its towers (None: without one)."""
    shutil.copytree(root / "model", folder, ignore=shutil.ignore_patterns("checkpoint-*", "checksums.json"))
    record = json.loads((folder / TOWERS_FILE).read_text())
    if change is None:
        (folder / TOWERS_FILE).unlink()
    else:
        change(record)
        (folder / TOWERS_FILE).write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (None, [], "towers.json, which names the tower of the conditions, found none"),
        (None, ["--eva", "owner/none/x"], "owner/none/x: expected a model folder or a hub id"),
        (
            lambda r: r["encoders"]["eva"].update(grid=8),
            [],
            "with grid 8, found random eva tower, seed 3 with 16",
        ),
        (
            lambda r: r["encoders"]["eva"]["preprocessing"].update(resample="lanczos"),
            [],
            "with preprocessing.resample 'lanczos', found random eva tower, seed 3 with 'bicubic'",
        ),
        (
            lambda r: r["encoders"]["eva"]["preprocessing"].update(resize_to=256),
            [],
            "with preprocessing.resize_to 256, found random eva tower, seed 3 with None",
        ),
        (lambda r: r["encoders"]["eva"].update(commit=5), [], "commit: expected text, found 5"),
        (lambda r: r["encoders"]["eva"].update(name="towers/eva"), [], "name where it is now with --eva"),
        (lambda r: r["encoders"]["eva"].update(name="timm:x"), [], "only loaded when you name it: --eva"),
        (lambda r: r["encoders"]["eva"].update(name=5), [], "expected the towers of a store, found"),
        (lambda r: r["encoders"]["eva"].update(revision=5), [], "revision: expected text, found 5"),
        (
            lambda r: r.update(pooling="eva attention"),
            [],
            "pooled 'eva 16x16 -> 4x4 mean', found 'eva attention'",
        ),
        (lambda r: r.update(normalization="l2"), [], "normalised 'none', found 'l2'"),
        (lambda r: r.update(dtype="int8"), [], "dtype: expected one of"),
    ],
)
def test_another_tower_is_refused(
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Any,
    words: list[str],
    message: str,
) -> None:
    model = altered(root, tmp_path / "model", change)
    status = generate(tmp_path, root / "images", tmp_path / "out", *words)
    assert message in error_of(capsys, status) and model.is_dir()
    assert not (tmp_path / "out").exists()


def test_the_tower_can_be_named(root: Path, tmp_path: Path) -> None:
    altered(root, tmp_path / "model", None)
    words = ["--eva", "random eva tower, seed 3"]
    assert generate(tmp_path, root / "images" / "04.png", tmp_path / "named.pkl", *words) == 0
    assert generate(root, root / "images" / "04.png", tmp_path / "recorded.pkl") == 0
    named, recorded = (load_pickle(tmp_path / f"{name}.pkl") for name in ("named", "recorded"))
    assert isinstance(named, dict) and isinstance(recorded, dict)
    assert np.array_equal(named["eva_embeddings"], recorded["eva_embeddings"])


@pytest.mark.parametrize(
    ("data", "words", "message"),
    [
        ("images", ["--split", "eval"], "--split: expected none with pictures"),
        ("images", ["--num_samples", "3"], "--num_samples: expected none with pictures"),
        ("store", ["--eva", "x"], "--eva: expected pictures, found embeddings"),
        ("images", ["--pooled"], "expected a .npz or .pkl file for one vector a picture"),
        ("none.jpg", [], "none.jpg: expected pictures, found nothing there"),
    ],
)
def test_flags_that_do_not_fit(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], data: str, words: list[str], message: str
) -> None:
    assert message in error_of(capsys, generate(root, root / data, tmp_path / "out", *words))


def test_a_picture_whose_tokens_overflow_is_skipped(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, calls = tower_conditions.pool_tokens, []

    def overflowing(tokens: Any, count: int) -> Any:
        calls.append(len(tokens))
        pooled = pool(tokens, count)
        if len(calls) == 2:  # the first is the check at loading
            pooled[1, 0, 0] = float("inf")
        return pooled

    monkeypatch.setattr(tower_conditions, "pool_tokens", overflowing)
    assert generate(root, root / "images", tmp_path / "out", "--batch_size", "3") == 0
    assert EmbeddingStore(tmp_path / "out").num_samples == 6
    reasons = {image["key"]: image["reason"] for image in skipped_in(tmp_path / "out" / "skipped.jsonl")}
    assert reasons["01.png"] == "its tokens are not finite" and len(reasons) == 3


def test_a_folder_that_is_away_stops_the_run(root: Path, tmp_path: Path) -> None:
    """A missing picture is skipped, a missing place is not."""
    (tmp_path / "images").mkdir()
    shutil.copy(root / "images" / "00.png", tmp_path / "images")
    images = list_images(tmp_path / "images")
    tower = tower_conditions.open_tower(read_towers(root / "model"), (16, 64, 48), root / "model")
    conditions = tower_conditions.ImageConditions(images, tower, num_tokens=16)
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(OSError, match="expected a file that can be opened"):
        list(conditions.batches(2))
    assert not conditions.skipped
