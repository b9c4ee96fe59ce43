"""A training step: ours, as the Trainer takes it, beside diffusers' class in a loop written by hand."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.measure import (
    SIZES,
    Row,
    alternate,
    block_flops,
    block_matrices,
    paper_config,
    products,
    untrained,
)
from benchmarks.our_step import our_step, random_batch
from benchmarks.peer import Peer
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["1/4 width", "default width"])
    parser.add_argument("--layers", type=int, help="blocks, instead of the size's own")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast on both sides")
    parser.add_argument("--compile", action="store_true", help="ours compiled as well")
    parser.add_argument("--selective", action="store_true", help="ours with selective checkpointing as well")


def run(arguments: argparse.Namespace) -> list[Row]:
    return [compare(arguments, size) for size in arguments.sizes]


def compare(arguments: argparse.Namespace, size: str) -> Row:
    sizes = SIZES[size] | ({"num_layers": arguments.layers} if arguments.layers else {})
    model, batch = untrained(paper_config(**sizes)), arguments.batch
    inputs = random_batch(model, batch)
    steps = {"ours": our_step(model, inputs, arguments.bf16)}
    if arguments.selective:
        steps["selective"] = our_step(_copy(model), inputs, arguments.bf16, selective_checkpointing=True)
    if arguments.compile:
        steps["compiled"] = our_step(_copy(model), inputs, arguments.bf16, compile=True)
    steps["diffusers"] = peer_step(Peer(model, share=False), inputs, arguments.bf16)
    recomputing = Peer(model, share=False, checkpointing=True)
    steps["diffusers, checkpointing"] = peer_step(recomputing, inputs, arguments.bf16)
    matrices = block_matrices(model, condition=True)
    rows = batch * model.config.num_tokens
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    steps["products"] = products(matrices, rows, dtype)
    # The C library's memory settles after about three steps; until then the system hands out fresh pages.
    seconds = alternate(steps, arguments.rounds, warm_up=3)
    floor = 3 * seconds["products"]  # once forward, and for each of inputs and weights backward
    row = {
        "size": size,
        "layers": model.config.num_layers,
        "batch": batch,
        "precision": "bf16 autocast" if arguments.bf16 else "float32",
        "ours s": seconds["ours"],
        "diffusers s": seconds["diffusers"],
        "diffusers / ours": seconds["diffusers"] / seconds["ours"],
        "always checkpointing / ours": seconds["diffusers, checkpointing"] / seconds["ours"],
        "floor / ours": floor / seconds["ours"],
        "samples/s": batch / seconds["ours"],
        "TFLOP/s": 3 * block_flops(matrices, rows) / seconds["ours"] / 1e12,
    }
    for name in ("selective", "compiled"):
        if name in seconds:
            row[f"diffusers / {name}"] = seconds["diffusers"] / seconds[name]
    return row


def peer_step(peer: Peer, inputs: dict, bf16: bool) -> Callable[[], None]:
    """The same by hand: draw, loss, backward, clipping, fused AdamW and averaged weights."""
    parameters = [p for p in peer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    averages = [p.detach().clone() for p in parameters]
    eva, clip = inputs["eva"], inputs["clip"]
    peer.train()

    def step() -> None:
        with torch.autocast(eva.device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = peer.loss(eva, clip)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1e-3)

    return step


def _copy(model: BLIP3oDiTModel) -> BLIP3oDiTModel:
    copied = BLIP3oDiTModel(model.config).to(model.device)
    copied.load_state_dict(model.state_dict())
    return copied
