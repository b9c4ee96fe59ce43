"""Weight files that are not what their names say are named in one line; digests tell weights apart."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from blip3o_dit.extraction import vision_towers, weight_files
from blip3o_dit.extraction.preprocessing import Preprocessing
from blip3o_dit.extraction.vision_towers import VisionEncoder, load_encoder, tiny_encoder
from blip3o_dit.extraction.weight_files import parameters_digest, weights_digest

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 1711974081\n"
PAGE = b"\n<!DOCTYPE html><html><head><title>Sign in</title></head></html>"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tower")
    sizes: dict[str, Any] = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8)
    torch.manual_seed(0)
    config = CLIPVisionConfig(**sizes, patch_size=4, intermediate_size=16, projection_dim=8)
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "tower"))


def as_bin(folder: Path) -> Path:
    """The same weights as torch saves them."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder / "pytorch_model.bin"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def shards(folder: Path) -> Path:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for number in (1, 2):
        file = f"model-{number:05d}-of-00002.safetensors"
        part = {name: tensors[name] for name in names[number - 1 :: 2]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder / "model-00002-of-00002.safetensors"


def replaced(content: bytes, name: str = "model.safetensors") -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def only(*names: str) -> Callable[[Path], object]:
    """A folder with a configuration, whose weights have these names."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        for name in names:
            (folder / name).write_bytes(b"weights")

    return change


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "pointer": (replaced(POINTER), r"model\.safetensors: .*git-lfs pointer.*git lfs pull"),
    "pointer bin": (lambda f: as_bin(f).write_bytes(POINTER), r"pytorch_model\.bin: .*git-lfs pointer"),
    "pointer config": (
        replaced(POINTER, "config.json"),
        r"config\.json: expected JSON, found a git-lfs pointer",
    ),
    "page": (replaced(PAGE), r"model\.safetensors: .*found a web page: download the file itself"),
    "page bin": (lambda f: as_bin(f).write_bytes(PAGE), r"pytorch_model\.bin: .*found a web page"),
    "page config": (replaced(PAGE, "config.json"), r"config\.json: expected JSON, found a web page"),
    "empty": (replaced(b""), r"found an empty file: download it again"),
    "cut": (lambda f: cut(f / "model.safetensors"), r"found \d+ of its \d+ bytes \(cut\): download it again"),
    "one byte short": (
        lambda f: replaced((f / "model.safetensors").read_bytes()[:-1])(f),
        r"found \d+ of its \d+ bytes \(cut\)",
    ),
    "cut in its header": (
        lambda f: replaced((f / "model.safetensors").read_bytes()[:50])(f),
        "no safetensors file, or the start of one: download it again",
    ),
    "an error message": (replaced(b'{"error": "Repository not found"}'), "no safetensors file"),
    "cut bin": (lambda f: cut(as_bin(f)), r"pytorch_model\.bin: .*that was cut: download it again"),
    "other bin": (lambda f: as_bin(f).write_bytes(b"\x80\x02garbage"), r"not (readable|a model)"),
    "missing shard": (
        lambda f: shards(f).unlink(),
        r"index\.json: expected 2 files, found 1 missing: .*00002-of",
    ),
    "pointer shard": (lambda f: shards(f).write_bytes(POINTER), "00002-of-00002.*git-lfs pointer"),
    "no weights": (only(), "expected model.safetensors or pytorch_model.bin .* found neither"),
    "authors": (only("EVA02_CLIP_L.pt"), r"found \['EVA02_CLIP_L.pt'\], in a layout that is not read: take"),
    "open_clip": (only("open_clip_pytorch_model.bin"), "in open_clip's layout: name the tower open_clip:"),
    "flax": (only("flax_model.msgpack", "tf_model.h5"), "flax_model.msgpack.*layout that is not read"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_it_is_and_what_to_do(name: str, folder: Path) -> None:
    damage, message = DAMAGE[name]
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load_encoder(str(folder))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_a_file_is_no_tower(tmp_path: Path) -> None:
    (tmp_path / "EVA02_CLIP_E.pt").write_bytes(b"PK")
    with pytest.raises(FileNotFoundError, match=r"expected a folder with config.json.*EVA02_CLIP_E.pt.*take"):
        load_encoder(str(tmp_path / "EVA02_CLIP_E.pt"))
    with pytest.raises(FileNotFoundError, match=r"expected config\.json, found \['EVA02_CLIP_E.pt'\]"):
        load_encoder(str(tmp_path))


@pytest.mark.parametrize("change", [shards, as_bin])
def test_all_layouts_load_the_same(change: Callable[[Path], Path], folder: Path, whole: Path) -> None:
    change(folder)
    pixels = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(load_encoder(str(folder))(pixels), load_encoder(str(whole))(pixels))


def test_the_digest_is_of_the_weights(folder: Path, whole: Path) -> None:
    before = load_encoder(str(whole)).describe()
    narrow = load_encoder(str(whole), dtype=torch.bfloat16).describe()
    assert before["weights"] == narrow["weights"] == load_encoder(str(folder)).describe()["weights"]
    tensors = load_file(folder / "model.safetensors")
    tensors["visual_projection.weight"][3, 4] += 0.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    after = load_encoder(str(folder)).describe()
    assert after["weights"] != before["weights"]
    assert {**after, "weights": 0, "name": 0} == {**before, "weights": 0, "name": 0}


def test_the_digest_of_a_large_file_samples_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "WHOLE", 1000)
    monkeypatch.setattr(weight_files, "BLOCK", 16)
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    values = torch.arange(100_000.0)
    save_file({"w": values}, files[0])
    save_file({"w": values + 1}, files[1])
    assert weights_digest(files[:1]) != weights_digest(files[1:])
    save_file({"v": values}, files[1])  # the header is read whole
    assert weights_digest(files[:1]) != weights_digest(files[1:])
    end = bytearray(files[0].read_bytes())
    end[-1] ^= 1
    files[1].write_bytes(end)
    assert weights_digest(files[:1]) != weights_digest(files[1:])


def test_towers_without_files_are_described() -> None:
    class Double(VisionEncoder):
        """Without parameters."""

    about: dict[str, Any] = dict(name="x", revision=None, preprocessing=Preprocessing(8), grid=2, width=3)
    assert (
        Double(**about, tokens="none").describe()["weights"]
        == Double(**about, tokens="").describe()["weights"]
    )
    assert tiny_encoder("eva", seed=3).describe()["weights"] == "seed 3"
    one, other = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
    assert parameters_digest(one) == parameters_digest(one) != parameters_digest(other)


def test_a_large_tower_says_what_it_takes(
    whole: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="blip3o_dit")
    load_encoder(str(whole))
    assert not caplog.messages
    monkeypatch.setattr(vision_towers, "count_parameters", lambda _: 7_526_088_704)
    load_encoder(str(whole))
    load_encoder(str(whole), dtype=torch.bfloat16)
    assert caplog.messages == [
        f"{whole}: 7.5 B parameters in float32: 30 GB (--dtype bfloat16: 15 GB)",
        f"{whole}: 7.5 B parameters in bfloat16: 15 GB",
    ]


@pytest.mark.parametrize("published", [["model.safetensors", "pytorch_model.bin"], ["pytorch_model.bin"]])
def test_one_format_is_downloaded(
    published: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot, asked = tmp_path / "snapshots" / "0123abc", []

    def download(spec: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((revision, allow_patterns))
        snapshot.mkdir(parents=True, exist_ok=True)
        shutil.copy(whole / "config.json", snapshot)
        for name in published:
            if any(Path(name).match(pattern) for pattern in allow_patterns):
                shutil.copy(whole / "model.safetensors", snapshot / "model.safetensors")
                if name.endswith(".bin"):
                    as_bin(snapshot)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    described = load_encoder("somebody/tower", revision="main").describe()
    assert (described["name"], described["revision"], described["commit"]) == (
        "somebody/tower",
        "main",
        "0123abc",
    )
    assert asked[0] == ("main", ["*.json", "*.safetensors"])
    assert asked[1:] == ([] if len(published) == 2 else [("0123abc", ["*.json", "*.bin"])])
