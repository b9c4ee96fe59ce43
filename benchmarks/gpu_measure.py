"""How near a GPU comes to its limits: the default network's speed and memory beside the floor.

The floor of a generation are its products at the rate of a large product of random numbers, or reading the
weights once a call at the bandwidth of a copy; `mfu` of a training is beside the same rate. Each entry is
measured in a process of its own: a new one is a line in GENERATIONS, TRAININGS, SPLITS or PEERS.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from benchmarks import checkpoints
from benchmarks.gpu_compare import Setup, prepared, uncompiled
from benchmarks.measure import (
    Row,
    alternate,
    block_flops,
    block_matrices,
    paper_config,
    peak_gib,
    synchronize,
    untrained,
)
from benchmarks.our_run import run_steps
from benchmarks.our_step import random_batch
from benchmarks.quantization import times
from benchmarks.split import split_call, split_training
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.cuda_graphs import CUDAGraphs
from blip3o_dit.training.config import LOW_MEMORY_DEFAULTS

ROWS_OF_A_LARGE_PRODUCT = 8192
COPIED_BYTES = 2 * 2**30
BF16: dict[str, Any] = {"bf16": True}
GRAPHS = BF16 | {"cuda_graphs": True}  # as by default, where there is room
PLAIN = BF16 | {"cuda_graphs": False}


@dataclass(frozen=True)
class Generation:
    """A generation in bfloat16, by Euler steps; `way` is "", recorded or compiled."""

    batch: int
    calls: int = 16
    guidance: float = 1.0
    way: str = "recorded"
    seconds: int = 30

    @property
    def name(self) -> str:
        return f"batch {self.batch}, guidance {self.guidance:g}, {self.calls} calls, {self.way or 'plain'}"


@dataclass(frozen=True)
class Training:
    """Steps of `blip3o-dit train` with these settings."""

    batch: int
    settings: dict[str, Any] = field(default_factory=lambda: BF16)
    seconds: int = 45

    @property
    def name(self) -> str:
        shown = [f"{name} {'' if value is True else value}".strip() for name, value in self.settings.items()]
        return ", ".join([f"batch {self.batch}", *shown]).replace("_", " ")


LOW_MEMORY = {"memory": "low", **LOW_MEMORY_DEFAULTS}

# In the order of what is asked first, as a lent GPU may go before the end.
TRAININGS = [
    Training(32, GRAPHS),
    Training(128, GRAPHS),
    Training(256, GRAPHS),
    Training(32, PLAIN),
    Training(128, PLAIN),
    Training(32, GRAPHS | {"compile": "blocks"}, 90),
    Training(128, GRAPHS | {"compile": "blocks"}, 90),
    Training(256, GRAPHS | {"compile": "blocks"}, 90),
    Training(128, GRAPHS | {"compile": "full"}, 120),
    Training(32, GRAPHS | {"deterministic": True}),  # beside the first two: what it costs
    Training(128, GRAPHS | {"deterministic": True}),
    Training(32, GRAPHS | {"memory": "split"}),
    Training(128, GRAPHS | {"memory": "split", "moments": "bfloat16"}),
    Training(128, GRAPHS | {"residual": "bfloat16"}),
    Training(128, GRAPHS | {"optimizer": "muon"}),
    Training(32, LOW_MEMORY, 120),
    Training(128, BF16 | {"gradient_checkpointing": True}),
]
GENERATIONS = [
    *(Generation(batch) for batch in (1, 8, 64)),
    Generation(1, calls=1),
    *(Generation(batch, guidance=3.0) for batch in (1, 64)),
    *(Generation(batch, way="") for batch in (1, 64)),
    *(Generation(batch, way="compiled", seconds=60) for batch in (1, 64)),
]
SPLITS: list[Training | Generation] = [
    Training(32, GRAPHS),
    Generation(64),
    Generation(1),
    Training(128, GRAPHS),
    Training(32, PLAIN),
    Generation(1, calls=1),
]
PEERS: list[Training | Generation] = [Generation(1), Generation(64), Training(32), Training(128)]


def measure_hardware(setup: Setup) -> list[Row]:
    return [
        {"figure": "bf16 product TFLOP/s", "value": product_rate(setup) / 1e12},
        {"figure": "copy TB/s", "value": copy_bandwidth(setup) / 1e12},
    ]


def product_rate(setup: Setup) -> float:
    """Operations per second of a large bfloat16 product of random numbers; constant ones run faster."""
    n = 64 if setup.quick else ROWS_OF_A_LARGE_PRODUCT
    a, b = (torch.randn(n, n, device=setup.device).bfloat16() for _ in range(2))
    warm_up = 1 if setup.quick else 200  # a GPU that was idle is slow for a fraction of a second
    return 2 * n**3 / _seconds(lambda: F.linear(a, b), 10, warm_up)


def copy_bandwidth(setup: Setup) -> float:
    """Bytes per second read and written by a copy of 2 GiB on the device."""
    source = torch.empty(2**16 if setup.quick else COPIED_BYTES, dtype=torch.uint8, device=setup.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), 5)


def measure_generation(asked: Generation, setup: Setup) -> Iterator[Row]:
    """The default network in bfloat16, from conditions on the GPU to tokens on the GPU."""
    model, run = _generation(asked, setup)
    matrices = block_matrices(model, condition=False)
    first, second = _once(run), _once(run)  # the second one is recorded
    seconds = _seconds(run, 7 if asked.way else 3)
    rows_of_x = _batch(asked, setup) * model.config.num_tokens * (2 if asked.guidance != 1.0 else 1)
    # Each call multiplies every token by the blocks' matrices, and reads them once.
    reading = sum(matrix.nbytes for matrix in matrices) / copy_bandwidth(setup)
    products = block_flops(matrices, rows_of_x) / product_rate(setup)
    calls = _calls(asked, setup)
    floor = calls * max(products, reading)
    yield {
        "figure": f"generate, {asked.name}",
        "seconds": seconds,
        "ms a call": 1000 * seconds / calls,
        "first s": first,
        "second s": second,
        "floor s": floor,
        "floor / measured": floor / seconds,
        "products / measured": calls * products / seconds,
        "peak GiB": peak_gib(),
    }


def measure_end_to_end(setup: Setup) -> list[Row]:
    """One call, as a student takes it, from conditions on the CPU to tokens on the CPU: where its time goes.

    Before the replay is the noise, the copy of the conditions and Python; the replay is on the GPU; after it
    come the copy back and the wait for it.
    """
    model = prepared(_network(setup), "recorded")
    eva = torch.randn(1, model.config.num_tokens, model.config.eva_embedding_size)
    times: dict[str, list[float]] = {"before the replay": [], "replay": [], "after the replay": []}
    marks: list[float] = []
    run_plainly = CUDAGraphs.run

    def marked(graphs: CUDAGraphs, *given: Any, **named: Any) -> Any:
        synchronize()
        marks.append(time.perf_counter())
        found = run_plainly(graphs, *given, **named)
        synchronize()
        marks.append(time.perf_counter())
        return found

    def run() -> None:
        model.generate(eva, num_inference_steps=1, solver="euler").cpu()

    for _ in range(3):
        run()
    whole = _seconds(run, 15)
    with mock.patch.object(CUDAGraphs, "run", marked):
        for _ in range(15):
            marks[:] = [time.perf_counter()]
            run()
            marks.append(time.perf_counter())
            for name, began, ended in zip(times, marks, marks[1:], strict=False):
                times[name].append(ended - began)
    rows = [
        {"figure": f"one call end to end, {name}", "ms": 1000 * statistics.median(own)}
        for name, own in times.items()
        if own
    ]
    return [{"figure": "one call end to end", "ms": 1000 * whole}, *rows]


def measure_checkpoints(setup: Setup) -> Iterator[Row]:
    """How long the default size, 21.7 GB a checkpoint, stands still for one; needs 45 GB of disk."""
    sizes = dict(width=setup.width, layers=2) if setup.quick else dict(width=1792, layers=24)
    for goes_on in (False, True):
        yield checkpoints.measured(goes_on, saves=2, every=3 if setup.quick else 60, **sizes)


def measure_training(asked: Training, setup: Setup) -> Iterator[Row]:
    """Steps in the Trainer's own loop: loader, draws, clipping, AdamW and averaged weights."""
    batch, settings = _batch(asked, setup), _settings(asked, setup)
    with uncompiled() if setup.quick else nullcontext():
        ran = run_steps(setup.sizes(), batch, **settings)
    rate = product_rate(setup)
    yield {
        "figure": f"training step, {asked.name}",
        "ms": 1000 * ran.seconds,
        "samples/s": batch / ran.seconds,
        "TFLOP/s": ran.flops / ran.seconds / 1e12,
        "mfu": ran.flops / ran.seconds / rate,
        "data wait": ran.data_wait,
        "peak GiB": ran.peak,
        "forecast GiB": ran.forecast,
    }


