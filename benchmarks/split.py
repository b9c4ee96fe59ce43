"""What a training step and a generation spend their time on, by torch's profiler: rows that sum to the whole.

On a GPU the kernels are sorted by their names, and what is left of the time the GPU idles: it waits for data
(while the loop waits for its loader), or for launches. On a CPU the operators are sorted, and what is left is
Python and the profiler itself, without which `unprofiled ms` was measured.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import SIZES, Row, alternate, device, paper_config, untrained
from benchmarks.our_run import run_steps

DATA, ELEMENT_WISE, PYTHON, LAUNCHES = "data", "element-wise", "views, dispatch and Python", "launches"

# What an operator's or a kernel's name says it is; the first that is found counts, else element-wise.
KINDS = {
    DATA: r"DataLoader|Memcpy (HtoD|DtoH)",
    "optimizer, clipping, averages": r"Optimizer\.|adam|_foreach_|multi_tensor_apply|lpnorm_cleanup|lerp",
    "attention": r"scaled_dot_product|flash_|flash::|fmha|sdpa|^attend",
    "products": r"^aten::(mm|addmm_?|bmm|baddbmm|mv|addmv_?)$|gemm|gemv|nvjet|cutlass|splitK|^triton_tem",
    PYTHON: r"^aten::(_?\w*view\w*|_?reshape\w*|as_strided|t|transpose|permute|(un)?squeeze|(un)?flatten|"
    r"expand\w*|select|slice|narrow|split\w*|chunk|detach_?|alias|empty\w*|to|linear|matmul|layer_norm|rms_norm|contiguous|"
    r"result_type|resolve_\w+|resize_)$|^detach_?$",
    "casts and copies": r"^aten::(_to_copy|copy_|clone|cat)$|copy_kernel|Memcpy DtoD|CatArrayBatchedCopy",
}
# The ranges that torch puts around the steps of optimizers and the batches of loaders.
RANGE = re.compile(r"(Optimizer\.|enumerate\(DataLoader)\w*")
_PATTERNS = {kind: re.compile(pattern) for kind, pattern in KINDS.items()}


@dataclass(frozen=True)
class Piece:
    """One operator or kernel: its name, and its own microseconds."""

    name: str
    kind: str
    microseconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--of", nargs="+", choices=("training", "generation"), default=["training", "generation"]
    )
    parser.add_argument("--size", choices=SIZES, default="1/4 width")
    parser.add_argument("--layers", type=int, help="blocks, instead of the size's own")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--calls", type=int, default=4, help="network calls of the generation")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast in training")
    parser.add_argument("--kernels", type=int, default=0, help="so many of the longest operators or kernels")


def run(arguments: argparse.Namespace) -> list[Row]:
    sizes = SIZES[arguments.size] | ({"num_layers": arguments.layers} if arguments.layers else {})
    rows: list[Row] = []
    if "training" in arguments.of:
        rows += split_training(sizes, arguments.batch, kernels=arguments.kernels, bf16=arguments.bf16)
    if "generation" in arguments.of:
        model = untrained(paper_config(**sizes)).eval()
        shape = (arguments.batch, model.config.num_tokens, model.config.eva_embedding_size)
        eva = torch.randn(shape, device=device())
        generate = partial(model.generate, eva, num_inference_steps=arguments.calls, solver="euler")
        rows += split_call("generation", generate, kernels=arguments.kernels)
    return rows


def split_training(
    sizes: dict[str, Any],
    batch: int,
    *,
    kernels: int = 0,
    steps: int = 10,
    warm_up: int = 3,
    **settings: Any,
) -> list[Row]:
    """Of the steps that the trainer itself takes, loader included."""
    run, profiler = partial(run_steps, sizes, batch, steps=steps, warm_up=warm_up, **settings), _profiler()
    plain, seconds = run().seconds, run(around=profiler).seconds
    return _rows("training step", profiler, seconds, plain, steps, kernels)


def split_call(what: str, function: Callable[[], Any], *, kernels: int = 0) -> list[Row]:
    """Of one call of a function that was called before."""
    plain = alternate({what: function}, 3, warm_up=2)[what]
    profiler = _profiler()
    with profiler:
        seconds = alternate({what: function}, 1, warm_up=0)[what]
    return _rows(what, profiler, seconds, plain, 1, kernels)


def kind_of(name: str) -> str:
    found = (kind for kind, pattern in _PATTERNS.items() if pattern.search(name))
    return next(found, ELEMENT_WISE)


def _profiler() -> profile:
    gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    return profile(activities=[ProfilerActivity.CPU, *gpu])


def _rows(what: str, profiler: profile, seconds: float, plain: float, times: int, kernels: int) -> list[Row]:
    """`seconds` and `plain`: of one of the `times` that were profiled, and of one without the profiler."""
    pieces, loader = pieces_of(profiler.events())
    whole = 1000 * seconds
    rows = [{"of": what} | row for row in sorted_out(pieces, whole, loader / 1000 / times, times)]
    rows.append({"of": what, "part": "together", "ms": whole, "share": 1.0, "unprofiled ms": 1000 * plain})
    return rows + [{"of": what} | row for row in longest(pieces, whole, times)[:kernels]]


def pieces_of(events: Iterable[Any]) -> tuple[list[Piece], float]:
    """The kernels if there are any, else the operators; and the microseconds that the loader took."""
    kernels, operators, loader = [], [], 0.0
    for event in events:
        if event.device_type != DeviceType.CPU:
            if not RANGE.match(event.name):  # a GPU's timeline shows the CPU's ranges as well
                kernels.append(Piece(event.name, kind_of(event.name), event.time_range.elapsed_us()))
            continue
        operators.append(Piece(event.name, _kind_on_cpu(event), event.self_cpu_time_total))
        loader += event.time_range.elapsed_us() if "DataLoader" in event.name else 0.0
    return kernels or operators, loader


def _kind_on_cpu(event: Any) -> str:
    """By the range that it is in, or by its name; what is not torch's own is a function written in Python."""
    of_ranges = (kind_of(name) for name in _ranges(event))
    own = kind_of(event.name) if event.name.startswith("aten::") else PYTHON
    return next((kind for kind in of_ranges if kind != ELEMENT_WISE), own)


