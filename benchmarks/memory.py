"""Peak memory of whole programs at the default size, each in a process of its own.

Training goes through the command line; generation through `BLIP3oInference`. On a machine with a GPU the
figures are those of its memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.evaluation import write_store
from benchmarks.measure import Row, device, paper_config, peak_gib, untrained
from blip3o_dit.config import LOW_MEMORY_DEFAULTS, TrainingConfig
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.training.run import train

TASKS = ("interpreter", "generation", "training")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of the training")
    parser.add_argument("--modes", nargs="+", default=["low"], help="--memory settings to train with")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # what a process of its own does
    parser.add_argument("--folder", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> list[Row]:
    if arguments.only:
        return [_alone(arguments)]
    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder) / "store", 96)
        tasks = [task for task in arguments.tasks if task != "training"]
        tasks += [f"training {mode}" for mode in arguments.modes if "training" in arguments.tasks]
        return [_in_a_process(task, folder, arguments) for task in tasks]


def _in_a_process(task: str, folder: str, arguments: argparse.Namespace) -> Row:
    words = [sys.executable, "-m", "benchmarks", "memory", "--only", task, "--folder", folder]
    words += ["--layers", str(arguments.layers), "--steps", str(arguments.steps), "--rows"]
    if task == "generation":  # the weights come from a file, as a user's do
        subprocess.run([*words, "--only", "save a model"], check=True, stdout=subprocess.DEVNULL)
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])[0]


def _alone(arguments: argparse.Namespace) -> Row:
    task, folder = arguments.only, Path(arguments.folder)
    row: Row = {"task": task, "layers": arguments.layers, "batch": None, "parameters": None}
    if task == "save a model":
        untrained(paper_config(num_layers=arguments.layers)).save_pretrained(folder / "model")
    elif task == "generation":
        inference = BLIP3oInference(folder / "model", dtype=torch.bfloat16)
        inference.generate(torch.randn(8, 64, 1280), num_inference_steps=1, solver="euler")
        row |= {"batch": 8, "parameters": inference.model.num_parameters()}
    elif task.startswith("training "):
        config = _training(task.removeprefix("training "), folder, arguments)
        train(config, overwrite=True)
        row |= {"batch": config.batch_size, "parameters": paper_parameters(arguments.layers)}
    return row | {"peak GiB": peak_gib()}


def _training(mode: str, folder: Path, arguments: argparse.Namespace) -> TrainingConfig:
    return TrainingConfig(
        embeddings_path=str(folder / "store"),
        output_dir=str(folder / "run"),
        num_layers=arguments.layers,
        max_steps=arguments.steps,
        logging_steps=1,
        save_steps=arguments.steps,
        eval_split=0.0,
        memory=mode,
        device=device().type,
        **(LOW_MEMORY_DEFAULTS if mode == "low" else {"ema_decay": 0.0}),
    )


def paper_parameters(layers: int) -> int:
    """Parameters of the default network with so many layers."""
    from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel

    with torch.device("meta"):
        return BLIP3oDiTModel(paper_config(num_layers=layers)).num_parameters()
