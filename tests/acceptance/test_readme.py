"""Every snippet of the README after its path runs, in its order, on small data; long options keep it small.

The path itself, as written and with the wheel alone, is in test_first_hour.py.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.run import get_args_parser

from blip3o_dit import StoreWriter
from blip3o_dit.cli.extract import main as extract_main
from blip3o_dit.cli.main import main as command_main
from tests.acceptance.commands import MULTI_GPU

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PATH = "\n## From pictures to a report\n"
BEFORE, AFTER = README.split(PATH)
THE_PATH, *_ = AFTER.split("\n## ")
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", BEFORE + AFTER[len(THE_PATH) :], flags=re.DOTALL)
(TRAINING,) = re.findall(r"^blip3o-dit (train .*)$", THE_PATH, flags=re.MULTILINE)
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
    """A working folder like the repository's root after the path, of narrow tokens."""
    for name in ("src", "train_blip3o_dit.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    generator = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for index in range(3):
        pixels = generator.integers(0, 256, (50, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    eva, clip = (torch.randn(24, 64, int(width)) for width in NARROW.values())
    sizes = dict(num_tokens=64, condition_dim=eva.shape[2], target_dim=clip.shape[2])
    with StoreWriter("embeddings/pictures", **sizes) as writer:
        writer.append(eva, clip, [{"key": f"{i}"} for i in range(24)])
    assert command_main([*TRAINING.replace("--size tiny", SMALL).split()]) == 0
    return tmp_path


def run_bash(words: list[str]) -> None:
    """One README command. Single-process ones run here: a fresh interpreter costs seconds each."""
    program = words[0]
    if program == "make":
        subprocess.run(["make", "--dry-run", *words[1:]], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    elif words[:2] == ["python", "-m"]:
        assert words[2:] in (["venv", ".venv"], ["pip", "install", "."])
    elif program == "source":
        assert words[1:] == [".venv/bin/activate"]
    elif words[:2] == ["python", "-c"]:
        exec(words[2], {})
    elif words[:2] == ["python", "extract_embeddings_production.py"]:
        assert extract_main([*words[2:], "--workers", "0", "--device", "cpu"]) == 0
    elif words[:2] == ["blip3o-dit", "train"]:
        assert command_main([*words[1:2], *small(words[2:])]) == 0
    elif program == "blip3o-dit":
        assert command_main(words[1:]) == 0
    elif program in ("torchrun", "accelerate"):
        train_as_launched(words)
    else:
        raise AssertionError(f"no way to run {words}")


def small(arguments: list[str]) -> list[str]:
    if "--resume_from_checkpoint" in arguments:
        return arguments  # sizes come from the checkpoint
    return [*arguments, *SMALL.split()]


def train_as_launched(words: list[str]) -> None:
    """In this process alone. `test_distributed_commands.py` launches two with accelerate's words, through
    torch's launcher; `training/test_processes.py` trains in processes that know what torchrun tells them."""
    script = words.index("train_blip3o_dit.py")
    if words[0] == "torchrun":
        asked = get_args_parser().parse_args(words[1:])
        assert (asked.nproc_per_node, asked.training_script) == ("2", words[script])
    else:
        assert words[:script] == ["accelerate", "launch", *MULTI_GPU.split()]
    assert command_main(["train", *small(words[script + 1 :])]) == 0


@pytest.mark.slow
def test_every_snippet_runs_in_order(folder: Path) -> None:
    assert len(BLOCKS) >= 10
    trained = (folder / "checkpoints/run/model.safetensors").read_bytes()
    for language, block in BLOCKS:
        if language == "python":
            exec(narrow(block), {})
        else:
            for words in commands(block):
                run_bash(words)
    made = ("results/generated.pkl", "my_store/manifest.json", "embeddings/converted/manifest.json")
    for produced in (*made, "checkpoints/base/model.safetensors"):
        assert (folder / produced).is_file(), produced
    # A finished run is found as it is.
    assert (folder / "checkpoints/run/model.safetensors").read_bytes() == trained
    assert not (folder / "checkpoints/small").exists()


def test_installed_versions_are_the_pinned_ones() -> None:
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if "==" in line and sys.version_info[:2] == (3, 11):
            name, pinned = line.split("==")
            assert version(name).split("+")[0] == pinned, name


def test_files_the_readme_links_to_exist() -> None:
    linked = re.findall(r"\]\((?!http|#)([^)#]+)\)", README)
    assert len(linked) > 10
    assert not [name for name in linked if not (ROOT / name).exists()]


def test_sections_the_readme_links_to_exist() -> None:
    titles = re.findall(r"^## (.*)$", README, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors
