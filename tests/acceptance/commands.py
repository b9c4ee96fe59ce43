"""Run a block of the specification from the repository root, and look at what it left.

What differs when a block runs: the paths, flags after it that make the network small or let a run of a few
steps log and save, and `--bf16` for `--fp16`, which needs a GPU.
"""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from matplotlib.image import imread
from safetensors.torch import load_file

from blip3o_dit.cli.train import main
from tests.helpers.curves import curves_drawn

ROOT = Path(__file__).parents[2]
SAMPLES, HELD_OUT = 24, 2  # of the data set that the fixtures write
SMALL = shlex.split("--model_dim 32 --num_layers 1 --num_heads 2")
# The default source is used once, in the quick start: at full width it takes seconds.
SMALL_AND_QUICK = [*SMALL, *shlex.split("--source noise")]
# Two processes on one machine; what `accelerate launch` is not told it asks its configuration for.
MULTI_GPU = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
RUN_FILES = (
    "model.safetensors",
    "config.json",
    "training_config.json",
    "training_log.jsonl",
    "training_curves.png",
    "trainer_state.json",
)

# Set by launchers, by a Trainer in this process or by the user's shell; a command starts without them.
FOREIGN_VARIABLES = re.compile(
    r"(ACCELERATE|WANDB|TORCHELASTIC|FSDP|GROUP|ROLE)_.*"
    r"|(LOCAL_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|NETRC|BLIP3O_DIT_TRACEBACK"
)


def placed(text: str, folder: Path) -> str:
    """`text` with its paths under `folder`."""
    text = text.replace("path/to/blip3o_grid_embeddings.pkl", f"{folder}/blip3o_grid_embeddings.pkl")
    return text.replace("./", f"{folder}/")


def words(block: str, folder: Path) -> list[str]:
    """The words of a shell block as bash sees them, with its paths under `folder`."""
    return [placed(word, folder) for word in shlex.split(block.replace("\\\n", ""), comments=True)]


def run_command(command: list[str], home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run from the repository root, without a GPU, with nothing from this process's own runs."""
    program, *arguments = command
    environment = {name: value for name, value in os.environ.items() if not FOREIGN_VARIABLES.fullmatch(name)}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(home / "huggingface")}
    path = sys.executable if program == "python" else str(Path(sys.executable).parent / program)
    return subprocess.run(
        [path, *arguments],
        cwd=ROOT,
        env=environment | variables,
        capture_output=True,
        encoding="utf-8",
        timeout=900,
    )


def run_here(block: str, folder: Path, *more: str) -> int:
    """The training script of a block in this process, which has loaded torch already."""
    program, script, *arguments = words(block, folder)
    assert (program, script) == ("python", "train_blip3o_dit.py")
    with curves_drawn():
        return main([*arguments, *more])


def log_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "training_log.jsonl").read_text().splitlines()]


def run_with_enter(command: list[str], home: Path) -> tuple[int, str]:
    """Run on a terminal and press Enter at each question; returns the exit status and what was shown."""
    terminal, other_end = pty.openpty()
    environment = os.environ | {"HF_HOME": str(home / "huggingface")}
    path = str(Path(sys.executable).parent / command[0])
    process = subprocess.Popen(
        [path, *command[1:]],
        env=environment,
        stdin=other_end,
        stdout=other_end,
        stderr=other_end,
        start_new_session=True,
    )
    os.close(other_end)
    shown, deadline = b"", time.monotonic() + 600
    try:
        while process.poll() is None and time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.1)[0]:
                try:
                    shown += os.read(terminal, 1 << 16)
                except OSError:  # how Linux says that the other end was closed
                    break
            elif shown:
                os.write(terminal, b"\r")
        return process.wait(timeout=60), shown.decode()
    finally:
        process.kill()
        os.close(terminal)


def json_of(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def snapshot(folder: Path) -> dict[str, int]:
    """When each file below was last written."""
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*")}


def assert_whole_run(output: Path) -> None:
    """The files of a finished run, readable, and their sizes as the data and flags ask."""
    missing = [name for name in RUN_FILES if not (output / name).is_file()]
    assert not missing
    config = json_of(output / "config.json")
    weights = load_file(output / "model.safetensors")
    width = config["model_dim"]
    assert weights["dit.patch_embedder.proj.weight"].shape == (width, 768)
    assert weights["dit.caption_projection.linear_1.weight"].shape == (width, 1280)
    assert weights["dit.norm_out.linear_2.weight"].shape == (768, width)
    assert config["input_size"] == 8
    assert all(tensor.isfinite().all() for tensor in weights.values())
    picture = imread(output / "training_curves.png")
    assert picture.shape[0] > 300 and picture.shape[1] > 300 and picture.std() > 0
