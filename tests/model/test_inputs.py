"""What callers give a model: it works, or a ValueError says what was expected and what was found."""

from __future__ import annotations

import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from src.modules.inference.blip3o_inference import BLIP3oInference
from tests.conftest import randomize, tiny_config
from tests.helpers.stores import write_linear_store

EVA = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(0))
NUMBERS = EVA.numpy()


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


def with_nan(value: float) -> torch.Tensor:
    eva = EVA.clone()
    eva[1, 2, 3] = value
    return eva


SAME = {
    "not contiguous": EVA.transpose(0, 1).contiguous().transpose(0, 1),
    "requires a gradient": EVA.clone().requires_grad_(),
    "float64": EVA.double(),
    "NumPy": NUMBERS,
    "NumPy, Fortran order": np.asfortranarray(NUMBERS),
    "NumPy, negative strides": NUMBERS[::-1].copy()[::-1],
    "NumPy, big endian": NUMBERS.astype(">f4"),
    "NumPy, float64": NUMBERS.astype(np.float64),
    "NumPy, read-only": read_only(NUMBERS),
    "lists": EVA.tolist(),
}


@pytest.fixture(scope="module", params=["noise", "ridge_3x3"])
def model(request: pytest.FixtureRequest) -> BLIP3oDiTModel:
    torch.manual_seed(0)
    flow = {"source": request.param} | ({"source_components": 4} if request.param == "ridge_3x3" else {})
    model = BLIP3oDiTModel(tiny_config(flow_matching=flow))
    randomize(model)
    return model.eval()


@pytest.mark.parametrize("name", SAME)
def test_the_same_numbers_give_the_same_tokens(model: BLIP3oDiTModel, name: str) -> None:
    expected = model.generate(EVA, num_inference_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = model.generate(SAME[name], num_inference_steps=1)
    assert torch.equal(found, expected) and not found.requires_grad
    assert torch.equal(model.predict_mean(SAME[name]), model.predict_mean(EVA))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.uint8])
def test_other_dtypes_are_their_numbers(model: BLIP3oDiTModel, dtype: torch.dtype) -> None:
    eva = (EVA.abs() * 4).to(dtype)
    assert torch.equal(
        model.generate(eva, num_inference_steps=1), model.generate(eva.float(), num_inference_steps=1)
    )


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun", "dopri5"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_no_samples_give_no_tokens(model: BLIP3oDiTModel, solver: str, guidance: float) -> None:
    steps = None if solver == "dopri5" else 2
    options: dict[str, Any] = dict(num_inference_steps=steps, solver=solver, guidance_scale=guidance)
    assert model.generate(EVA[:0], **options).shape == (0, 9, 8)
    assert model.predict_mean(EVA[:0]).shape == (0, 9, 8)


