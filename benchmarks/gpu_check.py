"""Whether a GPU computes what the CPU does, and how near it is to its limits.

For a machine that may have other versions than the pinned ones, and neither diffusers nor pytest. First each
dtype and path is compared with the CPU in float32 on a small network; then speed and memory of the default
network are measured beside the floor: products at the rate of a large product of random numbers, and reading
the weights at the bandwidth of a copy. Every part has a time limit and does not hide the others' results;
the last line is JSON with everything. Exit status 1 when a comparison or a part fails, 0 without a GPU.
`--device cpu` compares at a tiny size, to try the program itself.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products; read when CUDA starts

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.measure import (
    Row,
    block_flops,
    block_matrices,
    described,
    machine,
    markdown,
    paper_config,
    synchronize,
    untrained,
)
from benchmarks.our_step import RandomEmbeddings, our_step, random_batch
from benchmarks.quantization import times
from blip3o_dit.data.embeddings import open_embeddings
from blip3o_dit.data.store import StoreWriter
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.config import BLIP3oDiTConfig
from blip3o_dit.model.quantization import DTYPES
from blip3o_dit.training.config import LOW_MEMORY_DEFAULTS, TrainingConfig
from blip3o_dit.training.memory import GIB, forecast
from blip3o_dit.training.metrics import PASSES_PER_STEP, forward_flops
from blip3o_dit.training.run import train, train_on

# Largest relative distance (root mean square) from the CPU's float32.
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2, "float16": 5e-3}
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2, "float16": 2e-2, "memory low": 2e-2}
ROWS_OF_A_LARGE_PRODUCT = 8192


@dataclass(frozen=True)
class Setup:
    """Where to check, and how large the network is that is compared."""

    device: torch.device
    width: int
    layers: int
    steps: int
    quick: bool

    def config(self, source: str = "noise") -> BLIP3oDiTConfig:
        flow: dict[str, Any] = {"condition_dropout": 0.1, "source": source}
        if source != "noise":
            flow["prediction_type"] = "preconditioned"
        heads = self.width // 16 if self.quick else self.width // 64
        return BLIP3oDiTConfig(
            model_dim=self.width,
            num_layers=self.layers,
            num_heads=heads,
            num_kv_heads=heads if source == "noise" else heads // 2,
            in_channels=24,
            eva_embedding_size=40,
            input_size=4 if self.quick else 8,
            flow_matching=flow,
        )

    def model(self, source: str = "noise") -> BLIP3oDiTModel:
        """The same random weights at every call, on the CPU, without zero gates."""
        torch.manual_seed(0)
        model = BLIP3oDiTModel(self.config(source))
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.02)
            if source != "noise":
                model.source_weight.normal_(std=0.1)
                model.source_std.fill_(0.3)
        return model.eval()

    def there(self, model: BLIP3oDiTModel, dtype: torch.dtype) -> BLIP3oDiTModel:
        return model.to(self.device, dtype)

    def dtypes(self) -> list[torch.dtype]:
        narrow = [torch.bfloat16] if self.device.type == "cpu" else [torch.bfloat16, torch.float16]
        return [torch.float32, *narrow]

    def conditions(self, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        config = self.config()
        return torch.randn(batch, config.num_tokens, config.eva_embedding_size, generator=generator)


# What is compared


def check_generation(setup: Setup) -> list[Row]:
    """Every dtype and way of launching, with and without guidance and an informed source."""
    rows = []
    ways = ("",) if setup.device.type == "cpu" else ("", "recorded", "compiled")  # compiling takes seconds
    for source in ("noise", "ridge"):
        for guidance in (1.0, 3.0):
            expected = _generate(setup.model(source), setup.conditions(3), guidance)
            for dtype in setup.dtypes():
                for way in ways if dtype == torch.bfloat16 else ways[:2]:
                    model = _prepared(setup.there(setup.model(source), dtype), way)
                    for _ in range(3 if way else 1):  # plainly, recorded, replayed
                        found = _generate(model, setup.conditions(3), guidance)
                    what = f"generate {_name(dtype)}, {source}, guidance {guidance:g}"
                    what += f", {way}" if way else ""
                    rows.append(_compared(what, found, expected, TOLERANCE[_name(dtype)]))
    return rows


def check_recordings(setup: Setup) -> list[Row]:
    """Recorded generations with batch sizes and guidance that change and come back."""
    model = _prepared(setup.there(setup.model(), torch.bfloat16), "recorded")
    plain, rows = setup.there(setup.model(), torch.bfloat16), []
    for batch, guidance in 3 * ((1, 1.0), (3, 1.0), (3, 3.0), (8, 1.0)):
        found, expected = (_generate(m, setup.conditions(batch), guidance) for m in (model, plain))
        what = f"recorded, batch {batch}, guidance {guidance:g}"
        rows.append(_compared(what, found, expected, TOLERANCE["bfloat16"]))
    return rows


def check_devices(setup: Setup) -> list[Row]:
    """The same samples on each device by its name, whatever the current device is."""
    names = ["cpu"]
    if setup.device.type == "cuda":
        names = ["cuda", *(f"cuda:{number}" for number in range(min(2, torch.cuda.device_count())))]
    rows = []
    expected = _generate(setup.model(), setup.conditions(2))
    with tempfile.TemporaryDirectory() as folder:
        setup.model().save_pretrained(folder)
        for name in names:
            inference = BLIP3oInference(folder, device=name)
            for _ in range(2):
                found = inference.generate(setup.conditions(2), num_inference_steps=4, solver="euler")
                rows.append(
                    _compared(f"device {name}", torch.as_tensor(found), expected, TOLERANCE["bfloat16"])
                )
    return rows


def check_quantized(setup: Setup) -> list[Row]:
    """Weights of one byte: plainly, recorded and replayed, beside the same weights widened to float32."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        setup.model("ridge").save_pretrained(folder)
        for kind in DTYPES:
            here = BLIP3oInference(folder, device="cpu", dtype=torch.float32, quantize=kind, alone=True)
            expected = _generate(here.model, setup.conditions(2))
            there = BLIP3oInference(
                folder, device=setup.device.type, dtype=torch.bfloat16, quantize=kind, alone=True
            )
            for _ in range(3):
                found = _generate(there.model, setup.conditions(2))
                rows.append(_compared(f"quantize {kind}", found, expected, TOLERANCE["bfloat16"]))
    return rows


