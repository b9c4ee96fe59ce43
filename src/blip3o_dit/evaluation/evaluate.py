"""Models beside baselines on held-out samples: metrics.json, report.html and the model card."""

from __future__ import annotations

import logging
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from blip3o_dit.data.dataset import split_samples
from blip3o_dit.data.embeddings import Embeddings, TransformedEmbeddings
from blip3o_dit.evaluation import plots, report, scores
from blip3o_dit.evaluation.fitting import fit_baselines
from blip3o_dit.evaluation.predictions import Predictions, collect_predictions, without_vectors
from blip3o_dit.evaluation.reference import (
    EvaluationSettings,
    ReferenceSet,
    Track,
    collect_reference,
    fit_probe,
)
from blip3o_dit.evaluation.samplers import ModelSampler, Sampler
from blip3o_dit.evaluation.summary import summarize
from blip3o_dit.inference.pipeline import BLIP3oInference, check_writable, target_statistics
from blip3o_dit.training.config import TRAINING_CONFIG_FILE, TrainingConfig
from blip3o_dit.utils.distributed import SINGLE_PROCESS, Processes, join_processes
from blip3o_dit.utils.stateless_random import stateless_permutation

FORMAT = "blip3o-dit evaluation"
FORMAT_VERSION = 1

MOST_SAMPLES = 20_000
"""Held-out samples that are measured unless more are asked for: intervals are narrow by then."""
FEWEST_FIT_SAMPLES = 5000

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What `evaluate_models` does beside measuring; `measure` says how much is measured.

    Args:
        split: "eval", "train" or "all"; the first two are the sides of the first model's training split.
            Baselines are fitted on the other side, and measured on this one.
        num_samples: most of them, chosen by the seed; None means all.
        num_inference_steps, solver, guidance_scale, seed: how the models sample; None: as they were saved.
        curve_calls, curve_samples: network calls and samples of the cost curve; no calls means no curve.
        fit_on: embeddings whose training side the baselines are fitted on; None means the evaluated ones.
        fit_samples: most samples a baseline is fitted on. None: as many as the models' own ridge sources were
            fitted on, at least `FEWEST_FIT_SAMPLES`.
        regression_steps: train the same network by plain regression for so many steps, as a baseline.
        shown: samples drawn on the page.
        weights, device, dtype: as `BLIP3oInference`.
    """

    split: str = "eval"
    num_samples: int | None = MOST_SAMPLES
    num_inference_steps: int | None = None
    solver: str | None = None
    guidance_scale: float = 1.0
    seed: int = 0
    curve_calls: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 50)
    curve_samples: int = 256
    fit_on: str | None = None
    fit_samples: int | None = None
    regression_steps: int = 0
    shown: int = 6
    weights: str = "auto"
    device: str = "auto"
    dtype: torch.dtype = torch.float32
    measure: EvaluationSettings = field(default_factory=EvaluationSettings)

    def __post_init__(self) -> None:
        least = {"curve_samples": 2, "regression_steps": 0}
        optional = {"num_inference_steps": 1, "fit_samples": 2, "num_samples": 2}
        least |= {name: low for name, low in optional.items() if getattr(self, name) is not None}
        for name, lowest in (least | {"shown": 0}).items():
            if getattr(self, name) < lowest:
                raise ValueError(f"{name}: expected at least {lowest}, found {getattr(self, name)}")
        if any(calls < 1 for calls in self.curve_calls):
            raise ValueError(f"curve_calls: expected 1 or more each, found {list(self.curve_calls)}")


def evaluate_models(
    models: Sequence[str | Path],
    embeddings: str | Path,
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
        embeddings: store or documented pickle.
        output_dir: for metrics.json, report.html and README.md; None means the first model's folder.
        pictures: keys -> RGB images or None, for the page.
        command: shown on the page.

    Returns: the content of metrics.json, whose schema is in docs/evaluation.md, on the first process; an
        empty dict on the others.

    Raises:
        FileNotFoundError, ValueError: one line naming what was expected and found.
    """
    config = config or EvaluationConfig()
    plots.require_matplotlib()
    folder = Path(models[0] if output_dir is None else output_dir)
    processes = join_processes(config.device)
    if processes.is_main:
        check_writable(folder / report.METRICS_FILE)
    loaded = [
        BLIP3oInference(path, device=config.device, dtype=config.dtype, weights=config.weights)
        for path in models
    ]
    _check_comparable(loaded, config)
    source, indices, available = _held_out(loaded[0], embeddings, config)
    for other in loaded[1:]:
        other.open(embeddings)
    methods = _model_methods(loaded, config)
    if not processes.is_main:
        _help_sampling(methods, source, indices, config, processes)
        return {}
    fit_on, train = _fit_source(loaded, source, embeddings, config)
    # Of the data, not of a model: figures must not depend on which model is named first.
    statistics = target_statistics(fit_on, train, seed=config.seed)
    result, samples = evaluate_methods(
        methods,
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
    result["models"] = [_about(method.name, found) for method, found in zip(methods, loaded, strict=True)]
    report.write_metrics(result, folder)
    report.write_report(result, folder, samples)
    if not report.write_card(result, folder):
        logger.warning("%s: kept, as it was not written by an evaluation", folder / report.CARD_FILE)
    return result


def evaluate_methods(
    methods: Sequence[Sampler],
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
) -> tuple[dict[str, Any], report.ShownSamples | None]:
    """Measure any methods beside the baselines. `fit_source` is (embeddings, training indices).

    Args:
        statistics: mean and standard deviation of the training tokens per channel, [C] each.
        source_samples: training samples that a method's own ridge was fitted on, if it has one.
        available: samples that `indices` were chosen from; None means no others.
        processes: the others of which are in `_help_sampling` meanwhile.

    Returns: the content of metrics.json, and the samples for the page.
    """
    track = _track(progress)
    mean, std = (value.float().cpu() for value in statistics)
    truth = collect_reference(source, indices, mean=mean, std=std, settings=config.measure, track=track)
    fit_on, train = fit_source
    if fit_on is source:
        fit_probe(truth, train, track)
    floor = scores.real_vs_real(truth, fit_on, train) if len(train) >= 2 else None
    most = min(len(train), config.fit_samples or max(FEWEST_FIT_SAMPLES, source_samples))
    everything = [*methods]
    if len(train):
        everything += fit_baselines(
            fit_on,
            train,
            std=std,
            most=most,
            seed=config.seed,
            track=track,
            network=regression_like.model if regression_like else None,
            network_steps=config.regression_steps,
        )
    described, found = [], []
    for method in everything:
        shared = processes if any(method is asked for asked in methods) else SINGLE_PROCESS
        answers = collect_predictions(method, truth, track, shared)
        described.append(scores.score(answers, truth))
        found.append(without_vectors(answers))
    result: dict[str, Any] = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "summary": [],
        "models": [],
        "data": {
            **_data(source, truth, config),
            "available_samples": available or len(truth.indices),
            "fitted_on": str(fit_on.path),
            "fitted_samples": most,
            "source_samples": min(len(train), source_samples),
        },
        "settings": _settings(config),
        "versions": _versions(),
        "methods": described,
        "floor": floor,
        "differences": _differences(found, config),
        "curve": _curves(methods, truth, config, track, processes),
        "command": None,
    }
    result["summary"] = summarize(result)
    return result, _shown(everything, truth, config, pictures)


