"""The faster layers: what they give is what the plain ones give, forward and backward."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from blip3o_dit.model import cpu_kernels, layers, stacked_layers
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.cpu_kernels import (
    Linear,
    RMSNorm,
    _ScaledRMSNorm,
    multi_linear,
    pack_weights,
    use_cpu_kernels,
)
from blip3o_dit.model.layers import BFLOAT16_VARIABLE, LayerNorm, has_native_matmul
from blip3o_dit.model.quantization import quantize_weight
from blip3o_dit.model.transformer import NextDiT
from tests.conftest import randomize, tiny_config


def three_weights(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(rows, 5).to(dtype)) for rows in (4, 2, 3)]


class CountedProducts(TorchDispatchMode):
    """Counts matrix products where they are computed."""

    calls = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def large_products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each weight matrix that a product was taken with."""
    rows: list[int] = []
    plain = F.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows.append(len(weight))
        return plain(x, weight, bias)

    monkeypatch.setattr(cpu_kernels.F, "linear", counted)
    return rows


def test_weights_packed_are_one_product_with_the_same_result(large_products: list[int]) -> None:
    weights, x = three_weights(), torch.randn(2, 7, 5)
    before = [weight.detach().clone() for weight in weights]
    apart = multi_linear(x, weights)
    assert large_products == [4, 2, 3]
    pack_weights(weights)
    large_products.clear()
    with torch.no_grad():
        packed = multi_linear(x, weights)
    assert large_products == [9]
    for weight, old, a, b in zip(weights, before, apart, packed, strict=True):
        assert torch.equal(weight, old)
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_those_of_plain_products(packed: bool) -> None:
    weights, x = three_weights(), torch.randn(2, 7, 5, requires_grad=True)
    pulls = [torch.randn(2, 7, len(weight)) for weight in weights]
    plain = torch.autograd.grad([x @ weight.T for weight in weights], [x, *weights], pulls)
    if packed:
        pack_weights(weights)
    found = torch.autograd.grad(multi_linear(x, weights), [x, *weights], pulls)
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_results_and_gradients_of_a_step_do_not_share_memory() -> None:
    weights, x = three_weights(), torch.randn(2, 7, 5, requires_grad=True)
    pack_weights(weights)
    outputs = multi_linear(x, weights)
    torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])
    made = [*outputs, *(weight.grad for weight in weights if weight.grad is not None)]
    assert len(made) == 6 and all(tensor.is_contiguous() for tensor in made)
    assert len({tensor.untyped_storage().data_ptr() for tensor in made}) == len(made)


def test_a_weight_that_moved_is_multiplied_by_itself(large_products: list[int]) -> None:
    weights, x = three_weights(), torch.randn(3, 5)
    pack_weights(weights)
    weights[1].data = torch.randn(2, 5)
    out = multi_linear(x, weights)
    assert large_products == [4, 2, 3]
    torch.testing.assert_close(out[1], x @ weights[1].T)


def test_an_optimizer_step_changes_weights_that_are_packed() -> None:
    weights, x = three_weights(), torch.randn(3, 5)
    pack_weights(weights)
    optimizer = torch.optim.SGD(weights, lr=0.1)
    sum(out.square().sum() for out in multi_linear(x, weights)).backward()
    optimizer.step()
    for out, weight in zip(multi_linear(x, weights), weights, strict=True):
        torch.testing.assert_close(out, x @ weight.T)


@pytest.mark.parametrize("packed", [False, True])
def test_bfloat16_weights_are_multiplied_in_the_dtype_of_the_input(packed: bool) -> None:
    weights = three_weights(torch.bfloat16)
    if packed:
        pack_weights(weights)
    x = torch.randn(6, 5, requires_grad=True)
    outputs = multi_linear(x, weights)
    wide = [weight.detach().float().requires_grad_() for weight in weights]
    expected = [x @ weight.T for weight in wide]
    for out, reference in zip(outputs, expected, strict=True):
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, reference)
    pulls = [torch.randn_like(out) for out in outputs]
    found = torch.autograd.grad(outputs, [x, *weights], pulls)
    reference = torch.autograd.grad(expected, [x, *wide], pulls)
    torch.testing.assert_close(found[0], reference[0])
    for a, b in zip(found[1:], reference[1:], strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a, b.bfloat16())


