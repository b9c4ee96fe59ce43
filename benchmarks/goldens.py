"""Four small trainings beside what they computed when they were recorded, to the last bit.

The default recipe, the paper's, a distillation and `--memory low` (with products of bfloat16 native and
emulated) take 100 steps each on one thread of a CPU. tests/goldens.json has each step's loss and gradient
norm, and digests of the parts of the first steps: a difference is traced to the part that moved first.
Bits are compared with a record of the same libraries, processor family and instruction set; where there is
none, figures must agree with another record within the tolerances of `RUNS`. `--record` writes a new record;
`--all` takes the processor's own instructions, then the oldest that torch, MKL and oneDNN can be held to.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.traces import TRACED, Enough, Trace, Tracer
from blip3o_dit.data.embeddings import Embeddings
from blip3o_dit.data.store import EmbeddingStore, StoreWriter
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.layers import BFLOAT16_VARIABLE
from blip3o_dit.training.base_trainer import ExactResumeTrainer
from blip3o_dit.training.config import LOW_MEMORY_DEFAULTS, PAPER_RECIPE, TrainingConfig
from blip3o_dit.training.distillation import student_trainer
from blip3o_dit.training.distillation_config import DistillationConfig
from blip3o_dit.training.run import build_trainer
from blip3o_dit.utils.logging import quiet_transformers

FILE = Path(__file__).parent.parent / "tests" / "goldens.json"
STEPS = 100

# What holds torch's own code, MKL and oneDNN to fewer instructions than the processor has.
HOLDS = ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")
REGIMES: tuple[dict[str, str], ...] = (
    {},
    {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"},
)

SAMPLES, TOKENS, CONDITION, TARGET = 96, 9, 12, 8
SETTINGS: dict[str, Any] = dict(
    **dict(model_dim=32, num_layers=2, num_heads=2, batch_size=8, learning_rate=1e-3, max_steps=STEPS),
    **dict(eval_split=0.0, save_steps=STEPS, logging_steps=STEPS, num_workers=0, device="cpu"),
)


@dataclass(frozen=True)
class Kind:
    """A training: its settings beside `SETTINGS`, what is said of bfloat16, and whether it is a student's.

    `first` and `tolerance`: how far, relative, losses and gradient norms of the first steps and of all may be
    from a record of other libraries or another instruction set.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    bfloat16: str = "emulated"
    distils: bool = False
    steps: int = STEPS
    first: float = 1e-5
    tolerance: float = 1e-4


ONE_LAYER = {"num_layers": 1}
NO_WARMUP = {"warmup_steps": 0}  # whose first step would change nothing
LOW = {"memory": "low", **LOW_MEMORY_DEFAULTS, **ONE_LAYER, **NO_WARMUP}
RUNS = {
    "default": Kind(NO_WARMUP),
    "paper": Kind({**PAPER_RECIPE, **ONE_LAYER}),
    "distillation": Kind(ONE_LAYER, distils=True, first=2e-5),
    "memory low": Kind(LOW, tolerance=2e-2),  # a weight rounded the other way is one by 2^-8
    "memory low, bfloat16 native": Kind(LOW, bfloat16="native", steps=20, first=1e-3, tolerance=2e-2),
}


def write_store(folder: Path) -> EmbeddingStore:
    """Targets that follow from conditions and something else, all multiples of 1/256: the same anywhere."""
    random = np.random.Generator(np.random.Philox(key=7))
    eva = random.integers(-256, 768, (SAMPLES, TOKENS, CONDITION))
    matrix = random.integers(-32, 33, (CONDITION, TARGET))
    clip = eva @ matrix // 256 + random.integers(-32, 33, (SAMPLES, TOKENS, TARGET))
    sizes = {"num_tokens": TOKENS, "condition_dim": CONDITION, "target_dim": TARGET}
    with StoreWriter(folder, **sizes, dtype="float32", shard_size=32) as writer:
        records = [{"key": f"{number:03}"} for number in range(SAMPLES)]
        writer.append(*(torch.tensor(array / 256).float() for array in (eva, clip)), records)
    return EmbeddingStore(folder)


def make_trainer(kind: Kind, source: Embeddings, output: Path) -> ExactResumeTrainer:
    """The trainer of such a training, before its first step."""
    config = TrainingConfig(**{**SETTINGS, **kind.settings}, output_dir=str(output))
    if not kind.distils:
        return build_trainer(source, config)
    lessons = DistillationConfig(steps=2, train_steps=STEPS, teacher_steps=2, save_steps=STEPS)
    return student_trainer(_teacher(source, config), source, np.arange(SAMPLES), lessons, config)


def _teacher(source: Embeddings, config: TrainingConfig) -> BLIP3oDiTModel:
    """A model as it begins, but for gates, which are open, and numbers that are the same anywhere."""
    model = BLIP3oDiTModel(config.model(num_tokens=TOKENS, condition_dim=CONDITION, target_dim=TARGET))
    random = np.random.Generator(np.random.Philox(key=8))
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        noise = torch.tensor(random.integers(-256, 257, tuple(value.shape)) / 1024).float()
        positive = name.endswith("std") or (".norm" in name and name.endswith("weight"))
        value.data = 1.0 + noise if positive else noise
    return model.eval()


