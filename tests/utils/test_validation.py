"""Checks of values that users give."""

from __future__ import annotations

from pathlib import Path

import pytest

from blip3o_dit.utils.validation import is_hub_id


def test_only_what_can_be_meant_as_a_hub_id_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert is_hub_id("owner/model") and is_hub_id("model")
    folders = ("checkpoints", "checkpoints/run", "./model", "../model", "/a", "~/a", "a/b/c", "", Path("a/b"))
    assert not any(is_hub_id(name) for name in folders)
