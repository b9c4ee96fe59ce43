"""extract --keep: the class token and the pooled vector of each tower, beside the grid, in every command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from blip3o_dit.cli.main import main
from blip3o_dit.data.combine import append_store, merge_stores
from blip3o_dit.data.convert import convert_files
from blip3o_dit.data.kept_vectors import CHECKSUMS, fetch_kept
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.extraction.config import ExtractionConfig
from blip3o_dit.extraction.extract import extract
from blip3o_dit.extraction.inspection import format_inspection, inspect_embeddings
from blip3o_dit.extraction.vision_towers import tiny_encoder
from blip3o_dit.publish import push_to_address
from tests.data.test_store import refused
from tests.extraction.test_vision_towers import FAMILIES, save

COUNT = 7
NAMES = ["clip_class", "clip_pooled", "eva_class", "eva_pooled"]


def config_for(root: Path, output: str, **changes: object) -> ExtractionConfig:
    settings: dict[str, object] = dict(
        images=str(root / "images"),
        output=str(root / output),
        towers_from_scratch=True,
        tokens=16,
        shard_size=4,
        batch_size=3,
        workers=0,
        device="cpu",
    )
    return ExtractionConfig(**(settings | changes))  # type: ignore[arg-type]


def extracted(config: ExtractionConfig) -> EmbeddingStore:
    store = extract(config, progress=False)
    assert store is not None
    return store


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, and their stores without and with vectors."""
    root = tmp_path_factory.mktemp("kept")
    (root / "images").mkdir()
    generator = np.random.default_rng(0)
    for index in range(COUNT):
        pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{index}.png")
    extracted(config_for(root, "plain"))
    extracted(config_for(root, "kept", keep=("class", "pooled")))
    return root


def test_they_stand_beside_the_same_tokens(root: Path) -> None:
    """Every byte of a store that keeps none is as it was: neither manifest nor shards speak of them."""
    plain, kept = EmbeddingStore(root / "plain"), EmbeddingStore(root / "kept")
    assert "kept" not in plain.manifest and "keep" not in plain.manifest["extraction"]["settings"]
    assert not plain.kept and fetch_kept(plain, [0]) == {}
    widths = {name: fetch_kept(kept, [0])[name].shape[1] for name in NAMES}
    assert kept.kept == kept.manifest["kept"] == widths
    for entry in plain.manifest["shards"]:
        there, here = (load_file(root / name / entry["file"]) for name in ("plain", "kept"))
        assert here.keys() - there.keys() == {*NAMES, CHECKSUMS}
        assert all(torch.equal(here[name], there[name]) for name in there)


