"""Flags made from dataclasses: help, types, and defaults that are stated once."""

from __future__ import annotations

import argparse
import inspect
import subprocess
import sys
from dataclasses import MISSING, dataclass, fields
from typing import Any

import pytest

from blip3o_dit.cli.arguments import add_flags, given_settings
from blip3o_dit.cli.command import command_module
from blip3o_dit.cli.generate import GenerationConfig
from blip3o_dit.cli.main import COMMANDS, main
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
}


def actions_of(command: str) -> dict[str, argparse.Action]:
    parser = argparse.ArgumentParser()
    command_module(command).add_arguments(parser)
    return {action.dest: action for action in parser._actions}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help(command: str) -> None:
    assert [name for name, action in actions_of(command).items() if not action.help] == []


@pytest.mark.parametrize("command", SETTINGS)
def test_defaults_are_stated_in_the_dataclass_alone(command: str) -> None:
    actions = actions_of(command)
    settings = [option for option in fields(SETTINGS[command]) if option.name not in NOTED]
    flags = [option for option in settings if "help" in option.metadata]
    assert len(flags) > 6
    for option in flags:
        assert actions[option.name].default == argparse.SUPPRESS
        assert actions[option.name].required is (option.default is MISSING)
        if isinstance(option.default, int | float) and not isinstance(option.default, bool):
            assert f"(default: {option.default})" in str(actions[option.name].help)


def test_help_imports_nothing_that_a_command_runs() -> None:
    heavy = ["transformers.trainer", "transformers.modeling_utils"]
    code = (
        "import argparse, sys; from blip3o_dit.cli.command import command_module\n"
        "from blip3o_dit.cli.main import COMMANDS\n"
        "for name in COMMANDS: command_module(name).add_arguments(argparse.ArgumentParser())\n"
        f"assert not [name for name in {heavy} if name in sys.modules]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_generation_has_the_defaults_of_the_library() -> None:
    parameters = inspect.signature(BLIP3oInference.generate_from_dataset).parameters
    for option in fields(GenerationConfig):
        assert parameters[option.name].default == option.default


@dataclass
class Example:
    number: int | None = setting(None, "an integer")
    pair: tuple[float, float] = setting((0.0, 1.0), "two")
    several: tuple[int, ...] = setting((1, 2), "any number")
    fast: bool = setting(False, "a switch")
    name: str = setting("a", "a name", choices=("a", "b"))
    with_hyphens: int = setting(1, "spelt otherwise", spelling="--with-hyphens")
    hidden: int = setting(1, "not on the command line")
    internal: int = 3


def parse(words: list[str], **options: Any) -> dict[str, Any]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser, Example, leave_out=["hidden"], **options)
    return given_settings(parser.parse_args(words), Example)


def test_only_what_was_given_is_there() -> None:
    assert parse([]) == {}
    words = ["--number", "3", "--pair", "1", "2", "--several", "4", "5", "6", "--fast", "--with-hyphens", "7"]
    expected = {"number": 3, "pair": (1.0, 2.0), "several": (4, 5, 6), "fast": True, "with_hyphens": 7}
    assert parse(words) == expected
    assert parse(["--several"]) == {"several": ()}
    assert parse(["--no-fast"], negatable=True) == {"fast": False}
    assert parse(["--number", "ab"], number={"type": len}) == {"number": 2}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--no-fast"], "unrecognized arguments: --no-fast"),
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
    assert message in capsys.readouterr().err


def test_help_shows_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, Example)
    shown = " ".join(parser.format_help().split())
    assert "any number (default: 1 2)" in shown and "two (default: 0.0 1.0)" in shown
    assert "an integer --pair" in shown and "a switch --name" in shown
    with pytest.raises(SystemExit):
        main(["distill", "--help"])
    assert "solver steps of a whole path of the teacher (default: 8)" in " ".join(
        capsys.readouterr().out.split()
    )
