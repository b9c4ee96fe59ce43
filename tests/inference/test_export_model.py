"""Exported models: the tokens of `generate`, in a process that cannot import this package."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blip3o_dit.cli.main import main
from blip3o_dit.inference import export_model as module
from blip3o_dit.inference.export_model import export_model, trace
from blip3o_dit.inference.request import describe_model
from blip3o_dit.model.blip3o_dit import GENERATION_STREAM, BLIP3oDiTModel
from blip3o_dit.model.generation import Guidance
from blip3o_dit.model.quantization import quantize_blocks
from blip3o_dit.utils.stateless_random import stateless_normal
from tests.conftest import randomize, tiny_config

ROOT = Path(__file__).parent.parent.parent
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

RECIPE = {"source": "ridge_3x3", "source_components": 2, "prediction_type": "preconditioned"}
# Name -> configuration, sampling. Guidance acts in the second of two steps.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "recipe": (
        dict(
            flow_matching=RECIPE | {"time_shift": 2.0, "noise_scale": 0.8},
            num_kv_heads=1,
        ),
        dict(num_inference_steps=2, guidance_scale=2.5, guidance_interval=(0.2, 1.0)),
    ),
    "student": (
        dict(
            flow_matching=RECIPE | {"source": "ridge_context_spread", "student_steps": 1},
            default_steps=1,
            normalize_embeddings=True,
        ),
        {},
    ),
}

# What a user without this package does. The example comes first: it needs no torch either.
USER = """
import json, runpy, sys
import numpy as np

sys.modules["blip3o_dit"] = None
example, folder = sys.argv[1:]
sys.argv = [example, f"{folder}/student.onnx", f"{folder}/student-7.npy", f"{folder}/example.npy"]
runpy.run_path(example, run_name="__main__")
assert "torch" not in sys.modules
import onnxruntime, torch

about = {}
for name in ("recipe", "student"):
    files = {"blip3o_dit.json": ""}
    program = torch.export.load(f"{folder}/{name}.pt2", extra_files=files).module()
    session = onnxruntime.InferenceSession(f"{folder}/{name}.onnx")
    about[name] = [files["blip3o_dit.json"], session.get_modelmeta().custom_metadata_map["blip3o_dit"]]
    for batch in (1, 7):
        condition, noise = (np.load(f"{folder}/{name}-{batch}{end}.npy") for end in ("", "-noise"))
        found = program(torch.from_numpy(condition), torch.from_numpy(noise)).numpy()
        np.save(f"{folder}/{name}-{batch}.pt2.npy", found)
        (found,) = session.run(None, {"condition": condition, "noise": noise})
        np.save(f"{folder}/{name}-{batch}.onnx.npy", found)
