"""Joint products and narrow weights: the same numbers as plain ones, forward and backward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip3o_dit.model import linear
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.linear import Linear, lay_together, products
from blip3o_dit.model.precision import BFLOAT16_VARIABLE, has_native_matmul
from tests.conftest import randomize, tiny_config


def three_weights(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(rows, 5).to(dtype)) for rows in (4, 2, 3)]


@pytest.fixture
def large_products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each weight matrix that a product was taken with."""
    rows: list[int] = []
    plain = F.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows.append(len(weight))
        return plain(x, weight, bias)

    monkeypatch.setattr(linear.F, "linear", counted)
    return rows


def test_weights_laid_together_are_one_product_with_the_same_result(large_products: list[int]) -> None:
    weights, x = three_weights(), torch.randn(2, 7, 5)
    before = [weight.detach().clone() for weight in weights]
    apart = products(x, weights)
    assert large_products == [4, 2, 3]
    lay_together(weights)
    large_products.clear()
    with torch.no_grad():
        together = products(x, weights)
    assert large_products == [9]
    for weight, old, a, b in zip(weights, before, apart, together, strict=True):
        assert torch.equal(weight, old)
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("together", [False, True])
def test_gradients_are_those_of_plain_products(together: bool) -> None:
    weights, x = three_weights(), torch.randn(2, 7, 5, requires_grad=True)
    pulls = [torch.randn(2, 7, len(weight)) for weight in weights]
    plain = torch.autograd.grad([x @ weight.T for weight in weights], [x, *weights], pulls)
    if together:
        lay_together(weights)
    found = torch.autograd.grad(products(x, weights), [x, *weights], pulls)
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_results_and_gradients_of_a_step_do_not_share_memory() -> None:
    weights, x = three_weights(), torch.randn(2, 7, 5, requires_grad=True)
    lay_together(weights)
    outputs = products(x, weights)
    torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])
    made = [*outputs, *(weight.grad for weight in weights if weight.grad is not None)]
    assert len(made) == 6 and all(tensor.is_contiguous() for tensor in made)
    assert len({tensor.untyped_storage().data_ptr() for tensor in made}) == len(made)


def test_a_weight_that_moved_is_multiplied_by_itself(large_products: list[int]) -> None:
    weights, x = three_weights(), torch.randn(3, 5)
    lay_together(weights)
    weights[1].data = torch.randn(2, 5)
    out = products(x, weights)
    assert large_products == [4, 2, 3]
    torch.testing.assert_close(out[1], x @ weights[1].T)


def test_an_optimizer_step_changes_weights_that_lie_together() -> None:
    weights, x = three_weights(), torch.randn(3, 5)
    lay_together(weights)
    optimizer = torch.optim.SGD(weights, lr=0.1)
    sum(out.square().sum() for out in products(x, weights)).backward()
    optimizer.step()
    for out, weight in zip(products(x, weights), weights, strict=True):
        torch.testing.assert_close(out, x @ weight.T)


@pytest.mark.parametrize("together", [False, True])
def test_bfloat16_weights_are_multiplied_in_the_dtype_of_the_input(together: bool) -> None:
    weights = three_weights(torch.bfloat16)
    if together:
        lay_together(weights)
    x = torch.randn(6, 5, requires_grad=True)
    outputs = products(x, weights)
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
    lay_together(weights)
    outputs = products(x, weights)
    assert all(out.dtype == torch.bfloat16 for out in outputs)
    sum(out.float().sum() for out in outputs).backward()
    assert all(weight.grad is not None and weight.grad.dtype == torch.float32 for weight in weights)


def lie_together(model: BLIP3oDiTModel) -> bool:
    return all(
        linear._lie_together(weights) for layer in model.dit.blocks for weights in layer.joint_weights()
    )


def test_weights_of_a_model_lie_together_whatever_was_done_to_it(tmp_path: object) -> None:
    model = BLIP3oDiTModel(tiny_config(num_kv_heads=1))
    assert lie_together(model)
    assert lie_together(model.bfloat16())
    model.save_pretrained(tmp_path)
    assert lie_together(BLIP3oDiTModel.from_pretrained(tmp_path))


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
        found = BLIP3oDiTModel.read(tmp_path, dtype=dtype)
        assert not found.training and lie_together(found)
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
def from_the_left(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Small products are taken from the left too; counts them."""
    monkeypatch.setattr(linear, "MANY_COLUMNS", 1)
    asked: list[int] = []
    plain = linear._from_the_left

    def counted(x: Tensor) -> bool:
        taken = plain(x)
        asked.extend([1] * taken)
        return taken

    monkeypatch.setattr(linear, "_from_the_left", counted)
    return asked


def test_products_of_few_rows_are_taken_from_the_left(from_the_left: list[int]) -> None:
    weights, x = three_weights(), torch.randn(2, 7, 5)
    expected = [F.linear(x, weight) for weight in weights]
    products(x, weights)
    assert not from_the_left  # gradients are wanted
    with torch.no_grad():
        for together in (False, True):
            if together:
                lay_together(weights)
            for part, reference in zip(products(x, weights), expected, strict=True):
                assert part.is_contiguous()
                torch.testing.assert_close(part, reference)
            for part, reference in zip(products(x, weights, any_layout=True), expected, strict=True):
                torch.testing.assert_close(part, reference)
        assert from_the_left
        assert not linear._from_the_left(torch.randn(linear.FEW_ROWS + 1, 5))
        assert not linear._from_the_left(x.bfloat16())


def test_a_network_whose_products_are_taken_from_the_left(
    tiny_model: BLIP3oDiTModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    eva = torch.randn(2, 9, 12)
    expected = tiny_model.generate(eva, num_inference_steps=2)
    monkeypatch.setattr(linear, "MANY_COLUMNS", 1)
    found = tiny_model.generate(eva, num_inference_steps=2)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
