"""What an index keeps when its vectors are translated to another embedding model instead of encoded anew.

One vector a sample: the mean token of two towers. A network of `--size tiny` learns the new tower's vectors
from the old one's on the training samples. Four fifths of the held-out samples are the index, in translated
vectors; the others are queries, true vectors of the new tower. Recall is the share of a query's 10 nearest by
cosine in the true index that are among its 10 nearest in the translated one.

Beside ridge and a rotation: means by one network call from each draw's noise, means of draws, and one draw.
Then the tenth of the index with the largest spread is replaced by true vectors, beside a tenth by chance and
the tenth with the largest error, which nobody knows.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.calibration import split_of
from benchmarks.measure import Row
from benchmarks.quality_data import SETS, MemorySource
from benchmarks.real_towers import DIRECTIONS, load
from blip3o_dit.evaluation.baselines import Procrustes, split_validation
from blip3o_dit.inference.translate import translate_vectors
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.ridge import TokenRidge
from blip3o_dit.training.config import SIZE_RATES, SIZES, TrainingConfig
from blip3o_dit.training.console import ConsoleCallback
from blip3o_dit.training.finishing import finish
from blip3o_dit.training.run import build_trainer

NEAREST = 10
ANEW = 0.1
DRAWS = (2, 8)


@dataclass(frozen=True)
class Index:
    """True vectors of the held-out samples of the index [n, C], those of the queries [m, C], and the old
    tower's vectors [n, C_eva] with the samples' numbers."""

    true: Tensor
    queries: Tensor
    old: Tensor
    numbers: list[int]

    @classmethod
    def of(cls, data: MemorySource) -> Index:
        order = np.random.default_rng(0).permutation(np.flatnonzero(data.held_out))
        queries, index = np.split(order, [len(order) // 5])
        old, true = data.fetch(index)
        return cls(true[:, 0], data.fetch(queries)[1][:, 0], old[:, 0], index.tolist())

    def figures(self, found: Tensor) -> Row:
        """Cosine with the true vectors, squared error over their variance, recall."""
        variance = (self.true - self.true.mean(dim=0)).square().sum()
        return {
            "cosine": float(F.cosine_similarity(self.true, found, dim=-1).mean()),
            "error over variance": float((found - self.true).square().sum() / variance),
            f"recall@{NEAREST}": self.recall(found),
        }

    def recall(self, found: Tensor) -> float:
        queries = F.normalize(self.queries, dim=-1)
        sides = (F.normalize(vectors, dim=-1) for vectors in (self.true, found))
        true, there = ((queries @ side.T).topk(NEAREST).indices for side in sides)
        return float((true[:, :, None] == there[:, None]).any(dim=-1).float().mean())


def vectors_of(data: MemorySource) -> MemorySource:
    """The mean token of each sample."""
    eva, clip = (side.mean(dim=1, keepdim=True) for side in (data.eva, data.clip))
    return MemorySource(data.name, eva, clip, data.held_out, data.labels, data.groups)


def rows_of(data: MemorySource, steps: int, batch_size: int, seed: int) -> Iterator[Row]:
    index, train = Index.of(data), np.flatnonzero(~data.held_out)
    fit, validation = split_validation(train, max_samples=10_000, seed=0, groups=data.groups)
    about = {"data": data.name, "training samples": len(train), "index": len(index.true)}
    old = index.old[:, None]
    ridge = TokenRidge.fit(data, fit, validation=validation).predict(old)[:, 0]
    for name, found in (("ridge", ridge), ("rotation", Procrustes.fit(data, train).predict(old)[:, 0])):
        yield about | {"vectors": name} | index.figures(found)
    model = trained(data, steps, batch_size, seed)
    how: dict[str, Any] = {"sample_index": index.numbers, "seed": seed}
    translations = {
        "one draw": translate_vectors(model, index.old, way="sample", draws=2, **how),
        **{
            f"{way} of {k}": translate_vectors(model, index.old, way=way, draws=k, **how)
            for way in ("mean", "estimate")
            for k in DRAWS
        },
    }
    for name, found in translations.items():
        yield about | {"vectors": name} | index.figures(found.vectors)
    vectors, spread = translations["estimate of 8"]
    yield from _anew(about, index, vectors, spread)


def _anew(about: Row, index: Index, vectors: Tensor, spread: Tensor) -> Iterator[Row]:
    """With a tenth of the index encoded anew, by three ways of choosing it."""
    error = (vectors - index.true).norm(dim=-1)
    chance = torch.rand(len(error), generator=torch.Generator().manual_seed(0))
    ranks = np.stack([side.argsort().argsort().numpy() for side in (spread, error)])
    known = {
        "spread over error": float((spread.square().mean() / error.square().mean()).sqrt()),
        "rank correlation": float(np.corrcoef(ranks)[0, 1]),
    }
    for name, order in (("by chance", chance), ("of largest spread", spread), ("of largest error", error)):
        changed, chosen = vectors.clone(), order.topk(round(ANEW * len(order))).indices
        changed[chosen] = index.true[chosen]
        more = known if order is spread else {}
        yield about | {"vectors": f"estimate of 8, a tenth anew {name}"} | index.figures(changed) | more


def trained(data: MemorySource, steps: int, batch_size: int, seed: int) -> BLIP3oDiTModel:
    """As `train --size tiny` trains and calibrates."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainingConfig(
            **SIZES["tiny"],
            output_dir=folder,
            max_steps=steps,
            batch_size=batch_size,
            learning_rate=SIZE_RATES["tiny"],
            source="ridge",
            eval_split=0.2,
            eval_samples=0,
            eval_loss_samples=1,
            seed=seed,
            device="cpu",
        )
        trainer = build_trainer(data, config, split=split_of(data, seed))
        trainer.remove_callback(ConsoleCallback)
        trainer.train()
        finish(trainer)
        assert trainer.ema is not None
        trainer.ema.copy_into(trainer.unwrapped_model)
        return trainer.unwrapped_model.eval()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sets", nargs="*", choices=tuple(SETS), default=["digits", "photographs"])
    parser.add_argument("--real", type=Path, help="folder that `real-towers --fetch` filled, as a set too")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])


def run(arguments: argparse.Namespace) -> Sequence[Row]:
    sets = [SETS[name]() for name in arguments.sets]
    if arguments.real:
        sets += [load(arguments.real, direction) for direction in DIRECTIONS]
    return [
        {"seed": seed, **row}
        for data in map(vectors_of, sets)
        for seed in arguments.seeds
        for row in rows_of(data, arguments.steps, arguments.batch_size, seed)
    ]
