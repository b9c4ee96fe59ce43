"""Models beside baselines on held-out samples: metrics.json, report.html and the model card."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from blip3o_dit.data.dataset import split_samples
from blip3o_dit.data.embeddings import Embeddings, TransformedEmbeddings
from blip3o_dit.evaluation import report, scores
from blip3o_dit.evaluation.baselines import fit_baselines
from blip3o_dit.evaluation.config import EvaluationConfig
from blip3o_dit.evaluation.predictions import Predictions, collect_predictions
from blip3o_dit.evaluation.reference import Progress, ReferenceSet, collect_reference, fit_probe
from blip3o_dit.evaluation.sample_maps import ShownSamples
from blip3o_dit.evaluation.samplers import ModelSampler, Sampler
from blip3o_dit.evaluation.summary import summarize
from blip3o_dit.inference.output import check_writable
from blip3o_dit.inference.pipeline import BLIP3oInference, target_statistics
from blip3o_dit.training.config import TRAINING_CONFIG_FILE, TrainingConfig
from blip3o_dit.utils.distributed import SINGLE_PROCESS, Processes, join_processes
from blip3o_dit.utils.json_files import escaped
from blip3o_dit.utils.stateless_random import stateless_choice

FORMAT = "blip3o-dit evaluation"
FORMAT_VERSION = 1

MIN_FIT_SAMPLES = 5000

logger = logging.getLogger(__name__)


def evaluate_models(
    models: Sequence[str | Path],
    embeddings: str | Path | Embeddings,
    output_dir: str | Path | None = None,
    config: EvaluationConfig | None = None,
    *,
    pictures: Callable[[list[str]], list[Any]] | None = None,
    progress: bool = True,
    command: str | None = None,
) -> dict[str, Any]:
    """Measure trained models beside baselines, and write what was found.

    Under a launcher (torchrun, accelerate launch) sampling from the models is shared out over the processes,
    all of which must call this; the first one does the rest.

    Args:
        models: folders of training runs or checkpoints; all are measured on the same samples.
        embeddings: store or documented pickle, or embeddings that are open already.
        output_dir: for metrics.json, report.html and README.md; None means the first model's folder.
        pictures: keys -> RGB images, or name -> image where there are several of one, or None, for the page;
            called once, at the end.
        command: shown on the page.

    Returns: the content of metrics.json, whose schema is in docs/evaluation.md, on the first process; an
        empty dict on the others.

    Raises:
        FileNotFoundError, ValueError: one line naming what was expected and found.
    """
    config = config or EvaluationConfig()
    folder = Path(models[0] if output_dir is None else output_dir)
    processes = join_processes(config.device)
    if processes.is_main:
        check_writable(folder / report.METRICS_FILE)
    dtype = getattr(torch, config.dtype)
    loaded = [
        BLIP3oInference(path, device=config.device, dtype=dtype, weights=config.weights) for path in models
    ]
    _check_comparable(loaded, config)
    opened = loaded[0].open(embeddings)
    for other in loaded[1:]:
        other.open(opened)
    source, indices, available = _held_out(loaded[0], opened, config)
    samplers = _model_samplers(loaded, config)
    if not processes.is_main:
        _help_sampling(samplers, source, indices, config, processes)
        return {}
    fit_on, train = _fit_source(loaded, source, config)
    # Of the data, not of a model: scores must not depend on which model is named first.
    statistics = target_statistics(fit_on, train, seed=config.seed)
    result, samples = evaluate_samplers(
        samplers,
        source,
        indices,
        fit_source=(fit_on, train),
        config=config,
        statistics=(statistics.mean, statistics.std),
        source_samples=_source_samples(loaded),
        available=available,
        regression_like=loaded[0],
        pictures=pictures,
        progress=progress,
        processes=processes,
    )
    result["command"] = command
    result["models"] = [
        report.describe_model(sampler.name, found) for sampler, found in zip(samplers, loaded, strict=True)
    ]
    report.write_metrics(result, folder)
    report.write_report(result, folder, samples)
    if not report.write_card(result, folder):
        logger.warning("%s: kept, as it was not written by an evaluation", folder / report.CARD_FILE)
    return result


def evaluate_samplers(
    samplers: Sequence[Sampler],
    source: Embeddings,
    indices: np.ndarray,
    *,
    fit_source: tuple[Embeddings, np.ndarray],
    config: EvaluationConfig,
    statistics: tuple[torch.Tensor, torch.Tensor],
    source_samples: int = 0,
    available: int | None = None,
    regression_like: BLIP3oInference | None = None,
    pictures: Callable[[list[str]], list[Any]] | None = None,
    progress: bool = True,
    processes: Processes = SINGLE_PROCESS,
) -> tuple[dict[str, Any], ShownSamples | None]:
    """Measure any samplers beside the baselines.

    Args:
        fit_source: embeddings and their training indices.
        statistics: mean and standard deviation of the training tokens per channel, [C] each.
        source_samples: training samples that a sampler's own ridge was fitted on, if it has one.
        available: samples that `indices` were chosen from; None means no others.
        processes: collective: ranks > 0 must be inside `_help_sampling` at the same time.

    Returns: the content of metrics.json, and the samples for the page.
    """
    bars = _progress_bars(progress)
    mean, std = (value.float().cpu() for value in statistics)
    reference = collect_reference(source, indices, mean=mean, std=std, config=config, progress=bars)
    fit_on, train = fit_source
    if fit_on is source:
        fit_probe(reference, train, bars)
    real_vs_real = scores.real_vs_real(reference, fit_on, train) if len(train) >= 2 else None
    fitted = min(len(train), config.fit_samples or max(MIN_FIT_SAMPLES, source_samples))
    baselines: list[Sampler] = []
    if len(train):
        baselines = fit_baselines(
            fit_on,
            train,
            std=std,
            max_samples=fitted,
            seed=config.seed,
            progress=bars,
            network=regression_like.model if regression_like else None,
            network_steps=config.regression_steps,
        )
    everything = [*samplers, *baselines]
    described, kept = [], []
    for number, sampler in enumerate(everything):
        shared = processes if number < len(samplers) else SINGLE_PROCESS
        predictions = collect_predictions(sampler, reference, bars, shared)
        described.append(scores.score(predictions, reference))
        kept.append(replace(predictions, pooled=torch.empty(0), tokens=torch.empty(0)))  # only `score` needs
    result: dict[str, Any] = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "summary": [],
        "models": [],
        "data": {
            **report.describe_data(reference),
            "available_samples": available or len(reference.indices),
            "fitted_on": str(fit_on.path),
            "fitted_samples": fitted,
            "source_samples": min(len(train), source_samples),
        },
        "settings": report.describe_settings(config),
        "versions": report.describe_versions(),
        "methods": described,
        "floor": real_vs_real,
        "differences": _differences(kept, reference),
        "curve": _curves(samplers, reference, bars, processes),
        "curve_baseline": _curve_baseline(baselines, described, reference) if config.curve_calls else None,
        "command": None,
    }
    result["summary"] = summarize(result)
    return result, _shown(everything, reference, pictures)


def _help_sampling(
    samplers: Sequence[Sampler],
    source: Embeddings,
    indices: np.ndarray,
    config: EvaluationConfig,
    processes: Processes,
) -> None:
    """What `evaluate_samplers` shares out, in its order, for a process that is not the first."""
    zeros = torch.zeros(source.target_dim)  # statistics are for measuring, which the first process does
    bars = _progress_bars(False)
    reference = collect_reference(source, indices, mean=zeros, std=zeros, config=config, progress=bars)
    for sampler in samplers:
        collect_predictions(sampler, reference, bars, processes)
    _curves(samplers, reference, bars, processes)


def _differences(kept: Sequence[Predictions], reference: ReferenceSet) -> dict[str, Any]:
    """Model -> other sampler -> metric -> paired difference."""
    return {
        model.sampler.name: {
            other.sampler.name: scores.paired_differences(model, other, reference)
            for other in kept
            if other is not model
        }
        for model in kept
        if model.sampler.is_model
    }


def _curves(
    samplers: Sequence[Sampler], reference: ReferenceSet, progress: Progress, processes: Processes
) -> dict[str, Any]:
    return {
        sampler.name: scores.quality_curve(sampler, reference, progress=progress, processes=processes)
        for sampler in samplers
        if isinstance(sampler, ModelSampler)
    }


def _curve_baseline(
    baselines: Sequence[Sampler], described: Sequence[dict[str, Any]], reference: ReferenceSet
) -> dict[str, Any] | None:
    """The energy score of the best baseline on the samples of the curves."""
    scored = {found["name"]: found["metrics"]["conditional"]["energy_score"]["value"] for found in described}
    best = min(baselines, key=lambda sampler: scored[sampler.name], default=None)
    if best is None:
        return None
    return {"name": best.name, "energy_score": scores.curve_energy_score(best, reference)}


def _shown(
    samplers: Sequence[Sampler],
    reference: ReferenceSet,
    pictures: Callable[[list[str]], list[Any]] | None,
) -> ShownSamples | None:
    """Tokens of a few samples: the reference, two samples and the best guess of each model, and ridge's."""
    config = reference.config
    if not config.shown:
        return None
    rows = stateless_choice(len(reference.indices), config.shown, seed=config.seed, stream="shown samples")
    indices = reference.indices[rows]
    eva, clip = reference.source.fetch(indices)
    shown = {"true tokens": clip}
    for sampler in samplers:
        if sampler.is_model:
            shown[f"{sampler.name}, sample 1"] = sampler.sample(eva, indices.tolist(), 0)
            shown[f"{sampler.name}, sample 2"] = sampler.sample(eva, indices.tolist(), 1)
        if sampler.is_model or sampler.name == "ridge":
            best_guess = sampler.predict_mean(eva, indices.tolist())
            if best_guess is not None:
                shown[f"{sampler.name}, best guess"] = best_guess
    records = reference.source.records(indices)
    keys = [record["key"] for record in records]
    return ShownSamples(
        {name: tokens.numpy() for name, tokens in shown.items()},
        [
            key + (f", label {record['label']}" if record.get("label") else "")
            for key, record in zip(keys, records, strict=True)
        ],
        [_views(found) for found in pictures(keys)] if pictures else [],
    )


