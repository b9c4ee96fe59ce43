"""Every snippet of the README runs, in its order, on small data; long options keep it small."""

from __future__ import annotations

import os
import pickle
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blip3o_dit.cli.extract import main as extract_main
from blip3o_dit.cli.main import main as command_main
from blip3o_dit.cli.train import main as train_main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", README, flags=re.DOTALL)
SMALL = "--model_dim=32 --num_layers=1 --num_heads=2 --max_steps=4 --batch_size=4 --eval_samples=2"
SMALL += " --eval_inference_steps=2 --save_steps=2 --source=ridge"
# Tokens of an eighth of the documented widths, in the data and in the snippets: baselines at full width take
# a minute. The specification's commands run on tokens of full width.
NARROW = {"1280": "160", "768": "96"}


def narrow(snippet: str) -> str:
    for width, fewer in NARROW.items():
        snippet = snippet.replace(width, fewer)
    return snippet


def commands(block: str) -> list[list[str]]:
    lines = block.replace("\\\n", " ").strip().splitlines()
    return [shlex.split(line) for line in lines]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder like the repository's root, with the documented pickle in it, of narrow tokens."""
    for name in ("src", "train_blip3o_dit.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    generator = np.random.default_rng(0)
    content = {
        "eva_blip3o_embeddings": generator.normal(size=(24, 64, int(NARROW["1280"]))).astype(np.float32),
        "clip_blip3o_embeddings": generator.normal(size=(24, 64, int(NARROW["768"]))).astype(np.float32),
        "captions": [f"picture {i}" for i in range(24)],
        "keys": [f"{i}" for i in range(24)],
    }
    (tmp_path / "embeddings").mkdir()
    (tmp_path / "embeddings" / "blip3o_grid_embeddings.pkl").write_bytes(pickle.dumps(content))
    (tmp_path / "images").mkdir()
    for index in range(3):
        pixels = generator.integers(0, 256, (50, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_bash(words: list[str]) -> None:
    """One README command. Single-process ones run here: a fresh interpreter costs seconds each."""
    words = [word.replace("checkpoint-1000", "checkpoint-2") for word in words]
    program = words[0]
    if program == "make":
        subprocess.run(["make", "--dry-run", *words[1:]], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    elif words[:4] == ["python", "-m", "pip", "install"]:
        assert words[4:] == ["-r", "requirements.txt"]
    elif program == "source":
        assert words[1:] == [".venv/bin/activate"]
    elif words[:2] == ["python", "-c"]:
        exec(words[2], {})
    elif words[:2] == ["python", "extract_embeddings_production.py"]:
        assert extract_main([*words[2:], "--workers", "0", "--device", "cpu"]) == 0
    elif words[:2] == ["python", "train_blip3o_dit.py"]:
        assert train_main(small(words[2:])) == 0
    elif words[:2] == ["blip3o-dit", "evaluate"]:
        assert command_main([*words[1:], "--num_inference_steps=2", "--curve_calls=1", "--bootstrap=20"]) == 0
    elif program == "blip3o-dit":
        assert command_main([word.replace("50", "2") for word in words[1:]]) == 0
    elif program in ("torchrun", "accelerate"):
        launch(words)
    else:
        raise AssertionError(f"no way to run {words}")


def small(arguments: list[str]) -> list[str]:
    if "--resume_from_checkpoint" in arguments:
        return arguments  # sizes come from the checkpoint
    if "--debug" in arguments:
        return [*arguments, "--max_steps", "2", "--source", "ridge"]
    return [*arguments, *SMALL.split()]


def launch(words: list[str]) -> None:
    script = words.index("train_blip3o_dit.py")
    launcher = [str(Path(sys.executable).parent / words[0]), *words[1:script]]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, words[script], *small(words[script + 1 :])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 process(es)" in done.stderr


@pytest.mark.slow
def test_every_snippet_runs_in_order(folder: Path) -> None:
    assert len(BLOCKS) >= 10
    for language, block in BLOCKS:
        if language == "python":
            exec(narrow(block).replace("num_inference_steps=50", "num_inference_steps=2"), {})
        else:
            for words in commands(block):
                run_bash(words)
    made = ("checkpoints/run/model.safetensors", "results/generated.pkl", "my_store/manifest.json")
    for produced in (*made, "embeddings/pictures_inspection.png"):
        assert (folder / produced).is_file(), produced
    assert (folder / "checkpoints/run/checkpoint-4").is_dir()


def test_installed_versions_are_the_pinned_ones() -> None:
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if "==" in line and sys.version_info[:2] == (3, 11):
            name, pinned = line.split("==")
            assert version(name).split("+")[0] == pinned, name


def test_files_the_readme_names_exist() -> None:
    for name in (
        "requirements.txt",
        "train_blip3o_dit.py",
        "docs/eva-clip-parity.md",
        "docs/evaluation.md",
        "docs/reliability.md",
        "docs/many-processes.md",
        "docs/speed.md",
        "SECURITY.md",
        "Makefile",
    ):
        assert (ROOT / name).is_file()