def measure_split(asked: Training | Generation, setup: Setup) -> list[Row]:
    """A step or a generation by kinds of kernels, and the longest kernels."""
    if isinstance(asked, Generation):
        return split_call(f"generate, {asked.name}", _generation(asked, setup)[1], kernels=12)
    settings = _settings(asked, setup)
    return split_training(setup.sizes(), _batch(asked, setup), kernels=12, **settings)


def measure_quantized(setup: Setup) -> Iterator[Row]:
    """A generation of one sample, recorded, with each kind of weights."""
    layers, calls = (1, 2) if setup.quick else (24, 16)
    for row in times(layers, batches=[1], calls=calls, rounds=2 if setup.quick else 7):
        yield {"figure": f"{row.pop('measured')}, {row.pop('weights')}", **row}


def measure_peer(asked: Training | Generation, setup: Setup) -> Iterator[Row]:
    """diffusers' class with the same weights, where it is installed."""
    if not importlib.util.find_spec("diffusers"):
        yield {"figure": f"diffusers, {asked.name}", "seconds": None, "why": "not installed"}
        return
    from benchmarks.peer import Peer  # needs diffusers
    from benchmarks.training import peer_step

    batch, model = _batch(asked, setup), untrained(paper_config(**setup.sizes()))
    if isinstance(asked, Training):
        run: Callable[[], Any] = peer_step(Peer(model, share=False), random_batch(model, batch), bf16=True)
    else:
        config = model.config
        eva = torch.randn(batch, config.num_tokens, config.eva_embedding_size, device=setup.device)
        noise = torch.randn(batch, config.num_tokens, config.in_channels, device=setup.device)
        peer = Peer(model.to(torch.bfloat16), share=True).eval()
        run = partial(peer.generate, eva, noise, _calls(asked, setup), asked.guidance)
    yield {"figure": f"diffusers, {asked.name}", "seconds": _seconds(run, 3), "peak GiB": peak_gib()}


