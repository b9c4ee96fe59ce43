"""The hub through a small server: a model that was trained, sent, and read again by its name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from blip3o_dit.cli.main import main
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.decoder.folder import load_decoder, save_decoder
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.publish import push_to_hub
from blip3o_dit.utils.hub import model_folder, names_a_repository
from tests.helpers.hub_server import HubServer, hub_server
from tests.helpers.painted import random_decoder
from tests.helpers.remote import counted
from tests.helpers.stores import write_linear_store
from tests.helpers.training import train_model

TRAIN = ["train", "--embeddings_path", "STORE", "--output_dir", "x"]
ON_CPU = {"device": "cpu", "dtype": torch.float32}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, and a model trained on it."""
    root = tmp_path_factory.mktemp("hub")
    train_model(write_linear_store(root / "store", samples=24), root / "run")
    return root


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.chdir(tmp_path)
    with hub_server(monkeypatch, tmp_path / "cache") as server:
        yield server


def test_a_model_sent_and_fetched_gives_the_same_samples(here: Path, hub: HubServer) -> None:
    assert push_to_hub(here / "run", "me/model").endswith("/me/model")
    eva = torch.randn(3, 9, 12)
    expected = BLIP3oInference(here / "run", **ON_CPU).generate(eva)
    found = BLIP3oInference("me/model", **ON_CPU)
    assert torch.equal(found.generate(eva), expected) and found.name == "me/model"
    # Averaged weights were enough; nothing but what a model is made of was sent or fetched.
    assert "model.ema.safetensors" in hub.fetched and "model.safetensors" not in hub.fetched
    assert not any(path.startswith("checkpoint") or "optimizer" in path for path in hub.files("me/model"))
    assert b"has not been measured" in hub.files("me/model")["README.md"]
    raw = BLIP3oInference("me/model", weights="raw", **ON_CPU).generate(eva)
    assert torch.equal(raw, BLIP3oInference(here / "run", weights="raw", **ON_CPU).generate(eva))
    auto = AutoModel.from_pretrained("me/model", variant="ema").eval()
    torch.testing.assert_close(auto.generate(eva), expected)


