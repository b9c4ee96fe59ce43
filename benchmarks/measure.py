"""What the speed benchmarks share: alternating timings, the floor, the machine, tables."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blip3o_dit.evaluation.predictions import peak_memory_mib
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.config import BLIP3oDiTConfig
from blip3o_dit.model.layers import has_native_matmul

Row = dict[str, Any]
Machine = Mapping[str, Any]

# Networks to measure, by `BLIP3oDiTConfig`'s settings.
SIZES: dict[str, dict[str, Any]] = {
    "1/4 width": {"model_dim": 448, "num_heads": 7, "num_layers": 24},
    "default width": {"model_dim": 1792, "num_heads": 28, "num_layers": 4},
    "default": {},
}


def alternate(
    functions: Mapping[str, Callable[[], Any]], rounds: int, *, warm_up: int = 1
) -> dict[str, float]:
    """Median seconds of each function, called in turn `rounds` times after rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(-warm_up, rounds):
        for name, function in functions.items():
            synchronize()
            started = time.perf_counter()
            function()
            synchronize()
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def block_matrices(model: BLIP3oDiTModel, *, condition: bool) -> list[Tensor]:
    """The weight matrices of all blocks that every token is multiplied by, from where they lie in memory.

    Without `condition` the keys and values of cross-attention are left out: they are made once per sample.
    """
    kept = []
    for name, weight in model.dit.layers.named_parameters():
        of_condition = "attn2.to_k" in name or "attn2.to_v" in name
        if weight.ndim == 2 and "norm1.linear" not in name and (condition or not of_condition):
            kept.append(weight.detach())
    return kept


def products(matrices: Sequence[Tensor], rows: int, dtype: torch.dtype) -> Callable[[], None]:
    """Plain matrix products of [rows, k] inputs with all matrices in turn: the work nothing can avoid."""
    where = matrices[0].device
    inputs = {k: torch.randn(rows, k, dtype=dtype, device=where) for k in {m.shape[1] for m in matrices}}

    @torch.no_grad()
    def run() -> None:
        for matrix in matrices:
            F.linear(inputs[matrix.shape[1]], matrix.to(dtype))

    return run


def block_flops(matrices: Sequence[Tensor], rows: int) -> float:
    """Floating point operations of `products`: two per weight and row."""
    return 2.0 * rows * sum(matrix.numel() for matrix in matrices)


def paper_config(**sizes: Any) -> BLIP3oDiTConfig:
    """A network that diffusers' class can hold as well: from noise, predicting the velocity."""
    return BLIP3oDiTConfig(**sizes, flow_matching={"condition_dropout": 0.1})


def untrained(config: BLIP3oDiTConfig, *, dtype: torch.dtype = torch.float32) -> BLIP3oDiTModel:
    """Random weights without zero gates, so that no part of the network is idle."""
    torch.manual_seed(0)
    with device():  # a billion numbers take twenty seconds to draw on one core
        model = BLIP3oDiTModel(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model


def machine() -> Machine:
    """Processor, memory and versions, to be read beside every figure."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    native = has_native_matmul(torch.bfloat16, torch.device("cpu"))
    found = {
        "processor": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
        "bfloat16": "native" if native else "emulated",
        "threads": torch.get_num_threads(),
        "memory GiB": round(pages / 2**30, 1),
        "python": platform.python_version(),
        **{name: installed(name) for name in ("torch", "diffusers", "transformers")},
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    return found


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def peak_gib() -> float:
    """Most memory this process has had resident so far; on a GPU the most it has allocated there."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return peak_memory_mib() / 1024


def markdown(rows: Sequence[Row]) -> str:
    """A table with every column that a row has."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def record(file: Path, command: str, rows: Sequence[Row], where: Machine | None = None) -> None:
    """Put what a command found, with its machine, into a JSON file beside other commands' and machines' rows.

    They take the place of what the same command found on a machine of the same `label`.
    """
    content = json.loads(file.read_text()) if file.is_file() else {}
    where = machine() if where is None else where
    rounded = [{name: _rounded(value) for name, value in row.items()} for row in rows]
    others = [found for found in content.get(command, []) if label(found["machine"]) != label(where)]
    content[command] = [*others, {"machine": where, "rows": rounded}]
    file.write_text(json.dumps(content, indent=1) + "\n")


def tables(file: Path) -> str:
    """All that `record` put there, as Markdown: a table for each command, and the machines they ran on."""
    text, machines = "", set()
    for command, runs in json.loads(file.read_text()).items():
        rows = [{"machine": label(run["machine"]), **row} for run in runs for row in run["rows"]]
        text += f"### {command.split()[3].capitalize()}\n\n`{command}`\n\n{markdown(rows)}\n\n"
        machines |= {f"* {label(run['machine'])}: {described(run['machine'])}" for run in runs}
    return text + "### Machines\n\n" + "\n".join(sorted(machines)) + "\n"


def label(machine: Machine) -> str:
    """What tables call a machine."""
    if "gpu" in machine:
        return str(machine["gpu"])
    return f"{machine['processor']}, {machine['threads']} threads, bfloat16 {machine['bfloat16']}"


def described(machine: Machine) -> str:
    return ", ".join(f"{name} {value}" for name, value in machine.items())


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)
