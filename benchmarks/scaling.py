"""Scaling of cost: time and memory against batch, tokens, width, depth; the fitted exponents; a figure.

Each point is a process of its own: a generation call and a training step of a network that differs from the
base in one size. Peak memory is over the process's own before it built the network.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measure import Row, alternate, device, exponent, paper_config, peak_gib, untrained

BASE = {"batch": 8, "grid": 8, "width": 448, "layers": 4}
SWEEPS = {
    "batch": (2, 4, 8, 16, 32),
    "tokens": (16, 64, 256, 1024),
    "width": (224, 448, 896, 1792),
    "layers": (2, 4, 8, 16),
}
HEAD_WIDTH = 64
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
        draw(rows, arguments.figure)
    return rows + exponents(rows)


def exponents(rows: list[Row]) -> list[Row]:
    """One row per sweep: b of y = a x^b over the upper half of its points, where fixed costs weigh less."""
    fitted = []
    for sweep in dict.fromkeys(row["against"] for row in rows):
        points = [row for row in rows if row["against"] == sweep]
        points = points[len(points) // 2 - 1 :]
        measured = {name: exponent([(row["value"], row[name]) for row in points]) for name in MEASURES}
        fitted.append({"against": sweep, "value": "exponent", **measured})
    return fitted


def draw(rows: list[Row], file: Path) -> None:
    """Measured points and the fitted power law of every sweep, both axes logarithmic."""
    from matplotlib.figure import Figure

    laws = {row["against"]: row for row in exponents(rows)}
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    for axes, sweep in zip(figure.subplots(1, len(laws)), laws, strict=True):
        points = [row for row in rows if row["against"] == sweep]
        xs = [row["value"] for row in points]
        for name, color in zip(MEASURES, ("#0072b2", "#d55e00", "#009e73"), strict=True):
            b = laws[sweep][name]
            last = points[-1][name]
            axes.plot(xs, [row[name] for row in points], "o", color=color)
            fit = [last * (x / xs[-1]) ** b for x in xs]
            axes.plot(xs, fit, color=color, linewidth=1, label=f"{name}: {b:.2f}")
        axes.set(xscale="log", yscale="log", xlabel=sweep)
        axes.set_xticks(xs, [str(x) for x in xs], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8, title="measure: exponent", title_fontsize=8)
    figure.savefig(file, dpi=120)


def _point(sweep: str, value: int, rounds: int) -> Row:
    sizes = BASE | ({"grid": round(value**0.5)} if sweep == "tokens" else {sweep: value})
    words = [sys.executable, "-m", "benchmarks", "scaling", "--rows", "--point", json.dumps(sizes)]
    words += ["--rounds", str(rounds)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    return {"against": sweep, "value": value, **json.loads(done.stdout.splitlines()[-1])[0]}


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
        velocity = model.velocity_of(eva, model.source_of(eva))
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
