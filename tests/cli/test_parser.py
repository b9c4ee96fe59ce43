"""Every command's help, mistakes, spellings and completion, and that none of them takes a library."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from blip3o_dit.cli import main as program
from blip3o_dit.cli.command import command_module, command_parser
from blip3o_dit.cli.main import COMMANDS, main

# More flags than fit a screen's half are under headings.
MANY = 12
MISTAKES = (
    ["frobnicate"],
    ["train", "--frobnicate"],
    ["extract", "--dtype", "int3"],
    ["generate", "a"],
    ["train"],
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_says_what_it_does_by_default_and_where_it_belongs(command: str) -> None:
    parser = command_parser(command)
    flags = [
        action
        for action in parser._actions
        if action.option_strings and action.dest not in ("help", "config")
    ]
    assert [action.dest for action in parser._actions if not action.help] == []
    shown = parser.format_help()
    for action in flags:
        assert all("-" not in flag[2:] for flag in action.option_strings)
        text = shown[shown.index(f"\n  {action.option_strings[0]}") + 3 :].split("\n  -")[0]
        assert action.nargs == 0 or action.required or "(default:" in " ".join(text.split()), action.dest
    if len(flags) > MANY:
        grouped = [action for group in parser._action_groups[2:] for action in group._group_actions]
        assert len([action for action in flags if action not in grouped]) <= 3


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_are_command_lines(command: str) -> None:
    examples = command_module(command).EXAMPLES
    assert examples
    for example in examples:
        assert f"\n  {example}\n" in command_parser(command).format_help()
        name, command_word, *words = shlex.split(example)
        assert (name, command_word) == ("blip3o-dit", command)
        command_parser(command).parse_args(words)


def test_examples_of_all_are_command_lines() -> None:
    for example in program.EXAMPLES:
        _, command, *words = shlex.split(example)
        command_parser(command).parse_args(words)


@pytest.mark.parametrize("command", COMMANDS)
def test_hyphens_are_underscores(command: str) -> None:
    parser = command_parser(command)
    known = dict(parser._option_string_actions)
    for flag in [*known, *parser._former_names]:
        hyphens = "--" + flag[2:].replace("_", "-")
        spelled = [parser._spelled(word) for word in (flag, hyphens, f"{hyphens}=a-b_c")]
        assert spelled[0] in known
        if flag.startswith("--"):
            assert spelled == [spelled[0], spelled[0], f"{spelled[0]}=a-b_c"]


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("train --overwrite_output_dir", "overwrite", True),
        ("train --overwrite-output-dir", "overwrite", True),
        ("train --no-standardize", "standardize", False),
        ("distill m e --steps=1 --overwrite_output_dir", "overwrite", True),
        ("extract --towers-from-scratch", "towers_from_scratch", True),
        ("extract a b -- --no-file", "pictures", ["a", "b", "--no-file"]),
        ("inspect s --no-picture", "no_picture", True),
        ("inspect s --picture a-b.png", "picture", Path("a-b.png")),
        ("inspect s --output a.png", "picture", Path("a.png")),
        ("extract --image-column photo-name", "image_column", "photo-name"),
    ],
)
def test_earlier_spellings_go_on_working(line: str, field: str, value: object) -> None:
    command, *words = shlex.split(line)
    assert getattr(command_parser(command).parse_args(words), field) == value


def test_whatever_refuses_what_is_there_can_replace_it() -> None:
    for command in ("extract", "train", "generate", "distill", "convert", "export-embeddings", "merge"):
        assert "--overwrite" in command_parser(command)._option_string_actions


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "train --learning_rat 1",
            "unrecognized arguments: --learning_rat 1 (did you mean --learning_rate?)",
        ),
        ("train --num-epoch=3", "unrecognized arguments: --num-epoch=3 (did you mean --num_epochs?)"),
        ("evaluate a b --shine x", "unrecognized arguments: --shine x"),
        ("generate a tests src b", "unrecognized arguments: b"),
        ("inspect a src tests", "unrecognized arguments: src tests (quote a pattern of files, as"),
        ("distill a b", "the following arguments are required: --steps"),
        ("extract --dtype a\x1b[31m\nb", "argument --dtype: invalid choice: "),
        (f"extract --dtype {'a' * 1000}", "argument --dtype: invalid choice: "),
    ],
)
def test_a_mistake_is_one_short_line(
    line: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    words = line.split(" ")
    with pytest.raises(SystemExit) as stopped:
        main(words)
    shown = capsys.readouterr()
    assert (stopped.value.code, shown.out) == (2, "")
    assert shown.err.startswith(f"error: {message}")
    assert shown.err.endswith(f"; see blip3o-dit {words[0]} --help\n")
    assert shown.err[:-1].isprintable() and len(shown.err) < 600


def test_help_and_mistakes_take_no_library_and_no_time() -> None:
    lines = [[], ["--version"], *([name, "--help"] for name in COMMANDS), *MISTAKES]
    code = f"""
import contextlib, io, sys, time
from blip3o_dit.cli.main import main
for line in {lines}:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            status = main(line)
        except SystemExit as stopped:
            status = stopped.code
    assert status == (2 if line in {MISTAKES} else 0), (line, status)
    assert err.getvalue() if status else out.getvalue(), line
heavy = {{"torch", "transformers", "numpy", "PIL", "matplotlib", "pyarrow"}} & set(sys.modules)
assert not heavy, heavy
assert time.process_time() < 2, time.process_time()  # 0.3 s on a quiet core; torch alone takes 2
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_shell_completes_commands_flags_and_names_without_a_library(tmp_path: Path) -> None:
    lines = {
        "blip3o-dit e": "evaluate export export-embeddings extract",
        "blip3o-dit train --num_h": "--num_heads",
        "blip3o-dit train --source ": "noise ridge ridge_3x3 ridge_context ridge_context_spread",
        "blip3o-dit distill m e --teacher_s": "--teacher_solver --teacher_steps",
        "blip3o-dit extract --dtype b": "bfloat16",
    }
    told = tmp_path / "told"
    code = f"""
import os, sys
sys.modules.update(torch=None, numpy=None)  # which cannot be imported then
from blip3o_dit.cli.main import main
os.environ.update(_ARGCOMPLETE="1", _ARGCOMPLETE_STDOUT_FILENAME={str(told)!r}, _ARGCOMPLETE_IFS=" ")
for line, expected in {lines}.items():
    os.environ.update(COMP_LINE=line, COMP_POINT=str(len(line)))
    if not os.fork():
        main([])
    os.wait()
    found = sorted(open({str(told)!r}).read().split())
    assert found == expected.split(), (line, found)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
