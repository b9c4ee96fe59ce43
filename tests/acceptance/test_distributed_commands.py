"""The specification's distributed training: as `accelerate config` leaves it, and in two processes."""

from __future__ import annotations

import os
import shlex
from argparse import Namespace
from pathlib import Path
from typing import Any

import accelerate.commands.launch as accelerate_launch
import pytest
import torch.distributed.run
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from torch.distributed.run import get_args_parser

from blip3o_dit.training.trainer import BLIP3oTrainer
from tests.acceptance.commands import (
    MULTI_GPU,
    SMALL,
    assert_whole_run,
    json_of,
    log_of,
    run_command,
    run_here,
    run_with_enter,
    words,
)
from tests.acceptance.specification import CONFIGURE_DISTRIBUTED, DISTRIBUTED

pytestmark = pytest.mark.usefixtures("without_a_gpu", "console_restored")

DISTRIBUTED_FLAGS = [*SMALL, *shlex.split("--source noise --max_steps 2 --logging_steps 1 --save_steps 2")]


def assert_trained_once(output: Path, said: str, *, processes: int) -> None:
    """One training into one folder, whatever started it: not as many trainings as processes."""
    assert_whole_run(output)
    described = [line for line in said.splitlines() if "process(es)" in line]
    assert len(described) == 1 and f"{processes} process(es) x batch" in described[0]
    log = log_of(output)
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2]
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [2]
    assert sum("train_runtime" in entry for entry in log) == 1
    progress = json_of(output / "checkpoint-2" / "progress.json")
    settings = json_of(output / "training_config.json")
    steps = settings["batch_size"] * settings["gradient_accumulation_steps"]
    assert progress["run"]["global_batch"] == processes * steps


@pytest.mark.slow
def test_distributed_as_configured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`accelerate config` with every question at its default, then the launch as it is written.

    What the launcher starts runs here: it and the script would import torch again, which takes seconds.
    """
    status, shown = run_with_enter(CONFIGURE_DISTRIBUTED.split(), folder)
    assert status == 0 and "configuration saved" in shown, shown
    configuration = folder / "huggingface/accelerate/default_config.yaml"
    program, launch, *script = [*words(DISTRIBUTED, folder), *DISTRIBUTED_FLAGS]
    assert (program, launch) == ("accelerate", "launch")

    def start(arguments: Namespace) -> None:
        (_, *started), environment = prepare_simple_launcher_cmd_env(arguments)
        assert started == script
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        block = DISTRIBUTED.replace("accelerate launch", "python")
        assert run_here(block, folder, *DISTRIBUTED_FLAGS) == 0

    monkeypatch.setattr(accelerate_launch, "simple_launcher", start)
    parser = accelerate_launch.launch_command_parser()
    accelerate_launch.launch_command(parser.parse_args(["--config_file", str(configuration), *script]))
    output = folder / "checkpoints/blip3o-dit-distributed"
    assert_trained_once(output, capsys.readouterr().err, processes=1)
    config = json_of(output / "training_config.json")
    assert (config["batch_size"], config["gradient_accumulation_steps"]) == (16, 2)


@pytest.mark.slow
def test_precision_of_accelerate_config(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who answers bf16 there launches with this variable: refused, or what runs is what is written down."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    used = []
    whole = BLIP3oTrainer.train

    def watched(self: BLIP3oTrainer, *arguments: Any, **options: Any) -> Any:
        used.append(self.accelerator.mixed_precision)
        return whole(self, *arguments, **options)

    monkeypatch.setattr(BLIP3oTrainer, "train", watched)
    status = run_here(DISTRIBUTED.replace("accelerate launch", "python"), folder, *DISTRIBUTED_FLAGS)
    said = capsys.readouterr().err
    if status != 0:
        assert used == [] and "bf16" in said
        return
    config = json_of(folder / "checkpoints/blip3o-dit-distributed/training_config.json")
    assert used == ["bf16" if config["bf16"] else "no"]
    assert ("; bf16 on" if config["bf16"] else "; float32 on") in said


@pytest.fixture(scope="session")
def one_process(shared: Path) -> dict[str, Any]:
    """What one process logs of its first step, with a batch as large as two processes take together."""
    output = shared / "checkpoints/one-process"
    flags = [*DISTRIBUTED_FLAGS, *shlex.split("--batch_size 8 --output_dir"), str(output)]
    assert run_here(DISTRIBUTED.replace("accelerate launch", "python"), shared, *flags) == 0
    return log_of(output)[0]


def as_program(arguments: Namespace) -> list[str]:
    """What a shell would give torch's launcher instead of these arguments."""
    defaults = vars(get_args_parser().parse_args(["script"]))
    script = ("training_script", "training_script_args")
    flags = [
        f"--{name}={value}"
        for name, value in vars(arguments).items()
        if name not in script and value not in (None, defaults[name])
    ]
    return ["torchrun", *flags, arguments.training_script, *arguments.training_script_args]


@pytest.mark.slow
def test_two_processes(folder: Path, one_process: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes take the step that one process takes with batches twice as large.

    Nobody is told to use the CPU; in `training/test_processes.py` the program is. `accelerate launch` hands
    on to torch's launcher, which is started as the program `torchrun` here, with the words and the
    environment that it was given: both launchers work, for one import of torch less.
    """
    before, launched = dict(os.environ), []

    def run(arguments: Namespace) -> None:
        given = {name: value for name, value in os.environ.items() if before.get(name) != value}
        launched.append((as_program(arguments), run_command(as_program(arguments), folder, **given)))

    monkeypatch.setattr(torch.distributed.run, "run", run)
    block = DISTRIBUTED.replace("accelerate launch", f"accelerate launch {MULTI_GPU}")
    program, launch, *arguments = [*words(block, folder), *DISTRIBUTED_FLAGS, "--batch_size", "4"]
    assert (program, launch) == ("accelerate", "launch")
    accelerate_launch.launch_command(accelerate_launch.launch_command_parser().parse_args(arguments))
    ((command, result),) = launched
    assert "--nproc_per_node=2" in command
    assert result.returncode == 0, result.stderr
    output = folder / "checkpoints/blip3o-dit-distributed"
    assert_trained_once(output, result.stderr, processes=2)

    first = log_of(output)[0]
    for name in ("step", "epoch", "loss", "grad_norm", "cosine_similarity", "l2_distance"):
        assert first[name] == pytest.approx(one_process[name], rel=1e-4), name
