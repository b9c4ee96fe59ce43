"""Quantised weights: the energy score beside float32's on held-out samples, and the time of a network call.

The scores are those of one model, given with its data or trained here by the default recipe, read with each
kind of weights. All take the same noise, so that differences are paired.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import Row, alternate, device, paper_config, untrained
from blip3o_dit.data.embeddings import Embeddings, open_embeddings
from blip3o_dit.evaluation.config import EvaluationConfig
from blip3o_dit.evaluation.predictions import collect_predictions
from blip3o_dit.evaluation.reference import collect_reference
from blip3o_dit.evaluation.samplers import ModelSampler
from blip3o_dit.evaluation.scores import no_bar, paired_differences
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.inference.request import choose_indices
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.cpu_kernels import use_cpu_kernels
from blip3o_dit.model.quantization import DTYPES, quantize_blocks, weight_bytes

# (dtype, quantize), the reference first.
PRECISIONS = [(torch.float32, None), (torch.bfloat16, None), *((torch.bfloat16, kind) for kind in DTYPES)]
MEASURED = EvaluationConfig(batch_size=128)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", nargs=2, metavar=("MODEL", "DATA"), help="scores of a trained model")
    parser.add_argument("--sets", nargs="*", choices=("digits", "modes"), default=[], help="train on")
    parser.add_argument("--steps", type=int, default=600, help="of training")
    parser.add_argument("--samples", type=int, default=256, help="held-out ones, most")
    parser.add_argument("--layers", type=int, default=0, help="of the network that is timed; 0: none")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--calls", type=int, default=16, help="network calls of a generation")
    parser.add_argument("--rounds", type=int, default=5)


def run(arguments: argparse.Namespace) -> list[Row]:
    rows, samples, calls = [], arguments.samples, arguments.calls
    if arguments.model:
        folder, source = Path(arguments.model[0]), open_embeddings(arguments.model[1])
        rows += scores(folder, source, choose_indices(folder, source, "eval", samples), calls)
    for name in arguments.sets:
        data, model = trained(name, arguments.steps)
        with tempfile.TemporaryDirectory() as place:
            model.save_pretrained(place)
            rows += scores(Path(place), data, np.flatnonzero(data.held_out)[:samples].tolist(), calls)
    if arguments.layers:
        rows += times(arguments.layers, arguments.batch, calls, arguments.rounds)
    return rows


def trained(name: str, steps: int) -> tuple[Any, BLIP3oDiTModel]:
    """One of the quality benchmark's data sets, and a model that the default recipe trained on it."""
    from benchmarks import quality  # needs matplotlib and scikit-learn, which timing does not

    data = quality.SETS[name]()
    settings = {"batch_size": quality.BATCH_SIZES.get(name, 32)}
    return data, quality.train_recipe(data, quality.truth_of(data), settings, steps=steps, points=[])[1]


def scores(folder: Path, source: Embeddings, indices: Sequence[int], calls: int) -> Iterator[Row]:
    """The energy score with each kind of weights, and what it is above float32's, with an interval."""
    first = None
    for dtype, kind in PRECISIONS:
        read = BLIP3oInference(folder, dtype=dtype, quantize=kind, alone=True).model
        mean, std = read.target_mean.cpu(), read.target_std.cpu()
        truth = collect_reference(
            source, np.asarray(indices), mean=mean, std=std, config=MEASURED, progress=no_bar
        )
        found = collect_predictions(ModelSampler(read).with_calls("midpoint", calls), truth, no_bar)
        first = first or found
        plain = float(first.values["conditional.energy_score"].mean())
        above = paired_differences(found, first, truth)["conditional.energy_score"]
        yield {
            "measured": f"{source.path.name}, {len(indices)} samples, {calls} calls",
            "weights": _name(dtype, kind),
            "energy score": float(found.values["conditional.energy_score"].mean()),
            **{f"above float32 %{end}": 100 * above[name] / plain for name, end in ENDS.items()},
            "weights MiB": weight_bytes(read) / 2**20,
        }


ENDS = {"value": "", "low": ", low", "high": ", high"}


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
    return f"{kind}, others {name}" if kind else name
