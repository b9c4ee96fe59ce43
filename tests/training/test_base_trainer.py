"""The private parts of transformers.Trainer that ours relies on."""

from __future__ import annotations

import pytest
from transformers import Trainer

from blip3o_dit.training.base_trainer import PRIVATE_METHODS, ExactResumeTrainer, check_private_names


def test_every_overridden_private_method_is_checked() -> None:
    theirs = {name for name, value in vars(Trainer).items() if callable(value) and name.startswith("_")}
    overridden = {name for name in vars(ExactResumeTrainer) if name in theirs and not name.startswith("__")}
    assert overridden | {"get_batch_samples"} == set(PRIVATE_METHODS)


def test_a_trainer_without_them_is_refused() -> None:
    with pytest.raises(ImportError, match=r"methods \['_save'\], found none"):
        check_private_names(type("Other", (), {"_load_scaler": print}), ["_save", "_load_scaler"])
