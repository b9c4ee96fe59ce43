"""The Triton kernels beside the plain network, by Triton's interpreter; `make gpu-check` compiles them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

ROWS = """
import torch
from torch.utils._pytree import tree_map_only
from blip3o_dit.model import gpu_kernels
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.encoded_condition import Modulations
from blip3o_dit.model.quantization import quantize_weight
from tests.conftest import randomize, tiny_config

torch.manual_seed(0)
for heads, groups, dim, grid in ((4, 2, 48, 3), (3, 3, 96, 4)):
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
            modulations = dit._modulations(torch.randn(len(rows), config.time_embed_dim).half())
            rope = dit._rope(rows)
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

for kind in ("int8", "fp8"):  # more than a tile and a piece of each side, and parts of them
    for rows, columns, depth in ((3, 40, 200), (70, 35, 96)):
        x, weight = torch.randn(rows, depth), torch.randn(columns, depth)
        found, scale = quantize_weight(weight, kind)
        expected = x.half().float() @ (found.float() * scale[:, None]).T
        product = gpu_kernels.quantized_product(x.half(), found, scale)
        assert product.dtype == torch.float16
        torch.testing.assert_close(product.float(), expected, atol=1e-2, rtol=8e-3)
"""


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton comes with CUDA builds of torch")
def test_the_interpreted_kernels_are_the_plain_blocks() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ROWS], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
