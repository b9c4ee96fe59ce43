"""What other packages print is kept quiet where it says nothing to a user."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator

import pytest

from blip3o_dit.utils.logging import quiet_torchao

QUANTIZER = "diffusers.quantizers.torchao.torchao_quantizer"


@pytest.fixture
def as_before() -> Iterator[logging.Logger]:
    """The logger as diffusers leaves it, without what was set before this test; restored afterwards."""
    logger = logging.getLogger(QUANTIZER)
    level = logger.level
    logger.setLevel(logging.NOTSET)
    yield logger
    logger.setLevel(level)


@pytest.mark.parametrize("quiet", [False, True])
def test_diffusers_says_nothing_of_torchao(quiet: bool, as_before: logging.Logger) -> None:
    pytest.importorskip("diffusers")
    module = pytest.importorskip(QUANTIZER)
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listener = Listener()
    as_before.addHandler(listener)
    try:
        if quiet:
            quiet_torchao()
        importlib.reload(module)
        as_before.warning("Unable to import `torchao` Tensor objects")  # also of a torchao that has them
    finally:
        as_before.removeHandler(listener)
    assert bool(said) is not quiet