def _help_sampling(
    methods: Sequence[Sampler],
    source: Embeddings,
    indices: np.ndarray,
    config: EvaluationConfig,
    processes: Processes,
) -> None:
    """What `evaluate_methods` shares out, in its order, for a process that is not the first."""
    nothing = torch.zeros(source.target_dim)  # statistics are for measuring, which the first process does
    track = _track(False)
    truth = collect_reference(
        source, indices, mean=nothing, std=nothing, settings=config.measure, track=track
    )
    for method in methods:
        collect_predictions(method, truth, track, processes)
    _curves(methods, truth, config, track, processes)


def _differences(found: Sequence[Predictions], config: EvaluationConfig) -> dict[str, Any]:
    """Model -> other method -> figure -> paired difference."""
    return {
        model.method.name: {
            other.method.name: scores.paired_differences(model, other, config.measure)
            for other in found
            if other is not model
        }
        for model in found
        if model.method.is_model
    }


def _curves(
    methods: Sequence[Sampler],
    truth: ReferenceSet,
    config: EvaluationConfig,
    track: Track,
    processes: Processes,
) -> dict[str, Any]:
    return {
        method.name: scores.quality_curve(
            method,
            truth,
            calls=config.curve_calls,
            samples=config.curve_samples,
            track=track,
            processes=processes,
        )
        for method in methods
        if isinstance(method, ModelSampler)
    }