def check_training(setup: Setup) -> list[Row]:
    """Losses of the first steps in every precision."""
    expected, rows = _losses(setup, "cpu"), []
    where = setup.device.type
    kinds: dict[str, dict[str, Any]] = {"float32": {}, "bfloat16": {"bf16": True}}
    if where == "cuda":
        kinds["bfloat16 recorded"] = {"bf16": True, "cuda_graphs": True}
    if where == "cuda":
        kinds["float16"] = {"fp16": True}
    if importlib.util.find_spec("torchao") and not setup.quick:
        kinds["memory low"] = {"memory": "low", **LOW_MEMORY_DEFAULTS}
    for name, settings in kinds.items():
        with _uncompiled():  # torchao compiles its optimizer, for ten seconds a step
            found = _losses(setup, where, **settings)
        rows.append(
            _compared(f"training in {name}", found, expected, LOSS_TOLERANCE[name.removesuffix(" recorded")])
        )
    return rows


def check_resume(setup: Setup) -> list[Row]:
    """A run that continues from a checkpoint ends with the very weights of the uninterrupted one."""
    on_cpu = setup.device.type == "cpu"
    return [_resumed(setup, cuda_graphs=graphs) for graphs in ((False,) if on_cpu else (False, True))]


def _resumed(setup: Setup, **more: bool) -> Row:
    named = {field.name for field in fields(TrainingConfig)}
    settings: dict[str, Any] = {"bf16": True, "save_steps": 2, "max_steps": 4, **more}
    settings |= {"deterministic": True} if "deterministic" in named else {}
    with tempfile.TemporaryDirectory() as folder, _algorithms_restored():
        data, root = _write_store(setup, Path(folder) / "store"), Path(folder)
        whole, again = (_config(setup, data, root / name, **settings) for name in ("whole", "again"))
        train(whole)
        train(again, resume=root / "whole" / "checkpoint-2")
        first, second = (load_file(root / name / "model.safetensors") for name in ("whole", "again"))
    different = [name for name in first if not torch.equal(first[name], second[name])]
    what = "resume bit for bit" + (", recorded" if more["cuda_graphs"] else "")
    what += "" if "deterministic" in settings else ", no --deterministic"
    return {"check": what, "found": len(different), "at most": 0, "ok": not different}


def _losses(setup: Setup, device: str, **settings: Any) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        data = _write_store(setup, Path(folder) / "store")
        asked = _config(
            setup, data, Path(folder) / "run", **{"device": device, "logging_steps": 1} | settings
        )
        trainer = train_on(open_embeddings(data), asked)
        return torch.tensor([line["loss"] for line in trainer.state.log_history if "loss" in line])


def _config(setup: Setup, data: str, output: Path, **settings: Any) -> TrainingConfig:
    config = setup.config()
    return TrainingConfig(
        **{
            "embeddings_path": data,
            "output_dir": str(output),
            "model_dim": config.model_dim,
            "num_layers": config.num_layers,
            "num_heads": config.num_heads,
            "source": "ridge",
            "batch_size": 8,
            "max_steps": setup.steps,
            "learning_rate": 1e-3,
            "eval_split": 0.0,
            "device": setup.device.type,
            **settings,
        }
    )