def test_a_store_is_read_sample_by_sample(
    here: Path, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLIP3O_DIT_CACHE", str(tmp_path / "samples"))
    push_to_hub(here / "store", "me/data")
    store = EmbeddingStore("hf://datasets/me/data")
    with counted() as traffic:
        assert torch.equal(store.fetch([3, 21])[0], EmbeddingStore(here / "store").fetch([3, 21])[0])
    assert traffic.bytes < 3 * 720 + 3000
    with pytest.raises(FileNotFoundError, match=r"^hf://datasets/me/nothing: expected an embedding store"):
        EmbeddingStore("hf://datasets/me/nothing")


def test_every_command_takes_a_name(
    here: Path, hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, cpu = str(here / "store"), ["--device", "cpu"]
    assert main(["push", str(here / "run"), "me/model"]) == 0
    capsys.readouterr()
    assert main(["generate", "me/model", store, "out.npz", *cpu]) == 0
    assert main(["inspect", "me/model"]) == 0
    assert main(["evaluate", "me/model", store, *cpu]) == 2
    assert "--output_dir: expected a folder, as me/model is not on this disk" in capsys.readouterr().err
    distilled = [
        "distill",
        "me/model",
        store,
        "--steps",
        "1",
        "--train_steps",
        "2",
        "--push_to_hub",
        "me/student",
    ]
    assert main([*distilled, *cpu]) == 0
    assert (tmp_path / "model-1-steps" / "config.json").is_file() and "config.json" in hub.files("me/student")
    onward = ["train", "--embeddings_path", store, "--output_dir", "on", "--init_from", "me/model"]
    assert main([*onward, "--max_steps", "1", "--batch_size", "4", *cpu, "--push_to_hub", "me/on"]) == 0
    assert "model.safetensors" in hub.files("me/on")


def test_a_decoder_sent_and_fetched_makes_the_same_pictures(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decoder = random_decoder()
    save_decoder(decoder, tmp_path / "decoder")
    assert main(["push", str(tmp_path / "decoder"), "me/decoder"]) == 0
    assert b"blip3o-dit decode me/decoder" in hub.files("me/decoder")["README.md"]
    tokens = torch.randn(2, 9, 8)
    assert torch.equal(load_decoder("me/decoder").decode(tokens), decoder.decode(tokens))
    capsys.readouterr()
    assert main(["inspect", "me/decoder"]) == 0
    assert "9 tokens, 8 wide" in capsys.readouterr().out
    weights = hub.files("me/decoder")["model.safetensors"]
    hub.files("me/decoder")["model.safetensors"] = weights[:-1] + bytes([weights[-1] ^ 1])
    with pytest.raises(ValueError, match="the file was altered"):
        load_decoder("me/decoder")


def test_branches_commits_and_private_repositories(
    here: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_to_hub(here / "run", "me/secret", private=True)
    push_to_hub(here / "run", "me/secret", revision="next")
    hub.repositories["me/secret"]["main"]["config.json"] = b"{}"
    commit = hub.commit("me/secret", "next")
    assert model_folder("me/secret@next").name == model_folder(f"me/secret@{commit}").name == commit
    with pytest.raises(FileNotFoundError, match="nothing there, and the hub did not give it"):
        model_folder("me/secret@other")
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="did not give it"):
        model_folder("me/secret")


def test_altered_weights_are_refused(here: Path, hub: HubServer) -> None:
    push_to_hub(here / "run", "me/model")
    files = hub.files("me/model")
    weights = files["model.ema.safetensors"]
    files["model.ema.safetensors"] = weights[:-1] + bytes([weights[-1] ^ 1])
    with pytest.raises(ValueError, match="the file was altered"):
        BLIP3oInference("me/model", **ON_CPU)


def test_what_a_new_push_does_not_have_goes(here: Path, hub: HubServer, tmp_path: Path) -> None:
    push_to_hub(here / "run", "me/model")
    hub.files("me/model")["notes.txt"] = b"mine"
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in ("config.json", "model.safetensors"):
        (plain / name).write_bytes((here / "run" / name).read_bytes())
    push_to_hub(plain, "me/model")
    assert set(hub.files("me/model")) == {"config.json", "model.safetensors", "README.md", "notes.txt"}


def test_a_store_becomes_a_data_set(here: Path, hub: HubServer, tmp_path: Path) -> None:
    assert push_to_hub(here / "store", "me/store").endswith("/datasets/me/store")
    for name, data in hub.files("me/store").items():
        (tmp_path / name).write_bytes(data)
    again, there = EmbeddingStore(tmp_path), EmbeddingStore(here / "store")
    assert torch.equal(again.fetch([3])[0], there.fetch([3])[0]) and not list(again.find_damage())
    assert b"24 samples" in hub.files("me/store")["README.md"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["push", "RUN", "others/model"], "others/model: the hub did not take it: 403"),
        (["push", "RUN", "not a name"], "not a name: the hub did not take it: "),
        (["push", "STORE/manifest.json", "me/x"], "expected a model folder with config.json, found JSON"),
        (
            ["generate", "me/none", "STORE", "out.npz"],
            "me/none: expected a folder, or a repository on the hub, found nothing there",
        ),
        (["generate", "me/a/b", "STORE", "out.npz"], "me/a/b: expected a model folder"),
        (
            ["train", "--embeddings_path", "STORE", "--output_dir", "x", "--private"],
            "--private: expected --push",
        ),
        (
            ["train", "--embeddings_path", "STORE", "--output_dir", "x", "--push_to_hub", "others/x"],
            "others/x: the hub did not take it: 403",
        ),
    ],
)
def test_refusals_are_one_line(
    here: Path, hub: HubServer, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    names = {"RUN": str(here / "run"), "STORE": str(here / "store")}
    words = [names.get(word, word.replace("STORE", names["STORE"])) for word in words]
    assert main(words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line


def test_only_names_that_can_be_meant_are_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert names_a_repository("owner/model") and names_a_repository("owner/model@v1")
    folders = ("model", "checkpoints/run", "checkpoints/run@v1", "./a", "/a/b", "a/b/c", Path("a/b"), "")
    assert not any(names_a_repository(name) for name in folders)
    assert model_folder("checkpoints/rnu") == Path("checkpoints/rnu")
