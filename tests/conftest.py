"""Shared by all tests: one thread (two cores, several processes), tiny real models, small stores.

torch is imported where it is used: the process that shares out tests, which reads this file before it starts
the others, does without, and importing takes seconds.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's background job begins
    signal.signal(signal.SIGINT, signal.default_int_handler)

if TYPE_CHECKING:
    import torch

    from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
    from blip3o_dit.model.config import BLIP3oDiTConfig


def tiny_config(**changes: object) -> BLIP3oDiTConfig:
    """A small configuration of the real class: 3x3 tokens, condition 12 wide, target 8 wide."""
    from blip3o_dit.model.config import BLIP3oDiTConfig

    sizes = dict(model_dim=48, num_layers=2, num_heads=3, in_channels=8, eva_embedding_size=12, input_size=3)
    return BLIP3oDiTConfig(**(sizes | changes))


def randomize(model: torch.nn.Module, seed: int = 0, scale: float = 0.2) -> None:
    """Every parameter random, gates and norms included, so that no path through the network is off."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = scale * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1.0 + noise if ".norm" in name and name.endswith("weight") else noise)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes are named by their place: pickles of tensors hold addresses, and processes
    that share out tests must collect the same ones."""
    return argname if isinstance(val, bytes) else None


# The files that take the longest, by their processor's seconds, those of their processes included.
LONGEST = (
    "test_known_answer",
    "test_processes",
    "test_precision",
    "test_fuzz",
    "test_goldens",
    "test_first_hour",
    "test_evaluate",
    "test_distributed_commands",
    "test_resume",
    "test_quick_start",
    "test_distillation",
    "test_speed_and_memory",
    "test_training_commands",
    "test_resolve",
    "test_notebook",
    "test_calibration",
    "test_benchmarks",
    "test_trainer",
    "test_digits_parts",
    "test_image_decoding",
    "test_memory",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: `make test` gives whole files to two processes, which then end together."""
    import torch

    from tests.helpers import curves  # noqa: F401 - from here on none are drawn

    torch.set_num_threads(1)
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish() -> None:
    """The libraries and the tests stay to the end: each training looks through all that may be garbage."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """What a test logged may hold half surrogates, which cannot go from process to process."""
    return _sendable((yield))


def _sendable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_sendable(name): _sendable(each) for name, each in value.items()}
    return type(value)(map(_sendable, value)) if isinstance(value, list | tuple) else value


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(params=["native", "emulated"])
def bfloat16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The processor is said to multiply bfloat16 itself, or not: both regimes on any machine."""
    from blip3o_dit.model.layers import BFLOAT16_VARIABLE

    monkeypatch.setenv(BFLOAT16_VARIABLE, request.param)
    return str(request.param)


@pytest.fixture
def tiny_model() -> BLIP3oDiTModel:
    from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel

    model = BLIP3oDiTModel(tiny_config())
    randomize(model)
    return model.eval()
