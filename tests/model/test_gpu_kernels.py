"""The Triton kernels beside the plain network, by Triton's interpreter; `make gpu-check` compiles them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.encoded_condition import Modulations
from tests.conftest import tiny_config
from tests.helpers.interpreted import needs_triton, run_interpreted

ROWS = """
import torch
from torch.utils._pytree import tree_map_only
from blip3o_dit.model import gpu_kernels
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.encoded_condition import Modulations
from blip3o_dit.model.quantization import quantize_weight
from blip3o_dit.utils import stateless_random
from blip3o_dit.utils.philox import philox
from blip3o_dit.utils.philox_kernel import philox_words
from blip3o_dit.utils.stateless_random import draw_names
from tests.conftest import randomize, tiny_config

torch.manual_seed(0)
gpu_kernels.FEW_ROWS, gpu_kernels.FEW_PROGRAMS = 20, 6
gpu_kernels.JOINT, gpu_kernels.SPLIT = (16, 32, 1), {"to_out": (32, 2, 16, 1), "linear_2": (64, 2, 16, 1)}
few = []  # samples whose queries, keys and values came with their sums
project_few = gpu_kernels.project_few

def noted(block, h):
    found = project_few(block, h)
    few.append(found and len(h))
    return found

gpu_kernels.project_few = noted
for heads, groups, dim, grid in ((4, 2, 64, 3), (3, 3, 96, 4)):
    config = tiny_config(model_dim=dim, num_heads=heads, num_kv_heads=groups, input_size=grid)
    model = BLIP3oDiTModel(config).eval()
    randomize(model)
    dit = model.to(torch.float16).dit
    blocks, (n, _, _) = dit.blocks, config.data_sizes
    x = torch.randn(4, n, dim)
    with torch.no_grad():
        encoded = dit.encode_condition(torch.randn(2, n, config.eva_embedding_size).half())
        null = dit.encode_condition(torch.zeros(1, n, config.eva_embedding_size).half())
        for condition, rows in ((encoded, x[:2]), (encoded.with_null_condition(null), x)):
            keys_values = [tree_map_only(torch.Tensor, torch.Tensor.half, kv) for kv in condition.keys_values]
            joint = dit.modulate(torch.randn(len(rows), config.time_embed_dim).half())
            modulations = Modulations.of_joint(joint, dim)
            rope = condition.rope
            assert gpu_kernels.can_run(blocks, rows, keys_values, torch.float16)
            found = gpu_kernels.run_blocks(blocks, rows, keys_values, modulations, rope)
            dit.float()
            wide = [tree_map_only(torch.Tensor, torch.Tensor.float, kv) for kv in keys_values]
            gains = Modulations([t.float() for t in modulations.blocks], modulations.output.float())
            expected = super(type(dit), dit).run_blocks(rows, wide, gains, rope)
            dit.half()
            distance = float((found - expected).norm() / (expected - rows).norm())
            print(heads, groups, dim, len(rows), distance)
            assert distance < 4e-3, distance
assert few == [2, 2, None, None], few

names = draw_names([7, 2**40 + 3, 9], seed=5, stream="test", counter=3, repeats=[0, 2, 1])
for rows, positions in ((slice(0, 3), 600), (slice(1, 3), 5)):
    keys, samples = names[:20, 0], names[20:, rows]
    counter = [torch.arange(positions).repeat(samples.shape[1], 1)]
    counter += [word[:, None].repeat(1, positions) for word in samples]
    expected = philox(counter, list(zip(keys[::2], keys[1::2])))
    found = philox_words(keys, samples, positions)
    assert torch.equal(found[[0, 2, 1, 3]], torch.stack(expected))
    normals = stateless_random._normals_by_kernel(keys, samples, positions)
    torch.testing.assert_close(normals, stateless_random._normals(keys, samples, positions))

for kind in ("int8", "fp8"):  # more than a tile and a piece of each side, and parts of them
    for rows, columns, depth in ((3, 40, 200), (70, 35, 96)):
        x, weight = torch.randn(rows, depth), torch.randn(columns, depth)
        found, scale = quantize_weight(weight, kind)
        expected = x.half().float() @ (found.float() * scale[:, None]).T
        product = gpu_kernels.quantized_product(x.half(), found, scale)
        assert product.dtype == torch.float16
        torch.testing.assert_close(product.float(), expected, atol=1e-2, rtol=8e-3)
"""


@needs_triton
def test_the_interpreted_kernels_are_the_plain_blocks() -> None:
    run_interpreted(ROWS)


class Launches:
    """In place of the kernels: what each launch reads and writes of the size of the activations."""

    def __init__(self, least: int) -> None:
        self.least = least
        self.passes: list[int] = []  # their bytes

    def __getattr__(self, name: str) -> Any:
        return MagicMock(**{"__getitem__.return_value": self._launch})  # kernel[grid](...)

    def _launch(self, *arguments: Any, **_: Any) -> None:
        tensors = [held for held in arguments if isinstance(held, Tensor) and held.numel() >= self.least]
        self.passes += {held.data_ptr(): held.nbytes for held in tensors}.values()  # stand-ins for None


@pytest.mark.parametrize("residual", ["float32", "bfloat16"])
def test_a_layer_makes_21_passes_over_its_activations(residual: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight of them where branches are added and normed, four of which are the residual stream's."""
    if not importlib.util.find_spec("triton"):
        for name in ("triton", "triton.language"):
            monkeypatch.setitem(sys.modules, name, MagicMock(next_power_of_2=lambda n: n))
        for name in ("gpu_kernels", "triton_kernels"):
            monkeypatch.setitem(sys.modules, f"blip3o_dit.model.{name}", None)
            del sys.modules[f"blip3o_dit.model.{name}"]  # imported without Triton in this test only
    gpu_kernels: Any = importlib.import_module("blip3o_dit.model.gpu_kernels")
    found = []
    for layers in (2, 3):
        config = tiny_config(num_layers=layers, ffn_dim=96, input_size=4, residual=residual)
        dit = BLIP3oDiTModel(config).eval().bfloat16().dit
        with torch.no_grad():
            x = torch.zeros(2, 16, 48, dtype=dit.residual_dtype)
            encoded = dit.encode_condition(torch.randn(2, 16, 12).bfloat16())
            launches = Launches(x.numel())
            monkeypatch.setattr(gpu_kernels, "kernels", launches)
            modulations = Modulations.of_joint(dit.modulate(torch.randn(2, 48).bfloat16()), 48)
            keys_values = [
                kv._replace(keys=kv.keys.bfloat16(), values=kv.values.bfloat16())
                for kv in encoded.keys_values
            ]
            gpu_kernels.run_blocks(dit.blocks, x, keys_values, modulations, encoded.rope)
        found.append((len(launches.passes), sum(launches.passes) // (2 * x.numel())))
    passes, of_bfloat16 = (there - here for here, there in zip(*found, strict=True))
    assert passes == 21
    assert of_bfloat16 == (28 if residual == "float32" else 24)  # SwiGLU's three are twice as wide here
