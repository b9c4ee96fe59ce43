"""Sentences about the scores, each written from metrics.json alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

LINEAR = ("ridge", "ridge 3x3")
# Held-out samples below which nothing is said but that they are too few, and those that set distances ask for
MIN_SAMPLES, MIN_SET_SAMPLES = 20, 100


def summarize(result: Mapping[str, Any]) -> list[str]:
    """Sentences, the most important first; `result` is the content of metrics.json.

    One method is called better than another only where the interval of their paired difference leaves out
    zero, and fewer than `MIN_SAMPLES` samples tell nothing apart.
    """
    models = [sampler for sampler in result["methods"] if sampler["is_model"]]
    if result["data"]["drawn_samples"] < MIN_SAMPLES:
        return [_too_few(result, models)]
    lines = [
        *(_against_best_baseline(result, model) for model in models),
        *_between_models(result, models),
    ]
    for model in models:
        lines += [
            _against_ridge(result, model),
            _calibration(model),
            _distribution(result, model),
            _downstream(result, model),
            _cost(result, model),
        ]
    return [*(line for line in lines if line), *_warnings(result)]


def _too_few(result: Mapping[str, Any], models: Sequence[Mapping[str, Any]]) -> str:
    names = listed([model["name"] for model in models])
    found = count(result["data"]["drawn_samples"], "held-out sample")
    are = "is" if len(models) == 1 else "are"
    return (
        f"With {found}, {names} {are} not told apart from other methods: measure at least {MIN_SAMPLES}, "
        f"better {MIN_SET_SAMPLES} or more."
    )


def _against_best_baseline(result: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """The verdict: is the model a better sampler than the best baseline?"""
    baselines = [sampler for sampler in result["methods"] if not sampler["is_model"]]
    if not baselines:
        return ""
    best = min(baselines, key=_energy)
    name, other = model["name"], best["name"]
    difference = result["differences"][name][other]["conditional.energy_score"]
    digits = _digits(difference["value"])
    scores = (
        f"energy score {_energy(model):.{digits}f} against {_energy(best):.{digits}f}, lower is better; "
        f"{_difference(difference, digits)}"
    )
    verdict = compare(difference)
    if verdict == "better":
        return f"{name} is the better sampler: it beats the best baseline, {other} ({scores})."
    if verdict == "worse":
        return (
            f"{name} is worse than {other} on this data ({scores}): train longer, or use {other}, "
            "which costs next to nothing."
        )
    samples = count(result["data"]["drawn_samples"], "sample")
    return f"{name} is not told apart from the best baseline, {other}, with {samples} ({scores})."


def _against_ridge(result: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """The share of the best linear map's residual variance that the model's best guess explains."""
    ridges = [m for m in result["methods"] if m["name"] in LINEAR]
    r2 = _value(model, "best_guess", "r2")
    if not ridges or r2 is None:
        return ""
    best = max(ridges, key=lambda m: _value(m, "best_guess", "r2") or -1.0)
    linear = _value(best, "best_guess", "r2")
    if linear is None or linear >= 1.0:
        return ""
    share = (r2 - linear) / (1 - linear)
    difference = result["differences"][model["name"]][best["name"]]["best_guess.r2"]
    verdict, digits = compare(difference, lower=False), _digits(difference["value"])
    scores = f"R2 {r2:.{digits}f} against {linear:.{digits}f}; {_difference(difference, digits)}"
    if verdict == "better":
        return (
            f"As a best guess, one call of {model['name']} explains {share:.0%} of what {best['name']} "
            f"leaves ({scores})."
        )
    if verdict == "worse":
        return (
            f"As a best guess, one call of {model['name']} is below {best['name']} ({scores}): "
            "where only the average answer is needed, use the linear map."
        )
    return f"As a best guess, one call of {model['name']} is not told apart from {best['name']} ({scores})."


def _calibration(model: Mapping[str, Any]) -> str:
    found = model["metrics"].get("conditional", {}).get("spread_error_ratio", {})
    ratio, low, high = (found.get(name) for name in ("value", "low", "high"))
    if ratio is None or low is None or high is None:
        return ""
    little = "a little too" if abs(ratio - 1) < 0.1 else "too"
    if low >= 0.9 and high <= 1.1:
        word = "calibrated to within a tenth"
    elif high < 1:
        word = f"over-confident: its samples of one condition differ {little} little"
    elif low > 1:
        word = f"under-confident: its samples of one condition differ {little} much"
    else:
        word = "calibrated as far as these samples tell"
    return f"{model['name']} is {word} (spread over error {ratio:.2f}, {low:.2f} to {high:.2f}; 1 is right)."


def _distribution(result: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """Nothing where there are too few vectors, or fewer true ones in the second set than in the first."""
    data, floor = result["data"], result.get("floor") or {}
    found = model["metrics"].get("tokens", {}).get("frechet")
    true = floor.get("tokens", {}).get("frechet")
    vectors = min(data["num_samples"], result["settings"]["measure_distribution_samples"])
    if not found or not true or vectors < MIN_SET_SAMPLES or floor["samples"] < data["num_samples"]:
        return ""
    if None in (found["low"], found["high"], true["low"], true["high"]):
        return ""
    word = "as close to the true ones as other true ones are, as far as these samples tell"
    if found["low"] > true["high"]:
        word = "farther from the true ones than other true ones are"
    elif found["high"] < true["low"]:
        word = "closer to the true ones than other true ones are"
    distances = [
        f"{each['value']:.3g}, 95 % interval {each['low']:.3g} to {each['high']:.3g}"
        for each in (found, true)
    ]
    figures = "; against ".join(distances)
    return f"As a set, the tokens of {model['name']} are {word} (Frechet distance {figures})."


def _downstream(result: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """Nothing where there are too few samples for intervals."""
    use, samples = model["metrics"].get("use", {}), result["data"]["gallery_samples"]
    parts = []
    recall, accuracy = use.get("recall_at_1"), use.get("probe_accuracy")
    if recall and recall["low"] is not None:
        parts.append(
            f"A sample of {model['name']} finds its own picture first among {samples} for {_share(recall)} "
            "of them"
        )
    real = result["data"].get("probe_accuracy_of_truth")
    if accuracy and real and accuracy["low"] is not None:
        parts.append(
            f"a linear classifier fitted on true tokens is right on {_share(accuracy)} of "
            f"{'its samples' if parts else 'the samples of ' + model['name']} and on {_share(real)} of the "
            "true tokens"
        )
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _share(estimate: Mapping[str, Any]) -> str:
    """A share with its interval, where the samples are not all alike (resamples of these are, too)."""
    low, high = estimate["low"], estimate["high"]
    interval = "" if low == high else f" ({low:.1%} to {high:.1%})"
    return f"{estimate['value']:.1%}{interval}"


def _cost(result: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    points = result.get("curve", {}).get(model["name"])
    if not points:
        return ""
    max_calls = max(point["network_calls"] for point in points)
    full = min(p["energy_score"]["value"] for p in points if p["network_calls"] == max_calls)
    enough = min(
        (p for p in points if p["energy_score"]["value"] <= 1.02 * full), key=lambda p: p["network_calls"]
    )
    cost = model["cost"]
    line = (
        f"A sample of {model['name']} took {count(cost['network_calls'], 'network call')} and "
        f"{cost['milliseconds_per_sample']:.3g} ms in this run"
    )
    samples = min(result["settings"]["curve_samples"], result["data"]["num_samples"])
    if enough["network_calls"] < max_calls and samples >= MIN_SAMPLES:
        line += (
            f"; with {enough['solver']}, {count(enough['network_calls'], 'call')} came within 2 % of the "
            f"energy score of {max_calls}, on {count(samples, 'sample')}"
        )
    return line + "."


def _between_models(result: Mapping[str, Any], models: list[Mapping[str, Any]]) -> list[str]:
    lines = []
    for first, second in combinations(models, 2):
        difference = result["differences"][first["name"]][second["name"]]["conditional.energy_score"]
        word = {"better": "better than", "worse": "worse than", "equal": "not told apart from"}
        lines.append(
            f"{first['name']} is {word[compare(difference)]} {second['name']} by energy score "
            f"({_difference(difference, _digits(difference['value']))})."
        )
    return lines


def _warnings(result: Mapping[str, Any]) -> list[str]:
    lines = []
    mean = next((m for m in result["methods"] if m["name"] == "position mean"), None)
    if mean is not None:
        cosine = _value(mean, "best_guess", "cosine_similarity_mean")
        pooled = _value(mean, "best_guess", "pooled_cosine_similarity_mean")
        lines.append(
            f"Cosine flatters: a constant answer, the mean of each position, already scores {cosine:.2f} per "
            f"token and {pooled:.2f} pooled."
        )
    fitted, source = (result["data"][name] for name in ("fitted_samples", "source_samples"))
    if fitted < source:
        lines.append(
            f"The baselines were fitted on {fitted} samples, the model's own ridge source on {source}: a "
            "difference between them may be no more than that (--fit_samples)."
        )
    measured, drawn = (result["data"][name] for name in ("num_samples", "drawn_samples"))
    if drawn < MIN_SET_SAMPLES:
        some = " with several draws (--draw_samples)" if drawn < measured else ""
        lines.append(
            f"Only {drawn} samples were measured{some}: the figures are rough, distribution distances above "
            "all."
        )
    return lines


def compare(difference: Mapping[str, float | None], *, lower: bool = True) -> str:
    """ "better", "worse" or "equal" for a model-minus-other difference; equal without a clear interval."""
    low, high = difference["low"], difference["high"]
    if low is None or high is None or low <= 0 <= high:
        return "equal"
    return "better" if (high < 0) == lower else "worse"


def listed(names: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def count(number: int, thing: str) -> str:
    """ "1 sample", "2 samples"."""
    return f"{number} {thing}" + ("" if number == 1 else "s")


def _difference(difference: Mapping[str, float | None], digits: int) -> str:
    low, high = difference["low"], difference["high"]
    interval = f", 95 % interval {low:+.{digits}f} to {high:+.{digits}f}" if None not in (low, high) else ""
    return f"difference {difference['value']:+.{digits}f}{interval}"


def _digits(difference: float) -> int:
    """Decimals that show two digits of a difference, three to six."""
    return min(6, max(3, 1 - math.floor(math.log10(abs(difference))))) if difference else 3


def _energy(sampler: Mapping[str, Any]) -> float:
    return _value(sampler, "conditional", "energy_score") or 0.0


def _value(sampler: Mapping[str, Any], group: str, name: str) -> float | None:
    return sampler["metrics"].get(group, {}).get(name, {}).get("value")
