"""A decoder trained on a small store whose tokens say what is in its pictures."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blip3o_dit.cli.main import main
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.decoder import load_decoder, train_decoder, training
from blip3o_dit.decoder.pictures import quality
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.utils.errors import WriteError
from tests.helpers.painted import painted_store, picture_at, tiny_decoder_training

WORDS = ["--width=8", "--num_layers=1", "--num_heads=2", "--steps=1", "--device=cpu"]


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> tuple[EmbeddingStore, Path]:
    return painted_store(tmp_path_factory.mktemp("painted"))


@pytest.fixture(scope="module")
def trained(painted: tuple[EmbeddingStore, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "decoder"
    train_decoder(*painted, folder, tiny_decoder_training())
    return folder


def test_it_learns_what_the_tokens_say(painted: tuple[EmbeddingStore, Path], trained: Path) -> None:
    """On pictures that it has not seen, which are those that a model's training holds out as well."""
    store, images = painted
    decoder = load_decoder(trained)
    held_out = TrainingConfig().split(store).eval
    true = torch.from_numpy(np.stack([picture_at(images / f"{index:02d}.png") for index in held_out]))
    found = quality(decoder.decode(store.fetch(held_out)[1]), true)
    measured = decoder.about["held_out"]
    assert measured["decoder"]["psnr"] == pytest.approx(found["psnr"].mean())
    assert measured["decoder"]["l1"] == pytest.approx(found["l1"].mean())
    mean = (255 * decoder.mean_picture).round().byte().permute(1, 2, 0).expand_as(true)
    assert measured["mean picture"]["psnr"] == pytest.approx(quality(mean, true)["psnr"].mean())
    assert measured["decoder"]["psnr"] > measured["mean picture"]["psnr"] + 5
    assert measured["ridge"]["psnr"] > measured["mean picture"]["psnr"] + 5
    assert decoder.about["held_out_samples"] == len(held_out)


def test_it_learns_from_the_training_side_alone(painted: tuple[EmbeddingStore, Path], tmp_path: Path) -> None:
    """Its statistics and mean picture are those of the samples that a model is trained on."""
    store, images = painted
    rule = {"split_by": "group", "group_pattern": r"^(\d)", "eval_split": 0.3, "seed": 5}
    train_decoder(store, images, tmp_path / "decoder", tiny_decoder_training(steps=1, **rule))
    decoder = load_decoder(tmp_path / "decoder")
    train = TrainingConfig(**rule).split(store).train
    tokens = store.fetch(train)[1].flatten(0, 1).double()
    assert torch.allclose(decoder.token_mean, tokens.mean(dim=0).float())
    assert torch.allclose(decoder.token_std, tokens.std(dim=0, correction=0).float())
    pictures = np.stack([picture_at(images / f"{index:02d}.png") for index in train]) / 255
    assert np.allclose(decoder.mean_picture.permute(1, 2, 0), pictures.mean(axis=0), atol=1e-6)
    assert decoder.about["train_samples"] == len(train) < 48


def test_the_seed_decides(painted: tuple[EmbeddingStore, Path], tmp_path: Path) -> None:
    weights = []
    for name, changes in (("first", {}), ("same", {}), ("other", {"seed": 43})):
        train_decoder(*painted, tmp_path / name, tiny_decoder_training(steps=5, batch_size=8, **changes))
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
        torch.rand(1)  # the process's own state does not
    assert weights[0] == weights[1] != weights[2]


def test_the_noise_is_half_a_normal_s_times_a_normal() -> None:
    """Its level is a sample's own; both are functions of the sample, not of its batch."""
    indices, tokens = np.arange(4000), torch.zeros(4000, 4, 8)
    named: dict[str, Any] = dict(tau=0.5, seed=1)
    found = training.noise(indices, tokens, epoch=0, **named)
    levels = found.flatten(1).std(dim=1)
    assert levels.square().mean().sqrt() == pytest.approx(0.5, rel=0.05)
    assert (levels < 0.25).double().mean() == pytest.approx(0.383, abs=0.03)  # P(|N(0, 1)| < 1/2)
    assert torch.equal(training.noise(indices[7:9], tokens[:2], epoch=0, **named), found[7:9])
    assert not torch.equal(training.noise(indices[7:9], tokens[:2], epoch=1, **named), found[7:9])
    assert not training.noise(indices, tokens, tau=0.0, seed=1, epoch=0).any()


