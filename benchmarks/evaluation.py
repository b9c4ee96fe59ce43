"""Time and peak memory of an evaluation at full widths, sampling aside.

Writes a store of 64 x 1280 and 64 x 768 tokens (about 0.26 MB a sample), then evaluates, in a process of
its own, a "model" whose samples are made from the truth and cost next to nothing, beside all baselines.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import Row
from blip3o_dit.data.dataset import split_permutation
from blip3o_dit.data.store import EmbeddingStore, StoreWriter
from blip3o_dit.evaluation.config import EvaluationConfig
from blip3o_dit.evaluation.evaluate import evaluate_samplers
from blip3o_dit.evaluation.predictions import peak_memory_mib
from blip3o_dit.evaluation.report import write_metrics, write_report
from blip3o_dit.utils.stateless_random import stateless_generator

TOKENS, CONDITION, TARGET = 64, 1280, 768


@dataclass(frozen=True)
class CheapSampler:
    """True tokens plus one noise pattern per sample: stands for a model whose sampling is free."""

    store: EmbeddingStore
    noise: Tensor
    name: str = "stand-in"
    about: str = "true tokens plus noise"
    is_model: bool = True
    calls: int = 0
    random: bool = True

    def predict_mean(self, eva: Tensor, indices: Sequence[int]) -> Tensor:
        return self.store.fetch(indices)[1]

    def sample(self, eva: Tensor, indices: Sequence[int], sample_number: int) -> Tensor:
        shifts = [
            int(stateless_generator("stand-in", sample_number, index).integers(0, TOKENS))
            for index in indices
        ]
        noise = torch.stack([self.noise.roll(shift, dims=0) for shift in shifts])
        return self.store.fetch(indices)[1] + noise


def write_store(path: Path, samples: int) -> None:
    """Tokens of a few hidden causes plus noise, so that covariances are as uneven as real ones."""
    generator = torch.Generator().manual_seed(0)
    mixing = [torch.randn(64, width, generator=generator) / 8 for width in (CONDITION, TARGET)]
    with StoreWriter(path, num_tokens=TOKENS, condition_dim=CONDITION, target_dim=TARGET) as writer:
        for start in range(0, samples, 256):
            count = min(256, samples - start)
            hidden = torch.randn(count, TOKENS, 64, generator=generator)
            eva, clip = (hidden @ matrix for matrix in mixing)
            clip += 0.5 * torch.randn(clip.shape, generator=generator)
            writer.append(eva, clip, [{"key": str(start + row)} for row in range(count)])


def evaluate_store(path: Path, held_out: int, output: Path) -> Row:
    store = EmbeddingStore(path)
    before = peak_memory_mib()
    split = split_permutation(len(store), eval_split=held_out / len(store), seed=0)
    clip = store.fetch(split.train[:500])[1]
    statistics = (clip.mean(dim=(0, 1)), clip.std(dim=(0, 1)))
    started = time.monotonic()
    result, shown = evaluate_samplers(
        [CheapSampler(store, 0.1 * torch.randn(TOKENS, TARGET, generator=torch.Generator().manual_seed(1)))],
        store,
        np.asarray(split.eval),
        fit_source=(store, np.asarray(split.train)),
        config=EvaluationConfig(),
        statistics=statistics,
        progress=True,
    )
    result["models"] = [
        {"name": "stand-in", "folder": "stand-in", "path": "", "weights": "", "parameters": 0}
    ]
    write_metrics(result, output)
    write_report(result, output, shown)
    return {
        "held_out_samples": len(split.eval),
        "store_mib": sum(file.stat().st_size for file in path.iterdir()) / 2**20,
        "mib_before": before,
        "peak_mib": peak_memory_mib(),
        "seconds": time.monotonic() - started,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--held_out", type=int, default=20_000)
    parser.add_argument("--train", type=int, default=6_000)
    parser.add_argument("--folder", type=Path, help="for the store (default: a temporary folder)")
    parser.add_argument("--evaluate", type=Path, help=argparse.SUPPRESS)  # what a process of its own does


def run(arguments: argparse.Namespace) -> list[Row]:
    if arguments.evaluate:
        output = arguments.evaluate.parent / "report"
        return [evaluate_store(arguments.evaluate, arguments.held_out, output)]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        store = Path(folder) / "store"
        write_store(store, arguments.held_out + arguments.train)
        words = [sys.executable, "-m", "benchmarks", "evaluation", "--rows", "--evaluate", str(store)]
        words += ["--held_out", str(arguments.held_out)]
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])
