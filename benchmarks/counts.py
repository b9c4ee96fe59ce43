"""What one network call of a generation reads, passes over and launches on a GPU, counted without one.

A narrow network of two and of three blocks runs on the CPU as it would on a GPU that multiplies bfloat16, and
every operation that is no view counts as one launch. Triton's kernels are counted instead of run: one launch,
and a pass for each activation that they are given. (One that read and wrote the same activation would count
once.) Bytes are those of the default network.

* weights: what the call's operations read of them, each as often as it is read.
* passes: activations (tensors of at least tokens x width numbers) that one layer reads or writes outside its
  products, as often as it does.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from benchmarks.measure import Row, paper_config
from blip3o_dit.model import cpu_kernels, transformer
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.layers import BFLOAT16_VARIABLE, RMSNorm

NARROW = {"model_dim": 256, "num_heads": 4, "in_channels": 24, "eva_embedding_size": 40}
CALLS = 16
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addmm_")
NO_LAUNCH = ("empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "lift_fresh")
MODULATIONS = ("norm1.linear", "norm_out.linear_1", "time_caption_embed.timestep_embedder")

OF_ITS_OWN = ("product_with_sums", "split_product")  # products among Triton's kernels

# How a call is computed: (modulations of all calls known before the first one, Triton's kernels, samples).
WAYS = {
    "layer by layer, modulations in every call": (False, False, 2),
    "layer by layer": (True, False, 2),
    "Triton's kernels": (True, True, 2),
    "Triton's kernels, one sample": (True, True, 1),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=24)


def run(arguments: argparse.Namespace) -> list[Row]:
    return [count(way, arguments.layers) for way in WAYS]


def count(way: str, layers: int) -> Row:
    """The row of one way to compute a call: of two blocks, and for each further one what a third adds."""
    sizes = _bytes_of_weights()
    two, three = _count_call(way, 2), _count_call(way, 3)

    def of_call(of: Callable[[Counts], float]) -> float:
        return of(two) + (layers - 2) * (of(three) - of(two))

    return {
        "one network call": way,
        "weights read GB": of_call(lambda counts: counts.bytes_of(sizes, "")) / 1e9,
        "of these for modulations GB": of_call(lambda counts: counts.bytes_of(sizes, *MODULATIONS)) / 1e9,
        "launches": of_call(lambda counts: counts.launches),
        "launches a layer": three.launches - two.launches,
        "passes a layer": three.passes - two.passes,
    }


class Counts(TorchDispatchMode):
    """Counts the operations inside; `launch` counts one that torch does not see."""

    def __init__(self, model: BLIP3oDiTModel, activation: int) -> None:
        super().__init__()
        self.launches, self.passes = 0, 0
        self.reads: Counter[str] = Counter()
        self._activation = activation
        self._places = {name: _range(weight) for name, weight in model.named_parameters()}

    def bytes_of(self, sizes: Mapping[str, int], *parts: str) -> int:
        """Read of the weights whose names have one of the parts."""
        found = ((name, times) for name, times in self.reads.items() if any(part in name for part in parts))
        return sum(times * sizes[name] for name, times in found)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in NO_LAUNCH:
            product = name in PRODUCTS
            self.launch(tree_leaves((args, kwargs)), [] if product else tree_leaves(out), product=product)
        return out

    def launch(self, inputs: list[Any], outputs: list[Any], *, product: bool = False) -> None:
        """One kernel that reads and writes these; what is no tensor is left out."""
        self.launches += 1
        given, made = ({_range(t): t for t in held if isinstance(t, Tensor)} for held in (inputs, outputs))
        for start, end in given:
            self.reads.update(name for name, (a, b) in self._places.items() if start <= a and b <= end)
        if not product:
            counted = [t for held in (given, made) for t in held.values() if t.numel() >= self._activation]
            self.passes += len(counted)


class CountedKernels(ModuleType):
    """Stands for the module of Triton's kernels: `kernels.NAME[grid](arguments)` is counted."""

    def __init__(self, counts: Counts) -> None:
        super().__init__("kernels that are counted")
        self.counts = counts

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return CountedKernel(self.counts, product=name in OF_ITS_OWN)


@dataclass(frozen=True)
class CountedKernel:
    counts: Counts
    product: bool

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *given, **named: self.counts.launch(list(given), [], product=self.product)


def _count_call(way: str, blocks: int) -> Counts:
    known, triton, batch = WAYS[way]
    torch.manual_seed(0)
    model = BLIP3oDiTModel(paper_config(num_layers=blocks, **NARROW)).to(torch.bfloat16).eval()
    config, dit = model.config, model.dit
    x = torch.randn(batch, config.num_tokens, config.in_channels)
    condition = torch.randn(batch, config.num_tokens, config.eva_embedding_size)
    times = torch.linspace(0, 1, CALLS)
    counts = Counts(model, batch * config.num_tokens * config.kv_dim)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(mock.patch.dict(os.environ, {BFLOAT16_VARIABLE: "native"}))
        encoded = dit.encode_condition(condition, times=times if known else None)
        stack.enter_context(_one_kernel_for_rms_norm(counts))
        if triton:
            stack.enter_context(_kernels_counted(counts))
        with counts:
            dit.predict(x, times[:1].expand(batch), encoded)
    return counts


@contextmanager
def _one_kernel_for_rms_norm(counts: Counts) -> Iterator[None]:
    """As torch has it on a GPU, where a CPU takes five operations."""
    plain = F.rms_norm

    def fused(x: Tensor, *given: Any) -> Tensor:
        with _disable_current_modes():
            out = plain(x, *given)
        counts.launch([x], [out])
        return out

    with (
        mock.patch.object(cpu_kernels.RMSNorm, "normalize", RMSNorm.normalize),
        mock.patch.object(F, "rms_norm", fused),
    ):
        yield


@contextmanager
def _kernels_counted(counts: Counts) -> Iterator[None]:
    """The blocks run by `gpu_kernels`, whose kernels are counted; Triton itself need not be there."""
    kernels = CountedKernels(counts)
    there: dict[str, ModuleType] = {}
    if not importlib.util.find_spec("triton"):
        triton = ModuleType("triton")
        vars(triton).update(cdiv=lambda a, b: -(-a // b), next_power_of_2=lambda n: 1 << (n - 1).bit_length())
        there = {"triton": triton, "blip3o_dit.model.triton_kernels": kernels}
    with mock.patch.dict(sys.modules, there):
        gpu_kernels: Any = importlib.import_module("blip3o_dit.model.gpu_kernels")

    def run_blocks(dit: transformer.NextDiT, x: Tensor, *given: Any) -> Tensor:
        assert gpu_kernels.can_run(dit.blocks, x, given[0], dit.compute_dtype)
        return gpu_kernels.run_blocks(dit.blocks, x, *given)

    with (
        mock.patch.object(gpu_kernels, "kernels", kernels),
        mock.patch.object(cpu_kernels.NextDiT, "run_blocks", run_blocks),
    ):
        yield


def _bytes_of_weights() -> dict[str, int]:
    with torch.device("meta"):
        model = BLIP3oDiTModel(paper_config(num_layers=3)).to(torch.bfloat16)
    return {name: weight.nbytes for name, weight in model.named_parameters()}


def _range(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor's numbers lie: the first byte, and the one behind the last."""
    span = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (span + 1) * tensor.itemsize
