"""What says that a command works: a bar in a terminal, a line elsewhere, nothing for what ends at once."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import pytest

from blip3o_dit.utils import progress as module
from blip3o_dit.utils.durations import in_words
from blip3o_dit.utils.progress import has_terminal, progress, working
from tests.helpers.terminal import COLUMNS, in_terminal

WORK = """
import time
from blip3o_dit.cli.command import set_up_logging
from blip3o_dit.utils.progress import logger, working
set_up_logging()
with working("at once", 1, "step"):
    pass
with working("counting", 20, "sample") as count:
    for number in range(20):
        time.sleep(0.01 if number else 2.5)
        count(1)
        if number == 10:
            logger.info("a line")
with working("not counting"):
    time.sleep(2.3)
with working("not lasting", lasting=False):
    time.sleep(1.2)
"""


def test_in_a_terminal_a_bar_changes_every_second_and_a_line_is_left() -> None:
    seen = in_terminal([sys.executable, "-c", WORK])
    assert seen.status == 0
    assert seen.lines == ["a line", "counting: 3 s", "not counting: 2 s", ""]
    assert seen.silences[0][0] < 2.5  # an import and a second at most
    assert "0/20 [00:00" in seen.text and "0/20 [00:01" in seen.text and "sample" in seen.text
    assert "not counting: 00:01" in seen.text and "not lasting: 00:00" in seen.text
    assert "at once" not in seen.text
    shown = seen.text.replace("\r", "\n").split("\n")
    assert max(map(len, shown)) <= COLUMNS


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(module, "EVERY", 0.05)
    caplog.set_level(logging.INFO, logger="blip3o_dit")
    return caplog


def test_elsewhere_one_line_for_what_takes_long(quick: pytest.LogCaptureFixture, capsys: Any) -> None:
    assert not has_terminal()
    with working("reading", 3, "batch") as count:
        time.sleep(0.3)
        count(1)
    assert list(progress(iter("abc"), "at once", "letter", 3)) == ["a", "b", "c"]
    with working("not lasting", lasting=False):
        time.sleep(0.1)
    time.sleep(0.1)
    assert quick.messages == ["reading"]
    assert capsys.readouterr().out == ""


def test_only_the_first_process_speaks(
    quick: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with working("reading"):
        time.sleep(0.1)
    assert not quick.messages


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.1, "1 s"), (40, "40 s"), (99.4, "99 s"), (100, "2 min"), (7200, "2.0 h"), (300000, "3 days")],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
