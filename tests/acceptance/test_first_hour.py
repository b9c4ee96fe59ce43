"""The README's path as written, with the wheel alone, in an empty folder; and every command's console.

The wheel is built from this tree and installed into a folder of its own. What makes it quick: few pictures,
and a training of ten steps where the data would ask for more.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from blip3o_dit.cli.main import COMMANDS
from tests.acceptance.commands import FOREIGN_VARIABLES, json_of

ROOT = Path(__file__).parents[2]
PICTURES = 24
CHANGES = [
    ("blip3o_dit.training.lengths", "LEAST_STEPS", 10),
    ("blip3o_dit.training.calibration", "LEAST_HELD_BACK", 2),
]
# As on a machine so much slower, or with so much more data (console_server.py).
PACE = 4
SILENCE = 3.0  # seconds; two test processes share the machine
UNFINISHED_BAR = re.compile(r"(?<!\d)\d?\d%\||: \d\d:\d\d$")

# Commands that are not on the README's path, run after it in the same folder, each once.
BESIDE = {
    "calibrate": "calibrate checkpoints/run embeddings/pictures --split eval --num_samples 2",
    "distill": "distill checkpoints/run embeddings/pictures --steps 1 --train_steps 4 --batch_size 4",
    "export": "export checkpoints/run model.pt2 --num_inference_steps 1",
    "train-decoder": "train-decoder embeddings/pictures images --output_dir decoder --steps 2 --width 16",
    "decode": "decode decoder results/generated decoded",
    "export-embeddings": "export-embeddings embeddings/pictures exported.npz",
    "convert": "convert exported.npz converted",
    "merge": "merge embeddings/pictures converted merged",
    "append": "append converted embeddings/pictures",
    "verify": "verify merged",
    "plot": "plot checkpoints/run",
}
# One needs a hub (tests/utils/test_hub.py), one a model of vectors (tests/inference/test_translate.py), and
# one goes on until it is stopped (tests/demo/test_demo.py).
ELSEWHERE = {"push", "translate", "demo"}


@dataclass(frozen=True)
class Outcome:
    """One command as a person at its terminal saw it."""

    command: str
    status: int
    text: str
    seconds: float
    silences: list[tuple[float, str]]
    written: list[tuple[str, str]]


class Installed:
    """The wheel in a folder of its own, and a process that has imported it and runs its commands."""

    def __init__(self, folder: Path) -> None:
        self.site = folder / "site"
        self.work = folder / "work"
        self.work.mkdir()
        for command in (_build(folder), _install(folder, self.site)):
            subprocess.run(command, check=True, capture_output=True, cwd=folder / "tree")
        kept = {name: value for name, value in os.environ.items() if not FOREIGN_VARIABLES.fullmatch(name)}
        self.environment = kept | {
            "PYTHONPATH": str(self.site),
            "PATH": f"{self.site / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HOME": str(folder / "huggingface"),
        }
        self._server = subprocess.Popen(
            [sys.executable, ROOT / "tests/helpers/console_server.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=self.work,
            env=self.environment,
            text=True,
        )
        self.outcomes: list[Outcome] = []
        self.begun = self._answer()

    def run(self, command: str) -> Outcome:
        request = {"words": shlex.split(command), "folder": str(self.work), "pace": PACE, "changes": CHANGES}
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        self.outcomes.append(Outcome(command=command, **self._answer()))
        return self.outcomes[-1]

    def stop(self) -> None:
        self._server.communicate(timeout=30)

    def _answer(self) -> dict[str, Any]:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        assert line, "the process has died; what it said is above"
        found: dict[str, Any] = json.loads(line)
        return found


def _build(folder: Path) -> list[str]:
    """Builds the wheel of a copy of this tree: building writes beside the sources."""
    tree = folder / "tree"
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(folder / 'wheel')!r})"
    (folder / "wheel").mkdir()
    return [sys.executable, "-c", build]


def _install(folder: Path, site: Path) -> list[str]:
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    wheel = folder / "wheel" / f"blip3o_dit-{version[1]}-py3-none-any.whl"
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-index", "--no-deps"]
    return [*pip, "--no-compile", "--target", str(site), str(wheel)]


def path_of_readme() -> tuple[str, list[str]]:
    """The program that makes pictures, and the commands: the blocks of the README's first section."""
    readme = (ROOT / "README.md").read_text()
    section = readme.split("\n## From pictures to a report\n")[1].split("\n## ")[0]
    (program,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    lines = "".join(re.findall(r"```bash\n(.*?)```", section, flags=re.DOTALL))
    return program, [line for line in lines.replace("\\\n", " ").splitlines() if line]


def promised_files() -> list[str]:
    """The files in the last column of the README's table of the path."""
    readme = (ROOT / "README.md").read_text()
    section = readme.split("\n## From pictures to a report\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `.*\|(.*)\|$", section, flags=re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    """After the README's path was followed."""
    installed = Installed(tmp_path_factory.mktemp("wheel"))
    program, commands = path_of_readme()
    # Every picture of the program is one more step of everything: it stops after the first few.
    made = installed.run(shlex.join(["python", "-c", program.replace("range(500)", f"range({PICTURES})")]))
    assert made.status == 0, made.text
    for command in commands:
        installed.run(command)
    yield installed
    installed.stop()


@pytest.fixture(scope="module")
def every_command(installed: Installed) -> list[Outcome]:
    """The path's commands and all others, each once."""
    for command in BESIDE:
        if command in COMMANDS:
            installed.run(f"blip3o-dit {BESIDE[command]}")
    return installed.outcomes


def test_the_wheel_in_an_empty_environment(installed: Installed, tmp_path: Path) -> None:
    """Its command is put there and runs outside of the sources; what it needs is lent by this environment."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "empty"], check=True)
    python = tmp_path / "empty/bin/python"
    (wheel,) = (installed.site.parent / "wheel").glob("*.whl")
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = partial(subprocess.run, cwd=tmp_path, env=kept, check=True, capture_output=True, text=True)
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install"]
    run([*pip, "-q", "--no-index", "--no-deps", "--no-compile", wheel])
    (site,) = (tmp_path / "empty/lib").glob("python*/site-packages")
    (site / "lent.pth").write_text(f"{Path(pytest.__file__).parent.parent}\n")
    assert run([python.parent / "blip3o-dit", "--version"]).stdout.startswith("blip3o-dit 0.")
    where = "import blip3o_dit; print(blip3o_dit.__file__)"
    assert Path(run([python, "-c", where]).stdout.strip()).is_relative_to(site)
    assert "--embeddings_path" in run([python, "-m", "blip3o_dit", "train", "--help"]).stdout


@pytest.mark.slow
def test_the_readme_s_path(installed: Installed) -> None:
    assert Path(installed.begun["package"]).is_relative_to(installed.site)
    assert not {str(ROOT), str(ROOT / "src")} & set(installed.begun["path"][:1])
    failed = [(outcome.command, outcome.text[-2000:]) for outcome in installed.outcomes if outcome.status]
    assert not failed
    for name in promised_files():
        assert (installed.work / name).exists(), name
    assert len(list((installed.work / "images").iterdir())) == PICTURES
    run = json_of(installed.work / "checkpoints/run/training_config.json")
    assert run["model_dim"] == 128


@pytest.mark.slow
def test_the_program_of_the_wheel_answers(installed: Installed) -> None:
    """In a process of its own, as a shell starts it."""
    answer = subprocess.run(
        ["blip3o-dit", "--version"],
        env=installed.environment,
        cwd=installed.work,
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.fullmatch(r"blip3o-dit \d+\.\d+\.\d+\n", answer.stdout)
    assert not answer.stderr


@pytest.mark.slow
def test_every_command_runs(every_command: list[Outcome]) -> None:
    words = [outcome.command.split() for outcome in every_command]
    run = {command for program, command, *_ in words if program == "blip3o-dit"}
    assert run | ELSEWHERE == set(COMMANDS), "a new command: how it is run here belongs into BESIDE"
    assert not [(outcome.command, outcome.text[-2000:]) for outcome in every_command if outcome.status]


@pytest.mark.slow
def test_no_command_is_silent(every_command: list[Outcome]) -> None:
    """Where a bar that is not full can be seen, it may stand still for a step; the next line may not wait."""
    silent = [
        f"{outcome.command}: {seconds:.1f} s of {outcome.seconds:.1f} after {text!r}"
        for outcome in every_command
        for seconds, text in outcome.silences
        if seconds > SILENCE and not UNFINISHED_BAR.search(text)
    ]
    assert not silent, "\n".join(silent)


@pytest.mark.slow
def test_every_line_is_ours(every_command: list[Outcome]) -> None:
    """Written by this package, by its logger, or by a bar that it made."""
    foreign = [
        f"{outcome.command}: {writer}: {text!r}"
        for outcome in every_command
        for writer, text in outcome.written
        if text.strip() and not writer.startswith("blip3o_dit")
    ]
    assert not foreign, "\n".join(foreign[:20])


@pytest.mark.slow
def test_nothing_is_written_past_the_streams(every_command: list[Outcome]) -> None:
    """By a library in C, by a handler that kept an older stream, or by another process."""
    for outcome in every_command:
        known = lines_of("".join(text for _, text in outcome.written))
        assert not lines_of(outcome.text) - known, outcome.command


@pytest.mark.slow
def test_every_bar_has_a_unit(every_command: list[Outcome]) -> None:
    bare = re.compile(r"[\d?](it)?/s|[\d?]s/(it)?\]")
    found = {outcome.command for outcome in every_command if bare.search(outcome.text)}
    assert not found


def test_importing_says_nothing(installed: Installed) -> None:
    assert not installed.begun["printed"]


FIRST_LINE = """
import importlib.abc, io, json, sys

class Torch(BaseException):
    pass

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise Torch

sys.meta_path.insert(0, Finder())
from blip3o_dit.cli.main import main

found = {}
for command in json.loads(sys.argv[1]):
    sys.stdout = sys.stderr = shown = io.StringIO()
    try:
        status = main(command.split())
    except Torch:
        status = "imports torch"
    except SystemExit as stop:
        status = stop.code
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    found[command] = [status, shown.getvalue()]
print(json.dumps(found))
"""


def test_a_line_comes_before_torch(tmp_path: Path) -> None:
    """Importing torch takes seconds: each command has said something by then."""
    _, path = path_of_readme()
    commands = [line.removeprefix("blip3o-dit ") for line in path]
    commands += [BESIDE[name] for name in BESIDE if name in COMMANDS]
    (tmp_path / "images").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", FIRST_LINE, json.dumps(commands)],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    silent = [name for name, (_, shown) in json.loads(done.stdout).items() if not shown.strip()]
    assert not silent


def lines_of(text: str) -> set[str]:
    """What can be read in it: without colours, cursor movements and empty lines."""
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
    return {line.strip() for line in re.split(r"[\r\n]+", plain) if line.strip()}