def test_linear_with_bias_in_another_dtype() -> None:
    layer = Linear(5, 4).bfloat16()
    x = torch.randn(3, 5)
    expected = x @ layer.weight.float().T + layer.bias.float()
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)


def test_products_follow_their_input_and_gradients_their_weights() -> None:
    weights, x = three_weights(), torch.randn(3, 5).bfloat16()
    pack_weights(weights)
    outputs = multi_linear(x, weights)
    assert all(out.dtype == torch.bfloat16 for out in outputs)
    sum(out.float().sum() for out in outputs).backward()
    assert all(weight.grad is not None and weight.grad.dtype == torch.float32 for weight in weights)


def network_pair(dtype: torch.dtype = torch.float32, **changes: object) -> tuple[NextDiT, NextDiT]:
    """A plain network, and one of the same weights that computes by the faster layers."""
    config = tiny_config(flow_matching={"source": "ridge"}, **changes)
    plain, fast = NextDiT(config), NextDiT(config)
    randomize(plain)
    fast.load_state_dict(plain.state_dict())
    plain, fast = plain.to(dtype), fast.to(dtype)
    use_cpu_kernels(fast)
    return plain, fast


@pytest.mark.parametrize("num_kv_heads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_fast_network_equals_the_plain_one(
    dtype: torch.dtype, num_kv_heads: int, bfloat16: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and all gradients; outputs of generation, guided as well."""
    monkeypatch.setattr(cpu_kernels, "MIN_COLUMNS", 1)
    x, mean, t, condition = torch.randn(2, 9, 8), torch.randn(2, 9, 8), torch.rand(2), torch.randn(2, 9, 12)
    if dtype == torch.float64:
        x, mean, condition = x.double(), mean.double(), condition.double()
    outputs, gradients = [], []
    for network in network_pair(dtype, num_kv_heads=num_kv_heads):
        out = network(x, t, condition, mean)
        out.square().mean().backward()
        with torch.no_grad():
            null = network.encode_condition(torch.zeros_like(condition[:1]))
            encoded = network.encode_condition(condition, mean)
            both = encoded.with_null_condition(null)
            sampled = network.predict(x, t, encoded)
            guided = network.predict(x.repeat(2, 1, 1), t.repeat(2), both)
        outputs.append(torch.cat([out.detach(), sampled, guided]))
        gradients.append([p.grad for p in network.parameters() if p.grad is not None])
    # The order of additions differs, by a rounding of 1/256 in bfloat16; rotation and time are float32.
    share = 1e-5 if dtype == torch.float64 else 0.05
    largest = max(float(gradient.abs().max()) for gradient in gradients[0])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=share * float(outputs[0].abs().max()))
    assert len(gradients[0]) == len(list(network.parameters()))
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=share * largest)


def stacked_pair(monkeypatch: pytest.MonkeyPatch, **changes: object) -> tuple[NextDiT, NextDiT]:
    """As `network_pair`, where a CPU too computes the keys and values of all layers at once."""
    monkeypatch.setattr(cpu_kernels, "_stacking_is_faster", lambda condition: True)
    return network_pair(**changes)


@pytest.fixture
def stacked_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How the layers' modulations, keys and values are computed: "stacked", or what is called of a block."""
    calls: list[str] = []
    stacked = stacked_layers.keys_values
    monkeypatch.setattr(
        stacked_layers, "keys_values", lambda *given: calls.append("stacked") or stacked(*given)
    )
    for name in ("encode", "modulate"):
        plain = getattr(cpu_kernels.NextDiTBlock, name)
        monkeypatch.setattr(
            cpu_kernels.NextDiTBlock,
            name,
            lambda *given, name=name, plain=plain: calls.append(name) or plain(*given),
        )
    return calls


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("num_kv_heads", [1, 3])
def test_all_layers_at_once_are_one_after_the_other(
    num_kv_heads: int, transposed: bool, stacked_calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modulations, keys and values of every layer, and what guided calls make of them, at every time."""
    if transposed:
        monkeypatch.setattr(cpu_kernels, "MIN_COLUMNS", 1)
    x, mean, condition = torch.randn(4, 9, 8), torch.randn(2, 9, 8), torch.randn(2, 9, 12)
    times = torch.tensor([0.0, 0.3, 0.7])
    encodings, outputs = [], []
    for network in stacked_pair(monkeypatch, num_kv_heads=num_kv_heads):
        with torch.no_grad():
            null = network.encode_condition(torch.zeros_like(condition[:1]), times=times)
            encoded = network.encode_condition(condition, mean, times)
            both = encoded.with_null_condition(null)
            outputs.append(
                torch.cat(
                    [network.predict(x[:2], t.expand(2), encoded) for t in times]
                    + [network.predict(x, t.expand(4), both) for t in times]
                )
            )
            alone = network.encode_condition(condition, mean, times[1:2])
            at_its_time = network.predict(x[:2], times[1].expand(2), alone)
        torch.testing.assert_close(at_its_time, outputs[-1][2:4])
        encodings.append(encoded)
    assert stacked_calls == ["stacked"] * 3
    plain, fast = encodings
    assert plain.modulations is not None and fast.modulations is not None
    assert fast.modulations.joint.is_contiguous()
    for found, expected in zip(fast.keys_values, plain.keys_values, strict=True):
        assert found.keys.shape == expected.keys.shape and found.null_value is None
        torch.testing.assert_close(found.keys, expected.keys)
        torch.testing.assert_close(found.values, expected.values)
    torch.testing.assert_close(fast.modulations.joint, plain.modulations.joint)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5 * float(outputs[0].abs().max()))


def test_keys_and_values_in_bfloat16_are_those_of_the_layers(
    bfloat16: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same roundings: the norm's, its weight's, the product's, the keys' norm's."""
    plain, fast = stacked_pair(monkeypatch, dtype=torch.bfloat16)
    condition = torch.randn(2, 9, 48).bfloat16()
    with torch.no_grad():
        for found, expected in zip(fast.encode(condition), plain.encode(condition), strict=True):
            assert found.keys.dtype == torch.bfloat16
            torch.testing.assert_close(found.keys, expected.keys, atol=0.01, rtol=0.01)
            torch.testing.assert_close(found.values, expected.values, atol=0.01, rtol=0.01)


def hook(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda *_: None)


def move(layer: Any) -> None:
    layer.weight.data = layer.weight.data.clone()


def quantize(layer: Any) -> None:
    weight, layer.scale = quantize_weight(layer.weight.detach(), "int8")
    layer.weight = nn.Parameter(weight, requires_grad=False)


NORM, MODULATION = "layers.1.norm1_context", "layers.1.norm1.linear"
KEY, KEY_NORM = "layers.1.attn2.to_k", "layers.1.attn2.norm_k"


@pytest.mark.parametrize(
    ("change", "name", "called"),
    [(change, KEY, "encode") for change in (hook, move, quantize)]
    + [(change, MODULATION, "modulate") for change in (hook, move, quantize)]
    + [(hook, "norm_out.linear_1", "modulate"), (hook, NORM, "encode"), (hook, KEY_NORM, "encode")],
)
def test_layers_that_something_was_done_to_are_called_one_by_one(
    change: Any, name: str, called: str, stacked_calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, fast = stacked_pair(monkeypatch)
    for part in {name, name.replace("to_k", "to_v")}:  # quantised are both or none
        if change is quantize:
            quantize(plain.get_submodule(part))
        change(fast.get_submodule(part))
    condition, temb = torch.randn(2, 9, 48), torch.randn(3, 2, 48)
    with torch.no_grad():
        found = fast.encode(condition), fast.modulate(temb)
        expected = plain.encode(condition), plain.modulate(temb)
    assert stacked_calls == ([called] * 2 if called == "encode" else ["stacked", *[called] * 2])
    for own, reference in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(own[:2], reference[:2])
    torch.testing.assert_close(found[1], expected[1])


@pytest.mark.parametrize("quantized", [False, True])
def test_weights_that_would_be_widened_are_multiplied_layer_by_layer(
    quantized: bool, stacked_calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all layers at once the copies would take as much memory as the weights."""
    networks = stacked_pair(monkeypatch, dtype=torch.float32 if quantized else torch.bfloat16)
    condition, temb, found = torch.randn(2, 9, 48), torch.randn(3, 2, 48), []
    for network in networks:
        if quantized:
            for block in network.blocks:
                for layer in (block.attn2.to_k, block.attn2.to_v, block.norm1.linear):
                    quantize(layer)
    use_cpu_kernels(networks[1])
    with torch.no_grad():
        found = [[network.modulate(temb), *network.encode(condition)[1][:2]] for network in networks]
    assert stacked_calls == ["modulate"] * 2 + ["encode"] * 2
    for own, reference in zip(*found, strict=True):
        torch.testing.assert_close(own, reference)


def test_with_gradients_and_without_a_gpu_layers_are_called_one_by_one(stacked_calls: list[str]) -> None:
    _, fast = network_pair()
    condition, temb = torch.randn(2, 9, 48), torch.randn(2, 48)
    fast.encode(condition)
    fast.modulate(temb).sum().backward()
    assert stacked_calls == ["encode", "encode", "modulate", "modulate"]
    assert all(block.norm1.linear.weight.grad is not None for block in fast.blocks)
    with torch.no_grad():
        fast.encode(condition)
        fast.modulate(temb)
    assert stacked_calls[4:] == ["encode", "encode"]


def test_weights_of_several_dtypes_stay_where_they_are() -> None:
    weights = [nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(2, 5).bfloat16())]
    places = [weight.data_ptr() for weight in weights]
    pack_weights(weights)
    assert [weight.data_ptr() for weight in weights] == places
    assert [weight.dtype for weight in weights] == [torch.float32, torch.bfloat16]


def test_only_plain_classes_are_replaced() -> None:
    class Own(layers.Linear):
        pass

    model = BLIP3oDiTModel(tiny_config())
    assert type(model.dit.layers[0]) is cpu_kernels.NextDiTBlock
    model.dit.layers[0].attn1.to_k = Own(48, 48, bias=False)
    model.dit.layers[0].attn1.to_v = nn.Linear(48, 48, bias=False)
    use_cpu_kernels(model)
    assert type(model.dit.layers[0].attn1.to_k) is Own
    assert type(model.dit.layers[0].attn1.to_v) is nn.Linear


def test_classes_keep_the_names_that_others_look_for() -> None:
    """FSDP's wrapping policy finds the block by the name of its class, a diagnosis names the layer's."""
    assert all(stand_in.__name__ == plain.__name__ for plain, stand_in in cpu_kernels.STAND_INS.items())


def test_frozen_weights_pass_gradients_to_their_input() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weights, x = three_weights(dtype), torch.randn(3, 5, requires_grad=True)
        for weight in weights:
            weight.requires_grad_(False)
        pack_weights(weights)
        outputs = multi_linear(x, weights)
        (found,) = torch.autograd.grad(outputs, x, [torch.ones_like(out) for out in outputs])
        expected = sum(weight.float().sum(0) for weight in weights)
        torch.testing.assert_close(found, expected.expand(3, 5))


def test_products_that_selective_checkpointing_keeps_are_not_repeated() -> None:
    """FlopCounterMode, counted at the dispatcher: one product forward and two backward for each weight."""
    counts = {}
    for selective in (True, False):
        model = BLIP3oDiTModel(tiny_config(gradient_checkpointing=True)).train()
        model.dit.selective_checkpointing = selective
        with CountedProducts() as counted:
            model(torch.randn(2, 9, 8), torch.rand(2), torch.randn(2, 9, 12)).sum().backward()
        counts[selective] = counted.calls
    per_block = 11  # four and two projections, the output's, three of the feed-forward, the modulation's
    assert counts[False] - counts[True] == per_block * 2


def all_are_packed(model: BLIP3oDiTModel) -> bool:
    kinds = cpu_kernels.NextDiT | cpu_kernels.NextDiTBlock | cpu_kernels.FeedForward
    fused = [module for module in model.modules() if isinstance(module, kinds)]
    groups = [[layer.weight for layer in group] for module in fused for group in module.joint_layers()]
    groups.append([layer.bias for layer in model.dit.joint_layers()[0]])
    return len(groups) == 3 * len(model.dit.layers) + 3 and all(map(cpu_kernels.are_packed, groups))


def test_weights_of_a_model_are_packed_whatever_was_done_to_it(tmp_path: object) -> None:
    model = BLIP3oDiTModel(tiny_config(num_kv_heads=1))
    assert all_are_packed(model)
    assert all_are_packed(model.bfloat16())
    model.save_pretrained(tmp_path)
    assert all_are_packed(BLIP3oDiTModel.from_pretrained(tmp_path))


def test_loaded_weights_lie_where_made_ones_do(tmp_path: object) -> None:
    BLIP3oDiTModel(tiny_config()).save_pretrained(tmp_path)
    loaded = BLIP3oDiTModel.from_pretrained(tmp_path)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in loaded.state_dict().values())


def test_a_model_that_is_read_is_the_one_that_is_loaded(tmp_path: Path) -> None:
    model = BLIP3oDiTModel(tiny_config(num_kv_heads=1, flow_matching={"source": "ridge"}))
    randomize(model)
    model.target_mean.normal_()
    model.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = BLIP3oDiTModel.from_pretrained(tmp_path, dtype=dtype)
        found = BLIP3oDiTModel.load_for_inference(tmp_path, dtype=dtype)
        assert not found.training and all_are_packed(found)
        expected = loaded.state_dict()
        assert expected.keys() == found.state_dict().keys()
        for name, tensor in found.state_dict().items():
            assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
            assert tensor.data_ptr() % 64 == 0
        assert all(p.requires_grad for p in found.parameters())


def test_saving_writes_every_weight_once_and_copies_none(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = BLIP3oDiTModel(tiny_config())
    randomize(model)
    monkeypatch.setattr(torch.Tensor, "clone", None)  # what transformers does to tensors that share memory
    model.save_pretrained(tmp_path)
    monkeypatch.undo()
    loaded = BLIP3oDiTModel.from_pretrained(tmp_path)
    for (name, a), (_, b) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_bfloat16_weights_where_it_would_be_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BFLOAT16_VARIABLE, raising=False)  # the processor's own features decide
    model = BLIP3oDiTModel(tiny_config())
    randomize(model, scale=0.1)
    model.eval()
    eva = torch.randn(2, 9, 12)
    exact = model.generate(eva, num_inference_steps=2)
    model.bfloat16()
    distances = []
    for fast in (False, True):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda fast=fast: {"avx512_bf16": fast})
        assert model.compute_dtype == (torch.bfloat16 if fast else torch.float32)
        distances.append(float((model.generate(eva, num_inference_steps=2) - exact).abs().mean()))
    assert 0 < distances[0] < distances[1] < 0.2  # rounded weights; rounded weights and activations


def test_what_this_processor_multiplies() -> None:
    assert has_native_matmul(torch.float32, torch.device("cpu"))
    assert not has_native_matmul(torch.bfloat16, torch.device("meta"))


@pytest.fixture
def transposed_gemm(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Small products are taken as w x^T too; counts them."""
    monkeypatch.setattr(cpu_kernels, "MIN_COLUMNS", 1)
    asked: list[int] = []
    plain = cpu_kernels._transposed_gemm_is_faster

    def counted(x: Tensor) -> bool:
        taken = plain(x)
        asked.extend([1] * taken)
        return taken

    monkeypatch.setattr(cpu_kernels, "_transposed_gemm_is_faster", counted)
    return asked


def test_products_of_few_rows_are_transposed(transposed_gemm: list[int]) -> None:
    weights, x = three_weights(), torch.randn(2, 7, 5)
    expected = [F.linear(x, weight) for weight in weights]
    multi_linear(x, weights)
    assert not transposed_gemm  # gradients are wanted
    with torch.no_grad():
        for packed in (False, True):
            if packed:
                pack_weights(weights)
            for part, reference in zip(multi_linear(x, weights), expected, strict=True):
                assert part.is_contiguous()
                torch.testing.assert_close(part, reference)
            for part, reference in zip(multi_linear(x, weights, any_layout=True), expected, strict=True):
                torch.testing.assert_close(part, reference)
        assert transposed_gemm
        assert not cpu_kernels._transposed_gemm_is_faster(torch.randn(cpu_kernels.MAX_ROWS + 1, 5))
        assert not cpu_kernels._transposed_gemm_is_faster(x.bfloat16())


def test_a_network_whose_products_are_transposed(
    tiny_model: BLIP3oDiTModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    eva = torch.randn(2, 9, 12)
    expected = tiny_model.generate(eva, num_inference_steps=2)
    monkeypatch.setattr(cpu_kernels, "MIN_COLUMNS", 1)
    found = tiny_model.generate(eva, num_inference_steps=2)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


# RMSNorm

WIDTH = 6


def rms_norm(eps: float = 1e-5) -> RMSNorm:
    layer = RMSNorm(WIDTH, eps=eps).double()
    with torch.no_grad():
        layer.weight.normal_()
    return layer


@pytest.mark.parametrize("modulated", [False, True])
def test_the_norm_is_torchs_times_weight_and_modulation(modulated: bool) -> None:
    layer, x = rms_norm(), torch.randn(3, 4, WIDTH, dtype=torch.float64)
    modulation = torch.randn(3, 1, WIDTH, dtype=torch.float64) if modulated else None
    plain = F.rms_norm(x, (WIDTH,), layer.weight, 1e-5)
    expected = plain if modulation is None else plain * modulation
    torch.testing.assert_close(layer(x, modulation), expected)
    narrow = layer(x.bfloat16(), None if modulation is None else modulation.bfloat16())
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.double(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("shape", [(WIDTH,), (3, 1, WIDTH)])
def test_gradients_are_those_of_finite_differences(shape: tuple[int, ...]) -> None:
    x = torch.randn(3, 4, WIDTH, dtype=torch.float64, requires_grad=True)
    factor = torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    def scaled(x: Tensor, factor: Tensor) -> Tensor:
        return _ScaledRMSNorm.apply(x, factor, 0.1)  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(scaled, (x, factor))


def test_a_token_of_zeros_stays_zero_with_finite_gradients() -> None:
    layer, x = rms_norm().float(), torch.zeros(1, 2, WIDTH, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    assert not out.any()
    assert x.grad is not None and x.grad.isfinite().all()
    assert layer.weight.grad is not None and not layer.weight.grad.any()


def test_memory_of_the_input_and_of_its_gradient_is_left_alone() -> None:
    layer = rms_norm()
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    before, pull = x.detach().clone(), torch.randn(2, 3, WIDTH, dtype=torch.float64)
    pulled = pull.clone()
    layer(x).backward(pull)
    assert torch.equal(x, before) and torch.equal(pull, pulled)


def test_plain_norms_give_the_same_in_every_dtype() -> None:
    layer, x = rms_norm(), torch.randn(2, 3, WIDTH, dtype=torch.float64)
    plain = layers.RMSNorm(WIDTH, eps=layer.eps).double()
    plain.load_state_dict(layer.state_dict())
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        modulation = torch.randn(2, 1, WIDTH, dtype=dtype)
        torch.testing.assert_close(layer(x.to(dtype)), plain(x.to(dtype)))
        torch.testing.assert_close(layer(x.to(dtype), modulation), plain(x.to(dtype), modulation))


def test_layer_norm_follows_its_input() -> None:
    layer, x = LayerNorm(WIDTH), torch.randn(2, WIDTH)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x), F.layer_norm(x, (WIDTH,), layer.weight, layer.bias, layer.eps))


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("kernels", ["before", "after", "without"])
def test_sharding_before_and_after_gives_the_same(kernels: str, one_process: None) -> None:
    """FSDP derives a class of its own from the block's: made of a plain block it stays plain."""
    plain, fast = network_pair()
    sharded = fast if kernels == "before" else copy.deepcopy(plain)
    mesh = init_device_mesh("cpu", (1,))
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    if kernels == "after":
        use_cpu_kernels(sharded)
    assert isinstance(sharded.blocks[0], FSDPModule)
    assert isinstance(sharded.blocks[0], cpu_kernels.NextDiTBlock) == (kernels == "before")
    assert (type(sharded.blocks[0].attn1.to_q) is Linear) == (kernels != "without")
    inputs = torch.randn(2, 9, 8), torch.rand(2), torch.randn(2, 9, 12), torch.randn(2, 9, 8)
    gradients = []
    for network in (plain, sharded):
        network(*inputs).square().sum().backward()
        grads = [p.grad for p in network.parameters() if p.grad is not None]
        gradients.append([g.full_tensor() if isinstance(g, DTensor) else g for g in grads])
    largest = max(float(gradient.abs().max()) for gradient in gradients[0])
    assert len(gradients[0]) == len(gradients[1])
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * largest)