def _views(picture: Any) -> Mapping[str, Any]:
    """Name -> image, of what a caller's function gives for one sample."""
    return picture if isinstance(picture, Mapping) else {} if picture is None else {"picture": picture}


def _check_comparable(loaded: Sequence[BLIP3oInference], config: EvaluationConfig) -> None:
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
        for name in ("eval_split", "seed", "split_by"):
            if getattr(mine, name) != getattr(theirs, name):
                raise ValueError(
                    f"{other.model_path}: expected {name} {getattr(mine, name)} as in {first.model_path}, "
                    f"found {getattr(theirs, name)}: it was trained on other samples (--split all on "
                    "embeddings that neither has seen compares them)"
                )


def _held_out(
    model: BLIP3oInference, source: Embeddings, config: EvaluationConfig
) -> tuple[Embeddings, np.ndarray, int]:
    """The embeddings, the samples to measure, and how many there were to choose from."""
    indices = np.asarray(model.choose(source, config.split, None))
    available = len(indices)
    if config.num_samples is not None:
        stream = "evaluated samples"
        chosen = stateless_choice(available, config.num_samples, seed=config.seed, stream=stream)
        indices = np.sort(indices[chosen])
    return _as_trained_on(model, source), indices, available


def _fit_source(
    loaded: Sequence[BLIP3oInference],
    source: Embeddings,
    config: EvaluationConfig,
) -> tuple[Embeddings, np.ndarray]:
    """(embeddings, indices) for baselines, statistics, probe and `real_vs_real`: nothing that is measured."""
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
    splits = {(run.eval_split, run.seed, run.split_by) for run in runs}
    if len(splits) != 1:  # models of several splits, or of none: no side is theirs
        return fitted, np.arange(fitted.num_samples)
    eval_split, seed, split_by = splits.pop()
    if side == "eval" and not eval_split:
        raise ValueError(
            f"{embeddings}: --split train would measure baselines on samples they were fitted on, as nothing "
            "was held out (eval_split 0); expected other embeddings in --fit_on"
        )
    sides = split_samples(fitted, eval_split=eval_split, seed=seed, split_by=split_by)
    return fitted, getattr(sides, side)


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


def _source_samples(loaded: Sequence[BLIP3oInference]) -> int:
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


def _model_samplers(loaded: Sequence[BLIP3oInference], config: EvaluationConfig) -> list[ModelSampler]:
    names = ["DiT"] if len(loaded) == 1 else _unique([found.model_path.resolve() for found in loaded])
    return [
        ModelSampler(
            found.model,
            name=name,
            num_inference_steps=config.num_inference_steps or found.model.config.default_steps,
            solver=config.solver or found.model.config.default_solver,
            guidance_scale=config.guidance_scale,
            seed=config.seed,
        )
        for name, found in zip(names, loaded, strict=True)
    ]


def _unique(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"--compare: expected different models, found {paths[0]} more than once")


def _progress_bars(shown: bool) -> Progress:
    return lambda items, name: tqdm(items, desc=escaped(name), unit="", leave=False, disable=not shown)
