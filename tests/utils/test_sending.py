"""Stores and models at an address: sent once, whole or not there, and read from there by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from blip3o_dit.cli.main import main
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.publish import push_to_address
from blip3o_dit.utils.atomic import written_aside
from tests.helpers.stores import write_linear_store


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BLIP3O_DIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files that go to memory://, of whole files, in order."""
    names: list[str] = []
    own = MemoryFileSystem.put_file

    def put_file(files: MemoryFileSystem, here: str, there: str, **named: object) -> None:
        names.append(Path(here).name)
        own(files, here, there, **named)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
    return names


def names_at(address: str) -> set[str]:
    return {Path(name).name for name in fsspec.filesystem("memory").ls(address, detail=False)}


def test_a_store_goes_and_comes(tmp_path: Path, sent: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    store = write_linear_store(tmp_path / "store")
    address = f"memory://{tmp_path.name}/store"
    assert main(["push", str(store.path), address]) == 0
    assert capsys.readouterr().out == f"{address}\n" and len(sent) == 10
    assert EmbeddingStore(address).fingerprint() == store.fingerprint()
    assert names_at(address) == {file.name for file in store.path.iterdir()}
    assert main(["verify", address]) == 0
    push_to_address(store.path, address)
    assert len(sent) == 10  # nothing went again


def test_what_was_stopped_goes_on(tmp_path: Path, sent: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    store = write_linear_store(tmp_path / "store")
    address, own = f"memory://{tmp_path.name}/store", MemoryFileSystem.put_file

    def stops(files: MemoryFileSystem, here: str, there: str, **named: object) -> None:
        if "00003.safetensors" in here:
            raise KeyboardInterrupt
        own(files, here, there, **named)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "put_file", stops)
        with pytest.raises(KeyboardInterrupt):
            push_to_address(store.path, address)
    before = list(sent)
    with pytest.raises(
        FileNotFoundError, match=r"expected an embedding store there, found no manifest.json$"
    ):
        EmbeddingStore(address)
    push_to_address(store.path, address)
    assert sorted(sent) == sorted({*sent}) and len(sent) == 10 and before == sent[:7]
    assert EmbeddingStore(address).fingerprint() == store.fingerprint()


def test_another_store_is_replaced_when_asked(
    tmp_path: Path, sent: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"memory://{tmp_path.name}/store"
    push_to_address(write_linear_store(tmp_path / "longer", samples=60).path, address)
    store = write_linear_store(tmp_path / "store")
    assert main(["push", str(store.path), address]) == 2
    assert "found another manifest.json (--overwrite replaces what it lists)" in capsys.readouterr().err
    assert len(EmbeddingStore(address)) == 60
    assert main(["push", str(store.path), address, "--overwrite"]) == 0
    assert EmbeddingStore(address).fingerprint() == store.fingerprint()
    assert names_at(address) == {file.name for file in store.path.iterdir()}


def test_a_model_goes_and_is_used_from_there(tmp_path: Path, tiny_model: BLIP3oDiTModel) -> None:
    folder, address = tmp_path / "model", f"memory://{tmp_path.name}/model"
    with written_aside(folder) as aside:
        tiny_model.save_pretrained(aside)
    push_to_address(folder, address)
    conditions = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(0))
    here = BLIP3oInference(folder, device="cpu").generate(conditions, seed=0)
    for _ in range(2):
        assert torch.equal(BLIP3oInference(address, device="cpu").generate(conditions, seed=0), here)
    store = write_linear_store(tmp_path / "store", samples=12)
    out = f"memory://{tmp_path.name}/generated"
    words = ["generate", address, str(store.path), out, "--num_inference_steps", "1", "--device", "cpu"]
    assert main(words) == 0 and len(EmbeddingStore(out)) == 12
    memory = fsspec.filesystem("memory")
    weights = f"/{tmp_path.name}/model/model.safetensors"
    memory.pipe_file(weights, memory.cat_file(weights)[:-1] + b"!")
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(ValueError, match="the file was altered"):
        BLIP3oInference(address, device="cpu")
    with pytest.raises(FileNotFoundError, match=r"expected a model folder with config.json, found none$"):
        BLIP3oInference(f"memory://{tmp_path.name}", device="cpu")


def test_commands_write_stores_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, there = str(write_linear_store(tmp_path / "store").path), f"memory://{tmp_path.name}"
    assert main(["convert", store, f"{there}/converted", "--dtype", "float32"]) == 0
    assert main(["merge", f"{there}/converted", store, f"{there}/merged"]) == 0
    assert capsys.readouterr().out == f"{there}/converted\n{there}/merged\n"
    assert torch.equal(EmbeddingStore(f"{there}/merged").fetch([40])[0], EmbeddingStore(store).fetch([40])[0])
    assert not list((tmp_path / "cache" / "outputs").iterdir())
    assert main(["convert", store, f"{there}/converted"]) == 2  # which is there
    assert main(["convert", store, f"{there}/converted", "--overwrite"]) == 0
    assert EmbeddingStore(f"{there}/converted").manifest["dtype"] == "float16"
    for refused in (
        ["generate", "model", store, f"{there}/out.npz"],
        ["export-embeddings", store, f"{there}/out.npz"],
        ["extract", "images", "--output", f"{there}/merged", "--append"],
    ):
        assert main(refused) == 2


def test_pictures_are_extracted_to_there(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(5):
        picture = Image.new("RGB", (32, 32), (50 * number, 9, 200))
        picture.save(tmp_path / "images" / f"{number}.png")
    words = ["extract", str(tmp_path / "images"), "--towers_from_scratch", "--device", "cpu"]
    words += ["--workers", "1", "--store_dtype", "int8", "--output"]
    address = f"memory://{tmp_path.name}/store"
    assert main([*words, str(tmp_path / "here")]) == main([*words, address]) == 0
    found = EmbeddingStore(address)
    assert found.fingerprint() == EmbeddingStore(tmp_path / "here").fingerprint()
    assert found.manifest["dtype"] == "int8" and torch.isfinite(found.fetch([4])[0]).all()


def test_what_cannot_be_written_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = write_linear_store(tmp_path / "store")
    assert main(["append", "memory://x", str(store.path)]) == 2
    assert main(["push", str(store.path), "memory://x", "--private"]) == 2
    assert main(["push", str(store.path), "owner/name", "--overwrite"]) == 2
    assert main(["push", str(tmp_path), "memory://x"]) == 2
    assert "expected neither" in capsys.readouterr().err
