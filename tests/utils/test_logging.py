"""What other packages print is kept quiet where it says nothing to a user."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
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


def run(code: str, *options: str) -> str:
    """What a process that runs this shows."""
    words = [sys.executable, *options, "-c", code]
    found = subprocess.run(words, capture_output=True, text=True, check=True)
    return found.stdout + found.stderr


def test_torchao_is_quiet_before_any_module_of_ours_can_import_it() -> None:
    levels = "[logging.getLogger(name).level for name in ('torchao', 'torch.utils._pytree')]"
    assert run(f"import logging, blip3o_dit; print({levels})") == f"{[logging.ERROR] * 2}\n"


def test_a_command_shows_what_libraries_fail_at_and_nothing_else() -> None:
    code = """
import logging, warnings
from blip3o_dit.cli.command import set_up_logging
set_up_logging()
warnings.simplefilter("default")  # as some libraries do when they are imported
warnings.warn("deprecated soon")
warnings.warn("CUDA initialization: an old\\ndriver")
logging.getLogger("torch.library").warning("something")
logging.getLogger("torch.library").error("all is lost")
logging.getLogger("blip3o_dit.ours").error("ours")
"""
    shown = ["CUDA initialization: an old driver", "torch.library: all is lost", "ours"]
    assert run(code).splitlines() == shown
    assert "deprecated soon" in run(code, "-W", "default")
