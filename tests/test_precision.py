"""The dtype rule (`model/layers.py`), and every path in bfloat16 against float32.

Each test runs where bfloat16 is multiplied natively and where it is emulated, on any machine (fixture
`bfloat16`): torch takes such products everywhere, only more slowly.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.evaluation.evaluate import evaluate_models
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.model import transformer
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.conversion import from_official_state_dict, to_official_state_dict
from blip3o_dit.model.layers import BFLOAT16_VARIABLE, has_native_matmul
from blip3o_dit.model.transformer import NextDiTBlock
from blip3o_dit.training.config import PAPER_RECIPE, TrainingConfig
from blip3o_dit.training.curves import read_log
from blip3o_dit.training.distillation import distill
from blip3o_dit.training.distillation_config import DistillationConfig
from blip3o_dit.training.run import train
from tests.conftest import randomize, tiny_config
from tests.helpers.evaluation import small_evaluation
from tests.helpers.stores import write_linear_store
from tests.helpers.training import tiny_training

pytestmark = pytest.mark.slow

RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": PAPER_RECIPE,
    "velocity from ridge": {"prediction_type": "v_prediction", "source": "ridge"},
    "noise": {"prediction_type": "epsilon", "source": "noise"},
    "sample": {"prediction_type": "sample", "source": "noise"},
    "preconditioned from noise": {"source": "noise", "schedule_type": "cosine"},
    "normalised": {"normalize_embeddings": True},
}
SETTINGS: dict[str, Any] = dict(
    model_dim=48,
    num_layers=2,
    num_heads=3,
    max_steps=25,
    batch_size=16,
    learning_rate=2e-3,
    eval_split=1 / 6,
    eval_samples=0,
    eval_steps=1000,
    save_steps=1000,
    logging_steps=5,
    ema_decay=0.0,
    cfg_dropout=0.2,
)


Loaded = Callable[[str], BLIP3oInference]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return write_linear_store(tmp_path_factory.mktemp("data") / "store", samples=96)


@pytest.fixture(scope="module")
def trained(store: EmbeddingStore, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A model folder for a recipe, trained once: rounding means something only next to what was learned."""
    return cache(
        lambda recipe: train_once(store, tmp_path_factory.mktemp("trained") / "run", **RECIPES[recipe])
    )


def train_once(store: EmbeddingStore, output: Path, **changes: Any) -> Path:
    return train(tiny_training(store.path, output, **(SETTINGS | changes)))


@pytest.fixture(scope="module")
def exact(trained: Callable[..., Path]) -> Loaded:
    """A recipe's model in float32, loaded once: it is the same in both regimes."""
    return cache(lambda recipe: inference(trained(recipe), torch.float32))


def inference(folder: Path, dtype: torch.dtype) -> BLIP3oInference:
    return BLIP3oInference(folder, device="cpu", dtype=dtype)


def relative_error(found: Tensor, exact: Tensor, model: BLIP3oDiTModel) -> float:
    """Root mean square of the difference over that of the tokens' deviation from their training mean."""
    scale = exact - model.target_mean
    return float((found - exact).norm() / scale.norm())


# Generation


@pytest.mark.parametrize("recipe", RECIPES)
def test_bfloat16_generates_what_float32_does(
    trained: Callable[..., Path], exact: Loaded, store: EmbeddingStore, recipe: str, bfloat16: str
) -> None:
    eva = store.fetch(range(80, 96))[0]
    whole, narrow = exact(recipe), inference(trained(recipe), torch.bfloat16)
    assert narrow.model.compute_dtype == (torch.bfloat16 if bfloat16 == "native" else torch.float32)
    for guidance in (1.0, 3.0):
        # So many that rounding alone stays below the bound, and so few that times in bfloat16 would not.
        expected, found = (
            model.generate(eva, guidance_scale=guidance, num_inference_steps=12) for model in (whole, narrow)
        )
        assert found.dtype == torch.float32
        assert 0 < relative_error(found, expected, whole.model) < 0.02
    if recipe != "noise":
        guess = narrow.model.predict_mean(eva)
        assert relative_error(guess, whole.model.predict_mean(eva), whole.model) < 0.02


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun", "dopri5"])
def test_every_solver_keeps_its_state_in_float32(
    trained: Callable[..., Path], exact: Loaded, store: EmbeddingStore, solver: str, bfloat16: str
) -> None:
    eva = store.fetch(range(4))[0]
    whole, narrow = exact("default"), inference(trained("default"), torch.bfloat16)
    expected, found = (model.generate(eva, solver=solver) for model in (whole, narrow))
    assert relative_error(found, expected, whole.model) < 0.02


def test_a_default_inference_takes_bfloat16_where_it_is_native(
    trained: Callable[..., Path], bfloat16: str
) -> None:
    found = BLIP3oInference(trained("default"), device="cpu")
    assert found.model.dtype == (torch.bfloat16 if bfloat16 == "native" else torch.float32)


