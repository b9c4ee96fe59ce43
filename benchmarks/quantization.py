"""Quantised weights: the energy score beside float32's on held-out samples, and the time of a network call.

For the scores one model a data set is trained by the default recipe and read with each kind of weights; all take
the same noise, so that differences are paired.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from benchmarks.measure import Row, alternate, device, paper_config, untrained
from benchmarks.quality import BATCH_SIZES, no_progress, train_recipe, truth_of
from benchmarks.quality_data import SETS
from blip3o_dit.evaluation.config import EvaluationConfig
from blip3o_dit.evaluation.predictions import collect_predictions
from blip3o_dit.evaluation.reference import collect_reference
from blip3o_dit.evaluation.samplers import ModelSampler
from blip3o_dit.evaluation.scores import paired_differences
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.cpu_kernels import use_cpu_kernels
from blip3o_dit.model.quantization import DTYPES, quantize_blocks, weight_bytes

# (dtype, quantize), the reference first.
PRECISIONS = [(torch.float32, None), (torch.bfloat16, None), *((torch.bfloat16, kind) for kind in DTYPES)]
MEASURED = EvaluationConfig(batch_size=128)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sets", nargs="*", choices=tuple(SETS), default=["digits", "modes"])
    parser.add_argument("--steps", type=int, default=600, help="of training")
    parser.add_argument("--samples", type=int, default=256, help="held-out ones, most")
    parser.add_argument("--layers", type=int, default=24, help="of the network that is timed; 0: none")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--calls", type=int, default=16, help="network calls (Euler steps) of a generation")
    parser.add_argument("--rounds", type=int, default=5)


def run(arguments: argparse.Namespace) -> list[Row]:
    rows = [row for name in arguments.sets for row in scores_of(name, arguments)]
    if arguments.layers:
        rows += times(arguments.layers, arguments.batch, arguments.calls, arguments.rounds)
    return rows


def scores_of(set_name: str, arguments: argparse.Namespace) -> Iterator[Row]:
    """The energy score in each precision, and its difference from float32's in percent with an interval."""
    data = SETS[set_name]()
    settings = {"batch_size": BATCH_SIZES.get(set_name, 32)}
    _, model = train_recipe(data, truth_of(data), settings, steps=arguments.steps, points=[])
    clip = data.fetch(np.flatnonzero(~data.held_out))[1]
    mean, std = clip.mean(dim=(0, 1)), clip.std(dim=(0, 1), correction=0)
    held_out = np.flatnonzero(data.held_out)[: arguments.samples]
    truth = collect_reference(data, held_out, mean=mean, std=std, config=MEASURED, progress=no_progress)
    first = None
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for dtype, kind in PRECISIONS:
            read = BLIP3oInference(folder, dtype=dtype, quantize=kind, alone=True).model
            found = collect_predictions(
                ModelSampler(read).with_calls("midpoint", arguments.calls), truth, no_progress
            )
            first = first or found
            value = float(first.values["energy_score"].mean())
            difference = paired_differences(found, first, truth)["energy_score"]
            yield {
                "measured": f"{set_name}, {len(held_out)} samples",
                "weights": _name(dtype, kind),
                "energy score": float(found.values["energy_score"].mean()),
                "difference %": 100 * difference["value"] / value,
                "low %": 100 * difference["low"] / value,
                "high %": 100 * difference["high"] / value,
                "weights MiB": weight_bytes(read) / 2**20,
            }


def times(layers: int, batches: list[int], calls: int, rounds: int) -> Iterator[Row]:
    """A call of the default width, of each kind of weights in turn; on a GPU recorded, beside bfloat16."""
    plain = torch.bfloat16 if device().type == "cuda" else torch.float32
    model = untrained(paper_config(num_layers=layers), dtype=plain).eval()
    models = {_name(plain): model}
    if plain == torch.float32:
        models[_name(torch.bfloat16)] = copy.deepcopy(model).bfloat16()
    models |= {_name(plain, kind): quantized(model, kind) for kind in DTYPES}
    for held in models.values():
        held.record_generation()
    config = model.config
    for batch in batches:
        eva = torch.randn(batch, config.num_tokens, config.eva_embedding_size, device=device())
        functions = {
            name: partial(held.generate, eva, num_inference_steps=calls, solver="euler")
            for name, held in models.items()
        }
        seconds = alternate(functions, rounds, warm_up=2)  # plainly, then recorded
        for name, held in models.items():
            yield {
                "measured": f"{layers} layers, batch {batch}, {calls} calls",
                "weights": name,
                "ms a call": 1000 * seconds[name] / calls,
                f"{_name(plain)} / this": seconds[_name(plain)] / seconds[name],
                "weights MiB": weight_bytes(held) / 2**20,
            }


def quantized(model: BLIP3oDiTModel, kind: str) -> BLIP3oDiTModel:
    model = copy.deepcopy(model)
    quantize_blocks(model, kind)
    use_cpu_kernels(model)
    return model


def _name(dtype: torch.dtype, kind: str | None = None) -> str:
    name = str(dtype).removeprefix("torch.")
    return f"{kind}, computed in {name}" if kind else name
