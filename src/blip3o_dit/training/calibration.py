"""How much noise sampling should start from: one number, fitted to the energy score of samples held back.

A network that knows its training pictures by heart is too sure of others, and one that has learned little
may not be sure enough. So sampling starts from x_0 = R(c) + scale s eps (without a source from scale eps),
where training starts from R(c) + s eps. It is what a temperature is to a classifier (Guo et al., arXiv
1706.04599); what it is fitted to is strictly proper (`metrics/conditional.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blip3o_dit.data.dataset import LEAST_HELD_BACK, MOST_HELD_BACK, choose_samples
from blip3o_dit.data.embeddings import Embeddings, batches, check_sizes, open_embeddings
from blip3o_dit.metrics import conditional
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.calibration import CALIBRATION_FILE, Calibration, read_calibration
from blip3o_dit.model.config import CONFIG_FILE, BLIP3oDiTConfig
from blip3o_dit.model.loading import pick_weights, variant_of
from blip3o_dit.training.config import TRAINING_CONFIG_FILE, TrainingConfig
from blip3o_dit.utils.addresses import located
from blip3o_dit.utils.atomic import replace_files
from blip3o_dit.utils.distributed import SINGLE_PROCESS, Processes, pick_device
from blip3o_dit.utils.json_files import read_json_object
from blip3o_dit.utils.progress import working
from blip3o_dit.utils.validation import check_name, checked_integer

DRAWS = 2
# Of the midpoint rule, two network calls each, for models that may choose: to fit, and while training.
SOLVER_STEPS, FEW_STEPS = 4, 2
# Between the logarithms of two scales that are tried next to each other, and how far the search may move.
SPACING, MOST_MOVES = 0.15, 4
TOLERANCE = 0.05

CALIBRATION_SPLITS = ("held_back", "eval", "all")


@dataclass(frozen=True)
class Scores:
    """Of each of n samples [n], float64: see `metrics/conditional.py`."""

    energy: Tensor
    spread: Tensor
    error: Tensor

    @property
    def means(self) -> dict[str, float]:
        """Energy score, and spread over error."""
        ratio = conditional.spread_error_ratio(float(self.spread.mean()), float(self.error.mean()))
        return {"energy_score": float(self.energy.mean()), "spread_error_ratio": float(ratio)}


@dataclass(frozen=True)
class HeldBack:
    """Samples that a model has not seen, to score its draws by; processes share them out."""

    source: Embeddings
    indices: np.ndarray
    seed: int = 0
    batch_size: int = 32
    solver_steps: int = SOLVER_STEPS
    processes: Processes = SINGLE_PROCESS
    precision: Callable[[], AbstractContextManager] = nullcontext

    def quick(self, at_most: int) -> HeldBack:
        """At most so many of them, chosen by the seed, in fewer network calls."""
        chosen = choose_samples(self.indices, max_samples=at_most, seed=self.seed)
        return replace(self, indices=np.sort(chosen), solver_steps=FEW_STEPS)

    @torch.no_grad()
    def scores(self, model: BLIP3oDiTModel, noise_scale: float = 1.0) -> Scores:
        """Of `DRAWS` draws of each sample, in units of a channel's deviation; the same on all processes.

        Any scale is scored with the same noise, and any number of processes gives the same bits.
        """
        found = torch.zeros(3, len(self.indices), dtype=torch.float64)
        pieces = list(batches(range(len(self.indices)), self.batch_size))
        for rows, counted in self.processes.shard(pieces):
            scores = self._scores_of(model, self.indices[list(rows)], noise_scale)
            if counted:
                found[:, list(rows)] = scores
        return Scores(*self.processes.sum(found))

    def _scores_of(self, model: BLIP3oDiTModel, indices: np.ndarray, noise_scale: float) -> Tensor:
        """[3, n] of these samples."""
        eva, clip = self.source.fetch(indices)
        config = model.config
        student = config.flow.student_steps
        solver, steps = ("euler", config.default_steps) if student else ("midpoint", self.solver_steps)
        with self.precision():
            draws = [
                model.generate(
                    eva,
                    num_inference_steps=steps,
                    solver=solver,
                    noise_scale=noise_scale,
                    seed=self.seed,
                    sample_index=indices.tolist(),
                    sample_number=number,
                )
                for number in range(DRAWS)
            ]
        deviation = model.target_std.float()
        samples = (torch.stack(draws).float() / deviation).flatten(2)
        truth = (model.l2_normalize_if_configured(clip.to(model.device)) / deviation).flatten(1)
        found = conditional.spread_and_error(samples, truth)
        return torch.stack([conditional.energy_score(samples, truth), found.spread, found.error]).cpu()


def calibrate(model: BLIP3oDiTModel, held_back: HeldBack) -> Calibration:
    """Fit the scale; the model is left as it is.

    The lowest energy score with a spread within `TOLERANCE` of the error: where some pictures are much harder
    than others the two differ, as the score is of distances and the error of squares. No scale where that
    has no better score than none.
    """

    @cache
    def scores_at(place: int) -> Scores:
        """At a logarithm of the scale in units of `SPACING`."""
        return held_back.scores(model, math.exp(SPACING * place))

    scale = round(math.exp(SPACING * best_place(scores_at)), 3)
    before = scores_at(0).means
    after = held_back.scores(model, scale).means
    if not after["energy_score"] < before["energy_score"]:
        scale, after = 1.0, before
    return Calibration(
        noise_scale=scale,
        samples=len(held_back.indices),
        before=before,
        after=after,
        energy_scores=[],
    )


def best_place(scores_at: Callable[[int], Scores]) -> float:
    """Where the energy score is lowest: the vertex of a parabola, kept to where the spread fits the error.

    It passes through the means at three neighbouring places around the lowest one. The vertex is drawn
    towards 0 by v^2 / (v^2 + e^2), e its standard error over the samples: where the curve is flat, or the
    samples are few, what is found is mostly noise.
    """
    place = 0
    for move in range(MOST_MOVES + 1):
        low, middle, high = (scores_at(place + step) for step in (-1, 0, 1))
        slope = (high.energy - low.energy) / 2
        curvature = float((high.energy - 2 * middle.energy + low.energy).mean())
        if abs(float(slope.mean())) <= curvature or move == MOST_MOVES:
            break
        place += 1 if slope.mean() < 0 else -1
    vertex = 0.0
    if curvature > 0:
        vertex = place - max(-1.0, min(1.0, float(slope.mean()) / curvature))
        error = float(slope.std()) / len(slope) ** 0.5 / curvature
        vertex *= vertex**2 / (vertex**2 + error**2) if vertex else 0.0
    measured = range(min(0, place) - 1, max(0, place) + 2)
    ratios = [scores_at(step).means["spread_error_ratio"] for step in measured]
    lowest, highest = np.interp([1 - TOLERANCE, 1 + TOLERANCE], ratios, measured).tolist()
    return max(lowest, min(highest, vertex))


def set_noise_scale(model: BLIP3oDiTModel, scale: float) -> None:
    """What the model's samples start from, and its config.json says."""
    model.config.flow_matching = asdict(replace(model.config.flow, noise_scale=scale))


