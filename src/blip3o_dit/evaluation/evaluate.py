"""Models beside baselines on held-out samples: metrics.json, report.html and the model card."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blip3o_dit.data.embeddings import Embeddings, generated_by, said_of_generated
from blip3o_dit.decoder.network import TokenDecoder
from blip3o_dit.evaluation import report, scores
from blip3o_dit.evaluation.baselines import fit_baselines
from blip3o_dit.evaluation.config import EvaluationConfig
from blip3o_dit.evaluation.decoded import check_decoder, decoded_rows, measure_decoded, said_of_decoded
from blip3o_dit.evaluation.kept import NOWHERE, Kept, describe_evaluation, going_on
from blip3o_dit.evaluation.predictions import Predictions, collect_predictions
from blip3o_dit.evaluation.reference import (
    ClassTexts,
    Progress,
    ReferenceSet,
    add_class_names,
    collect_reference,
    fit_probe,
)
from blip3o_dit.evaluation.sample_maps import ShownSamples
from blip3o_dit.evaluation.samplers import ModelSampler, Sampler
from blip3o_dit.evaluation.samples import (
    check_comparable,
    fitting_samples,
    held_out_samples,
    samples_of_sources,
)
from blip3o_dit.evaluation.summary import summarize
from blip3o_dit.inference.output import check_writable
from blip3o_dit.inference.pipeline import BLIP3oInference, target_statistics
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.calibration import read_calibration
from blip3o_dit.utils.addresses import refuse_address
from blip3o_dit.utils.distributed import SINGLE_PROCESS, Processes, join_processes
from blip3o_dit.utils.durations import in_words
from blip3o_dit.utils.json_files import escaped
from blip3o_dit.utils.names import shortest_ends
from blip3o_dit.utils.progress import one_bar, working
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
    decoder: TokenDecoder | None = None,
    texts: ClassTexts | None = None,
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
        decoder: turns tokens into pictures, for the page and for `decoded` in metrics.json.
        texts: what the classes of the labels are called, for zero-shot classification.
        command: shown on the page.

    Returns: the content of metrics.json, whose schema is in docs/evaluation.md, on the first process; an
        empty dict on the others.

    Raises:
        FileNotFoundError, ValueError: one line naming what was expected and found.
    """
    config = config or EvaluationConfig()
    folder = Path(models[0] if output_dir is None else output_dir)
    refuse_address(folder)
    processes = join_processes(config.device)
    if processes.is_main and (output_dir is not None or folder.is_dir()):  # else loading says what is there
        check_writable(folder / report.METRICS_FILE)
    loaded = _load(models, config, progress and processes.is_main)
    source, indices, available = held_out_samples(loaded, embeddings, config)
    if decoder is not None:
        check_decoder(decoder, loaded, source)
    samplers = _model_samplers(loaded, config)
    if not processes.is_main:
        _help_sampling(samplers, source, indices, config, processes)
        return {}
    fit_on, train, groups = fitting_samples(loaded, source, config)
    request = describe_evaluation(loaded, (source, indices), (fit_on, train), config)
    if texts is not None:
        request["texts"] = {"lines": texts.lines, "vectors": texts.vectors.double().sum(dim=1).tolist()}
    with going_on(folder, request) as kept:
        # Of the data, not of a model: scores must not depend on which model is named first.
        statistics = target_statistics(fit_on, train, seed=config.seed)
        result, samples = evaluate_samplers(
            samplers,
            source,
            indices,
            fit_source=(fit_on, train),
            groups=groups,
            config=config,
            statistics=(statistics.mean, statistics.std),
            source_samples=samples_of_sources(loaded),
            available=available,
            regression_like=loaded[0],
            pictures=pictures,
            decoder=decoder,
            texts=texts,
            progress=progress,
            processes=processes,
            kept=kept,
        )
        result["command"] = command
        made_by = generated_by(source)
        if made_by is not None:
            result["data"]["generated_by"] = dict(made_by)
            said = said_of_generated(made_by)
            result["summary"].insert(0, f"The tokens that all methods are measured against are {said}.")
        result["models"] = [
            report.describe_model(sampler.name, found)
            for sampler, found in zip(samplers, loaded, strict=True)
        ]
        result["summary"] += _said_of_calibration(loaded, samplers)
        with working("drawing the figures and writing the report", shown=progress):
            _write(result, folder, samples)
    return result


