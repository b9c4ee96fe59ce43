"""Generation: ours beside diffusers' class and scheduler with the same weights, and beside the floor."""

from __future__ import annotations

import argparse
from functools import partial

import torch

from benchmarks.measure import (
    Row,
    alternate,
    block_flops,
    block_matrices,
    device,
    paper_config,
    products,
    untrained,
)
from benchmarks.peer import Peer
from blip3o_dit.model.blip3o_dit import GENERATION_STREAM, BLIP3oDiTModel
from blip3o_dit.utils.stateless_random import stateless_normal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--batch", type=int, nargs="+", default=[4])
    parser.add_argument("--calls", type=int, default=8, help="network calls (Euler steps) of a generation")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 3.0])
    parser.add_argument("--compile", action="store_true", help="ours with compile=True as well")


def run(arguments: argparse.Namespace) -> list[Row]:
    rows = []
    for dtype in arguments.dtypes:
        for batch in arguments.batch:
            for guidance in arguments.guidance:
                rows.append(compare(arguments, getattr(torch, dtype), batch, guidance))
    return rows


def compare(arguments: argparse.Namespace, dtype: torch.dtype, batch: int, guidance: float) -> Row:
    model = untrained(paper_config(num_layers=arguments.layers), dtype=dtype).eval()
    peer, config, steps = Peer(model, share=True).eval(), model.config, arguments.calls
    eva = torch.randn(batch, config.num_tokens, config.eva_embedding_size, device=device())
    shape = (config.num_tokens, config.in_channels)
    noise = stateless_normal(range(batch), shape, seed=0, stream=GENERATION_STREAM).to(device())

    def generate(model: BLIP3oDiTModel) -> torch.Tensor:
        return model.generate(eva, num_inference_steps=steps, solver="euler", guidance_scale=guidance)

    rows = batch * config.num_tokens * (2 if guidance != 1.0 else 1)
    matrices = block_matrices(model, condition=False)
    functions = {
        "ours": partial(generate, model),
        "peer": lambda: peer.generate(eva, noise, steps, guidance),
        "products": products(matrices, rows, dtype),
    }
    if dtype != model.compute_dtype:
        functions["products in float32"] = products(matrices, rows, model.compute_dtype)
    distance = _relative_distance(functions["ours"](), functions["peer"]())
    if arguments.compile:
        functions["compiled"] = partial(generate, _compiled(model))
    seconds = alternate(functions, arguments.rounds)
    fastest = min(value for name, value in seconds.items() if name.startswith("products"))
    once = block_flops(block_matrices(model, condition=True), rows) - block_flops(matrices, rows)
    floor = fastest * (steps + once / block_flops(matrices, rows))
    row = {
        "dtype": str(dtype).removeprefix("torch."),
        "layers": arguments.layers,
        "batch": batch,
        "guidance": guidance,
        "calls": steps,
        "ours s": seconds["ours"],
        "diffusers s": seconds["peer"],
        "diffusers / ours": seconds["peer"] / seconds["ours"],
        "floor s": floor,
        "floor / ours": floor / seconds["ours"],
        "GFLOP/s of the floor": block_flops(matrices, rows) / fastest / 1e9,
        "difference": distance,
    }
    if arguments.compile:
        row["compiled s"] = seconds["compiled"]
        row["diffusers / compiled"] = seconds["peer"] / seconds["compiled"]
    return row


def _compiled(model: BLIP3oDiTModel) -> BLIP3oDiTModel:
    """A second model on the same weights, compiled."""
    with torch.device("meta"):
        compiled = BLIP3oDiTModel(model.config)
    compiled.load_state_dict(model.state_dict(), assign=True)
    compiled.eval().compile_for_generation()
    return compiled


def _relative_distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())
