"""Weights of one byte: how near they are, that every route multiplies by them alike, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from blip3o_dit.data.choices import QUANTIZATIONS
from blip3o_dit.evaluation import evaluate
from blip3o_dit.evaluation.config import EvaluationConfig
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.inference.request import Sampling, differences
from blip3o_dit.model import cpu_kernels, layers, quantization
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.config import BLIP3oDiTConfig
from blip3o_dit.model.cpu_kernels import Linear, joint_product, pack_weights
from blip3o_dit.model.quantization import check_quantize, quantize_blocks, quantize_weight, weight_bytes
from tests.conftest import randomize, tiny_config

KINDS = tuple(quantization.DTYPES)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model() -> BLIP3oDiTModel:
    config = tiny_config(num_kv_heads=1, flow_matching={"condition_dropout": 0.1, "source": "ridge"})
    model = BLIP3oDiTModel(config)
    randomize(model)
    return model.eval()


def quantized_linear(rows: int, kind: str) -> Linear:
    layer = Linear(40, rows, bias=rows == 7)
    weight, layer.scale = quantize_weight(layer.weight.detach(), kind)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def widened(layer: layers.Linear) -> Tensor:
    assert layer.scale is not None
    return layer.weight.float() * layer.scale[:, None]


def test_the_command_line_knows_the_kinds() -> None:
    assert QUANTIZATIONS == KINDS


def test_a_weight_is_as_near_as_its_byte_allows(kind: str) -> None:
    weight = torch.randn(6, 500) * torch.tensor([1e-6, 1e-3, 0.02, 1.0, 30.0, 0.0])[:, None]
    found, scale = quantize_weight(weight.clone(), kind)
    assert found.element_size() == 1 and scale.shape == (6,) and scale.dtype == torch.float32
    step = scale[:, None]
    # Half a step of the integers; half of the last of float8's three bits, and of its least number.
    bound = step / 2 if kind == "int8" else weight.abs() / 16 + step * 2**-10
    assert ((found.float() * step - weight).abs() <= bound * 1.001).all()
    assert (found.float().abs().amax(dim=1)[:5] == quantization.LARGEST[kind]).all()


def test_the_error_of_a_product_is_bounded_by_the_steps() -> None:
    layer = Linear(40, 24, bias=False)
    weight, x = layer.weight.detach().clone(), torch.randn(64, 40)
    found, scale = quantize_weight(weight, "int8")
    with torch.no_grad():
        error = (cpu_kernels.quantized_product(x, found, scale) - x @ weight.T).abs()
    assert (error <= x.abs().sum(dim=1)[:, None] * scale / 2 + 1e-5).all()
    assert error.max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [3, 600])  # in pieces from the left, and at once
def test_every_route_multiplies_by_the_same_weights(
    kind: str, dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_kernels, "WIDENED_AT_ONCE", 120)  # three rows of a weight
    group, x = [quantized_linear(count, kind) for count in (7, 4, 5)], torch.randn(2, rows, 40).to(dtype)
    expected = [x.float() @ widened(layer).T for layer in group]
    near = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 4e-3, "rtol": 8e-3}
    for packed in (False, True):
        if packed:
            pack_weights([layer.weight for layer in group])
            pack_weights([layer.scale for layer in group if layer.scale is not None])
        with torch.no_grad():
            parts = joint_product(x, group)
            assert all(part.is_contiguous() and part.dtype == dtype for part in parts)
            for found in (parts, joint_product(x, group, any_layout=True)):
                for part, reference in zip(found, expected, strict=True):
                    torch.testing.assert_close(part.float(), reference, **near)
            for layer, reference in zip(group, expected, strict=True):
                bias = 0 if layer.bias is None else layer.bias
                for out in (layer(x), layers.Linear.forward(layer, x)):
                    assert out.dtype == dtype and out.is_contiguous()
                    torch.testing.assert_close(out.float(), reference + bias, **near)


def test_gradients_go_through_to_the_input(kind: str) -> None:
    layer, x = quantized_linear(5, kind), torch.randn(3, 40, requires_grad=True)
    assert not cpu_kernels.can_be_joined([layer])
    (found,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(found, widened(layer).sum(dim=0).expand(3, -1))


def load(folder: Path, kind: str | None, dtype: torch.dtype = torch.float32) -> BLIP3oDiTModel:
    return BLIP3oInference(folder, device="cpu", dtype=dtype, quantize=kind).model


def test_samples_are_those_of_the_widened_weights(
    model: BLIP3oDiTModel, kind: str, bfloat16: str, tmp_path: Path
) -> None:
    """With guidance, in every layer, whether bfloat16 is multiplied or widened."""
    model.save_pretrained(tmp_path)
    eva = torch.randn(2, 9, 12)
    sampling = dict(num_inference_steps=3, guidance_scale=2.0)
    plain = model.generate(eva, **sampling)
    found = load(tmp_path, kind), load(tmp_path, kind, torch.bfloat16)
    with torch.no_grad():
        for own, layer in zip(model.modules(), found[0].modules(), strict=True):
            if isinstance(layer, layers.Linear) and layer.scale is not None:
                own.weight.copy_(widened(layer))
    expected = model.generate(eva, **sampling)
    exact, rounded = (each.generate(eva, **sampling) for each in found)
    torch.testing.assert_close(exact, expected, atol=2e-4, rtol=2e-4)
    assert float((rounded - expected).norm() / expected.norm()) < (0.05 if bfloat16 == "native" else 0.025)
    assert float((plain - expected).norm() / expected.norm()) > 1e-3


def test_only_the_blocks_matrices_take_one_byte(model: BLIP3oDiTModel, kind: str, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    found = load(tmp_path, kind, torch.bfloat16)
    assert found.dtype == torch.bfloat16  # what the other layers' weights are in
    expected = 0
    for name, tensor in model.state_dict().items():
        there, is_matrix = found.state_dict()[name], "layers." in name and tensor.ndim == 2
        is_statistic = name.startswith(("target_", "condition_", "source_"))
        assert there.element_size() == (1 if is_matrix else 4 if is_statistic else 2)
        expected += there.nbytes + (4 * len(tensor) if is_matrix else 0)  # and a scale for every row
        if is_matrix:  # of the weights as they are in the file, not of their bfloat16
            assert torch.equal(there.float(), quantize_weight(tensor, kind)[0].float())
    assert weight_bytes(found) == expected
    with pytest.raises(ValueError, match="expected weights as they were trained, found quantised ones"):
        found.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_the_default_network_takes_half_of_bfloat16() -> None:
    with torch.device("meta"):
        model = BLIP3oDiTModel(BLIP3oDiTConfig()).bfloat16()
    plain = weight_bytes(model)
    assert len(quantize_blocks(model, "int8")) == 24 * 11
    assert 0.5 < weight_bytes(model) / plain < 0.51


def test_what_cannot_be_quantised_is_refused_in_one_line(
    model: BLIP3oDiTModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^quantize: expected one of \('int8', 'fp8'\), found 'int4'$"):
        load(tmp_path, "int4")
    with pytest.raises(ValueError, match=r"^quantize: expected dtype bfloat16 or float32 with int8, found"):
        load(tmp_path, "int8", torch.float16)
    with pytest.raises(ValueError, match=r"^quantize: expected one of"):
        EvaluationConfig(quantize="int4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    check_quantize("int8", torch.bfloat16, torch.device("cuda"))
    with pytest.raises(
        ValueError, match=r"^quantize: expected int8 on this GPU, found fp8, .* 8\.9: .* 8\.0$"
    ):
        check_quantize("fp8", torch.bfloat16, torch.device("cuda"))


def test_an_evaluation_and_a_request_say_how_weights_were_quantised(
    model: BLIP3oDiTModel, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    (loaded,) = evaluate._load([tmp_path], EvaluationConfig(quantize="int8", device="cpu"), False)
    assert quantization.is_quantized(loaded.model)
    plain = BLIP3oInference(tmp_path, device="cpu", dtype=torch.float32)
    new, old = (each.request({}, Sampling(), batch_size=8) for each in (loaded, plain))
    assert differences(old, new) == ["quantize is None there, 'int8' here"]
    del old["sampling"]["quantize"]  # as it was noted before there was the flag
    assert not differences(old, plain.request({}, Sampling(), batch_size=8))
