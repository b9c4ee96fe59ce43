"""The private parts of transformers.Trainer that ours relies on."""

from __future__ import annotations

import ast
import inspect

import pytest
from transformers import Trainer

from blip3o_dit.training import base_trainer
from blip3o_dit.training.base_trainer import ExactResumeTrainer, overrides_trainer


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
