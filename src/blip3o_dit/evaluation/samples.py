"""Which samples an evaluation measures, and which ones baselines and statistics are fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from blip3o_dit.data.embeddings import Embeddings, TransformedEmbeddings
from blip3o_dit.evaluation.config import EvaluationConfig
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.training.config import SPLIT_SETTINGS, TRAINING_CONFIG_FILE, TrainingConfig
from blip3o_dit.utils.stateless_random import stateless_choice


def check_comparable(loaded: Sequence[BLIP3oInference], config: EvaluationConfig) -> None:
    """Refuse models whose held-out samples or units differ: their scores would not be comparable."""
    first, *others = loaded
    for other in others:
        if other.model.config.normalize_embeddings != first.model.config.normalize_embeddings:
            raise ValueError(
                f"{other.model_path}: expected normalize_embeddings "
                f"{first.model.config.normalize_embeddings} as in {first.model_path}, found "
                f"{other.model.config.normalize_embeddings}: their tokens have other units"
            )
        if config.split == "all":
            continue
        mine, theirs = (TrainingConfig.from_folder(model.model_path) for model in (first, other))
        for name in SPLIT_SETTINGS:
            if getattr(mine, name) != getattr(theirs, name):
                raise ValueError(
                    f"{other.model_path}: expected {name} {getattr(mine, name)} as in {first.model_path}, "
                    f"found {getattr(theirs, name)}: it was trained on other samples (--split all on "
                    "embeddings that neither has seen compares them)"
                )


def held_out_samples(
    loaded: Sequence[BLIP3oInference], embeddings: str | Path | Embeddings, config: EvaluationConfig
) -> tuple[Embeddings, np.ndarray, int]:
    """The embeddings, the samples to measure, and how many there were to choose from."""
    source = loaded[0].open(embeddings)
    for other in loaded[1:]:
        other.open(source)
    indices = np.asarray(loaded[0].choose(source, config.split, None))
    available = len(indices)
    if config.num_samples is not None:
        stream = "evaluated samples"
        chosen = stateless_choice(available, config.num_samples, seed=config.seed, stream=stream)
        indices = np.sort(indices[chosen])
    return _as_trained_on(loaded[0], source), indices, available


def fitting_samples(
    loaded: Sequence[BLIP3oInference],
    source: Embeddings,
    config: EvaluationConfig,
) -> tuple[Embeddings, np.ndarray, np.ndarray | None]:
    """(embeddings, indices) for baselines, statistics, probe and `real_vs_real`: nothing that is measured.

    Third, the groups of the embeddings' samples, if the models' split has any (`Split.groups`).
    """
    embeddings = source.path
    runs = [
        TrainingConfig.from_folder(model.model_path)
        for model in loaded
        if (model.model_path / TRAINING_CONFIG_FILE).is_file()
    ]
    path = config.fit_on
    if path is None and config.split == "all":
        path = _training_embeddings(runs, embeddings)
    fitted, side = source, "eval" if config.split == "train" else "train"
    if path is not None and Path(path).resolve() != Path(embeddings).resolve():
        fitted, side = _as_trained_on(loaded[0], loaded[0].open(path)), "train"
    elif config.split == "all":
        raise ValueError(
            f"{embeddings}: --split all would measure baselines on samples they were fitted on; "
            "expected other embeddings in --fit_on"
        )
    splits = {tuple(getattr(run, name) for name in SPLIT_SETTINGS) for run in runs}
    if len(splits) != 1:  # models of several splits, or of none: no side is theirs
        return fitted, np.arange(fitted.num_samples), None
    if side == "eval" and not runs[0].eval_split:
        raise ValueError(
            f"{embeddings}: --split train would measure baselines on samples they were fitted on, as nothing "
            "was held out (eval_split 0); expected other embeddings in --fit_on"
        )
    sides = runs[0].split(fitted)
    return fitted, getattr(sides, side), sides.groups


def _training_embeddings(runs: Sequence[TrainingConfig], embeddings: Path) -> str:
    """The embeddings that all the models were trained on."""
    paths = sorted({run.embeddings_path for run in runs})
    if len(paths) != 1 or not Path(paths[0]).exists():
        raise ValueError(
            f"{embeddings}: with --split all the baselines need embeddings to be fitted on (--fit_on), "
            f"found {'none' if len(paths) != 1 else 'none at ' + paths[0]}"
            + (f"; the models were trained on {', '.join(paths)}" if len(paths) > 1 else "")
        )
    return paths[0]


def samples_of_sources(loaded: Sequence[BLIP3oInference]) -> int:
    """Most training samples that the ridge source of any of these models was fitted on; 0 without sources."""
    counts = [0]
    for found in loaded:
        if found.model.config.flow.source != "noise":
            known = (found.model_path / TRAINING_CONFIG_FILE).is_file()
            run = TrainingConfig.from_folder(found.model_path) if known else TrainingConfig()
            counts.append(run.source_samples)
    return max(counts)


def _as_trained_on(model: BLIP3oInference, source: Embeddings) -> Embeddings:
    if not model.model.config.normalize_embeddings:
        return source
    normalize = model.model.l2_normalize_if_configured
    return TransformedEmbeddings(source, normalize, normalize)
