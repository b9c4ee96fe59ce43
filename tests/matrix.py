"""python -m tests.matrix: the core of the suite under each Python, with the oldest and newest packages.

For each Python 3.10 to 3.13 on the PATH and for both ends of what pyproject.toml allows of torch,
transformers and accelerate an environment is made under .matrix/ and the core of the suite runs in it.
(pyenv puts several on the PATH with PYENV_VERSION=3.10.1:3.11.2.)

pip is used as it is configured here. A torch that would bring CUDA's libraries is not installed unless --cuda
says so: the pinned one is tried instead, of which a CPU build may be at hand. Where none is, that interpreter
at least reads every file. Prints one line per combination and a table; exit status 1 when a suite failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
ENDS = ("oldest", "newest")
VARIED = ("torch", "transformers", "accelerate")
BESIDE = ("safetensors", "numpy", "tqdm", "pillow", "jinja2", "pytest", "pytest-xdist", "hypothesis")
BESIDE += ("pyarrow", "scikit-learn", "torchdiffeq", "torchao", "diffusers", "matplotlib", "wandb")
CORE = (
    "tests/test_architecture.py",
    "tests/utils",
    "tests/data",
    "tests/model",
    "tests/flow",
    "tests/training",
    "tests/inference",
    "tests/cli",
)
SECONDS = 1800  # that a suite may take


@dataclass(frozen=True)
class Outcome:
    """One combination: what was installed, and what came of it. `failed` only when tests did."""

    python: str
    end: str
    versions: str
    result: str
    failed: bool = False


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("--pythons", nargs="+", default=list(PYTHONS))
    parser.add_argument("--ends", nargs="+", choices=ENDS, default=list(ENDS))
    parser.add_argument("--cuda", action="store_true", help="install CUDA builds of torch, several GB each")
    parser.add_argument("--tests", nargs="+", default=list(CORE))
    parser.add_argument("--json", type=Path, help="file for the table")
    arguments = parser.parse_args(words)
    outcomes = []
    for python in arguments.pythons:
        for end in arguments.ends:
            outcomes.append(_combination(python, end, arguments))
            print(_line(outcomes[-1]), flush=True)
    print("\n" + table(outcomes))
    if arguments.json:
        arguments.json.write_text(json.dumps([vars(outcome) for outcome in outcomes], indent=1) + "\n")
    return int(any(outcome.failed for outcome in outcomes))


def _combination(python: str, end: str, arguments: argparse.Namespace) -> Outcome:
    found = interpreter(python)
    if found is None:
        return Outcome(python, end, "", "not run: no such Python on the PATH")
    bounds = (ROOT / "pyproject.toml").read_text()
    wanted = [requirement(bounds, name, end) for name in VARIED]
    environment = ROOT / ".matrix" / f"{python}-{end}"
    reason = "" if arguments.cuda else brings_cuda(found, wanted[0])
    if reason:
        pinned = _pinned("torch")
        also = brings_cuda(found, pinned)
        if also:
            compiled = _compiles(found)
            return Outcome(python, end, "", f"not run: {reason}; {compiled[0]}", failed=not compiled[1])
        wanted[0] = pinned
    error = install(found, environment, [*wanted, *BESIDE])
    if error:
        return Outcome(python, end, " ".join(wanted), f"not made: {error}")
    result, failed = run_tests(environment, arguments.tests)
    instead = f" (torch pinned: {reason})" if reason else ""
    return Outcome(python, end, _versions(environment), result + instead, failed)


def interpreter(version: str) -> str | None:
    """A Python of this version on the PATH that runs, as pyenv's stand-in for one not chosen does not."""
    program = shutil.which(f"python{version}")
    if program is None:
        return None
    done = subprocess.run([program, "--version"], capture_output=True, text=True)
    return program if done.returncode == 0 and f"Python {version}." in done.stdout else None


