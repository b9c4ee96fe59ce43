"""The folder of a decoder: read as it was written, and refused where it was not written so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from blip3o_dit.decoder.folder import load_decoder, save_decoder
from blip3o_dit.utils.atomic import REPLACES_FILE
from blip3o_dit.utils.recognise import recognise
from tests.helpers.painted import random_decoder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoders") / "decoder"
    decoder = random_decoder(normalize_embeddings=True)
    decoder.about = {"settings": {"seed": 3}}
    save_decoder(decoder, folder)
    return folder


def test_it_is_read_as_it_was_written(saved: Path) -> None:
    decoder, found = random_decoder(normalize_embeddings=True), load_decoder(saved)
    assert found.config == decoder.config and found.about == {"settings": {"seed": 3}}
    assert {name: tensor.tolist() for name, tensor in found.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in decoder.state_dict().items()
    }
    tokens = torch.randn(3, 9, 8)
    assert torch.equal(found.decode(tokens), decoder.decode(tokens))
    assert sorted(file.name for file in saved.iterdir()) == [
        *("checksums.json", "config.json", "model.safetensors"),
    ]
    assert recognise(saved).kind == "decoder"


def altered(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def changed(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(content))
        (folder / "checksums.json").unlink()

    return change


def without_width(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    del content["channels"]
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "checksums.json").unlink()


def another_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["norm.bias"] = torch.zeros(3)
    del tensors["norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    (folder / "checksums.json").unlink()


def no_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    (folder / "checksums.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (altered, "model.safetensors: its SHA-256 is not that of checksums.json"),
        (changed(width=8), "weights do not fit the configuration: 18 mismatched"),
        (changed(patch=3), r"config.json: settings: unknown \['patch'\]"),
        (changed(num_tokens=7), "config.json: num_tokens: expected a square, found 7"),
        (changed(training=3), "config.json: training: expected an object, found int"),
        (without_width, r"config.json: expected \['channels'\], found none"),
        (another_tensor, "1 missing .norm.weight.; 1 mismatched .norm.bias."),
        (no_safetensors, "model.safetensors: not readable weights"),
        (changed(model_type="clip"), "expected a decoder's folder, found a model of another kind .'clip'"),
        (shutil.rmtree, "expected a decoder's folder, found nothing there"),
    ],
)
def test_what_was_not_written_so_is_refused(
    saved: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_decoder(folder)
    assert "\n" not in str(error.value)


def test_a_decoder_that_was_being_moved_into_place_is_finished(saved: Path, tmp_path: Path) -> None:
    """As after a kill between the renames."""
    folder = tmp_path / "killed"
    shutil.copytree(saved, folder / "model.partial")
    (folder / "model.partial" / REPLACES_FILE).write_text("[]")
    assert load_decoder(folder).config.num_tokens == 9