def test_a_small_residual_beside_a_large_guess_survives_bfloat16(bfloat16: str) -> None:
    """x_t = R(c) + s y with s = 0.01: rounding x_t and R(c) would leave an error of 0.24 in y."""
    model = BLIP3oDiTModel(tiny_config(in_channels=48, flow_matching={"source": "ridge"})).bfloat16()
    with torch.no_grad():  # the network's first layers hand on x_t - R(c)
        model.dit.patch_embedder.proj.weight.copy_(torch.eye(48))
        model.dit.guess_embedder.weight.copy_(-torch.eye(48))
    guess, y, dtype = 1.0 + torch.randn(2, 9, 48), torch.randn(2, 9, 48), model.dit.compute_dtype
    embedded = model.dit._embed_source_mean(guess, dtype)
    shown = model.dit._embed(guess + 0.01 * y, guess, embedded, dtype)
    torch.testing.assert_close(shown / 0.01, y, rtol=0.01, atol=0.01)


# Evaluation, distillation, conversion, saving


@pytest.fixture(scope="module")
def evaluated(
    trained: Callable[..., Path], store: EmbeddingStore, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], tuple[dict[str, Any], float]]:
    """The pipeline's figures and the report's energy score by dtype and regime, measured once."""

    def measure(dtype: str, regime: str) -> tuple[dict[str, Any], float]:
        model, output = trained("default"), tmp_path_factory.mktemp("evaluated")
        figures = inference(model, getattr(torch, dtype)).evaluate_model(store.path, progress=False)
        config = small_evaluation(dtype=dtype, draw_samples=16)
        report = evaluate_models([model], store.path, output, config, progress=False)
        (found,) = (method for method in report["methods"] if method["is_model"])
        return figures, found["metrics"]["conditional"]["energy_score"]["value"]

    return cache(measure)


def test_bfloat16_is_evaluated_as_float32(
    evaluated: Callable[[str, str], tuple[dict[str, Any], float]], bfloat16: str
) -> None:
    (exact, score), (found, narrow) = evaluated("float32", "any"), evaluated("bfloat16", bfloat16)
    assert found == pytest.approx(exact, rel=0.01, abs=1e-3) and found != exact
    assert narrow == pytest.approx(score, rel=0.01) and narrow != score