def parts() -> dict[str, tuple[Callable[[Setup], Any], int]]:
    """Name -> what is measured, and its seconds at most. Names begin with their group's."""
    listed: dict[str, tuple[Callable[[Setup], Any], int]] = {"hardware": (measure_hardware, 30)}
    for group, function, entries in (
        ("training speed", measure_training, TRAININGS),
        ("generation speed", measure_generation, GENERATIONS),
        ("split", measure_split, SPLITS),
        ("diffusers", measure_peer, PEERS),
    ):
        for asked in entries:
            kind = "" if group.endswith("speed") else f"{type(asked).__name__.lower()}, "
            listed[f"{group}: {kind}{asked.name}"] = (partial(function, asked), asked.seconds)
        if group == "generation speed":
            listed["one call end to end"] = (measure_end_to_end, 30)
            listed["quantized speed"] = (measure_quantized, 40)
            listed["checkpoints"] = (measure_checkpoints, 300)
    return listed


def _network(setup: Setup) -> BLIP3oDiTModel:
    return untrained(paper_config(**setup.sizes()), dtype=torch.bfloat16).eval()


def _generation(asked: Generation, setup: Setup) -> tuple[BLIP3oDiTModel, Callable[[], Any]]:
    model = prepared(_network(setup), "" if setup.quick else asked.way)
    config, batch = model.config, _batch(asked, setup)
    eva = torch.randn(batch, config.num_tokens, config.eva_embedding_size, device=setup.device)
    steps, guidance = _calls(asked, setup), asked.guidance
    return model, partial(
        model.generate, eva, num_inference_steps=steps, solver="euler", guidance_scale=guidance
    )


def _batch(asked: Training | Generation, setup: Setup) -> int:
    return min(asked.batch, 3) if setup.quick else asked.batch


def _calls(asked: Generation, setup: Setup) -> int:
    return min(asked.calls, 2) if setup.quick else asked.calls


def _settings(asked: Training, setup: Setup) -> dict[str, Any]:
    """Of `run_steps`; on a CPU without what it cannot do, or takes minutes for."""
    left_out = ("cuda_graphs", "compile") if setup.quick else ()
    steps = {"steps": 1, "warm_up": 1} if setup.quick else {}
    return {name: value for name, value in asked.settings.items() if name not in left_out} | steps


def _once(function: Callable[[], Any]) -> float:
    return alternate({"": function}, 1, warm_up=0)[""]


def _seconds(function: Callable[[], Any], rounds: int, warm_up: int = 1) -> float:
    return alternate({"": function}, rounds, warm_up=warm_up)[""]
