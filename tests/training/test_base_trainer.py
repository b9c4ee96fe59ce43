"""The private parts of transformers.Trainer that ours relies on; clipping."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer

from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.training import base_trainer
from blip3o_dit.training.base_trainer import ExactResumeTrainer, overrides_trainer
from blip3o_dit.training.trainer import BLIP3oTrainer
from tests.helpers.stores import write_linear_store
from tests.helpers.training import make_trainer


def test_every_override_of_a_private_method_is_marked() -> None:
    private = {name for name in vars(Trainer) if name.startswith("_") and not name.startswith("__")}
    tree = ast.parse(inspect.getsource(base_trainer))
    methods = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    marked = {m.name for m in methods if "overrides_trainer" in map(ast.unparse, m.decorator_list)}
    assert marked == private & set(vars(ExactResumeTrainer)) | {"get_batch_samples"}


def test_a_method_that_the_trainer_does_not_have_is_refused() -> None:
    def _save_all() -> None: ...

    with pytest.raises(ImportError, match="a Trainer with the method _save_all, found none"):
        overrides_trainer(_save_all)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return write_linear_store(tmp_path_factory.mktemp("data") / "store")


class Passes(TorchDispatchMode):
    """Names of the operations that write to lists of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def clipped_step(trainer: BLIP3oTrainer, norm: float) -> dict[str, Tensor]:
    """Weights after an optimizer step whose gradients have this norm."""
    optimizer = trainer.create_optimizer()
    parameters = dict(trainer.unwrapped_model.named_parameters())
    drawn = {name: torch.randn(p.shape) for name, p in parameters.items()}
    total = torch.cat([value.flatten() for value in drawn.values()]).norm()
    for name, parameter in parameters.items():
        parameter.grad = drawn[name] * (norm / total)
    assert float(trainer._clip_grad_norm(trainer.unwrapped_model)) == pytest.approx(norm, rel=1e-4)
    optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


@pytest.mark.parametrize("norm", [0.5, 40.0])
def test_clipping_in_the_optimizers_step_is_clipping_before_it(
    store: EmbeddingStore, tmp_path: Path, norm: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit where nothing is clipped, else within rounding; no pass multiplies the gradients."""
    found = []
    for inside in (True, False):
        trainer = make_trainer(store, tmp_path, max_grad_norm=1.0, seed=1)
        if not inside:
            monkeypatch.setattr(trainer.accelerator, "scaler", SimpleNamespace())  # float16
            monkeypatch.setattr(trainer.accelerator, "unscale_gradients", lambda: None)
        torch.manual_seed(3)
        with Passes() as passes:
            found.append(clipped_step(trainer, norm))
        assert ("aten::_foreach_mul_.Tensor" in passes.names) != inside
    inside_step, before = found
    for name, weight in inside_step.items():
        if norm <= 1.0:
            assert torch.equal(weight, before[name])
        torch.testing.assert_close(weight, before[name], rtol=1e-6, atol=1e-8)


def test_a_step_that_is_not_clipped_forgets_the_one_before(store: EmbeddingStore, tmp_path: Path) -> None:
    trainer = make_trainer(store, tmp_path, max_grad_norm=1.0)
    for norm, divides in ((40.0, True), (0.5, False)):
        clipped_step(trainer, norm)
        optimizer: Any = trainer.optimizer
        assert (optimizer.grad_scale is not None) == divides
