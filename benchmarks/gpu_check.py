"""Whether a GPU computes what the CPU does, and how near it is to its limits.

For a machine that may have other versions than the pinned ones, and neither diffusers nor pytest. First each
dtype and path is compared with the CPU in float32 on a small network (`gpu_compare.py`); then speed and
memory of the default network are measured (`gpu_measure.py`). Every part runs in a process of its own, with
a time limit, and what it found is printed and written to the file of --json before the next one begins. Exit
status 1 when a comparison or a part fails, 0 without a GPU. `--device cpu` runs every part at a tiny size, to
try the program itself.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products; read when CUDA starts

import torch

from benchmarks import gpu_compare, gpu_measure
from benchmarks.gpu_compare import Setup
from benchmarks.measure import Machine, Row, described, machine, markdown, record

Part = Callable[[Setup], Iterable[Row]]

CHECKS: dict[str, tuple[Part, int]] = {
    "compare: generation": (gpu_compare.check_generation, 60),
    "compare: recordings": (gpu_compare.check_recordings, 40),
    "compare: devices": (gpu_compare.check_devices, 40),
    "compare: student": (gpu_compare.check_student, 30),
    "compare: draws": (gpu_compare.check_draws, 20),
    "compare: quantized": (gpu_compare.check_quantized, 40),
    "compare: decoder": (gpu_compare.check_decoder, 40),
    "compare: training": (gpu_compare.check_training, 90),
    "compare: resume": (gpu_compare.check_resume, 90),
    "compare: checkpoints": (gpu_compare.check_checkpoints, 40),
    "compare: lack of memory": (gpu_compare.check_lack_of_memory, 40),
}


def main(words: Sequence[str]) -> int:
    arguments = _parser().parse_args(words)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: no GPU here, nothing was checked")
        return 0
    on_cpu = arguments.device == "cpu"
    sizes = (32, 1, 3) if on_cpu else (256, 4, 8)
    setup = Setup(torch.device(arguments.device), *sizes, quick=on_cpu)
    chosen = choose(arguments.parts, on_cpu)
    if arguments.list:
        print("\n".join(f"{limit:4} s  {name}" for name, (_, limit) in chosen.items()))
        return 0
    start = "fork"
    rows, error = attempt("machine", _machine, setup, 120, start)
    if error:  # something here has begun to use the GPU, and what is forked cannot
        start = "spawn"
        rows, error = attempt("machine", _machine, setup, 120, start)
    where = rows[0] if rows else machine()
    print(described(where), f"processes: {start}", error, sep="\n", flush=True)
    if on_cpu:  # the limits are a GPU's
        chosen = {name: (part, 20 * limit) for name, (part, limit) in chosen.items()}
    seconds = math.inf if on_cpu else arguments.seconds
    failed = run_parts(chosen, setup, seconds, arguments.json, where, start)
    print("\n" + (f"failed: {'; '.join(failed)}" if failed else "all is well"))
    return int(bool(failed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu-check", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--parts", nargs="+", help="those whose names begin so (default: all)")
    parser.add_argument("--list", action="store_true", help="say which these are, and end")
    parser.add_argument("--json", type=Path, help="file that keeps the rows, beside other machines'")
    parser.add_argument("--seconds", type=float, default=850.0, help="for everything; what is left out fails")
    return parser


def choose(beginnings: Sequence[str] | None, on_cpu: bool) -> dict[str, tuple[Part, int]]:
    """The parts whose names begin with one of these, all for None.

    Raises:
        ValueError: for a beginning that no part has.
    """
    parts = CHECKS | gpu_measure.parts()
    if on_cpu:
        del parts["compare: recordings"], parts["compare: lack of memory"]  # there are none
    for beginning in beginnings or ():
        if not any(name.startswith(beginning) for name in parts):
            raise ValueError(f"--parts: expected a beginning of one of {', '.join(parts)}, found {beginning}")
    return {name: part for name, part in parts.items() if name.startswith(tuple(beginnings or [""]))}


def run_parts(
    parts: dict[str, tuple[Part, int]],
    setup: Setup,
    seconds: float,
    file: Path | None,
    where: Machine,
    start: str = "fork",
) -> list[str]:
    """Prints and keeps what each part finds; returns what failed."""
    failed: list[str] = []
    ends = time.monotonic() + seconds
    for name, (part, limit) in parts.items():
        started = time.monotonic()
        rows, error = attempt(name, part, setup, max(0.001, min(limit, ends - started)), start)
        print(f"\n## {name}, {time.monotonic() - started:.0f} s\n\n{markdown(rows)}", flush=True)
        if error:
            print(error, flush=True)
        failed += [row["check"] for row in rows if not row.get("ok", True)] + ([error] if error else [])
        if file and rows:
            words = ["python", "-m", "benchmarks", "gpu-check", "--parts", name]
            record(file, shlex.join(words), rows, where)
    return failed


def attempt(name: str, part: Part, setup: Setup, limit: float, start: str = "fork") -> tuple[list[Row], str]:
    """What a part found in a process of its own, and in one line why it did not come to an end if so.

    A process that hangs is killed, and one that a CUDA error made useless takes no other part with it. What
    is forked need not import again what is here.
    """
    context: Any = get_context(start)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send_rows, args=(theirs, part, setup))
    process.start()
    theirs.close()
    rows: list[Row] = []
    error, ends = "it ended without a word", time.monotonic() + limit
    try:
        while ours.poll(max(0.0, ends - time.monotonic())):
            found = ours.recv()
            if isinstance(found, str):
                error = found
                break
            rows.append(found)
        else:
            error = f"not finished after {limit:.3g} s"
    except EOFError:
        pass  # the process died
    process.kill()
    process.join()
    return rows, f"{name}: {error}" if error else ""


def _machine(setup: Setup) -> list[Row]:
    """Its name initialises CUDA, which this process must not do."""
    if setup.device.type == "cuda":
        torch.zeros(1, device=setup.device)
    return [dict(machine())]


def _send_rows(found: Connection, part: Part, setup: Setup) -> None:
    """Each row as soon as it is there, then the error or ""."""
    if setup.device.type == "cpu":
        torch.set_num_threads(1)  # a forked process has none of its parent's threads
    try:
        for row in part(setup):
            found.send(row)
        found.send("")
    except Exception as error:  # noqa: BLE001 - one part that fails must not hide what the others find
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:300] or "no message"
        found.send(f"{type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno})")
