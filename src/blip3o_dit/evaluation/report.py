"""metrics.json, and report.html and README.md (the model card), both written from its content."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from blip3o_dit.evaluation import plots
from blip3o_dit.evaluation.config import EvaluationConfig
from blip3o_dit.evaluation.metric_tables import CLASSIFIERS, METRICS, TABLES, Metric, MetricTable
from blip3o_dit.evaluation.reference import ReferenceSet
from blip3o_dit.evaluation.sample_maps import ShownSamples, blocks
from blip3o_dit.evaluation.summary import MIN_SET_SAMPLES, compare, listed
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.model.calibration import read_calibration
from blip3o_dit.utils.atomic import write_atomically
from blip3o_dit.utils.json_files import escaped

METRICS_FILE = "metrics.json"
REPORT_FILE = "report.html"
CARD_FILE = "README.md"
CARD_MARK = "<!-- Written by blip3o-dit evaluate; it is replaced at the next evaluation. -->"

# Options whose key in metrics.json begins with "measure_".
MEASURE_OPTIONS = (
    "batch_size",
    "draws",
    "draw_samples",
    "distribution_samples",
    "gallery_samples",
    "probe_samples",
    "bootstrap",
    "half_samples",
)


@dataclass(frozen=True)
class Cell:
    text: str
    interval: str = ""
    best: bool = False


@dataclass(frozen=True)
class Row:
    name: str
    is_model: bool
    cells: list[Cell]


@dataclass(frozen=True)
class Table:
    title: str
    note: str
    columns: list[str]
    rows: list[Row] = field(default_factory=list)


def describe_model(name: str, found: BLIP3oInference) -> dict[str, Any]:
    calibration = read_calibration(found.model_path)
    return {
        "name": name,
        "folder": Path(found.name).name,
        "path": str(found.model_path),
        "weights": "averaged (EMA)" if found.weights == "ema" else "raw",
        "parameters": sum(parameter.numel() for parameter in found.model.parameters()),
        "device": str(found.device),
        "dtype": str(found.model.dtype).removeprefix("torch."),
        "calibration": calibration and asdict(calibration),
    }


def describe_data(reference: ReferenceSet) -> dict[str, Any]:
    source = reference.source
    return {
        "path": str(source.path),
        "split": reference.config.split,
        "num_samples": len(reference.indices),
        "gallery_samples": len(reference.gallery),
        "num_tokens": source.num_tokens,
        "condition_dim": source.condition_dim,
        "target_dim": source.target_dim,
        "drawn_samples": int(reference.drawn.sum()),
        **{f"{name}_accuracy_of_truth": _accuracy(reference, name) for name in CLASSIFIERS},
    }


def _accuracy(reference: ReferenceSet, name: str) -> dict[str, Any] | None:
    found = reference.accuracies.get(name)
    return None if found is None else found.to_json()


def describe_settings(config: EvaluationConfig) -> dict[str, Any]:
    settings = asdict(config)
    measure = {f"measure_{name}": settings.pop(name) for name in MEASURE_OPTIONS}
    settings["curve_calls"] = list(config.curve_calls)
    settings["float32_products"] = torch.get_float32_matmul_precision()
    return settings | measure | {"measure_seed": config.seed}


def describe_versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    found["threads"] = str(torch.get_num_threads())
    return found | {name: version(name) for name in ("blip3o-dit", "torch", "transformers", "numpy")}


def write_metrics(result: Mapping[str, Any], folder: Path) -> None:
    """metrics.json; the schema is in docs/evaluation.md."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / METRICS_FILE, (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())


def write_report(result: Mapping[str, Any], folder: Path, samples: ShownSamples | None = None) -> None:
    """report.html: one page without scripts or anything from elsewhere."""
    environment = Environment(
        loader=PackageLoader("blip3o_dit.evaluation", "."), autoescape=True, trim_blocks=True, finalize=_shown
    )
    page = environment.get_template(f"{REPORT_FILE}.jinja").render(**_content(result, samples))
    write_atomically(folder / REPORT_FILE, page.encode(errors="backslashreplace"))