def _load(models: Sequence[str | Path], config: EvaluationConfig, progress: bool) -> list[BLIP3oInference]:
    loaded = []
    for path in models:
        with working(f"loading the model {escaped(str(path))}", shown=progress):
            model = BLIP3oInference(
                path,
                device=config.device,
                dtype=getattr(torch, config.dtype),
                weights=config.weights,
                quantize=config.quantize,
            )
            loaded.append(model)
    check_comparable(loaded, config)
    return loaded


def _write(result: dict[str, Any], folder: Path, samples: ShownSamples | None) -> None:
    """Each file takes its old one's place when it is whole."""
    report.write_metrics(result, folder)
    report.write_report(result, folder, samples)
    if not report.write_card(result, folder):
        logger.warning("%s: kept, as it was not written by an evaluation", folder / report.CARD_FILE)


def evaluate_samplers(
    samplers: Sequence[Sampler],
    source: Embeddings,
    indices: np.ndarray,
    *,
    fit_source: tuple[Embeddings, np.ndarray],
    groups: np.ndarray | None = None,
    config: EvaluationConfig,
    statistics: tuple[torch.Tensor, torch.Tensor],
    source_samples: int = 0,
    available: int | None = None,
    regression_like: BLIP3oInference | None = None,
    pictures: Callable[[list[str]], list[Any]] | None = None,
    decoder: TokenDecoder | None = None,
    texts: ClassTexts | None = None,
    progress: bool = True,
    processes: Processes = SINGLE_PROCESS,
    kept: Kept = NOWHERE,
) -> tuple[dict[str, Any], ShownSamples | None]:
    """Measure any samplers beside the baselines.

    Args:
        fit_source: embeddings and their training indices. groups: of these embeddings' samples, as
            `fit_baselines` takes them.
        statistics: mean and standard deviation of the training tokens per channel, [C] each.
        source_samples: training samples that a sampler's own ridge was fitted on, if it has one.
        available: samples that `indices` were chosen from; None means no others.
        processes: collective: ranks > 0 must be inside `_help_sampling` at the same time.
        kept: where what was measured is kept, and was by a stopped evaluation.

    Returns: the content of metrics.json, and the samples for the page.
    """
    with one_bar("measuring", shown=progress) as bars:
        mean, std = (value.float().cpu() for value in statistics)
        reference = collect_reference(source, indices, mean=mean, std=std, config=config, progress=bars)
        fit_on, train = fit_source
        if fit_on is source:
            fit_probe(reference, train, bars)
        if texts is not None:
            add_class_names(reference, texts)
        floor = scores.real_vs_real(reference, fit_on, train, progress=bars) if len(train) >= 2 else None
        fitted = min(len(train), config.fit_samples or max(MIN_FIT_SAMPLES, source_samples))
        network = regression_like.model if regression_like else None
        baselines = _baselines((fit_on, train, groups), fitted, network, reference, bars)
        everything = [*samplers, *baselines]
        say = _Estimate(samplers, reference, processes) if progress else None
        described, predicted = _measure(everything, len(samplers), reference, bars, processes, kept, say)
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
            "floor": floor,
            "differences": _differences(predicted, reference),
            "curve": _curves(samplers, reference, bars, processes, kept),
            "curve_baseline": _curve_baseline(baselines, described, reference)
            if config.curve_calls
            else None,
            "decoded": measure_decoded(decoder, everything, reference, bars) if decoder else None,
            "command": None,
        }
        result["summary"] = summarize(result)
        if result["decoded"]:
            result["summary"].append(said_of_decoded(result["decoded"]))
        return result, _shown(everything, reference, pictures, decoder)


def _baselines(
    fit_source: tuple[Embeddings, np.ndarray, np.ndarray | None],
    fitted: int,
    network: BLIP3oDiTModel | None,
    reference: ReferenceSet,
    progress: Progress,
) -> list[Sampler]:
    """Fitted on so many of the training samples of (embeddings, their indices, groups); none without any."""
    source, train, groups = fit_source
    if not len(train):
        return []
    return fit_baselines(
        source,
        train,
        std=reference.std,
        max_samples=fitted,
        seed=reference.config.seed,
        progress=progress,
        groups=groups,
        network=network,
        network_steps=reference.config.regression_steps,
    )


def _measure(
    samplers: Sequence[Sampler],
    models: int,
    reference: ReferenceSet,
    progress: Progress,
    processes: Processes,
    kept: Kept,
    say: _Estimate | None,
) -> tuple[list[dict[str, Any]], list[Predictions]]:
    """Each sampler's scores, and its predictions but for the vectors that only these need.

    The processes share out the sampling from the first ones, which are the models.
    """
    described, predicted = [], []
    for number, sampler in enumerate(samplers):
        is_model = number < models
        predictions = collect_predictions(
            sampler,
            reference,
            progress,
            processes if is_model else SINGLE_PROCESS,
            kept=kept.method(number),
            first=partial(say, number) if say is not None and is_model else None,
        )
        described.append(scores.score(predictions, reference, progress=progress))
        predicted.append(replace(predictions, pooled=torch.empty(0), tokens=torch.empty(0)))
    return described, predicted