def calibrate_model(
    model_path: Path,
    embeddings: str | Path,
    *,
    split: str = "held_back",
    num_samples: int = MOST_HELD_BACK,
    weights: str = "auto",
    seed: int = 0,
    batch_size: int = 32,
    device: str = "auto",
) -> Calibration:
    """Calibrate a trained model, and write what was found into its folder.

    Args:
        split: which samples, none of which the model may have been trained on: those its training held back,
            those it held out ("eval"), or all of other embeddings.

    Raises:
        FileNotFoundError, ValueError: one line naming what was expected and found.
        WriteError: the folder cannot be written; it is as it was.
    """
    num_samples = checked_integer("num_samples", num_samples, low=LEAST_HELD_BACK)
    batch_size = checked_integer("batch_size", batch_size, low=1)
    chosen_weights = pick_weights(model_path, weights)
    sizes = BLIP3oDiTConfig.from_pretrained(model_path).data_sizes
    source = open_embeddings(embeddings)
    check_sizes(source, sizes, model_path)
    indices = choose_samples(_unseen(model_path, source, split), max_samples=num_samples, seed=seed)
    place = pick_device(device)
    model: BLIP3oDiTModel = BLIP3oDiTModel.load_for_inference(
        model_path, dtype=torch.float32, variant=variant_of(chosen_weights)
    ).to(place)
    with working(f"calibrating on {len(indices)} samples"):
        found = calibrate(model, HeldBack(source, np.sort(indices), seed=seed, batch_size=batch_size))
    before = read_calibration(model_path)
    if before is not None:  # what is known of its training stays
        known = replace(before, noise_scale=found.noise_scale, samples=found.samples)
        found = replace(known, before=found.before, after=found.after)
    config = read_json_object(model_path / CONFIG_FILE)
    config["flow_matching"] = (config.get("flow_matching") or {}) | {"noise_scale": found.noise_scale}
    written = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()  # as Hugging Face does
    replace_files(model_path, {CALIBRATION_FILE: found.to_json(), CONFIG_FILE: written})
    return found


def _unseen(model_path: Path, source: Embeddings, split: str) -> np.ndarray:
    """Samples that the model was not trained on. Raises ValueError where there are too few, or none."""
    check_name("split", split, CALIBRATION_SPLITS)
    known = (model_path / TRAINING_CONFIG_FILE).is_file()
    run = TrainingConfig.from_folder(model_path) if known or split != "all" else None
    if split == "all" or run is None:
        if (
            run is not None
            and run.embeddings_path
            and located(run.embeddings_path).resolve() == source.path.resolve()
        ):
            raise ValueError(
                f"{source.path}: --split all expects embeddings that the model was not trained on, found "
                "those that it was"
            )
        indices = np.arange(source.num_samples)
    else:
        sides = run.split(source)
        indices = sides.eval if split == "eval" else sides.held_back
    if len(indices) < LEAST_HELD_BACK:
        raise ValueError(
            f"{source.path}: expected at least {LEAST_HELD_BACK} samples to calibrate by (--split {split}), "
            f"found {len(indices)}: other embeddings with --split all are independent of both training and "
            "evaluation; --split eval takes those that evaluations measure"
        )
    return indices