def test_the_size_follows_from_what_the_tower_saw(painted: tuple[EmbeddingStore, Path]) -> None:
    store, _ = painted
    config = tiny_decoder_training(picture_size=None)
    assert training._sizes(store, {}, config).picture_size == 63
    for saw, size in ((32, 33), (224, 63)):
        clip = {"preprocessing": {"resize": "squash", "size": saw}}
        assert training._sizes(store, {"encoders": {"clip": clip}}, config).picture_size == size


def test_pictures_are_what_the_clip_tower_saw(
    painted: tuple[EmbeddingStore, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The middle of each, where its processor cuts the rest off."""
    store, images = painted
    eva = {"preprocessing": {"resize": "squash", "size": 12}}
    clip = {"preprocessing": {"resize": "shortest", "size": 6, "resize_to": 12}}
    shown = training.pictures_of_store({"encoders": {"eva": eva, "clip": clip}}, str(images), pixels=6)
    found = training.read_pictures(shown, store, np.asarray([5]), 6, images).pixels[0]
    assert np.array_equal(found, picture_at(images / "05.png")[3:9, 3:9])


def test_samples_without_a_picture_are_left_out(
    painted: tuple[EmbeddingStore, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, images = painted
    fewer = shutil.copytree(images, tmp_path / "fewer")
    (fewer / "04.png").unlink()
    (fewer / "06.png").write_bytes(b"no picture")
    shown = training.pictures_of_store({}, str(fewer), pixels=12)
    with caplog.at_level(logging.WARNING):
        found = training.read_pictures(shown, store, np.arange(3, 8), 12, fewer)
    assert found.indices.tolist() == [3, 5, 7] and found.pixels.shape == (3, 12, 12, 3)
    assert np.array_equal(found.pixels[1], picture_at(images / "05.png"))
    assert "2 of 5 pictures are not there" in caplog.text
    with pytest.raises(ValueError, match=r"expected pictures with the keys of .* found none of 1"):
        training.read_pictures(shown, store, np.asarray([4]), 12, fewer)


def test_a_run_that_ends_early_leaves_nothing(
    painted: tuple[EmbeddingStore, Path], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    old = shutil.copytree(trained, tmp_path / "old")
    before = {file.name: file.read_bytes() for file in old.iterdir()}
    for place, stop, error in (("_measure", interrupted, KeyboardInterrupt), ("save", full, WriteError)):
        target = "blip3o_dit.decoder.folder.save_tensors" if place == "save" else training
        patched = (target, stop) if place == "save" else (target, place, stop)
        with monkeypatch.context() as patch:
            patch.setattr(*patched)
            for folder, overwrite in ((tmp_path / "new", False), (old, True)):
                config = tiny_decoder_training(steps=1)
                with pytest.raises(error):
                    train_decoder(*painted, folder, config, overwrite=overwrite)
        assert not (tmp_path / "new").exists()
        assert {file.name: file.read_bytes() for file in old.iterdir()} == before
    load_decoder(old)


def test_what_is_refused_before_a_picture_is_read(
    painted: tuple[EmbeddingStore, Path], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, _ = painted
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for output, flags, message in (
        (trained, [], "found a decoder (--overwrite replaces it)"),
        (
            tmp_path / "full",
            ["--overwrite"],
            "expected a new folder for a decoder, found a folder with",
        ),
        (tmp_path / "new", ["--picture_size=13"], "picture_size: expected a multiple of 3"),
        (
            tmp_path / "new",
            ["--picture_size=99999"],
            "num_samples: expected at most 0 pictures of 99999",
        ),
        (tmp_path / "new", ["--eval_split=0.999"], "eval_split=0.999 of 48 samples leaves 0 for training"),
    ):
        words = ["train-decoder", str(store.path), str(tmp_path / "gone"), "--output_dir", str(output)]
        assert main([*words, *WORDS, *flags]) == 2
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line
    assert main(["train-decoder", str(store.path), str(tmp_path / "gone"), "--output_dir", "x", *WORDS]) == 2
    assert "expected pictures, found nothing there" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


def test_the_command_says_what_it_measured(
    painted: tuple[EmbeddingStore, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, images = painted
    output = tmp_path / "decoder"
    words = ["train-decoder", str(store.path), str(images), "--output_dir", str(output), *WORDS]
    assert main([*words, "--picture_size=6", "--normalize_embeddings"]) == 0
    found = json.loads(capsys.readouterr().out)
    config = json.loads((output / "config.json").read_text())
    assert found == config["training"]["held_out"]
    assert config["model_type"] == "blip3o-dit-decoder" and config["normalize_embeddings"] is True
    assert main([*words, "--picture_size=6", "--overwrite"]) == 0
    assert load_decoder(output).config.normalize_embeddings is False