def _shown(
    methods: Sequence[Sampler],
    truth: ReferenceSet,
    config: EvaluationConfig,
    pictures: Callable[[list[str]], list[Any]] | None,
) -> report.ShownSamples | None:
    """Tokens of a few samples: true, two draws and the best guess of each model, and ridge's guess."""
    if not config.shown:
        return None
    order = stateless_permutation(len(truth.indices), seed=config.seed, stream="shown samples")
    indices = truth.indices[np.sort(order[: config.shown])]
    eva, clip = truth.source.fetch(indices)
    rows = {"true": clip}
    for method in methods:
        if method.is_model:
            rows[f"{method.name}, sample 1"] = method.sample(eva, indices.tolist(), 0)
            rows[f"{method.name}, sample 2"] = method.sample(eva, indices.tolist(), 1)
        guess = (
            method.predict_mean(eva, indices.tolist()) if method.is_model or method.name == "ridge" else None
        )
        if guess is not None:
            rows[f"{method.name}, best guess"] = guess
    records = truth.source.records(indices)
    keys = [record["key"] for record in records]
    return report.ShownSamples(
        {name: tokens.numpy() for name, tokens in rows.items()},
        [str(record.get("label") or key)[-18:] for record, key in zip(records, keys, strict=True)],
        pictures(keys) if pictures else None,
    )


def _check_comparable(loaded: Sequence[BLIP3oInference], config: EvaluationConfig) -> None:
    """Refuse models whose held-out samples or units differ: their figures would not be comparable."""
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
    model: BLIP3oInference, embeddings: str | Path, config: EvaluationConfig
) -> tuple[Embeddings, np.ndarray, int]:
    """The embeddings, the samples to measure, and how many there were to choose from."""
    source = model.open(embeddings)
    indices = np.asarray(model.choose(source, config.split, None))
    available = len(indices)
    if config.num_samples is not None:
        order = stateless_permutation(available, seed=config.seed, stream="evaluated samples")
        indices = np.sort(indices[order[: config.num_samples]])
    return _as_trained_on(model, source), indices, available


def _fit_source(
    loaded: Sequence[BLIP3oInference],
    source: Embeddings,
    embeddings: str | Path,
    config: EvaluationConfig,
) -> tuple[Embeddings, np.ndarray]:
    """(embeddings, indices) for baselines, statistics, probe and floor: nothing that is measured."""
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


def _training_embeddings(runs: Sequence[TrainingConfig], embeddings: str | Path) -> str:
    """What all the models were trained on."""
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
    return TransformedEmbeddings(
        source, model.model.l2_normalize_if_configured, model.model.l2_normalize_if_configured
    )


def _model_methods(loaded: Sequence[BLIP3oInference], config: EvaluationConfig) -> list[ModelSampler]:
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


def _about(name: str, found: BLIP3oInference) -> dict[str, Any]:
    return {
        "name": name,
        "folder": found.model_path.resolve().name,
        "path": str(found.model_path),
        "weights": "averaged (EMA)" if found.weights == "ema" else "raw",
        "parameters": sum(parameter.numel() for parameter in found.model.parameters()),
        "device": str(found.device),
        "dtype": str(found.model.dtype).removeprefix("torch."),
    }


def _data(source: Embeddings, truth: ReferenceSet, config: EvaluationConfig) -> dict[str, Any]:
    return {
        "path": str(source.path),
        "split": config.split,
        "num_samples": len(truth.indices),
        "gallery_samples": len(truth.gallery),
        "num_tokens": source.num_tokens,
        "condition_dim": source.condition_dim,
        "target_dim": source.target_dim,
        "drawn_samples": int(truth.drawn.sum()),
        "probe_accuracy_of_truth": truth.probe_accuracy and truth.probe_accuracy.to_json(),
    }


def _settings(config: EvaluationConfig) -> dict[str, Any]:
    settings = asdict(config)
    measure = settings.pop("measure")
    settings["dtype"] = str(config.dtype).removeprefix("torch.")
    settings["curve_calls"] = list(config.curve_calls)
    settings["float32_products"] = torch.get_float32_matmul_precision()
    return settings | {f"measure_{name}": value for name, value in measure.items()}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    found["threads"] = str(torch.get_num_threads())
    return found | {name: version(name) for name in ("blip3o-dit", "torch", "transformers", "numpy")}


def _track(progress: bool) -> Track:
    def track(items: Iterable[Any], name: str) -> Iterable[Any]:
        return tqdm(items, desc=name, unit="", leave=False, disable=not progress)

    return track


def command_line(arguments: Sequence[str] | None = None) -> str:
    """The command as a user typed it, for the page."""
    words = sys.argv[1:] if arguments is None else arguments
    return shlex.join(["blip3o-dit", *words])