def _shown(value: Any) -> Any:
    """A value of the page: names and paths can hold what neither prints nor has a place in UTF-8."""
    return escaped(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def markdown(text: str) -> str:
    """Text as it is, where Markdown or HTML would make something of its characters."""
    return re.sub(r"[\\`*_{}\[\]<>|#~$&!]", r"\\\g<0>", escaped(text))


def write_card(result: Mapping[str, Any], folder: Path) -> bool:
    """README.md with Hugging Face metadata; False when a file that is not ours stands there."""
    from huggingface_hub import EvalResult, ModelCardData

    path = folder / CARD_FILE
    if path.exists() and CARD_MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return False
    model = next(sampler for sampler in result["methods"] if sampler["is_model"])
    data_name = escaped(Path(result["data"]["path"]).name)
    wanted = (("conditional", "energy_score"), ("best_guess", "r2"), ("sample", "cosine_similarity_mean"))
    found = [
        EvalResult(
            task_type="feature-extraction",
            dataset_type="embedding-store",
            dataset_name=data_name,
            dataset_split=result["data"]["split"],
            metric_type=f"{group}.{name}",
            metric_value=round(model["metrics"][group][name]["value"], 6),
        )
        for group, name in wanted
        if model["metrics"].get(group, {}).get(name, {}).get("value") is not None
    ]
    data = ModelCardData(
        library_name="blip3o-dit",
        tags=["flow-matching", "diffusion-transformer", "clip", "eva-clip", "embeddings"],
        model_name=escaped(result["models"][0]["folder"]),
        eval_results=found,
    )
    text = f"---\n{data.to_yaml()}\n---\n{CARD_MARK}\n\n{_card_text(result)}"
    write_atomically(path, text.encode(errors="backslashreplace"))
    return True


def _content(result: Mapping[str, Any], samples: ShownSamples | None) -> dict[str, Any]:
    samplers, data = result["methods"], result["data"]
    models = [sampler for sampler in samplers if sampler["is_model"]]
    tables = [_table(table, result) for table in TABLES]
    if result.get("decoded"):
        tables.append(_decoded_table(result["decoded"]))
    return {
        "title": f"Evaluation of {listed([model['folder'] for model in result['models']])}",
        "subtitle": (
            f"{_measured(data)} of {data['path']} ({data['split']} split), "
            f"{data['num_tokens']} tokens of {data['target_dim']} numbers given {data['num_tokens']} "
            f"of {data['condition_dim']}"
        ),
        "summary": result["summary"],
        "blocks": list(blocks(samples)) if samples else [],
        "titles": samples.titles if samples else [],
        "tables": tables,
        "some_are_best": any(cell.best for table in tables for row in table.rows for cell in row.cells),
        "differences": _difference_tables(result),
        "spread": _spread_plot(data["drawn_samples"], samplers),
        "curve": _curve_plot(result),
        "curve_samples": _part(min(result["settings"]["curve_samples"], data["num_samples"]), data),
        "positions": plots.position_plots(models),
        "costs": [_cost(sampler) for sampler in samplers],
        "methods": samplers,
        "settings": _settings(result),
    }


def _spread_plot(samples: int, samplers: Sequence[Mapping[str, Any]]) -> str:
    """The plot, or nothing where its bins would hold too few samples to show more than noise."""
    shown = [sampler for sampler in samplers if sampler["is_model"] or sampler["name"] == "ridge"]
    return plots.spread_plot(shown) if samples >= MIN_SET_SAMPLES else ""


def _curve_plot(result: Mapping[str, Any]) -> str:
    """The plot, beside the best baseline's score on the same samples; nothing where none was measured."""
    curves = {name: points for name, points in result["curve"].items() if points}
    best = result.get("curve_baseline")
    line = (best["name"], best["energy_score"]["value"]) if best else None
    return plots.curve_plot(curves, line) if curves else ""


def _part(samples: int, data: Mapping[str, Any]) -> str:
    whole = data["num_samples"]
    return f"{samples} of the {whole} samples" if samples < whole else f"all {whole} samples"


def _measured(data: Mapping[str, Any]) -> str:
    chosen = data["num_samples"] < data["available_samples"]
    return f"{data['num_samples']}" + (f" of {data['available_samples']}" if chosen else "") + " samples"


def _table(table: MetricTable, result: Mapping[str, Any]) -> Table:
    group = table.group
    rows = [(m["name"], m["is_model"], m["metrics"]) for m in result["methods"]]
    rows = [(name, is_model, metrics[group]) for name, is_model, metrics in rows if group in metrics]
    best = {metric.name: _best(metric, rows, result["differences"]) for metric in table.metrics}
    real: dict[str, Any] = {}
    if group in ("tokens", "pooled") and result["floor"]:
        real = result["floor"][group]
        rows.append(("true against true", False, real))
    if group == "use":
        told = {name: result["data"].get(f"{name}_accuracy_of_truth") for name in CLASSIFIERS}
        real = {f"{name}_accuracy": estimate for name, estimate in told.items() if estimate}
    if group == "use" and real:
        rows.append(("true tokens", False, real))
    shown = [m for m in table.metrics if m.label and any(m.name in scores for _, _, scores in rows)]
    return Table(
        table.title,
        table.note.format_map(result["data"]),
        [metric.label for metric in shown],
        [
            Row(
                name,
                is_model,
                [
                    _cell(scores.get(metric.name), best=None if scores is real else best[metric.name])
                    for metric in shown
                ],
            )
            for name, is_model, scores in rows
        ],
    )


def _decoded_table(decoded: Mapping[str, Any]) -> Table:
    known = decoded["true_tokens_psnr"]
    limit = "" if known is None else f" (on pictures that it has not seen, a PSNR of {known:.1f} dB)"
    note = (
        f"Predicted tokens as pictures of {decoded['picture_size']} pixels, against the true tokens as "
        f"pictures: {decoded['samples']} samples. The decoder is small: it shows where shapes and colours "
        "are, no texture and no small detail, and true tokens too come out smoother than their "
        f"picture{limit}. A method's best guess is smooth, and so nearer than a sample."
    )
    columns = {"PSNR of a sample, dB": ("sample", "psnr"), "L1 of a sample": ("sample", "l1")}
    columns |= {"PSNR of the best guess, dB": ("best_guess", "psnr")}
    rows = [
        Row(
            name,
            method["is_model"],
            [_cell(method.get(kind, {}).get(figure)) for kind, figure in columns.values()],
        )
        for name, method in decoded["methods"].items()
    ]
    return Table("Decoded to pictures", note, list(columns), rows)


def _best(metric: Metric, rows: Sequence[tuple[str, bool, Any]], differences: Any) -> float | None:
    """The value that a column sets off: the best, if it is told apart from every other; None for a tie."""
    found = {name: scores[metric.name] for name, _, scores in rows if metric.name in scores}
    found = {name: estimate for name, estimate in found.items() if estimate["value"] is not None}
    if metric.better == "none" or len(found) < 2:
        return None
    badness = {"up": lambda value: -value, "down": lambda value: value, "one": lambda value: abs(value - 1)}
    first, *others = sorted(found, key=lambda name: badness[metric.better](found[name]["value"]))
    for other in others:
        pairs = (
            differences.get(a, {}).get(b, {}).get(metric.key) for a, b in ((first, other), (other, first))
        )
        difference = next((pair for pair in pairs if pair), None)
        if not _apart(found[first], found[other], difference):
            return None
    return found[first]["value"]


def _apart(first: Mapping[str, Any], other: Mapping[str, Any], difference: Mapping[str, Any] | None) -> bool:
    """By their paired difference where there is one, as the sentences say it, else by their own intervals."""
    if difference:
        return compare(difference) != "equal"
    ends = (first["low"], first["high"], other["low"], other["high"])
    return None not in ends and (first["high"] < other["low"] or other["high"] < first["low"])


def _cell(estimate: Mapping[str, Any] | None, *, best: float | None = None) -> Cell:
    if not estimate or estimate["value"] is None:
        return Cell("-")
    interval = ""
    if estimate["low"] is not None and estimate["high"] is not None:
        interval = f"{number(estimate['low'])} to {number(estimate['high'])}"
    return Cell(number(estimate["value"]), interval, best=estimate["value"] == best)


def _in_card(cell: Cell) -> str:
    return f"{cell.text} ({cell.interval})" if cell.interval else cell.text


def number(value: float) -> str:
    """Three significant digits, no exponent where it can be read without."""
    if abs(value) < 1e-6:
        return "0"
    if 0.001 <= abs(value) < 10_000:
        digits = 3 if abs(value) < 10 else 1
        return f"{value:.{digits}f}"
    return f"{value:.2e}"


def _difference_tables(result: Mapping[str, Any]) -> list[Table]:
    """One for each model: its scores less those of every other sampler."""
    directions = {"up": "above zero", "down": "below zero"}
    note = "Paired: the same samples and resamples. An interval without zero is a difference."
    tables = []
    for name, others in result["differences"].items():
        metrics = [
            metric
            for metric in METRICS
            if metric.difference and any(metric.key in found for found in others.values())
        ]
        columns = [f"{metric.difference} ({directions[metric.better]} is better)" for metric in metrics]
        rows = [
            Row(f"less {other}", False, [_cell(found.get(metric.key)) for metric in metrics])
            for other, found in others.items()
        ]
        tables.append(Table(f"{name} less the others", note, columns, rows))
    return tables


def _cost(sampler: Mapping[str, Any]) -> dict[str, Any]:
    cost = sampler["cost"]
    return {
        "name": sampler["name"],
        "is_model": sampler["is_model"],
        "calls": cost["network_calls"] or "-",
        "milliseconds": f"{cost['milliseconds_per_sample']:.3g}",
        "memory": f"{cost['peak_memory_mib']:.0f} MiB",
    }


def _settings(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [("command", result["command"])] if result.get("command") else []
    for model in result["models"]:
        about = f"{model['path']}, {model['weights']} weights, {model['parameters']:,} parameters"
        rows.append((model["name"], about))
    data = result["data"]
    rows.append(("baselines", f"fitted on {data['fitted_samples']} samples of {data['fitted_on']}"))
    rows += [(name, str(value)) for name, value in result["settings"].items()]
    rows += [(name, str(value)) for name, value in result["versions"].items()]
    return rows


def _card_text(result: Mapping[str, Any]) -> str:
    model = result["models"][0]
    lines = [
        f"# {markdown(model['folder'])}",
        "",
        "A BLIP3-o diffusion transformer trained by flow matching to generate CLIP tokens from EVA-CLIP",
        "tokens, by blip3o-dit.",
        "",
        f"* condition {result['data']['num_tokens']} x {result['data']['condition_dim']}, "
        f"target {result['data']['num_tokens']} x {result['data']['target_dim']}",
        f"* {model['parameters']:,} parameters, {model['weights']} weights evaluated",
        "",
        "## How good it is",
        "",
        *(f"* {markdown(line)}" for line in result["summary"]),
        "",
        f"Measured on {_measured(result['data'])} ({result['data']['split']} split). "
        f"All figures: `{METRICS_FILE}`, `{REPORT_FILE}`.",
        "",
    ]
    for table in TABLES[:3]:
        made = _table(table, result)
        lines += [f"### {made.title}", "", "| | " + " | ".join(made.columns) + " |"]
        lines.append("|---" * (len(made.columns) + 1) + "|")
        lines += [
            f"| {markdown(row.name)} | " + " | ".join(map(_in_card, row.cells)) + " |" for row in made.rows
        ]
        lines.append("")
    lines += [
        "## Use",
        "",
        "```python",
        "from blip3o_dit import BLIP3oInference",
        "",
        'inference = BLIP3oInference("path/to/this/folder")',
        "clip = inference.generate(eva_embeddings)",
        "```",
        "",
    ]
    return "\n".join(lines)
