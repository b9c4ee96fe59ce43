"""Shared by the tests of training."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def no_curves() -> Iterator[None]:
    """Drawing them takes longer than a tiny run; for modules that train many times and look at none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blip3o_dit.training.callbacks.draw_curves", lambda log, path: None)
        yield