assert sys.modules["blip3o_dit"] is None
print(json.dumps(about))
"""


def tiny_folder(folder: Path, **changes: Any) -> BLIP3oDiTModel:
    """A model with random weights and statistics, saved there."""
    model = BLIP3oDiTModel(tiny_config(num_layers=1, **changes)).eval()
    randomize(model, scale=0.1)
    for name, buffer in model.named_buffers(recurse=False):
        buffer.copy_(
            1.0 + 0.3 * torch.rand(buffer.shape) if name.endswith("std") else 0.2 * torch.randn(buffer.shape)
        )
    model.save_pretrained(folder)
    return model


def traced_once(programs: list[Any], *given: Any) -> Any:
    """What `trace` makes, for both files of a model."""
    if not programs:
        programs.append(trace(*given))
    return programs[0]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folders, what became of them, and what a user without this package made of that."""
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    for name, (config, sampling) in CASES.items():
        model = tiny_folder(folder / name, **config)
        (folder / "student.onnx").touch()
        (folder / "student.onnx.data").touch()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "MAX_BYTES_INSIDE", 0 if name == "recipe" else 2**20)
            programs: list[Any] = []
            patch.setattr(module, "trace", partial(traced_once, programs))
            for suffix in (".pt2", ".onnx"):
                path = folder / f"{name}{suffix}"
                export_model(folder / name, path, overwrite=name == "student", **sampling)
        for batch in (1, 7):
            condition = torch.randn(batch, 9, 12)
            noise = stateless_normal(range(batch), (9, 8), seed=5, stream=GENERATION_STREAM)
            tokens = model.generate(condition, seed=5, **sampling)
            for end, values in (("", condition), ("-noise", noise), ("-expected", tokens)):
                np.save(folder / f"{name}-{batch}{end}.npy", values.numpy())
    answer = subprocess.run(
        [sys.executable, "-c", USER, str(ROOT / "examples" / "use_exported.py"), str(folder)],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert not answer.returncode, answer.stderr
    shape, about = answer.stdout.splitlines()
    assert shape == "(7, 9, 8)" == str(np.load(folder / "example.npy").shape)
    (folder / "about.json").write_text(about)
    return folder


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@pytest.mark.parametrize("name", CASES)
def test_the_tokens_are_those_of_generate(exported: Path, name: str, suffix: str, batch: int) -> None:
    expected = np.load(exported / f"{name}-{batch}-expected.npy")
    found = np.load(exported / f"{name}-{batch}{suffix}.npy")
    assert found.dtype == np.float32 and found.shape == (batch, 9, 8)
    largest = np.abs(expected).max()  # of random weights, which guidance multiplies: up to 15
    assert largest > 0.5 and np.abs(found - expected).max() < 1e-4 * max(1.0, largest)


@pytest.mark.parametrize("name", CASES)
def test_the_file_says_what_it_is(exported: Path, name: str) -> None:
    in_pt2, in_onnx = map(json.loads, json.loads((exported / "about.json").read_text())[name])
    assert in_pt2 == in_onnx
    assert in_pt2["model"] == describe_model(exported / name, "raw")
    assert in_pt2["sizes"] == {"num_tokens": 9, "condition_dim": 12, "target_dim": 8}
    guided = name == "recipe"
    assert in_pt2["sampling"] == {
        "solver": "euler",
        "num_inference_steps": 2 if guided else 1,
        "guidance_scale": 2.5 if guided else 1.0,
        "guidance_interval": [0.2, 1.0] if guided else [0.0, 1.0],
    }
    assert ("length 1" in in_pt2["units"]) == (not guided)
    for suffix in (".pt2", ".onnx"):  # nothing of the machine that wrote it
        assert str(ROOT).encode() not in (exported / f"{name}{suffix}").read_bytes()


def test_large_weights_lie_beside_an_onnx_file(exported: Path) -> None:
    """The recipe's were said to be; the student took the place of such a pair."""
    file, data = (exported / f"recipe.onnx{end}" for end in ("", ".data"))
    weights = sum(part.stat().st_size for part in (exported / "recipe").glob("*.safetensors"))
    assert file.is_file() and weights / 2 < data.stat().st_size
    assert not (exported / "student.onnx.data").exists() and not list(exported.glob("*.partial"))


def test_refusals(
    exported: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (exported / "student.pt2").read_bytes()

    def refused(*words: str) -> str:
        try:
            status = main(["export", str(exported / "student"), *words])
        except SystemExit as stopped:
            status = int(str(stopped.code))
        *others, line = capsys.readouterr().err.splitlines()
        assert status == 2 and not any(other.startswith("Traceback") for other in others)
        return line

    new = str(exported / "new.pt2")
    assert "expected a name that ends in .pt2 or .onnx, found '.pth'" in refused(str(exported / "m.pth"))
    assert "found one (--overwrite replaces it)" in refused(str(exported / "student.pt2"))
    assert "invalid choice: 'dopri5'" in refused(new, "--solver", "dopri5")
    assert "unrecognized arguments: --quantize" in refused(new, "--quantize", "int8")
    assert "expected 1 with solver euler, which this model was taught" in refused(
        new, "--num_inference_steps", "3"
    )
    with pytest.raises(ValueError, match=r"solver: expected one of .*, found 'dopri5'"):
        export_model(exported / "recipe", new, solver="dopri5")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert "expected the package onnx, found none: pip install onnx" in refused(str(exported / "m.onnx"))
    assert (exported / "student.pt2").read_bytes() == before
    assert not list(exported.glob("new*")) and not list(exported.glob("m.*"))


def test_the_hub_is_asked_for_the_weights_that_are_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_hub(name: str, *, weights: str = "auto") -> Path:
        raise FileNotFoundError(f"{name}: {weights}")

    monkeypatch.setattr(module, "model_folder", no_hub)
    with pytest.raises(FileNotFoundError, match="owner/name: raw"):
        export_model("owner/name", tmp_path / "model.pt2", weights="raw")


def test_quantised_weights_are_refused(tiny_model: BLIP3oDiTModel) -> None:
    quantize_blocks(tiny_model, "int8")
    with pytest.raises(ValueError, match="expected weights as they were trained, found quantised ones"):
        trace(tiny_model, "euler", 1, Guidance(1.0, 0.0, 1.0))