def _write_store(setup: Setup, path: Path) -> str:
    tokens, condition, target = setup.config().data_sizes
    eva, clip = RandomEmbeddings(tokens, condition, target).fetch(range(32))
    with StoreWriter(path, num_tokens=tokens, condition_dim=condition, target_dim=target) as writer:
        writer.append(eva, clip, [{"key": str(i)} for i in range(32)])
    return str(path)


def _prepared(model: BLIP3oDiTModel, way: str) -> BLIP3oDiTModel:
    if way == "compiled":
        model.compile_for_generation()
    elif way == "recorded":
        model.record_generation()
    return model


def _generate(model: BLIP3oDiTModel, conditions: Tensor, guidance: float = 1.0) -> Tensor:
    return model.generate(conditions, num_inference_steps=4, solver="euler", guidance_scale=guidance).cpu()


def _compared(what: str, found: Tensor, expected: Tensor, tolerance: float) -> Row:
    distance = float((found.float() - expected).norm() / expected.norm())
    return {"check": what, "found": distance, "at most": tolerance, "ok": distance <= tolerance}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def _uncompiled() -> Iterator[None]:
    torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        torch.compiler.set_stance("default")


@contextmanager
def _algorithms_restored() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


# What is measured, on a GPU only


def measure_hardware(setup: Setup) -> list[Row]:
    return [
        {"figure": "bf16 product TFLOP/s", "value": product_rate() / 1e12},
        {"figure": "copy TB/s", "value": copy_bandwidth() / 1e12},
    ]


def product_rate() -> float:
    """Operations per second of a large bfloat16 product of random numbers; constant ones run faster."""
    n = ROWS_OF_A_LARGE_PRODUCT
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / _median_seconds(lambda: F.linear(a, b), 10)


