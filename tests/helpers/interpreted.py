"""Triton's kernels by its interpreter, which must be asked for before Triton is imported."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

needs_triton = pytest.mark.skipif(
    not importlib.util.find_spec("triton"), reason="Triton comes with CUDA builds of torch"
)


def run_interpreted(script: str) -> None:
    """Run a script in a process of its own, and fail with what it said if it does."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
