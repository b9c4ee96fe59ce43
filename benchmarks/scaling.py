"""Scaling of cost: time and memory against batch, tokens, width, depth, samples; the exponents; a figure.

Each point is a process of its own: a generation call and a training step of a network that differs from the
base in one size. Peak memory is over the process's own before it built the network. Samples are those of a
store at full widths: until training could start (as in `loading`), a pass over it, and memory resident.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import loading
from benchmarks.measure import Row, alternate, device, paper_config, peak_gib, power_law, untrained

BASE = {"batch": 8, "grid": 8, "width": 448, "layers": 4}
SWEEPS = {
    "batch": (2, 4, 8, 16, 32),
    "tokens": (16, 64, 256, 1024),
    "width": (224, 448, 896, 1792),
    "layers": (2, 4, 8, 16),
    "samples": (1024, 2048, 4096, 8192),
}
HEAD_WIDTH = 64
COLORS = ("#0072b2", "#d55e00", "#009e73")
MEASURES = ("generation call s", "training step s", "training GiB")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--figure", type=Path, help="PNG to draw")
    parser.add_argument("--point", help=argparse.SUPPRESS)  # what a process of its own measures


def run(arguments: argparse.Namespace) -> list[Row]:
    if arguments.point:
        return [_measure(json.loads(arguments.point), arguments.rounds)]
    rows = [_point(sweep, value, arguments.rounds) for sweep in arguments.sweeps for value in SWEEPS[sweep]]
    if arguments.figure:
        plot(rows, arguments.figure)
    return rows + exponents(rows)


def exponents(rows: list[Row]) -> list[Row]:
    """One row per sweep: b of y = a x^b, as `_laws` fits it."""
    return [
        {"against": sweep, "value": "exponent", **{name: b for name, (_, b) in _laws(points).items()}}
        for sweep, points in _by_sweep(rows).items()
    ]


def plot(rows: list[Row], file: Path) -> None:
    """Measured points and the fitted power law of every sweep, both axes logarithmic."""
    from matplotlib.figure import Figure

    sweeps = _by_sweep(rows)
    figure = Figure(figsize=(14, 5.6), layout="constrained")
    for axes, (sweep, points) in zip(figure.subplots(1, len(sweeps)), sweeps.items(), strict=True):
        xs = [row["value"] for row in points]
        for (name, (a, b)), color in zip(_laws(points).items(), COLORS, strict=True):
            axes.plot(xs, [row[name] for row in points], "o", color=color)
            axes.plot(xs, [a * x**b for x in xs], color=color, linewidth=1, label=f"{name}: {b:.2f}")
        axes.set(xscale="log", yscale="log", xlabel=sweep, ylim=(None, 4 * axes.get_ylim()[1]))
        axes.set_xticks(xs, [str(x) for x in xs], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8, title="measure: exponent", title_fontsize=8, loc="upper left")
    figure.savefig(file, dpi=120)


def _by_sweep(rows: list[Row]) -> dict[str, list[Row]]:
    return {
        sweep: [row for row in rows if row["against"] == sweep]
        for sweep in dict.fromkeys(row["against"] for row in rows)
    }


def _laws(points: list[Row]) -> dict[str, tuple[float, float]]:
    """a and b of every measure of a sweep, over its upper half of points, where fixed costs weigh less."""
    upper = points[len(points) // 2 - 1 :]
    names = [name for name in points[0] if name not in ("against", "value")]
    return {name: power_law([(row["value"], row[name]) for row in upper]) for name in names}


def _point(sweep: str, value: int, rounds: int) -> Row:
    if sweep == "samples":
        return {"against": sweep, "value": value, **_read(value)}
    sizes = BASE | ({"grid": round(value**0.5)} if sweep == "tokens" else {sweep: value})
    words = [sys.executable, "-m", "benchmarks", "scaling", "--rows", "--point", json.dumps(sizes)]
    words += ["--rounds", str(rounds)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    return {"against": sweep, "value": value, **json.loads(done.stdout.splitlines()[-1])[0]}


def _read(samples: int) -> Row:
    """A store of so many samples: seconds to a first batch, of a pass, and GiB resident at most."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        loading.write_store(path, samples)
        (start,) = loading.in_a_fresh_process(str(path), "exact")
        first, *_ = loading.in_a_fresh_process(str(path), "exact", "0")
    seconds = sum(value for name, value in start.items() if name.endswith("_seconds"))
    return {
        "start s": seconds,
        "pass s": samples / first["samples_per_second"],
        "reading GiB": first["peak_mib"] / 1024,
    }


def _measure(sizes: dict[str, int], rounds: int) -> Row:
    before = peak_gib()
    config = paper_config(
        model_dim=sizes["width"],
        num_heads=sizes["width"] // HEAD_WIDTH if sizes["width"] % HEAD_WIDTH == 0 else 4,
        num_layers=sizes["layers"],
        input_size=sizes["grid"],
    )
    model = untrained(config)
    batch, n = sizes["batch"], config.num_tokens
    eva = torch.randn(batch, n, config.eva_embedding_size, device=device())
    x = torch.randn(batch, n, config.in_channels, device=device())
    t = torch.full((batch,), 0.5, device=device())
    with torch.no_grad():
        velocity = model.make_velocity_fn(eva, model.source_distribution(eva))
    functions: dict[str, Callable[[], Any]] = {"call": lambda: _without_gradients(velocity, x, t)}
    seconds = alternate(functions, rounds)
    seconds |= alternate({"step": _training_step(model, x, t, eva)}, rounds)
    return dict(zip(MEASURES, (seconds["call"], seconds["step"], peak_gib() - before), strict=True))


@torch.no_grad()
def _without_gradients(velocity: Callable, x: torch.Tensor, t: torch.Tensor) -> None:
    velocity(x, t)


def _training_step(
    model: nn.Module, x: torch.Tensor, t: torch.Tensor, eva: torch.Tensor
) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        model(x, t, eva).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