@pytest.mark.parametrize("recipe", ["default", "paper"])
def test_a_student_generates_in_bfloat16(
    trained: Callable[..., Path], store: EmbeddingStore, tmp_path: Path, recipe: str, bfloat16: str
) -> None:
    config = DistillationConfig(steps=2, train_steps=6, batch_size=8, teacher_steps=3, ema_decay=0.5)
    student = distill(trained(recipe), store.path, tmp_path / "student", config, progress=False)
    eva = store.fetch(range(80, 96))[0]
    exact, narrow = (inference(student, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert relative_error(narrow.generate(eva), exact.generate(eva), exact.model) < 0.02


def test_a_narrow_model_is_saved_loaded_and_converted_whole(
    trained: Callable[..., Path], store: EmbeddingStore, tmp_path: Path, bfloat16: str
) -> None:
    eva = store.fetch(range(3))[0]
    model = inference(trained("paper"), torch.bfloat16).model
    expected = model.generate(eva)
    model.save_pretrained(tmp_path)
    for loaded in (
        BLIP3oDiTModel.from_pretrained(tmp_path, dtype="auto").eval(),
        inference(tmp_path, torch.bfloat16).model,
    ):
        assert loaded.dtype == torch.bfloat16
        assert torch.equal(loaded.generate(eva), expected)  # bit for bit: the same process and regime
    released = to_official_state_dict(model)
    assert {tensor.dtype for tensor in released.values()} == {torch.bfloat16}
    converted = from_official_state_dict(released, config=model.config).bfloat16().eval()  # no statistics
    assert torch.equal(converted.generate(eva), expected)  # which this recipe does not use


# Training


def at_a_constant_rate(recipe: str) -> dict[str, Any]:
    return RECIPES[recipe] | {"max_steps": 20, "lr_scheduler_type": "constant_with_warmup"}


def losses(run: Path) -> list[float]:
    return [entry["loss"] for entry in read_log(run / "training_log.jsonl") if "loss" in entry]


@pytest.fixture(scope="module")
def exact_losses(
    store: EmbeddingStore, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], list[float]]:
    """Those of a recipe in float32, trained once: they are the same in both regimes."""
    return cache(
        lambda recipe: losses(
            train_once(store, tmp_path_factory.mktemp("exact") / "run", **at_a_constant_rate(recipe))
        )
    )


@pytest.mark.parametrize("recipe", ["default", "paper"])
def test_training_with_bf16_follows_float32(
    exact_losses: Callable[[str], list[float]],
    store: EmbeddingStore,
    tmp_path: Path,
    recipe: str,
    bfloat16: str,
) -> None:
    expected = exact_losses(recipe)
    found = losses(train_once(store, tmp_path / "narrow", **at_a_constant_rate(recipe), bf16=True))
    assert found != expected
    np.testing.assert_allclose(found, expected, rtol=0.01)


@pytest.mark.parametrize("memory", ["bf16", "low"])
def test_a_narrow_run_continues_bit_for_bit(
    store: EmbeddingStore, tmp_path: Path, memory: str, bfloat16: str
) -> None:
    """In one process, on one machine, in one regime."""
    changes: dict[str, Any] = dict(max_steps=4, save_steps=2, num_layers=1, source="noise")
    changes |= {"bf16": True, "ema_decay": 0.9} if memory == "bf16" else {"memory": "low", "model_dim": 96}
    torch.compiler.set_stance("force_eager")  # torchao compiles its optimizer, which takes half a minute
    try:
        whole = train_once(store, tmp_path / "whole", **changes)
        config = TrainingConfig.from_folder(whole)
        again = train(
            TrainingConfig(**(vars(config) | {"output_dir": str(tmp_path / "again")})),
            resume=whole / "checkpoint-2",
        )
    finally:
        torch.compiler.set_stance("default")
    first, second = (BLIP3oDiTModel.from_pretrained(f, dtype="auto").state_dict() for f in (whole, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


# The rule itself


class Seen:
    """Dtypes inside a network."""

    def __init__(self, model: BLIP3oDiTModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.dtypes: dict[str, set[torch.dtype]] = {}
        self.times: list[Tensor] = []
        plain_time, plain_rotate, plain_attend = (
            transformer.official_timestep,
            transformer.rotate,
            transformer.attend,
        )

        def official_timestep(t: Tensor) -> Tensor:
            self.times.append(t)
            return plain_time(t)

        def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
            self.note("rope", rope[0], rope[1])
            return plain_rotate(x, rope)

        def attend(*inputs: Tensor) -> Tensor:
            self.note("attention", *inputs)
            return plain_attend(*inputs)

        monkeypatch.setattr(transformer, "official_timestep", official_timestep)
        monkeypatch.setattr(transformer, "rotate", rotate)
        monkeypatch.setattr(transformer, "attend", attend)
        last = (model.dit.norm_out.norm, model.dit.norm_out.linear_2)
        for module in model.modules():
            kind = "norm" if isinstance(module, nn.LayerNorm | nn.RMSNorm) else type(module).__name__
            if kind in ("norm", "Linear", "NextDiTBlock"):
                kind = "last layer" if module in last else kind
                module.register_forward_hook(lambda _, inputs, output, kind=kind: self.note(kind, output))

    def note(self, kind: str, *tensors: Tensor) -> None:
        self.dtypes.setdefault(kind, set()).update(tensor.dtype for tensor in tensors)


class CudaAutocast(TorchFunctionMode):
    """What autocast does to norms on CUDA and not on a CPU: they run in float32 and return it."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.layer_norm, torch.rms_norm) and torch.is_autocast_enabled("cpu"):
            args = tuple(arg.float() if isinstance(arg, Tensor) else arg for arg in args)
        return func(*args, **(kwargs or {}))


TIMES = torch.tensor([0.9001, 0.9011, 0.9021, 0.5013])  # bfloat16 would make two of them one


def informed(dtype: torch.dtype = torch.float32) -> BLIP3oDiTModel:
    model = BLIP3oDiTModel(
        tiny_config(flow_matching={"source": "ridge", "prediction_type": "preconditioned"})
    )
    randomize(model, scale=0.1)
    model.source_weight.copy_(torch.linspace(-0.1, 0.1, 12 * 8).view(12, 8))
    with torch.no_grad():  # numbers that bfloat16 holds, so that narrower weights are the same ones
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model.to(dtype)


def check_dtypes(seen: Seen, narrow: torch.dtype, times: Tensor = TIMES) -> None:
    expected = {kind: {narrow} for kind in ("norm", "Linear", "attention")}
    expected |= {kind: {torch.float32} for kind in ("NextDiTBlock", "last layer", "rope")}
    assert seen.dtypes == expected
    assert all(t.dtype == torch.float32 and torch.equal(t, times) for t in seen.times) and seen.times


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_autocast_narrows_what_blocks_compute_and_nothing_else_on_cuda_too(
    monkeypatch: pytest.MonkeyPatch, training: bool, checkpointing: bool
) -> None:
    model = informed().train(training)
    model.dit.gradient_checkpointing = checkpointing
    seen = Seen(model, monkeypatch)
    x, condition = torch.randn(4, 9, 8), torch.randn(4, 9, 12)
    with CudaAutocast(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(x, TIMES, condition)
    assert output.dtype == torch.float32
    if training:
        output.square().sum().backward()
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    check_dtypes(seen, torch.bfloat16)


def test_training_under_autocast_is_inference_with_narrow_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BFLOAT16_VARIABLE, "native")
    x, condition = torch.randn(4, 9, 8), torch.randn(4, 9, 12)
    with CudaAutocast(), torch.autocast("cpu", dtype=torch.bfloat16):
        trained = informed().train()(x, TIMES, condition).detach()
    model = informed(torch.bfloat16).eval()
    seen = Seen(model, monkeypatch)
    with torch.no_grad():
        guess = model.source_distribution(condition).mean
        inferred = model.dit.predict(x, TIMES, model.dit.encode_condition(condition, guess))
    check_dtypes(seen, torch.bfloat16)
    assert torch.equal(inferred, trained)  # bit for bit: the weights are numbers that bfloat16 holds


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_emulated_products_are_taken_in_float32(
    monkeypatch: pytest.MonkeyPatch, weights: torch.dtype
) -> None:
    monkeypatch.setenv(BFLOAT16_VARIABLE, "emulated")
    model = informed(weights).eval()
    seen = Seen(model, monkeypatch)
    with torch.no_grad():
        model(torch.randn(4, 9, 8), TIMES, torch.randn(4, 9, 12))
    assert set().union(*seen.dtypes.values()) == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_and_source_stay_float32_beside_any_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    model = informed()
    model.target_mean.fill_(1.001)  # 1.0 in bfloat16
    model.save_pretrained(tmp_path)
    cast = [
        BLIP3oDiTModel.from_pretrained(tmp_path, dtype=dtype),
        BLIP3oDiTModel.load_for_inference(tmp_path, dtype=dtype),
        model.to(dtype),
    ]
    for narrow in cast:
        assert narrow.dtype == dtype
        assert {buffer.dtype for buffer in narrow.buffers()} == {torch.float32}
        assert torch.equal(narrow.target_mean, torch.full((8,), 1.001))
        for tokens in (
            narrow.normalize_target(torch.randn(1, 9, 8, dtype=dtype)),
            narrow.source_distribution(narrow.normalize_condition(torch.randn(1, 9, 12, dtype=dtype))).mean,
        ):
            assert tokens is not None and tokens.dtype == torch.float32


@pytest.mark.parametrize("source", ["ridge", "ridge_3x3"])
def test_the_source_is_float32_under_autocast(source: str) -> None:
    components = 3 if source == "ridge_3x3" else 0
    flow = {"source": source, "source_components": components}
    model = BLIP3oDiTModel(tiny_config(flow_matching=flow))
    model.source_weight.normal_()
    if components:
        model.source_components.normal_()
    condition = torch.randn(2, 9, 12)
    expected = model.source_distribution(condition).mean
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.source_distribution(condition).mean, expected)


def test_float16_weights_follow_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU float16 is native; here autocast asks for it."""
    model = informed(torch.float16).eval()
    seen = Seen(model, monkeypatch)
    with torch.no_grad(), CudaAutocast(), torch.autocast("cpu", dtype=torch.float16):
        output = model(torch.randn(4, 9, 8), TIMES, torch.randn(4, 9, 12))
    assert output.dtype == torch.float32 and torch.isfinite(output).all()
    check_dtypes(seen, torch.float16)


def test_times_in_another_dtype_are_refused() -> None:
    with pytest.raises(ValueError, match="timestep: expected float32, found torch"):
        informed()(torch.randn(4, 9, 8), TIMES.bfloat16(), torch.randn(4, 9, 12))


def test_compiled_blocks_compute_in_bfloat16(
    trained: Callable[..., Path],
    exact: Loaded,
    store: EmbeddingStore,
    monkeypatch: pytest.MonkeyPatch,
    bfloat16: str,
) -> None:
    """Traced by torch.compile and run without its code generation, which takes half a minute."""
    torch.compiler.reset()
    eva = store.fetch(range(80, 84))[0]
    expected = exact("default").generate(eva, guidance_scale=3.0)
    monkeypatch.setattr(
        NextDiTBlock, "compile", lambda self: nn.Module.compile(self, backend=lambda graph, _: graph.forward)
    )
    compiled = BLIP3oInference(trained("default"), device="cpu", dtype=torch.bfloat16, compile=True)
    assert relative_error(compiled.generate(eva, guidance_scale=3.0), expected, compiled.model) < 0.02


def test_the_declaration_is_one_of_two_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BFLOAT16_VARIABLE, "yes")
    with pytest.raises(ValueError, match="BLIP3O_DIT_BFLOAT16: expected native or emulated, found 'yes'"):
        has_native_matmul(torch.bfloat16, torch.device("cpu"))