@contextmanager
def regime(bfloat16: str) -> Iterator[None]:
    """One thread, and a processor that multiplies bfloat16 itself or does not."""
    threads, declared = torch.get_num_threads(), os.environ.get(BFLOAT16_VARIABLE)
    os.environ[BFLOAT16_VARIABLE] = bfloat16
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        os.environ.pop(BFLOAT16_VARIABLE)
        if declared is not None:
            os.environ[BFLOAT16_VARIABLE] = declared


def trace(
    name: str,
    source: Embeddings,
    output: Path,
    *,
    steps: int | None = None,
    change: Callable[[ExactResumeTrainer], object] = lambda trainer: None,
) -> Trace:
    """The training of this name, or its first steps, on `write_store`'s samples; `change` is done to it."""
    kind = RUNS[name]
    with regime(kind.bfloat16), quiet_transformers(), _uncompiled():
        trainer = make_trainer(kind, source, output)
        change(trainer)
        tracer = Tracer(trainer, steps or kind.steps)
        try:
            trainer.train()
        except Enough:
            trainer.on_train_end()
    return tracer.trace


@contextmanager
def _uncompiled() -> Iterator[None]:
    """torchao's optimizer as it is written: compiled its bits would depend on a compiler, and take longer."""
    with mock.patch.object(torch, "compile", lambda function, **_: function):
        yield


def here() -> dict[str, str]:
    """What the last bits depend on."""
    libraries = ("transformers", "accelerate", "numpy", "torchao")
    products = re.findall(r"(?:Kernel Library Version|MKL-DNN v)\s*([\d.]+)", torch.__config__.show())
    return {
        "torch": torch.__version__,
        "MKL and oneDNN": " ".join(products),
        **{name: version(name) for name in libraries},
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "held to": " ".join(f"{name}={os.environ[name]}" for name in HOLDS if name in os.environ),
    }


def _processor() -> str:
    """Vendor and family, by which the products' library chooses its code."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    found = dict(map(str.strip, line.split(":", 1)) for line in reversed(lines) if ":" in line)
    return " ".join(found[name] for name in ("vendor_id", "cpu family") if name in found) or "unknown"


Record = dict[str, Any]  # {"where": `here()`, "runs": {name: `Trace.to_json`}}


def read_records() -> list[Record]:
    return json.loads(FILE.read_text()) if FILE.is_file() else []


def compare(name: str, found: Trace, records: Sequence[Record], where: Mapping[str, str]) -> tuple[bool, str]:
    """Whether a trace is what was recorded, and in words how it differs or how near it is."""
    traces = [(record["where"], Trace.from_json(record["runs"][name])) for record in records]
    for there, golden in traces:
        if there == where:
            difference = golden.difference(found)
            return not difference, difference or f"the same bits, {len(found.losses)} steps"
    if not traces:
        return False, f"expected a record in {FILE}, found none"
    golden = min((golden for _, golden in traces), key=lambda golden: golden.distance(found))
    kind = RUNS[name]
    begun, whole = golden.distance(found, TRACED), golden.distance(found)
    near = f"first steps {begun:.1g} (at most {kind.first}), all {whole:.1g} (at most {kind.tolerance})"
    ok = begun <= kind.first and whole <= kind.tolerance
    return ok, f"no record of this machine; relative to the nearest: {near}" + (
        "" if ok else f"; {golden.difference(found)}"
    )


def save(traces: Mapping[str, Trace], where: Mapping[str, str]) -> None:
    """Put them in the file: in place of what was recorded here, or with other libraries."""
    kept = [record for record in read_records() if _differs_in_processor(record["where"], where)]
    runs = {name: trace.to_json() for name, trace in traces.items()}
    records = sorted([*kept, {"where": dict(where), "runs": runs}], key=lambda record: str(record["where"]))
    FILE.write_text(json.dumps(records, indent=1) + "\n")


def _differs_in_processor(there: Mapping[str, str], where: Mapping[str, str]) -> bool:
    differing = {name for name in where if there.get(name) != where[name]}
    return bool(differing) and differing <= {"processor", "instructions", "held to"}


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks goldens", description=__doc__)
    parser.add_argument("--record", action="store_true", help="write what is computed now")
    parser.add_argument("--all", action="store_true", help="then with the oldest instructions")
    arguments = parser.parse_args(words)
    if arguments.all:
        rest = [word for word in words if word != "--all"]
        command = [sys.executable, "-m", "benchmarks", "goldens", *rest]
        return max(subprocess.run(command, env=os.environ | held).returncode for held in REGIMES)
    where = here()
    print(", ".join(f"{name} {value}" for name, value in where.items() if value), flush=True)
    traces: dict[str, Trace] = {}
    failed = False
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            traces[name] = trace(name, write_store(Path(folder, "store")), Path(folder, "run"))
        ok, said = compare(name, traces[name], read_records(), where)
        failed |= not ok
        print(f"{name}: {said}", flush=True)
    if arguments.record:
        save(traces, where)
    return int(failed and not arguments.record)
