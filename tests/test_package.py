"""pyproject.toml beside what the code imports, what its messages name, and the Pythons that are tested."""

from __future__ import annotations

import ast
import re
import sys
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests import licences
from tests.licences import plain
from tests.matrix import PYTHONS

tomllib: Any = pytest.importorskip("tomllib", reason="Python 3.11")

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = sorted((ROOT / "src/blip3o_dit").rglob("*.py"))
# For a user to read: messages, docs and examples.
TEXTS = [*SOURCES, ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.py")]
# What a requirement cannot do without, imported for a class of its own.
COME_WITH = {
    "huggingface-hub": "transformers",
    "markupsafe": "jinja2",
    "pyyaml": "transformers",
    "fastapi": "gradio",
    "uvicorn": "gradio",
}
# What torch's builds for a GPU bring, and nothing imports without one.
ON_A_GPU = {"triton"}
# Imported under another name than the package's, where the package may not be here to say so.
PACKAGES = {"open_clip": "open-clip-torch", "pillow_heif": "pillow-heif", "pillow_jxl": "pillow-jxl-plugin"}


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=!~;\[ ]", line)[0].lower().replace("_", "-") for line in requirements}


NEEDED = names(PROJECT["dependencies"])
EXTRAS = names([line for extra in PROJECT["optional-dependencies"].values() for line in extra])


def imported(file: Path) -> set[str]:
    """First words of all absolute imports, those inside functions as well."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
    return found - sys.stdlib_module_names - {"blip3o_dit"}


def test_every_import_is_a_requirement() -> None:
    """Of the package or of an extra."""
    owners = {module: owner[0] for module, owner in packages_distributions().items()}
    owners |= PACKAGES
    packages = names([owners.get(module, module) for file in SOURCES for module in imported(file)])
    assert set(COME_WITH.values()) <= NEEDED | EXTRAS
    assert packages <= NEEDED | EXTRAS | set(COME_WITH) | ON_A_GPU


def test_packages_that_messages_name_are_in_an_extra() -> None:
    """Under the name that `pip install` takes; each extra is for something that a message asks for."""
    texts = "".join(file.read_text() for file in SOURCES)
    asked = re.findall(r"package_missing\(.*?\"([\w-]+)\"\)", texts)
    asked += re.findall(r"\bpip install ([\w-]+)", texts)
    assert len(asked) >= 5
    assert {name.lower().replace("_", "-") for name in asked} <= NEEDED | EXTRAS


def test_nothing_sends_a_user_to_an_index_for_this_package() -> None:
    """The name is not registered there: anybody may take it."""
    sent = re.compile(rf"install\S*(?: -\S+)* ['\"]?{PROJECT['name']}\b")
    assert not [str(file) for file in TEXTS if sent.search(file.read_text())]


def test_the_pythons_that_are_named_are_those_that_are_tested() -> None:
    said = {line.split(" :: ")[-1] for line in PROJECT["classifiers"] if "Python :: 3." in line}
    assert said == set(PYTHONS)
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"
    assert f"Python {PYTHONS[0]} to {PYTHONS[-1]}" in (ROOT / "README.md").read_text()


def test_requirements_of_the_path_are_not_extras() -> None:
    """Each command of the README's path runs without one: see also tests/acceptance/test_first_hour.py."""
    assert {"torch", "transformers", "accelerate", "pillow", "matplotlib", "jinja2"} <= NEEDED


def pinned(*files: str) -> dict[str, str]:
    """Names and versions of the lines `name==version` in these files."""
    lines = "".join((ROOT / file).read_text() for file in files)
    found = re.findall(r"^([\w.-]+)(?:\[[\w,-]+\])?==([\w.+]+)", lines, flags=re.MULTILINE)
    return {plain(name): version for name, version in found}


def test_the_lock_is_in_step_with_the_requirements() -> None:
    """All that is pinned, in the same version, each with hashes, and no address of where it was found."""
    text = (ROOT / "requirements.lock").read_text()
    asked, locked = pinned("requirements.txt", "requirements-dev.txt"), pinned("requirements.lock")
    assert {name: locked.get(name) for name in asked} == asked, "make lock"
    entries = re.split(r"\n(?=\w)", text.split("make lock\n", 1)[1])
    assert len(entries) == len(locked) and all("--hash=sha256:" in entry for entry in entries)
    assert "://" not in text


def test_the_lock_is_whole() -> None:
    """What a locked package needs is locked, as far as that version is here to say so."""
    locked, compared = pinned("requirements.lock"), 0
    for name, version in locked.items():
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue
        if package.version != version:
            continue
        compared += 1
        lines = [Requirement(line) for line in package.requires or []]
        here = [line for line in lines if not line.marker or line.marker.evaluate({"extra": ""})]
        missing = {plain(line.name) for line in here} - set(locked)
        assert not missing, f"{name} needs {missing}: make lock"
    assert compared > 10


def test_the_licences_of_what_is_needed_are_listed() -> None:
    rows = dict(re.findall(r"^\| ([\w.-]+) \| (.+) \|$", licences.PAGE.read_text(), flags=re.MULTILINE))
    del rows["package"]
    direct = names(PROJECT["dependencies"]) | names(
        [line for extra in licences.EXTRAS for line in PROJECT["optional-dependencies"][extra]]
    )
    assert direct | (set(licences.needed()) & set(pinned("requirements.lock"))) <= set(rows)
    assert all(rows[name].strip() for name in rows)
    assert licences.licence(distribution("numpy")) == rows["numpy"]


def test_the_change_log_names_this_version() -> None:
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()
