"""Silence for what libraries report that says nothing to a user."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within this context transformers logs errors only and shows no progress bars for files."""
    from transformers.utils import logging as hf_logging  # `quiet_torchao` comes before it is imported

    level = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def quiet_libraries() -> None:
    """For the process of a command: no library logs, warns or shows a bar of its own, and ours say it.

    Python's `-W` and PYTHONWARNINGS, and TRANSFORMERS_VERBOSITY, still show what they ask for. A GPU that is
    there and cannot be used is always said: the command would take the CPU.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.warnoptions:
        warnings.showwarning = _show_of_the_gpu  # not a filter: libraries change those when imported


def _show_of_the_gpu(message: Warning | str, *where: Any, **others: Any) -> None:
    text = " ".join(str(message).split())
    if text.startswith("CUDA initialization"):
        sys.stderr.write(f"{text}\n")


def quiet_torchao() -> None:
    """Silence torchao about missing kernels and its own deprecations, and diffusers about newer torchao.

    It takes effect before transformers is imported, which imports torchao.
    """
    for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching")
