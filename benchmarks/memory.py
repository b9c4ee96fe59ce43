"""Peak memory of programs at the default size, each in a process of its own, beside what was forecast.

Training is what `blip3o-dit train` does up to its files, which take longer to write than the steps and no
memory; generation goes through `BLIP3oInference`. On a machine with a GPU the figures are its memory's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.trainer_utils import SaveStrategy

from benchmarks.evaluation import write_store
from benchmarks.measure import Row, device, paper_config, peak_gib
from blip3o_dit.data.embeddings import open_embeddings
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.loading import WEIGHTS_FILE
from blip3o_dit.training.config import LOW_MEMORY_DEFAULTS, TrainingConfig
from blip3o_dit.training.memory import forecast
from blip3o_dit.training.run import build_trainer

TASKS = ("interpreter", "generation", "training")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of the training")
    parser.add_argument("--modes", nargs="+", default=["low"], help="--memory settings to train with")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # what a process of its own does
    parser.add_argument("--folder", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> list[Row]:
    if arguments.only:
        return [_alone(arguments)]
    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder) / "store", 96)
        if "generation" in arguments.tasks:
            _write_model(Path(folder) / "model", arguments.layers)
        tasks = [task for task in arguments.tasks if task != "training"]
        tasks += [f"training {mode}" for mode in arguments.modes if "training" in arguments.tasks]
        return [_in_a_process(task, folder, arguments) for task in tasks]


def _in_a_process(task: str, folder: str, arguments: argparse.Namespace) -> Row:
    words = [sys.executable, "-m", "benchmarks", "memory", "--only", task, "--folder", folder]
    words += ["--layers", str(arguments.layers), "--steps", str(arguments.steps), "--rows"]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])[0]


def _alone(arguments: argparse.Namespace) -> Row:
    task, folder = arguments.only, Path(arguments.folder)
    row: Row = {"task": task, "layers": arguments.layers, "batch": None, "parameters": None}
    if task == "generation":
        inference = BLIP3oInference(folder / "model", dtype=torch.bfloat16)
        inference.generate(torch.randn(8, 64, 1280), num_inference_steps=1, solver="euler")
        row |= {"batch": 8, "parameters": inference.model.num_parameters()}
    elif task.startswith("training "):
        config = _training(task.removeprefix("training "), folder, arguments)
        source = open_embeddings(config.embeddings_path)
        sizes = dict(
            num_tokens=source.num_tokens, condition_dim=source.condition_dim, target_dim=source.target_dim
        )
        said = forecast(config, config.model(**sizes), device())
        trainer = build_trainer(source, config)
        trainer.args.save_strategy = SaveStrategy.NO
        trainer.train()
        row |= {"batch": config.batch_size, "parameters": trainer.unwrapped_model.num_parameters()}
        row["forecast GiB"] = said.total / 2**30
    return row | {"peak GiB": peak_gib()}


def _write_model(folder: Path, layers: int) -> None:
    """Weights for a program to read, as a user's come from a file: bfloat16 zeros, which are quickly made."""
    config = paper_config(num_layers=layers)
    with torch.device("meta"):
        model = BLIP3oDiTModel(config)
    weights = {name for name, _ in model.named_parameters()}
    state = {
        name: torch.zeros(tensor.shape, dtype=torch.bfloat16 if name in weights else torch.float32)
        for name, tensor in model.state_dict().items()
    }
    config.save_pretrained(folder)
    save_file(state, folder / WEIGHTS_FILE)


def _training(mode: str, folder: Path, arguments: argparse.Namespace) -> TrainingConfig:
    return TrainingConfig(
        embeddings_path=str(folder / "store"),
        output_dir=str(folder / "run"),
        num_layers=arguments.layers,
        max_steps=arguments.steps,
        logging_steps=1,
        eval_split=0.0,
        memory=mode,
        device=device().type,
        **(LOW_MEMORY_DEFAULTS if mode == "low" else {"ema_decay": 0.0}),
    )