class _Estimate:
    """One line with how much is sampled and about how long that takes, when the first batch was."""

    def __init__(self, samplers: Sequence[Sampler], reference: ReferenceSet, processes: Processes) -> None:
        self.models = [sampler for sampler in samplers if isinstance(sampler, ModelSampler)]
        self.reference, self.processes = reference, processes
        self._said = False

    def __call__(self, number: int, seconds_per_sample: float) -> None:
        """Of the model of this number; those before it are measured already."""
        if self._said or number >= len(self.models):
            return
        self._said = True
        model, config = self.models[number], self.reference.config
        count, draws = len(self.reference.indices), int(self.reference.drawn.sum()) * (config.draws - 1)
        points = scores.curve_settings(model, config)
        curve = 2 * min(count, config.curve_samples) * sum(calls for _, calls in points)
        calls = ((count + draws) * model.calls + curve) * (len(self.models) - number)
        seconds = seconds_per_sample / model.calls * calls / self.processes.count
        what = f"sampling {count + draws} times, {model.calls} network call{'s' * (model.calls > 1)} each"
        logger.info("%s%s: about %s", what, ", and a cost curve" if points else "", in_words(seconds))


def _help_sampling(
    samplers: Sequence[Sampler],
    source: Embeddings,
    indices: np.ndarray,
    config: EvaluationConfig,
    processes: Processes,
) -> None:
    """What `evaluate_samplers` shares out, in its order, for a process that is not the first."""
    none = scores.no_bar
    zeros = torch.zeros(source.target_dim)  # statistics are for measuring, which the first process does
    reference = collect_reference(source, indices, mean=zeros, std=zeros, config=config, progress=none)
    for sampler in samplers:
        collect_predictions(sampler, reference, none, processes)
    _curves(samplers, reference, none, processes, NOWHERE)


def _differences(predicted: Sequence[Predictions], reference: ReferenceSet) -> dict[str, Any]:
    """Model -> other sampler -> metric -> paired difference."""
    return {
        model.sampler.name: {
            other.sampler.name: scores.paired_differences(model, other, reference)
            for other in predicted
            if other is not model
        }
        for model in predicted
        if model.sampler.is_model
    }


def _curves(
    samplers: Sequence[Sampler],
    reference: ReferenceSet,
    progress: Progress,
    processes: Processes,
    kept: Kept,
) -> dict[str, Any]:
    how: dict[str, Any] = {"progress": progress, "processes": processes}
    return {
        sampler.name: scores.quality_curve(sampler, reference, kept=kept.curve(number), **how)
        for number, sampler in enumerate(samplers)
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
    decoder: TokenDecoder | None,
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
        decoded_rows(decoder, shown, eva, samplers) if decoder else {},
    )


def _views(picture: Any) -> Mapping[str, Any]:
    """Name -> image, of what a caller's function gives for one sample."""
    return picture if isinstance(picture, Mapping) else {} if picture is None else {"picture": picture}


def _model_samplers(loaded: Sequence[BLIP3oInference], config: EvaluationConfig) -> list[ModelSampler]:
    names = ["DiT"] if len(loaded) == 1 else _names([Path(found.name) for found in loaded])
    return [
        ModelSampler(
            found.model,
            name=name,
            num_inference_steps=config.num_inference_steps or found.model.config.default_steps,
            solver=config.solver or found.model.config.default_solver,
            guidance_scale=config.guidance_scale,
            noise_scale=config.noise_scale,
            seed=config.seed,
        )
        for name, found in zip(names, loaded, strict=True)
    ]


def _said_of_calibration(loaded: Sequence[BLIP3oInference], samplers: Sequence[ModelSampler]) -> list[str]:
    """What is known of each model's; named where there are several."""
    known = [
        (sampler.name, read_calibration(found.model_path))
        for sampler, found in zip(samplers, loaded, strict=True)
    ]
    return [
        f"{name}: {line}" if len(known) > 1 else line
        for name, found in known
        if found is not None
        for line in found.sentences()
    ]


def _names(paths: Sequence[Path]) -> list[str]:
    if len(set(paths)) < len(paths):
        raise ValueError(f"--compare: expected different models, found {paths[0]} more than once")
    return shortest_ends(paths)
