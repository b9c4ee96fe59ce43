"""A valid small checkpoint, how it is damaged, and what a continued run makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState

from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.training.checkpoint import (
    OPTIMIZER_NUMBERS,
    OPTIMIZER_TENSORS,
    PROGRESS_FILE,
    TRAINER_STATE_FILE,
    LoopState,
    RunIdentity,
    check_checkpoint,
)
from blip3o_dit.training.optimizer_state import gathered_state, load_optimizer, save_optimizer
from blip3o_dit.utils.checksums import CHECKSUMS_FILE, seal
from tests.fuzz.formats import Make, write_model
from tests.fuzz.judge import Trial
from tests.fuzz.mutators import mutate_bytes, mutate_json, mutate_safetensors

RUN = RunIdentity(samples=5, fingerprint="0", global_batch=4)
NUMBERS = (OPTIMIZER_NUMBERS, PROGRESS_FILE, TRAINER_STATE_FILE, CHECKSUMS_FILE)


def learner(model: BLIP3oDiTModel) -> tuple[torch.optim.AdamW, LambdaLR]:
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [
        {"params": parameters[:3]},
        {"params": parameters[3:], "weight_decay": 0.1},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    return optimizer, LambdaLR(optimizer, [lambda step: 1.0 / (1 + step)] * 2)


def write_checkpoint(folder: Path) -> BLIP3oDiTModel:
    write_model(folder)
    model: BLIP3oDiTModel = BLIP3oDiTModel.from_pretrained(folder)
    optimizer, schedule = learner(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    schedule.step()
    save_optimizer(folder, gathered_state(model, optimizer), schedule, None, save_file)
    progress = LoopState(
        run=RUN, loss_since_log=0.5, loss_until_log=1.0, last_logged_step=1, monitor=([0.1] * 7, 2)
    )
    progress.write(folder)
    log: list[dict[str, float]] = [{"step": 1, "loss": 1.0}]
    TrainerState(global_step=3, max_steps=9, log_history=log).save_to_json(str(folder / TRAINER_STATE_FILE))
    seal(folder)
    return model


def checkpoint_maker(folder: Path, seed: int) -> Make:
    checkpoint = folder / "checkpoint-3"
    model = write_checkpoint(checkpoint)
    optimizer, schedule = learner(model)
    names = (*NUMBERS, OPTIMIZER_TENSORS)
    whole = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    others = (whole[OPTIMIZER_TENSORS], whole["model.safetensors"])

    def act() -> None:
        check_checkpoint(checkpoint, model.config, RUN)
        LoopState.read(checkpoint)
        load_optimizer(checkpoint, model, optimizer, schedule)

    def damage(rng: Random) -> None:
        name = rng.choice(names)
        file = checkpoint / name
        if name == OPTIMIZER_TENSORS:
            file.write_bytes(mutate_safetensors(whole[name], rng, others=others))
        elif rng.random() < 0.8:
            values = ("0.exp_avg", "../x", CHECKSUMS_FILE, [], {}, 1e308, 2**70, True)
            file.write_bytes(mutate_json(json.loads(whole[name]), rng, values=values))
        else:
            file.write_bytes(mutate_bytes(whole[name], rng))
        if name != CHECKSUMS_FILE and rng.random() < 0.95:
            seal(checkpoint)  # by somebody who knows the format

    def make(number: int) -> Trial:
        for name in (*names, CHECKSUMS_FILE):
            (checkpoint / name).write_bytes(whole[name])
        damage(Random(f"{seed}/checkpoint/{number}"))
        size = sum(file.stat().st_size for file in checkpoint.iterdir())
        return Trial(act, size, folder)

    return make