def copy_bandwidth() -> float:
    """Bytes per second read and written by a copy of 2 GiB on the device."""
    source = torch.empty(2 * GIB, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median_seconds(lambda: target.copy_(source), 5)


# How generations are launched: (way, batch, guidance, network calls), batches from small to large.
GENERATIONS = [
    *(("plain", batch, 1.0, 16) for batch in (1, 64)),
    *(
        ("recorded", *row)
        for row in ((1, 1.0, 1), (1, 1.0, 16), (1, 3.0, 16), (8, 1.0, 16), (64, 1.0, 16), (64, 3.0, 16))
    ),
    *(("compiled", batch, 1.0, 16) for batch in (1, 64)),
]


def measure_generation(setup: Setup) -> Iterator[Row]:
    """The default network in bfloat16, from conditions on the GPU to tokens on the GPU."""
    rate, bandwidth = product_rate(), copy_bandwidth()
    model = untrained(paper_config(), dtype=torch.bfloat16).eval()
    matrices = block_matrices(model, condition=False)
    config, before = model.config, ""
    for way, batch, guidance, calls in GENERATIONS:
        if way != before:
            before, _ = way, _prepared(model, way)
        eva = torch.randn(batch, config.num_tokens, config.eva_embedding_size, device="cuda")
        run = partial(model.generate, eva, num_inference_steps=calls, solver="euler", guidance_scale=guidance)
        torch.cuda.reset_peak_memory_stats()
        first, second = _seconds(run), _seconds(run)  # the second one is recorded
        seconds = _median_seconds(run, 2 if way == "plain" else 7)
        rows_of_x = batch * config.num_tokens * (2 if guidance != 1.0 else 1)
        # Each call multiplies every token by the blocks' matrices, and reads them once.
        reading = sum(matrix.nbytes for matrix in matrices) / bandwidth
        floor = calls * max(block_flops(matrices, rows_of_x) / rate, reading)
        yield {
            "figure": f"generate, batch {batch}, guidance {guidance:g}, {calls} calls, {way}",
            "seconds": seconds,
            "ms a call": 1000 * seconds / calls,
            "first s": first,
            "second s": second,
            "floor s": floor,
            "floor / measured": floor / seconds,
            "peak GiB": torch.cuda.max_memory_allocated() / GIB,
        }


def measure_quantized(setup: Setup) -> Iterator[Row]:
    """A generation of one sample by the default network, recorded, with each kind of weights."""
    for row in times(layers=24, batches=[1], calls=16, rounds=7):
        yield {"figure": f"{row.pop('measured')}, {row.pop('weights')}", **row}


TRAININGS: list[tuple[int, dict[str, Any]]] = [
    (32, {}),
    (32, {"cuda_graphs": True}),
    (128, {"cuda_graphs": True}),
    (128, {"gradient_checkpointing": True}),
    (128, {"cuda_graphs": True, "compile": True}),
]


def measure_training(setup: Setup) -> Iterator[Row]:
    """Steps of the default network: bfloat16 autocast, clipping, AdamW and averaged weights in float32."""
    rate, bandwidth = product_rate(), copy_bandwidth()
    for batch, settings in TRAININGS:
        gc.collect()  # a trainer and its callbacks refer to each other
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        model = untrained(paper_config(gradient_checkpointing="gradient_checkpointing" in settings))
        step = our_step(model, random_batch(model, batch), bf16=True, **settings)
        step()
        seconds = _median_seconds(step, 4)
        count = model.num_parameters()
        tokens = batch * model.config.num_tokens
        # Three products a weight and token. AdamW and averages read gradient, weight, two states and average,
        # and write all but the gradient: at most ten float32 numbers a weight.
        floor = 6 * count * tokens / rate + 2 * 5 * 4 * count / bandwidth
        asked = TrainingConfig(batch_size=batch, bf16=True, **settings)
        yield {
            "figure": ", ".join(
                [f"training step, batch {batch}", *(name.replace("_", " ") for name in settings)]
            ),
            "seconds": seconds,
            "samples/s": batch / seconds,
            "mfu": PASSES_PER_STEP * forward_flops(model.config) * batch / seconds / rate,
            "floor s": floor,
            "floor / measured": floor / seconds,
            "peak GiB": torch.cuda.max_memory_allocated() / GIB,
            "forecast GiB": forecast(asked, model.config, torch.device("cuda")).total / GIB,
        }
        del step, model


def _seconds(function: Callable[[], Any]) -> float:
    synchronize()
    started = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - started


def _median_seconds(function: Callable[[], Any], rounds: int) -> float:
    function()
    return sorted(_seconds(function) for _ in range(rounds))[rounds // 2]


# The program

CHECKS: dict[str, tuple[Callable[[Setup], Iterable[Row]], int]] = {
    "generation": (check_generation, 50),
    "recordings": (check_recordings, 30),
    "devices": (check_devices, 30),
    "quantized": (check_quantized, 30),
    "training": (check_training, 45),
    "resume": (check_resume, 30),
}
MEASURES: dict[str, tuple[Callable[[Setup], Iterable[Row]], int]] = {
    "hardware": (measure_hardware, 15),
    "training speed": (measure_training, 75),
    "generation speed": (measure_generation, 60),
    "quantized speed": (measure_quantized, 40),
}


def attempt(name: str, part: Callable[[Setup], Iterable[Row]], setup: Setup, limit: float) -> list[Row]:
    """What a part found, and in a last row why it did not come to an end if so."""

    def ring(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not finished after {limit:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, limit)
    rows: list[Row] = []
    try:
        for row in part(setup):
            rows.append(row)
        return rows
    except Exception as error:  # noqa: BLE001 - one part that fails must not hide what the others find
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:300] or "no message"
        why = f"{type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"
        return [*rows, {"check": name, "found": why, "at most": None, "ok": False}]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu-check", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--parts", nargs="+", choices=[*CHECKS, *MEASURES], help="default: all")
    parser.add_argument("--json", type=Path, help="file for everything as JSON")
    parser.add_argument("--seconds", type=float, default=270.0, help="for everything; what is left out fails")
    arguments = parser.parse_args(words)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: no GPU here, nothing was checked")
        return 0
    on_cpu = arguments.device == "cpu"
    sizes = (32, 1, 3) if on_cpu else (256, 4, 8)
    setup = Setup(torch.device(arguments.device), *sizes, quick=on_cpu)
    parts = {name: part for name, part in CHECKS.items() if not (on_cpu and name == "recordings")}
    parts |= {} if on_cpu else MEASURES
    found: dict[str, list[Row]] = {}
    ends = time.monotonic() + arguments.seconds
    for name in arguments.parts or parts:
        part, limit = parts[name]
        started = time.monotonic()
        if not on_cpu:  # the limits are a GPU's
            limit = max(0.001, min(limit, ends - started))
        found[name] = attempt(name, part, setup, 10 * limit if on_cpu else limit)
        print(f"\n## {name}, {time.monotonic() - started:.0f} s\n\n{markdown(found[name])}", flush=True)
    failed = [row["check"] for rows in found.values() for row in rows if not row.get("ok", True)]
    print(f"\n{described(machine())}\n\n" + (f"failed: {'; '.join(failed)}" if failed else "all is well"))
    everything = {"machine": machine(), "failed": failed, "parts": found}
    text = json.dumps(everything, default=str).replace("NaN", "null").replace("Infinity", "null")
    if arguments.json:
        arguments.json.write_text(text + "\n")
    print(text)
    return int(bool(failed))