@pytest.mark.parametrize(
    ("eva", "message"),
    [
        (EVA[:, :4], r"expected shape \[batch, 9, 12\], found \[2, 4, 12\]"),
        (EVA[:, :0], r"expected shape \[batch, 9, 12\], found \[2, 0, 12\]"),
        (torch.randn(2, 10, 12), r"found \[2, 10, 12\]: leave out the class token, x\[:, 1:\]"),
        (EVA[..., :11], r"found \[2, 9, 11\]"),
        (EVA[0], r"found \[9, 12\]: one sample is a batch of one, x\[None\]"),
        (EVA[None], r"found \[1, 2, 9, 12\]"),
        (EVA[0, 0, 0], r"found \[\]"),
        (with_nan(float("nan")), "found NaN or infinity in 1 of 2 samples, first in sample 1"),
        (with_nan(float("-inf")).numpy(), "found NaN or infinity in 1 of 2 samples, first in sample 1"),
        (EVA.double() * 1e300, "found NaN or infinity in 2 of 2 samples, first in sample 0"),
        (EVA.to(torch.complex64), "expected a dense tensor of floats, found torch.complex64"),
        (EVA > 0, "expected a dense tensor of floats, found torch.bool"),
        (EVA.to_sparse(), "expected a dense tensor of floats, found torch.float32, torch.sparse_coo"),
        (np.array([["a"]]), "expected a tensor or array, found array"),
        ("eva.pt", "expected a tensor or array, found 'eva.pt'"),
        (None, "expected a tensor or array, found None"),
        ([[1.0], [1.0, 2.0]], "expected a tensor or array, found"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_other_conditions_are_refused(model: BLIP3oDiTModel, eva: Any, message: str) -> None:
    for use in (model.generate, model.predict_mean):
        with pytest.raises(ValueError, match=f"^condition: .*{message}"):
            use(eva)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps: expected an integer >= 1, found 0"),
        ({"num_inference_steps": -3}, "num_inference_steps: expected an integer >= 1, found -3"),
        ({"num_inference_steps": 4.0}, "num_inference_steps: expected an integer >= 1, found 4.0"),
        ({"num_inference_steps": True}, "num_inference_steps: expected an integer >= 1, found True"),
        ({"num_inference_steps": "4"}, "num_inference_steps: expected an integer >= 1, found '4'"),
        ({"guidance_scale": float("nan")}, "guidance_scale: expected a finite number, found nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale: expected a finite number, found inf"),
        ({"guidance_scale": None}, "guidance_scale: expected a finite number, found None"),
        ({"guidance_interval": (0.5,)}, r"guidance_interval: expected 0 <= low < high <= 1, found \(0.5,\)"),
        ({"guidance_interval": (0.1, float("nan"))}, "guidance_interval: expected 0 <= low < high <= 1"),
        ({"guidance_interval": 0.5}, "guidance_interval: expected 0 <= low < high <= 1, found 0.5"),
        ({"solver": "rk45"}, "solver: expected one of .* found 'rk45'"),
        ({"solver": ""}, "solver: expected one of .* found ''"),
        ({"solver": ["euler"]}, "solver: expected one of"),
        ({"solver": "dopri5", "tolerance": float("nan")}, "tolerance: expected a finite number, found nan"),
        ({"seed": 0.5}, "seed: expected an integer, found 0.5"),
        ({"seed": None}, "seed: expected an integer, found None"),
        ({"sample_number": "a"}, "sample_number: expected an integer, found 'a'"),
        ({"sample_index": [0]}, "sample_index: expected 2 entries, found 1"),
        ({"sample_index": 3}, "sample_index: expected 2 entries, found 1"),
        ({"sample_index": [0, 0.5]}, "sample_index: expected an integer, found 0.5"),
    ],
)
def test_other_settings_are_refused(model: BLIP3oDiTModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        model.generate(EVA, **options)


def test_numbers_of_other_libraries_and_any_seed(model: BLIP3oDiTModel) -> None:
    expected = model.generate(EVA, num_inference_steps=2, seed=3, sample_index=[4, 5], guidance_scale=1.5)
    options: dict[str, Any] = dict(num_inference_steps=np.int64(2), seed=torch.tensor(3))
    found = model.generate(EVA, sample_index=np.array([4, 5]), guidance_scale=np.float32(1.5), **options)
    assert torch.equal(found, expected)
    seeds = (0, -1, 2**31, 2**64, -(2**100))
    different = [model.generate(EVA, num_inference_steps=1, seed=seed) for seed in seeds]
    assert all(not torch.equal(a, b) for a, b in pairwise(different))


X, T, CONDITION = torch.randn(2, 9, 8), torch.zeros(2), EVA


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X[:, :8], T, CONDITION), r"hidden_states: expected shape \[2, 9, 8\], found \[2, 8, 8\]"),
        ((X[0, 0, 0], T, CONDITION), r"hidden_states: expected shape \[0, 9, 8\], found \[\]"),
        ((X, T[:1], CONDITION), r"timestep: expected shape \[2\], found \[1\]"),
        ((X, T.long(), CONDITION), "timestep: expected a tensor of floats, found torch.int64"),
        ((X, T.half(), CONDITION), "timestep: expected float32, found torch.float16"),
        ((X, 0.5, CONDITION), "timestep: expected a tensor of floats, found float"),
        ((X.numpy(), T, CONDITION), "hidden_states: expected a tensor of floats, found float32"),
        ((X.long(), T, CONDITION), "hidden_states: expected a tensor of floats, found torch.int64"),
        ((X, T, CONDITION[0]), r"condition: expected shape \[batch, tokens, 12\], found \[9, 12\]"),
        ((X, T, CONDITION[..., :3]), r"condition: expected shape \[batch, tokens, 12\], found \[2, 9, 3\]"),
        ((X, T, CONDITION[:, :0]), r"condition: expected shape \[batch, tokens, 12\], found \[2, 0, 12\]"),
        ((X, T, CONDITION[:1]), "condition: expected a batch of 2, found 1"),
        ((X, T, CONDITION, X[:, :4]), r"source_mean: expected shape \[2, 9, 8\], found \[2, 4, 8\]"),
        ((X, T, CONDITION.to("meta")), "condition: expected the device of the model, cpu, found meta"),
    ],
)
def test_forward_says_what_it_expects(
    model: BLIP3oDiTModel, arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        model(*arguments)


def test_forward_without_samples_and_with_other_numbers_of_tokens(model: BLIP3oDiTModel) -> None:
    assert model(X[:0], T[:0], CONDITION[:0]).shape == (0, 9, 8)
    if model.config.flow.source == "noise":
        assert model(X, T, CONDITION[:, :4]).shape == (2, 9, 8)
    else:
        with pytest.raises(
            ValueError, match="condition: expected 9 tokens, from which the source is computed"
        ):
            model(X, T, CONDITION[:, :4])


def test_the_documented_class_says_the_same(model: BLIP3oDiTModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    inference = BLIP3oInference(tmp_path / "model", device="cpu", dtype=torch.float32)
    expected = inference.generate(EVA, 1)
    for eva in SAME.values():
        assert torch.equal(inference.generate(eva, 1), expected)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected shape \[batch, 9, 12\], found \[9, 12\]"):
        inference.generate(EVA[0], 1)
    store = write_linear_store(tmp_path / "store", samples=4)
    for name, value in (("batch_size", 0), ("batch_size", 2.0), ("seed", 0.5), ("num_samples", -1)):
        for use in (inference.evaluate_model, inference.generate_from_dataset):
            with pytest.raises(ValueError, match=f"^{name}: expected an integer"):
                use(store.path, split="all", progress=False, **{name: value})  # type: ignore[operator]
    found = inference.evaluate_model(store, split="all", num_inference_steps=1, progress=False)
    assert found["num_samples"] == 4
    narrow = write_linear_store(tmp_path / "narrow", samples=4, condition=10)
    with pytest.raises(ValueError, match=r"expected .* \(9, 12, 8\) .* found \(9, 10, 8\)"):
        inference.evaluate_model(narrow, split="all")