def test_they_are_what_the_towers_make(root: Path) -> None:
    """The pooled vector of CLIP is transformers' image_embeds; EVA's is its class token, projected."""
    store, rows = EmbeddingStore(root / "kept"), [5, 0]
    found = fetch_kept(store, rows)
    for side in ("eva", "clip"):
        tower = tiny_encoder(side, seed=0).eval()
        pictures = [Image.open(root / "images" / f"{row}.png") for row in rows]
        raw = torch.stack([tower.preprocessing.pixels(picture) for picture in pictures])
        pixels = tower.preprocessing.normalize(raw)
        with torch.no_grad():
            if side == "clip":
                output = tower.model(pixel_values=pixels)
                pooled = output.image_embeds
                token = tower.model.vision_model.post_layernorm(output.last_hidden_state[:, 0])
            else:
                token = tower.model.vision_model(pixels)[:, 0]
                pooled = tower.model.visual_projection(token)
        torch.testing.assert_close(found[f"{side}_class"].float(), token, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(found[f"{side}_pooled"].float(), pooled, rtol=2e-3, atol=2e-3)


def test_a_tower_without_a_class_token_is_refused(root: Path, tmp_path: Path) -> None:
    kind, settings, _ = FAMILIES["siglip"]
    tower = save(kind(settings), tmp_path)
    config = config_for(root, "siglip", towers_from_scratch=False, eva=tower, clip=tower, tokens=4)
    message = refused(lambda: extract(replace(config, keep=("class",)), progress=False))
    assert "--keep: expected one of ['pooled'], which it has, found class" in message


def test_they_come_along_and_become_embeddings_of_one_token(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    halves = [tmp_path / "a", tmp_path / "b"]
    first = replace(config_for(root, "", keep=("class", "pooled")), output=str(halves[0]), limit=4)
    extracted(first)
    extracted(replace(first, output=str(halves[1]), limit=None))
    whole = EmbeddingStore(root / "kept")
    merged = merge_stores(halves, tmp_path / "merged").store
    append_store(halves[0], halves[1])
    for store in (merged, EmbeddingStore(halves[0])):
        assert store.kept == whole.kept and len(store) == COUNT
        found, expected = (fetch_kept(each, range(COUNT)) for each in (store, whole))
        assert all(torch.equal(found[name], expected[name]) for name in NAMES)
        store.verify()
    converted = convert_files([root / "kept"], tmp_path / "float32", dtype="float32")
    assert converted.kept == whole.kept
    found, expected = (fetch_kept(each, range(COUNT)) for each in (converted, whole))
    assert all(torch.equal(found[name], expected[name].float()) for name in NAMES)
    words = ["convert", str(root / "kept"), str(tmp_path / "vectors"), "--vectors", "pooled"]
    assert main(words) == 0
    vectors = EmbeddingStore(tmp_path / "vectors")
    eva, clip = vectors.fetch_stored([3, 1])
    assert vectors.num_tokens == 1 and vectors.records() == whole.records()
    assert torch.equal(eva[:, 0], fetch_kept(whole, [3, 1])["eva_pooled"])
    assert torch.equal(clip[:, 0], fetch_kept(whole, [3, 1])["clip_pooled"])
    assert vectors.manifest["encoders"]["clip"] == whole.manifest["encoders"]["clip"]
    said = format_inspection(inspect_embeddings(whole))
    assert f"vectors beside the tokens: eva_class {whole.kept['eva_class']}" in said


def test_what_does_not_belong_together_is_refused(root: Path, tmp_path: Path) -> None:
    plain, kept = root / "plain", root / "kept"
    assert "kept vectors: expected {}" in refused(lambda: merge_stores([plain, kept], tmp_path / "out"))
    assert "found none (`blip3o-dit extract --keep class` keeps them)" in refused(
        lambda: convert_files([plain], tmp_path / "out", vectors="class")
    )
    assert "keep is [] there, ['class'] here" in refused(
        lambda: extract(config_for(root, "plain", keep=("class",)), progress=False)
    )
    assert "keep: expected [" in refused(
        lambda: extract(config_for(root, "kept", append=True), progress=False)
    )
    assert "keep: expected one of" in refused(lambda: config_for(root, "x", keep=("tokens",)))
    assert "keep: expected each once" in refused(lambda: config_for(root, "x", keep=("class", "class")))


def test_vectors_that_not_every_source_has_are_left_out_with_a_word(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    eva, clip = EmbeddingStore(root / "plain").fetch([0, 1])
    np.savez(tmp_path / "more.npz", eva=eva.numpy(), clip=clip.numpy())
    both = convert_files([root / "kept", tmp_path / "more.npz"], tmp_path / "both")
    assert not both.kept and len(both) == COUNT + 2
    assert f"{NAMES} are left out: {tmp_path / 'more.npz'} has none" in caplog.text


def test_damage_is_found(root: Path, tmp_path: Path) -> None:
    whole = EmbeddingStore(root / "kept")
    store = convert_copy(root / "kept", tmp_path / "copy")
    file = store.path / store.manifest["shards"][0]["file"]
    content = bytearray(file.read_bytes())
    place = bytes(content).index(fetch_kept(whole, [2])["eva_pooled"].numpy().tobytes())
    content[place + 1] ^= 1
    file.write_bytes(content)
    store.fetch(range(4))  # the tokens are whole
    fetch_kept(store, [0, 1])
    assert "crc32_kept are not the stored ones" in refused(lambda: fetch_kept(store, [2]))
    assert "SHA-256" in refused(store.verify)
    manifest = (store.path / "manifest.json").read_text()
    (store.path / "manifest.json").write_text(manifest.replace('"clip_class"', '"clip_other"'))
    assert "kept: expected widths of" in refused(lambda: EmbeddingStore(store.path))


def convert_copy(source: Path, target: Path) -> EmbeddingStore:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return EmbeddingStore(target)


def test_they_are_read_from_an_address_and_stay_exact_beside_bytes(root: Path, tmp_path: Path) -> None:
    kept, rows = EmbeddingStore(root / "kept"), [0, 3, 6]
    expected = fetch_kept(kept, rows)
    there = EmbeddingStore(push_to_address(kept.path, "memory://kept-vectors", overwrite=True))
    assert torch.equal(there.fetch(rows)[0], kept.fetch(rows)[0])
    found = fetch_kept(there, rows)
    assert sorted(found) == NAMES and all(torch.equal(found[name], expected[name]) for name in NAMES)
    one_byte = extracted(config_for(root, str(tmp_path / "int8"), keep=("pooled",), store_dtype="int8"))
    one_byte.verify()
    of_bytes = fetch_kept(one_byte, rows)
    for name in ("eva_pooled", "clip_pooled"):
        assert of_bytes[name].dtype == torch.float32
        torch.testing.assert_close(of_bytes[name], expected[name].float(), rtol=1e-3, atol=1e-3)
