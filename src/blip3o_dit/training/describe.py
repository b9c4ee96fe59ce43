"""What is in a model folder, a checkpoint or the folder of a run, for people and for programs.

Read from its JSON files, the headers of its weights and its log: no weights are loaded, and no torch.
"""

from __future__ import annotations

import math
import re
import shlex
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors import safe_open

from blip3o_dit.training.curves import LOG_FILE, read_log
from blip3o_dit.utils.addresses import may_be_there
from blip3o_dit.utils.atomic import MODEL_ASIDE, finish_publishing
from blip3o_dit.utils.checksums import check_sizes
from blip3o_dit.utils.json_files import (
    escaped,
    finite_or_none,
    printable,
    read_json_object,
    short_repr,
    weight_files_of,
)
from blip3o_dit.utils.recognise import recognise
from blip3o_dit.utils.validation import damage_refused, is_number

# Files of a run beside its weights; `checkpoint.py` says what is in them.
STATE, PROGRESS, SETTINGS = "trainer_state.json", "progress.json", "training_config.json"
DISTILLATION = "distillation_config.json"
NETWORK = ("model_dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim")
RECIPE = (
    *("prediction_type", "schedule_type", "source", "batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "ema_decay", "normalize_embeddings"),
)
WIDTH = 80
_WRAP: dict[str, Any] = {
    "subsequent_indent": " " * 17,
    "break_long_words": False,
    "break_on_hyphens": False,
}
_WAYS_ON = {True: "to train it further:", False: "to go on:"}
HELD_OUT = {"loss": "eval_loss", "cosine": "eval_cosine_similarity_mean", "r2": "eval_r2"}


def describe(folder: Path) -> dict[str, Any]:
    """What is known of the model, checkpoint or run in a folder, as JSON values.

    Raises:
        ValueError: one line: a file of it that cannot be read.
    """
    finish_publishing(folder / MODEL_ASIDE, folder)
    found = recognise(folder)
    saved = _checkpoints(folder)
    newest = next((entry["name"] for entry in saved if entry["whole"]), None)
    at = folder if newest is None or found.kind != "run" else folder / newest
    config, settings = _object(at / "config.json"), _object(at / SETTINGS)
    progress = _progress(folder, saved)
    run: Any = (_object(folder / PROGRESS) or _object(folder / (newest or "") / PROGRESS)).get("run")
    run = run if isinstance(run, dict) else {}
    return {
        "path": str(folder),
        "kind": found.what,
        "network": _network(at, config),
        "recipe": _recipe(config, settings, run),
        "student": _student(at, config),
        "progress": progress,
        "held_out": _held_out(log_of(folder), settings),
        "weights": _weights(at),
        "data": _data(settings, run, at),
        "checkpoints": saved,
        "go_on": _way_on(folder, found.kind, progress, newest, at),
    }


def _object(file: Path) -> dict[str, Any]:
    return read_json_object(file, non_finite=True) if file.is_file() else {}


def _network(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    side = config.get("input_size")
    tokens = side * side if isinstance(side, int) else None
    sizes = {name: config.get(name) for name in NETWORK}
    widths = {"condition_width": config.get("eva_embedding_size"), "target_width": config.get("in_channels")}
    return {"parameters": _parameters(folder), **sizes, "tokens": tokens, **widths}


def _files(folder: Path, infix: str) -> list[Path]:
    """Files of the raw ("") or averaged (".ema") weights, which may be cut into several."""
    whole = folder / f"model{infix}.safetensors"
    index = folder / f"model.safetensors.index{infix}.json"
    if whole.is_file():
        return [whole]
    return [file for file in weight_files_of(index) if file.is_file()] if index.is_file() else []


def _parameters(folder: Path) -> int | None:
    """Numbers in the network; statistics and the fitted source beside it are none of its parameters."""
    count = 0
    for file in _files(folder, "") or _files(folder, ".ema"):
        with damage_refused(file), safe_open(file, framework="np") as tensors:
            names = [name for name in tensors.keys() if name.startswith("dit.")]  # noqa: SIM118
            count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
    return count or None


def _weights(folder: Path) -> list[dict[str, Any]]:
    found = []
    for infix, averaged in (("", False), (".ema", True)):
        for file in _files(folder, infix):
            with damage_refused(file), safe_open(file, framework="np") as tensors:
                kinds = Counter(
                    tensors.get_slice(name).get_dtype()
                    for name in tensors.keys()  # noqa: SIM118
                    if name.startswith("dit.")
                )
            dtype = kinds.most_common(1)[0][0] if kinds else None
            entry = {"file": file.name, "averaged": averaged, "dtype": dtype, "bytes": file.stat().st_size}
            found.append(entry)
    return found


def _recipe(config: dict[str, Any], settings: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    flow = config.get("flow_matching")
    known = {**(flow if isinstance(flow, dict) else {}), **settings}
    low = settings.get("memory") == "low"
    mixed = next((name for name in ("bf16", "fp16") if settings.get(name)), "float32") if settings else None
    whole: Any = run.get("global_batch")
    own: Any = [settings.get(name) for name in ("batch_size", "gradient_accumulation_steps")]
    numbers = all(isinstance(value, int) and value > 0 for value in (whole, *own))
    return {
        **{name: known.get(name) for name in RECIPE},
        "precision": "bfloat16 weights" if low else mixed,
        "processes": whole // (own[0] * own[1]) if numbers else None,
        "solver": config.get("default_solver"),
        "solver_steps": config.get("default_steps"),
        "noise_scale": known.get("noise_scale", 1.0),
    }


def _student(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """Of a distilled model: its network calls, and the teacher as far as it is noted."""
    flow = config.get("flow_matching")
    steps = flow.get("student_steps") if isinstance(flow, dict) else None
    teacher = _object(folder / DISTILLATION).get("teacher")
    default = config.get("default_steps")
    return {"steps": steps, "default_steps": default, "teacher": teacher or None} if steps else None


def _checkpoints(folder: Path) -> list[dict[str, Any]]:
    """The checkpoints in a folder, the newest first; files and sizes are looked at, not contents."""
    names = [path.name for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    found = []
    for name in sorted(names, key=lambda name: int(name.partition("-")[2]), reverse=True):
        problem = None
        try:
            check_sizes(folder / name)
        except ValueError as error:
            problem = str(error)
        step = int(name.partition("-")[2])
        found.append({"name": name, "step": step, "whole": problem is None, "problem": problem})
    return found


def _progress(folder: Path, saved: list[dict[str, Any]]) -> dict[str, Any]:
    """The step that was reached, of how many, and how far the newest checkpoint is."""
    places = [folder, *(folder / entry["name"] for entry in saved if entry["whole"])]
    states = [state for state in (_object(place / STATE) for place in places) if _steps(state)[0]]
    states.sort(key=lambda state: _steps(state)[0])
    step, planned = _steps(states[-1]) if states else (0, 0)
    own = _steps(_object(folder / STATE))[0]
    passes: Any = states[-1].get("epoch") if states else None
    known = is_number(passes) and math.isfinite(passes) and step
    ended = step >= planned or not (folder / PROGRESS).is_file()  # a run may have stopped early
    logged = max((entry["step"] for entry in log_of(folder)), default=0)
    return {
        "step": step or logged or None,
        "of": planned or None,
        "logged": logged or None,
        "passes": round(float(passes), 3) if known else None,
        "of_passes": round(float(passes) * planned / step, 3) if known and planned else None,
        "finished": bool(step and ended and own == step),
    }


def _steps(state: dict[str, Any]) -> tuple[int, int]:
    values = [state.get(name) for name in ("global_step", "max_steps")]
    step, planned = (value if type(value) is int and 0 < value < 2**53 else 0 for value in values)
    return step, planned


def log_of(folder: Path) -> list[dict[str, Any]]:
    """Log entries with a step: of the file, or of a checkpoint, which has none, of its state."""
    history: Any = _object(folder / STATE).get("log_history")
    entries = read_log(folder / LOG_FILE) or (history if isinstance(history, list) else [])
    return [entry for entry in entries if isinstance(entry, dict) and type(entry.get("step")) is int]


def _held_out(log: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any] | None:
    """Figures on held-out samples: the last, and the best by the metric that names the best checkpoint."""
    measured = [entry for entry in log if is_number(entry.get("eval_loss"))]
    if not measured:
        return None
    metric = settings.get("best_metric")
    named = metric in ("energy_score", "cosine_similarity_mean", "r2")
    name = f"eval_{metric}" if named else "eval_loss"
    sign = 1 if name in ("eval_energy_score", "eval_loss") else -1
    ranked = [entry for entry in measured if is_number(entry.get(name)) and math.isfinite(entry[name])]
    best = min(ranked, key=lambda entry: sign * entry[name], default=measured[-1])
    figures = [
        {"step": entry["step"]} | {short: finite_or_none(entry.get(long)) for short, long in HELD_OUT.items()}
        for entry in (measured[-1], best)
    ]
    return {"last": figures[0], "best": figures[1], "best_by": name.removeprefix("eval_")}


def _data(settings: dict[str, Any], run: dict[str, Any], folder: Path) -> dict[str, Any]:
    encoders: Any = _object(folder / "towers.json").get("encoders")
    sides = {side: encoders.get(side) for side in ("eva", "clip")} if isinstance(encoders, dict) else {}
    towers = {side: tower.get("name") for side, tower in sides.items() if isinstance(tower, dict)}
    path = settings.get("embeddings_path") or None
    return {
        "path": path,
        "there": may_be_there(path) if isinstance(path, str) else None,
        "samples": run.get("samples"),
        "held_out": settings.get("eval_split"),
        "group_pattern": settings.get("group_pattern") or None,
        "fingerprint": run.get("fingerprint"),
        "towers": towers or None,
    }


def _way_on(folder: Path, kind: str, progress: dict[str, Any], newest: str | None, at: Path) -> str | None:
    """The command that trains on from here."""
    output = shlex.quote(str(folder))
    taught = _object(at / DISTILLATION)
    if taught:
        words = [str(taught.get("teacher")), "STORE", "--steps", str(taught.get("steps"))]
        return None if kind == "model" else f"blip3o-dit distill {shlex.join(words)} --output_dir {output}"
    if _student(at, _object(at / "config.json")) is not None:
        return None
    if kind == "checkpoint":
        return f"blip3o-dit train --resume_from_checkpoint {output}"
    if newest is None:
        new = f"blip3o-dit train --init_from {output} --embeddings_path STORE --output_dir NEW"
        return new if kind == "model" else None
    more = " --extend_epochs N" if progress["finished"] else ""
    return f"blip3o-dit train --output_dir {output} --resume_from_checkpoint auto{more}"


# For people


def format_description(about: dict[str, Any]) -> str:
    """The same as text for a terminal of 80 columns; commands and paths stay whole."""
    rows = [
        ("network", _network_line(about["network"])),
        ("tokens", _tokens_line(about["network"])),
        ("recipe", _recipe_line(about["recipe"])),
        ("training", _training_line(about["recipe"])),
        ("distilled", _student_line(about["student"])),
        ("progress", _progress_line(about["progress"])),
        *_several("held out", _figures_lines(about["held_out"])),
        *_several("weights", [_weights_line(entry) for entry in about["weights"]] or ["none"]),
        *_several("data", _data_lines(about["data"])),
        *_several("checkpoints", [_checkpoint_line(entry) for entry in about["checkpoints"]]),
    ]
    lines = [f"{printable(about['path'])}: {about['kind']}"]
    for name, text in rows:
        lines += textwrap.wrap(text, WIDTH, initial_indent=f"  {name:<13}", **_WRAP) if text else []
    if about["go_on"]:
        lines += ["", _WAYS_ON[about["progress"]["finished"]], f"  {escaped(about['go_on'])}"]
    return "\n".join(lines) + "\n"


def _several(name: str, lines: list[str]) -> list[tuple[str, str]]:
    return [("" if row else name, line) for row, line in enumerate(lines)]


def _show(value: Any) -> str:
    """A value out of a file."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "?" if value is None else printable(value if isinstance(value, str) else short_repr(value))


def _network_line(network: dict[str, Any]) -> str:
    count = network["parameters"]
    size = f"{count:,} parameters" if count else "no weights"
    heads, shared = network["num_heads"], network["num_kv_heads"]
    few = f" ({_show(shared)} of keys and values)" if shared not in (None, heads) else ""
    return (
        f"{size}: width {_show(network['model_dim'])}, layers {_show(network['num_layers'])}, "
        f"heads {_show(heads)}{few}, feed-forward {_show(network['ffn_dim'])}"
    )


def _tokens_line(network: dict[str, Any]) -> str:
    widths = (_show(network[name]) for name in ("condition_width", "target_width"))
    return f"{_show(network['tokens'])} a picture, " + " -> ".join(widths) + " wide"


def _recipe_line(recipe: dict[str, Any]) -> str:
    start = _show(recipe["source"])
    return (
        f"{_show(recipe['prediction_type'])} prediction, {_show(recipe['schedule_type'])} path from "
        f"{start if start in ('noise', '?') else f'the guess of {start}'}, "
        f"{_show(recipe['solver'])} in {_show(recipe['solver_steps'])} steps"
        + ("" if recipe["noise_scale"] == 1.0 else f", noise x {_show(recipe['noise_scale'])}")
        + (", tokens normalised" if recipe["normalize_embeddings"] else "")
    )


def _training_line(recipe: dict[str, Any]) -> str:
    batch, parts, processes = (
        recipe[name] for name in ("batch_size", "gradient_accumulation_steps", "processes")
    )
    if batch is None:
        return ""
    several = f" x {_show(parts)} accumulated" if parts not in (None, 1) else ""
    several += f" x {processes} processes" if processes not in (None, 1) else ""
    return (
        f"{_show(recipe['precision'])}, batch {_show(batch)}{several}, learning rate "
        f"{_show(recipe['learning_rate'])} ({_show(recipe['lr_scheduler_type'])})"
    )


def _student_line(student: dict[str, Any] | None) -> str:
    if student is None:
        return ""
    teacher = student["teacher"]
    any_number = f"any, by default {_show(student['default_steps'])}"
    calls = any_number if student["steps"] == "any" else _show(student["steps"])
    return f"network calls a sample: {calls}" + (
        f", from {_show(teacher)}" if teacher else "; its teacher is not noted"
    )


def _progress_line(progress: dict[str, Any]) -> str:
    if progress["step"] is None:
        return ""
    line = f"step {progress['step']}" + (f" of {progress['of']}" if progress["of"] else "")
    if progress["passes"] is not None:
        whole = progress["of_passes"]
        line += f", pass {progress['passes']:.4g}" + (f" of {whole:.4g}" if whole else "")
    later = progress["logged"]
    if later and later > progress["step"]:
        line += f" (logged up to step {later})"
    if progress["of"] is None:
        return line
    return f"{line}: {'finished' if progress['finished'] else 'not finished'}"


def _figures_lines(held_out: dict[str, Any] | None) -> list[str]:
    if held_out is None:
        return []
    last, best = held_out["last"], held_out["best"]
    if last["step"] == best["step"]:
        return [_figures_line("last and best", last)]
    return [_figures_line("last", last), _figures_line("best", best)]


def _figures_line(which: str, figures: dict[str, Any]) -> str:
    names = {"loss": "loss", "cosine": "cosine", "r2": "R2"}
    shown = [f"{label} {figures[name]:.4g}" for name, label in names.items() if is_number(figures[name])]
    return f"{which}, step {figures['step']}: {', '.join(shown)}"


def _weights_line(entry: dict[str, Any]) -> str:
    kind = "averaged, used to generate" if entry["averaged"] else "of the last step"
    return f"{printable(entry['file'])}: {_show(entry['dtype'])}, {entry['bytes'] / 1e6:,.1f} MB, {kind}"


def _data_lines(data: dict[str, Any]) -> list[str]:
    if data["path"] is None and data["samples"] is None:
        return []
    gone = " (not there now)" if data["there"] is False else ""
    count = f", {_show(data['samples'])} samples" if data["samples"] else ""
    share = data["held_out"]
    held = ""
    if is_number(share) and share > 0:
        held = f", {share:.0%} held out" if share < 1 else f", {share:g} held out"
        held += f" by groups {_show(data['group_pattern'])}" if data["group_pattern"] else ""
    lines = [f"{_show(data['path'])}{gone}{count}{held}"]
    if data["fingerprint"]:
        lines.append(f"fingerprint {_show(data['fingerprint'])[:16]}")
    for side, name in (data["towers"] or {}).items():
        lines.append(f"{side} tower {_show(name)}")
    return lines


def _checkpoint_line(entry: dict[str, Any]) -> str:
    return f"{entry['name']}: " + ("whole" if entry["whole"] else f"damaged ({printable(entry['problem'])})")
