"""--config: flags in a file are flags on the command line, and those given beside it win."""

from __future__ import annotations

from pathlib import Path

import pytest

from blip3o_dit.cli.command import command_parser
from blip3o_dit.cli.main import COMMANDS
from blip3o_dit.training.config import TrainingConfig


def parsed(command: str, file: Path, text: str, *words: str) -> dict[str, object]:
    file.write_text(text)
    return vars(command_parser(command).parse_args([*words, "--config", str(file)]))


def test_a_file_says_what_the_command_line_would(tmp_path: Path) -> None:
    text = "batch-size: 64\nbf16: true\nstandardize: false\nlearning_rate: 1e-3\noutput_dir: run\n"
    found = parsed("train", tmp_path / "run.yaml", text, "--batch_size", "8")
    words = [
        "--batch_size",
        "8",
        "--bf16",
        "--no_standardize",
        "--learning_rate",
        "1e-3",
        "--output_dir",
        "run",
    ]
    expected = vars(command_parser("train").parse_args(words))
    assert found | {"config": None} == expected
    assert found["batch_size"] == 8 and "num_layers" not in found


def test_lists_and_required_flags(tmp_path: Path) -> None:
    file = tmp_path / "f.json"
    found = parsed("generate", file, '{"guidance_interval": [0.25, 0.5]}', "model", "data", "out")
    assert found["guidance_interval"] == [0.25, 0.5]
    assert parsed("distill", file, "steps: 2", "model", "data")["steps"] == 2
    found = parsed("evaluate", file, "compare: [a, b]", "model", "data")
    assert found["compare"] == ["a", "b"] and found["model"] == "model"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_every_command_can_come_from_a_file(command: str, tmp_path: Path) -> None:
    parser = command_parser(command)
    for action in parser._actions:
        if not action.option_strings or action.dest in ("help", "config"):
            continue
        word = str(next(iter(action.choices))) if action.choices else "1"
        count = action.nargs if isinstance(action.nargs, int) else 1
        value = (
            "true"
            if action.nargs == 0
            else str([word] * count)
            if action.nargs in (count, "*", "+")
            else word
        )
        (tmp_path / "f.yaml").write_text(f"{action.option_strings[0].lstrip('-')}: {value}")
        parser._take_file(["--config", str(tmp_path / "f.yaml")])
        assert parser.get_default(action.dest) is not None, action.dest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_size: x", "batch_size: invalid int value: 'x'"),
        ("batch_size: true", "batch_size: expected a value, found True"),
        ("batch_size: [3]", "batch_size: expected one value, found [3]"),
        ("batch_size:", "batch_size: expected a value, found None"),
        ("batch_size: {a: 1}", "batch_size: expected one value, found {'a': 1}"),
        ("bf16: 3", "bf16: expected true or false, found 3"),
        ("source: frob", "source: invalid choice: 'frob'"),
        ("frobnicate: 1", "expected flags of this command, found 'frobnicate'"),
        ("config: other.yaml", "expected flags of this command, found 'config'"),
        ("[1, 2]", "expected flags and their values (batch_size: 64), found [1, 2]"),
        ("3: 4", "expected flags and their values (batch_size: 64), found {3: 4}"),
        ("", "expected flags and their values (batch_size: 64), found None"),
        ("a: [", "expected YAML, found "),
        ("!!python/object/apply:os.system ['true']", "expected YAML, found "),
    ],
)
def test_mistakes_are_one_line(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parsed("train", tmp_path / "run.yaml", text)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'run.yaml'}: ") and message in line


def test_a_missing_file_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command_parser("train").parse_args(["--config", "none.yaml"])
    assert capsys.readouterr().err.startswith("error: none.yaml: No such file or directory")


def test_a_saved_configuration_is_no_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """training_config.json holds what was resolved, with fields that are no flags."""
    file = tmp_path / "training_config.json"
    file.write_bytes(TrainingConfig(embeddings_path="a", output_dir="b").to_json())
    with pytest.raises(SystemExit, match="2"):
        command_parser("train").parse_args(["--config", str(file)])
    assert "expected" in capsys.readouterr().err
