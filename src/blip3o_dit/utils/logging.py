"""Silence for what transformers and torchao report that says nothing to a user."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


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


def quiet_torchao() -> None:
    """Silence torchao about missing kernels and its own deprecations, and diffusers about newer torchao.

    Call it before transformers is imported, which imports torchao.
    """
    for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching")


def quiet_workers() -> None:
    """Silence torch about more data-loader processes than cores: who gives a number means it."""
    warnings.filterwarnings("ignore", message="This DataLoader will create .* worker processes")