def requirement(pyproject: str, name: str, end: str) -> str:
    """What pip is asked for: "name==2.10.*" for the oldest, pyproject.toml's own range for the newest."""
    found = re.search(rf'"{name}(>=(\d+\.\d+)[^"]*)"', pyproject)
    if found is None:
        raise ValueError(f"pyproject.toml: expected a lower bound of {name}, found none")
    return f"{name}=={found[2]}.*" if end == "oldest" else f"{name}{found[1]}"


def brings_cuda(python: str, torch: str) -> str:
    """Why this torch is not for a machine without a GPU, or that pip does not find it; "" where it is."""
    words = ["install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet", "--report", "-", torch]
    done = _pip(python, words)
    if done.returncode:
        return f"{torch}: {_last_line(done.stderr)}"
    (found,) = json.loads(done.stdout)["install"]
    needs = [line for line in found["metadata"].get("requires_dist", []) if _is_cuda(line)]
    return f"torch {found['metadata']['version']} is a CUDA build here" if needs else ""


def _is_cuda(requirement_line: str) -> bool:
    applies = "platform_system" not in requirement_line or sys.platform == "linux"
    return applies and re.match(r"nvidia-|cuda-", requirement_line) is not None


def install(python: str, environment: Path, packages: Sequence[str]) -> str:
    """Make the environment unless it is there for the same packages; returns what went wrong, or ""."""
    made = environment / "installed"
    asked = "\n".join(packages)
    if made.is_file() and made.read_text() == asked:
        return ""
    shutil.rmtree(environment, ignore_errors=True)
    subprocess.run([python, "-m", "venv", str(environment)], check=True)
    done = _pip(str(environment / "bin" / "python"), ["install", "--quiet", *packages])
    if done.returncode:
        return _last_line(done.stderr)
    made.write_text(asked)
    return ""


def run_tests(environment: Path, tests: Sequence[str]) -> tuple[str, bool]:
    """pytest's closing line and the names of up to five failures, and whether there were any."""
    words = [str(environment / "bin" / "python"), "-m", "pytest", "-n", "2", "--dist", "loadfile", "-m"]
    variables = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    try:
        done = subprocess.run(
            [*words, "not slow", *tests],
            cwd=ROOT,
            env=variables,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"not finished after {SECONDS} s", True
    (environment / "tests.log").write_text(done.stdout + done.stderr)
    closing = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", done.stdout.splitlines()[-1])
    result = ", ".join(closing) or _last_line(done.stdout + done.stderr)
    names = re.findall(r"^(?:FAILED|ERROR) \S*?(\w+\.py\S*)", done.stdout, re.MULTILINE)[:5]
    shown = f": {', '.join(names)}" if names else ""
    return f"{result} in {time.monotonic() - started:.0f} s{shown}", done.returncode != 0


def _compiles(python: str) -> tuple[str, bool]:
    """Whether this interpreter reads every file: what can be tried without torch."""
    code = "import ast, sys\nfor name in sys.argv[1:]: ast.parse(open(name, encoding='utf-8').read(), name)"
    files = [str(file) for folder in ("src", "tests", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
    done = subprocess.run([python, "-c", code, *files], capture_output=True, text=True)
    if done.returncode:
        return f"a file it cannot read: {_last_line(done.stderr)}", False
    return f"it reads all {len(files)} files", True


def _pinned(name: str) -> str:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{name}=="))


def _versions(environment: Path) -> str:
    code = "import sys, importlib.metadata as m; print(*[n + ' ' + m.version(n) for n in sys.argv[1:]])"
    words = [str(environment / "bin" / "python"), "-c", code, *VARIED]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip()


def _pip(python: str, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([python, "-m", "pip", *words], capture_output=True, text=True)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip() and "[notice]" not in line]
    return lines[-1].strip() if lines else "no output"


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown."""
    lines = ["| Python | end | versions | result |", "|---|---|---|---|"]
    lines += [f"| {o.python} | {o.end} | {o.versions} | {o.result} |" for o in outcomes]
    return "\n".join(lines)


def _line(outcome: Outcome) -> str:
    return f"Python {outcome.python}, {outcome.end}: {outcome.versions} {outcome.result}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
