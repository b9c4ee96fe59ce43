"""The training kernels beside the plain block, by Triton's interpreter; `make gpu-check` compiles them."""

from __future__ import annotations

from tests.helpers.interpreted import needs_triton, run_interpreted

# Outputs and all gradients of a block in half precision, beside the plain block in float32.
ROWS = """
import torch
from blip3o_dit.model import gpu_training
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from tests.conftest import randomize, tiny_config

torch.manual_seed(0)
for heads, groups, dim, grid, residual in ((4, 2, 48, 3, torch.float32), (3, 3, 36, 4, torch.float16)):
    config = tiny_config(model_dim=dim, num_heads=heads, num_kv_heads=groups, input_size=grid)
    model = BLIP3oDiTModel(config)
    randomize(model)
    block, tokens = model.dit.blocks[0], grid * grid
    x, condition, to_out = (torch.randn(2, tokens, dim) for _ in range(3))
    temb, rope = torch.randn(2, config.time_embed_dim), model.dit._rope(x.device)

    def gradients(run, dtype, residual):
        given = [x.to(residual), condition.to(dtype), temb.to(dtype)]
        given = [tensor.requires_grad_() for tensor in given]
        out = run(*given, rope)
        assert out.dtype == residual
        found = torch.autograd.grad(out, [*given, *block.parameters()], to_out.to(residual))
        names = ["x", "condition", "temb", *(name for name, _ in block.named_parameters())]
        return {"out": out} | dict(zip(names, found))

    expected = gradients(block, torch.float32, torch.float32)
    assert gpu_training.can_run(block, condition.half())
    found = gradients(lambda *given: gpu_training.run_block(block, *given), torch.float16, residual)
    for name, wanted in expected.items():
        distance = (found[name].float() - wanted).norm()
        if name != "attn2.norm_k.bias":  # scores of all keys move alike: it has no gradient
            distance = distance / wanted.norm()
        print(name, float(distance))
        assert distance < 8e-3, (name, float(distance))
        assert name in ("out", "x", "condition", "temb") or found[name].dtype == torch.float32

from blip3o_dit.training.memory import Activations

# What the forward pass keeps, as the forecast counts it; half weights are not copied.
model.half()
kept, given = {}, {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
condition, temb = condition.half().requires_grad_(), temb.half().requires_grad_()
given |= {tensor.untyped_storage().data_ptr() for tensor in (condition, temb, *rope)}

def keep(tensor):
    storage = tensor.untyped_storage()
    if storage.data_ptr() not in given:
        kept[storage.data_ptr()] = storage.nbytes(), tensor
    return tensor

with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
    gpu_training.run_block(block, x.requires_grad_(), condition, temb, rope)
found = sum(size for size, _ in kept.values())
expected = Activations(config, 2, tokens, 2, torch.device("cuda")).block()
print(found, expected)
assert abs(found / expected - 1) < 0.05

block.norm2.register_forward_hook(print)
assert not gpu_training.can_run(block, condition.half())
"""


@needs_triton
def test_the_interpreted_kernels_are_the_plain_block_and_its_gradients() -> None:
    run_interpreted(ROWS)