def _ranges(event: Any) -> list[str]:
    """The names of those that this operator is in."""
    names = []
    while event is not None:
        names += [event.name] if RANGE.match(event.name) else []
        event = event.cpu_parent
    return names


def sorted_out(pieces: Iterable[Piece], whole: float, loader: float, times: int) -> list[Row]:
    """Milliseconds of each kind in one of the `times`; what is left of the `whole` is idle, or Python."""
    pieces = list(pieces)
    on_gpu = not any(piece.name.startswith("aten::") for piece in pieces)
    milliseconds: defaultdict[str, float] = defaultdict(float)
    counts: defaultdict[str, int] = defaultdict(int)
    for piece in pieces:
        milliseconds[piece.kind] += piece.microseconds / 1000 / times
        counts[piece.kind] += 1
    idle = whole - sum(milliseconds.values())
    if on_gpu:
        waited = min(max(idle, 0.0), loader)
        milliseconds[DATA] += waited
        idle -= waited
    milliseconds[LAUNCHES if on_gpu else PYTHON] += idle
    order = [*(kind for kind in KINDS if kind != PYTHON), ELEMENT_WISE, LAUNCHES, PYTHON]
    return [
        {
            "part": kind,
            "ms": milliseconds[kind],
            "share": milliseconds[kind] / whole,
            "count": counts[kind] / times,
        }
        for kind in order
        if kind in milliseconds
    ]


def longest(pieces: Iterable[Piece], whole: float, times: int) -> list[Row]:
    """The same for each name, the longest first."""
    by_name: defaultdict[str, list[float]] = defaultdict(list)
    for piece in pieces:
        by_name[f"{piece.kind}: {_short(piece.name)}"].append(piece.microseconds / 1000 / times)
    ordered = sorted(by_name.items(), key=lambda item: -sum(item[1]))
    return [
        {"part": name, "ms": sum(own), "share": sum(own) / whole, "count": len(own) / times}
        for name, own in ordered
    ]


def _short(name: str) -> str:
    """A kernel's name without what all have, and without its arguments."""
    name = re.sub(r"\(anonymous namespace\)::|at::native::|^void ", "", name)
    functor = re.search(r"\w+(_cuda|Functor|_kernel_cuda)\b", name)
    return name.split("<")[0][:60] + (f" {functor[0]}" if functor else "")
