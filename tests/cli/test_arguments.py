"""Flags made from dataclasses: help, types, groups, and defaults that are stated once."""

from __future__ import annotations

import argparse
import inspect
from dataclasses import MISSING, dataclass, fields
from typing import Any

import pytest

from blip3o_dit.cli.arguments import add_flags, given_settings
from blip3o_dit.cli.command import command_parser
from blip3o_dit.cli.generate import GenerationConfig
from blip3o_dit.cli.parser import CommandParser
from blip3o_dit.evaluation.config import EvaluationConfig
from blip3o_dit.extraction.config import ExtractionConfig
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.training.config import NOTED, TrainingConfig
from blip3o_dit.training.distillation_config import DistillationConfig
from blip3o_dit.utils.settings import setting

SETTINGS: dict[str, Any] = {
    "train": TrainingConfig,
    "distill": DistillationConfig,
    "extract": ExtractionConfig,
    "generate": GenerationConfig,
    "evaluate": EvaluationConfig,
}


@pytest.mark.parametrize("command", SETTINGS)
def test_defaults_are_stated_in_the_dataclass_alone(command: str) -> None:
    actions = {action.dest: action for action in command_parser(command)._actions}
    options = [option for option in fields(SETTINGS[command]) if "help" in option.metadata]
    settings = [option for option in options if option.name in actions]
    assert len(settings) > 6 and not set(NOTED) & set(actions)
    for option in settings:
        assert actions[option.name].default == argparse.SUPPRESS
        assert actions[option.name].required is (option.default is MISSING)
        if isinstance(option.default, int | float) and not isinstance(option.default, bool):
            assert f"(default: {option.default})" in str(actions[option.name].help)


def test_generation_has_the_defaults_of_the_library() -> None:
    parameters = inspect.signature(BLIP3oInference.generate_from_dataset).parameters
    for option in fields(GenerationConfig):
        assert parameters[option.name].default == option.default


@dataclass
class Example:
    number: int | None = setting(None, "an integer")
    pair: tuple[float, float] = setting((0.0, 1.0), "two")
    several: tuple[int, ...] = setting((1, 2), "any number", group="much")
    fast: bool = setting(False, "a switch")
    name: str = setting("a", "a name", group="named", choices=("a", "b"))
    root_dir: str | None = setting(None, "a folder (default: here)", group="much")
    hidden: int = setting(1, "not on the command line")
    internal: int = 3


def parser_of(**options: Any) -> CommandParser:
    parser = CommandParser(prog="example")
    add_flags(parser, Example, leave_out=["hidden"], **options)
    return parser


def parse(words: list[str], **options: Any) -> dict[str, Any]:
    return given_settings(parser_of(**options).parse_args(words), Example)


def test_only_what_was_given_is_there() -> None:
    assert parse([]) == {}
    words = ["--number", "3", "--pair", "1", "2", "--several", "4", "5", "6", "--fast", "--root_dir", "x"]
    expected = {"number": 3, "pair": (1.0, 2.0), "several": (4, 5, 6), "fast": True, "root_dir": "x"}
    assert parse(words) == expected
    assert parse(["--several"]) == {"several": ()}
    assert parse(["--no-fast"], negatable=True) == parse(["--no_fast"], negatable=True) == {"fast": False}
    assert parse(["--no_fast", "--fast"], negatable=True) == {"fast": True}
    assert parse(["--number", "ab"], number={"type": len}) == {"number": 2}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--no_fast"], "unrecognized arguments: --no_fast"),
        (["--hidden", "1"], "unrecognized arguments: --hidden 1"),
        (["--internal", "1"], "unrecognized arguments: --internal 1"),
        (["--name", "c"], "argument --name: invalid choice: 'c'"),
        (["--pair", "1"], "argument --pair: expected 2 arguments"),
        (["--number", "1.5"], "argument --number: invalid int value: '1.5'"),
    ],
)
def test_anything_else_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(words)
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_help_shows_groups_and_defaults() -> None:
    shown = " ".join(parser_of().format_help().split())
    assert "--number N an integer (default: none) --pair X X two (default: 0.0 1.0)" in shown
    assert "much: --several [N ...] any number (default: 1 2) --fast a switch --root_dir DIR" in shown
    assert "a folder (default: here) named: --name {a,b} a name (default: a)" in shown
    switched = " ".join(parser_of(negatable=True).format_help().split())
    assert "--fast, --no_fast a switch (default: off)" in switched


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", {}),
        ("--compile", {"compile": "blocks"}),
        ("--compile full --fp16", {"compile": "full", "fp16": True}),
        ("--compile=blocks", {"compile": "blocks"}),
        ("--compile --no_compile", {"compile": None}),
    ],
)
def test_compile_takes_a_word_or_none(words: str, expected: dict[str, Any]) -> None:
    assert given_settings(command_parser("train").parse_args(words.split()), TrainingConfig) == expected
