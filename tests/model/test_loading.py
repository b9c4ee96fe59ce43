"""Model folders that anyone may have written: nothing runs, nothing is looked up, nothing large is built."""

from __future__ import annotations

import json
import socket
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from blip3o_dit.cli.main import main
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.conversion import load_official_checkpoint
from tests.data.test_safe_unpickler import HOSTILE


@pytest.fixture
def folder(tiny_model: BLIP3oDiTModel, tmp_path: Path) -> Path:
    tiny_model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens a socket fails the test; the hub's own offline switch is off."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def refusal(folder: Path) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        BLIP3oDiTModel.from_pretrained(folder)
    message = str(caught.value)
    assert message.startswith(str(folder)) and "\n" not in message and len(message) < 600
    return message


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 2**20}, "expected 1048576 layers"),
        ({"num_layers": 3}, "missing"),
        ({"model_dim": 2**20, "num_heads": 1, "num_kv_heads": 1, "ffn_dim": 2**20}, "mismatched"),
        ({"in_channels": 2**20}, "mismatched"),
    ],
)
def test_a_network_larger_than_its_weights_is_not_built(
    folder: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_config(folder, **changes)
    monkeypatch.setattr(torch.nn.init, "xavier_uniform_", None)  # no weight is made
    assert message in refusal(folder)


def test_weights_of_integers_and_broken_weights_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(file).items()}, file)
    assert "expected weights in ['BF16', 'F16', 'F32', 'F64'], found ['I8']" in refusal(folder)
    for broken in (b"", whole[:100], whole[:-1], struct.pack("<Q", 2**62) + whole[8:], b"\xff" * 100):
        file.write_bytes(broken)
        assert "model.safetensors: not readable weights" in refusal(folder)


def test_a_pickle_beside_the_configuration_is_never_read(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    evil = HOSTILE["os.system by GLOBAL"](tmp_path / "canary")
    for name in ("pytorch_model.bin", "model.bin", "model.pt", "training_args.bin"):
        (folder / name).write_bytes(evil)
    assert refusal(folder) == f"{folder}/model.safetensors: expected weights, found none"
    assert not (tmp_path / "canary").exists()


def test_code_beside_the_weights_is_never_run(folder: Path, tmp_path: Path, no_network: None) -> None:
    code = f"import os; os.mkdir({str(tmp_path / 'canary')!r})"
    for name in ("modeling.py", "configuration.py", "__init__.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    BLIP3oDiTModel.from_pretrained(folder, trust_remote_code=True)
    change_config(folder, auto_map={"AutoModel": "modeling.Evil", "AutoConfig": "configuration.Evil"})
    assert "unknown ['auto_map']" in refusal(folder)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "generation_config.json", "model.safetensors.index.json"]
)
def test_other_files_of_hugging_face_are_not_followed(folder: Path, name: str, no_network: None) -> None:
    content = {"base_model_name_or_path": "owner/model", "peft_type": "LORA", "weight_map": {"x": "../../x"}}
    (folder / name).write_text(json.dumps(content))
    BLIP3oDiTModel.from_pretrained(folder)


def test_a_folder_that_is_not_there_is_not_looked_up(
    folder: Path, tmp_path: Path, no_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (
        Path("owner/model"),
        "./owner/model",
        str(tmp_path / "none"),
        f"{folder.name}/none",
        "a/b/c",
    ):
        with pytest.raises(FileNotFoundError, match=r"a model folder with config\.json, found nothing there"):
            BLIP3oDiTModel.from_pretrained(name)
    with pytest.raises(FileNotFoundError):
        BLIP3oInference(Path("owner/model"))  # as text it would be a model on the hub
    assert main(["generate", "./owner/model", "nowhere", "out.pkl"]) == 2
    assert main(["evaluate", "./owner/model", "nowhere"]) == 2
    with pytest.raises(AssertionError, match="a socket was opened"):  # so this test would see one
        socket.create_connection(("127.0.0.1", 9))


@pytest.mark.parametrize("variant", [None, "ema"])
def test_weights_in_several_files_are_read(
    tiny_model: BLIP3oDiTModel, tmp_path: Path, variant: str | None, no_network: None
) -> None:
    eva = torch.randn(2, 9, 12)
    expected = tiny_model.generate(eva, num_inference_steps=2)
    folder = tmp_path / "model"
    if variant:  # beside raw weights
        BLIP3oDiTModel(tiny_model.config).save_pretrained(folder)
    tiny_model.save_pretrained(folder, max_shard_size="50KB", variant=variant)
    assert len(list(folder.glob("model*-of-*"))) > 2
    inference = BLIP3oInference(folder, device="cpu", dtype=torch.float32)
    assert inference.weights == ("ema" if variant else "raw")
    assert torch.equal(inference.generate(eva, 2), expected)
    loaded = BLIP3oDiTModel.from_pretrained(folder, variant=variant).eval()
    assert torch.equal(loaded.generate(eva, num_inference_steps=2), expected)


def test_several_files_that_do_not_fit_are_refused(tiny_model: BLIP3oDiTModel, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path / "model", max_shard_size="50KB")
    first, second, *_ = sorted((tmp_path / "model").glob("model-*.safetensors"))
    index = tmp_path / "model" / "model.safetensors.index.json"
    whole, content = first.read_bytes(), index.read_text()

    def refusals() -> list[str]:
        messages = []
        for load in (BLIP3oDiTModel.from_pretrained, BLIP3oInference):
            with pytest.raises((ValueError, FileNotFoundError)) as caught:
                load(tmp_path / "model")
            messages.append(str(caught.value))
            assert "\n" not in messages[-1]
        return messages

    first.unlink()
    assert all("expected weights, found none" in message for message in refusals())
    first.write_bytes(second.read_bytes())
    assert all("expected each tensor in one file, found" in message for message in refusals())
    first.write_bytes(whole[:-1])
    assert all("not readable weights" in message for message in refusals())
    first.write_bytes(whole)
    index.write_text(content.replace(first.name, second.name))
    assert all("do not fit the configuration: " in message and "missing" in message for message in refusals())
    index.write_text(content.replace(first.name, f"../{first.name}"))
    assert all("expected plain file names, found" in message for message in refusals())


@pytest.mark.parametrize("names", [5, {"a": 5}, {"a": "../x"}, {"a": "/etc/passwd"}, {"a": "x\ny"}])
def test_an_index_names_files_beside_it(tmp_path: Path, names: Any) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ValueError, match=rf"^{index}: expected"):
        load_official_checkpoint(tmp_path)
